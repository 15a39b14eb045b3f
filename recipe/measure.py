"""What a place costs or is worth: Fisher costs per unit, benefits per sequence."""

import contextlib

import torch
import torch.nn as nn

import runtime
from model import Transformer
from recipe.passes import (
    EVAL_BATCH,
    Example,
    by_length,
    collate,
    collect,
    generator,
    head_blocks,
    head_gradient,
    head_losses,
    mine,
    permutation,
    states,
)
from recipe.trunk import TrunkCache

COST_ROWS = 2  # rows per pass where costs are measured: its graph spans all routed layers
LABEL_SAMPLES = 2  # labels drawn from the model per token when costs are measured
COST_TOKENS = 2048  # tokens whose inputs and costs fit the token routers


@contextlib.contextmanager
def inputs_of(modules: list[nn.Module]):
    """A list that collects, for a while, what each of these modules is given, in the order in which they run."""
    given = []
    hooks = [module.register_forward_pre_hook(lambda _, args: given.append(args[0].detach())) for module in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def draw_labels(model: Transformer, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One label (n,) per final state (n,D), drawn from the model's own distribution by uniform numbers u (n,)."""
    drawn = []
    for part in head_blocks(model, h):
        rising = model.head(h[part].detach()).softmax(-1).cumsum(-1)  # (n', V)
        drawn.append(torch.searchsorted(rising, u[part, None] * rising[:, -1:]).squeeze(1).clamp(max=model.config.vocab_size - 1))
    return torch.cat(drawn)


def measure_costs(model: Transformer, examples: list[Example], rt: runtime.Runtime, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher cost (R,N) of skipping each unit, in nats summed over what it predicts, and the router inputs (R,N,D) beside it.

    With labels drawn from the model itself and every gate at 1, E[(d loss / d gate)^2] / 2 is the second-order KL between the model with
    and without that unit. Unit token: a seeded sample of at most COST_TOKENS tokens; first tokens, which always execute, are left out.
    """
    share = -(-COST_TOKENS // len(examples))
    parts, token = [], model.routing.unit == "token"
    for number, group in mine(by_length(examples, 4), rt):
        n_targets = sum(len(e.targets) for e in group)
        draws = [torch.rand(n_targets, generator=generator(seed, "labels", number, sample)).to(rt.device) for sample in range(LABEL_SAMPLES)]
        for first in range(0, len(group), COST_ROWS):
            batch = collate(group[first:first + COST_ROWS], rt.device)
            gates = torch.ones(len(model.routers()), *(batch.tokens.shape if token else batch.tokens.shape[:1]), device=rt.device, requires_grad=True)
            with inputs_of(model.routers()) as inputs:
                h = states(model, batch, route="mask", gates=gates)[0]
            costs, begin = torch.zeros_like(gates), sum(len(e.targets) for e in group[:first])
            for u in draws:
                labels = draw_labels(model, h, u[begin:begin + len(h)])
                gradient = head_gradient(model, h, labels, scale=1.0)[1]
                costs += torch.autograd.grad(h, gates, gradient, retain_graph=True)[0] ** 2 / (2 * LABEL_SAMPLES)
            costs, inputs = costs.detach().cpu(), torch.stack(inputs).float().cpu()
            if token:
                picks = [[1 + i for i in permutation(length - 1, seed, "tokens", number, first + row)[:share]] for row, length in enumerate(batch.lengths)]
                rows = [row for row, columns in enumerate(picks) for _ in columns]
                columns = [column for columns in picks for column in columns]
                costs, inputs = costs[:, rows, columns], inputs[:, rows, columns]  # (R,B,T) -> (R,N), (R,B,T,D) -> (R,N,D)
            parts.append(((number, first), (costs, inputs)))
    parts = collect(parts, rt)
    return torch.cat([costs for costs, _ in parts], dim=1), torch.cat([inputs for _, inputs in parts], dim=1)


@torch.no_grad()
def measure_benefits(model: Transformer, examples: list[Example], rt: runtime.Runtime, skipped: tuple[int, ...], trunk: "TrunkCache | None" = None,
                     distill: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What running each place is worth to each sequence (R,N) where everyone skips the `skipped` ones, and the router inputs (R,N,D) there.

    Benefit: the answer's loss without the layer minus its loss with it, each measured, in nats over the square root of the answer's tokens: a sum
    over n tokens is as noisy as sqrt(n), and short answers should not drown. Only what stands above the toggled layer is computed again.
    """
    parts, layers = [], [place.layer for place in model.routing.places]
    assert model.routing.unit == "sequence"
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch = collate(group, rt.device)
        x = model.trunk(batch.tokens) if trunk is None else trunk(model, group, batch)
        teacher = states(model, batch, route="off", x=x, first_layer=layers[0])[0] if distill else None
        gates = torch.ones(len(layers), len(group), device=rt.device)
        gates[list(skipped)] = 0.0
        distinct = list(dict.fromkeys(layers))
        with inputs_of(model.routers()) as inputs, inputs_of([model.layers[layer] for layer in distinct]) as entered:
            h = states(model, batch, route="mask", gates=gates, x=x, first_layer=layers[0])[0]
        entered = dict(zip(distinct, entered))  # layer -> (B,T,D)

        def by_row(h: torch.Tensor) -> torch.Tensor:  # (n,D) -> (B,) loss of each answer
            losses = head_losses(model, h, batch.labels, teacher)
            return losses.new_zeros(len(group)).index_add_(0, batch.at // batch.tokens.shape[1], losses)

        now, benefits = by_row(h), []
        for place, layer in enumerate(layers):
            first = layers.index(layer)  # of the routers in this layer
            toggled = gates[first:].clone()
            toggled[place - first] = 1 - gates[place]
            h = states(model, batch, route="gather", gates=toggled, x=entered[layer], first_layer=layer)[0]
            benefits.append((by_row(h) - now) * (2 * gates[place] - 1))  # a skipped place's loss falls by what it is worth
        weight = torch.tensor([len(e.targets) for e in group], device=rt.device) ** -0.5
        parts.append((number, ((torch.stack(benefits) * weight).cpu(), torch.stack(inputs).cpu())))
    parts = collect(parts, rt)
    return torch.cat([benefits for benefits, _ in parts], dim=1), torch.cat([inputs for _, inputs in parts], dim=1)


def log_costs(costs: torch.Tensor) -> torch.Tensor:
    """Log of Fisher costs (R,N). A cost estimated from few labels is often near zero by chance: a tenth of the place's mean keeps its log in bounds."""
    return (costs + 0.1 * costs.mean(dim=1, keepdim=True)).log()


def typical_costs(costs: torch.Tensor) -> torch.Tensor:
    """(R,) geometric mean of Fisher costs (R,N). An arithmetic one follows the few units that cost the most: the ranking by it changes with the sample."""
    return log_costs(costs).mean(dim=1).exp()
