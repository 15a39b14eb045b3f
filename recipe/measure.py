"""What a place costs or is worth: Fisher costs per unit, how far it turns its input, benefits per sequence."""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.records import Example
from model import ExpertRouters, Transformer
from recipe.journal import once
from recipe.lists import Prefixes, list_states, room_for_prefixes
from recipe.passes import (
    Batch, Workload, collate, finite, group_logits, head_blocks, head_losses, prompts_of, states,
)
from router import fill_budget
from runtime import collect, generator, permutation, track

COST_ROWS = 2  # rows per pass where costs are measured: its graph spans all routed layers
LABEL_SAMPLES = 2  # labels drawn from the model per token when costs are measured
COST_TOKENS = 2048  # tokens whose inputs and costs fit the token routers
LEAST_COST = 1e-12  # of a unit whose log is taken: an expert of few tokens may have cost none of them anything
EXPERT_TOKENS = 512  # the same for experts, whose places are many


@dataclass(frozen=True)
class Measured:
    """What one pass over some examples tells of R places and N units: sequences, or a sample of their tokens."""

    costs: Tensor  # (R,N) Fisher cost of skipping a unit; NaN where an expert was not given the token
    inputs: Tensor  # (R,N,D) what the routers read there; (1,N,D) where all read the same
    turned: Tensor  # (R,) 1 - cos of what enters a place's target and that plus its output, summed over tokens; of an
    # expert: tokens that were given it

    def at(self, places: list[int]) -> "Measured":
        """Of these places alone."""
        return Measured(self.costs[places], self.inputs[places], self.turned[places])


# -----------------------------------------------------------------------------
# Looking into a forward pass


@contextlib.contextmanager
def inputs_of(model: Transformer):
    """A list that collects, for a while, what each router is given, in the order of places; where all read the same
    (reads=first) once."""
    parts = [part for block in model.layers for part in (block.router, block.expert_routers, block.mlp_router)]
    modules = [part for part in parts if part is not None][: 1 if model.routing.reads == "first" else None]
    given = []

    def keep(module: nn.Module, args: tuple) -> None:
        several = len(module) if isinstance(module, ExpertRouters) else 1  # those of experts are asked together
        given.extend([args[0].detach()] * several)

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def sublayers_of(model: Transformer):
    """A list that collects, for a while and by layer, what enters it and what its attention and feed-forward add."""
    seen: list[dict[str, Tensor]] = []
    hooks = []
    for block in model.layers:
        hooks.append(block.register_forward_pre_hook(lambda _, args: seen.append({"x": args[0].detach()})))
        for name, part in (("attn", block.attention), ("mlp", block.feed_forward)):
            hook = lambda _, args, out, name=name: seen[-1].update({name: out.detach().clone()})  # noqa: E731
            hooks.append(part.register_forward_hook(hook))
        pairs = lambda _, args: seen[-1].update(pairs=args[1:])  # noqa: E731
        hooks.append(block.feed_forward.register_forward_pre_hook(pairs))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# -----------------------------------------------------------------------------
# Costs


def measure_costs(work: Workload, seed: int) -> Measured:
    """Fisher cost of skipping each unit, in nats summed over what it predicts, and the router inputs beside it.

    With labels drawn from the model itself and every gate at 1, E[(d loss / d gate)^2] / 2 is the second-order KL
    between the model with and without that unit. Unit token: a seeded sample of at most COST_TOKENS tokens; first
    tokens, which always execute, are left out.
    """
    share = -(-(EXPERT_TOKENS if work.model.routing.experts else COST_TOKENS) // len(work.examples))
    parts, token = [], work.model.routing.unit == "token"
    for number, group in track(work.groups(4), "costs"):
        n_targets = sum(len(example.targets) for example in group)
        streams = [generator(seed, "labels", number, sample) for sample in range(LABEL_SAMPLES)]
        draws = [torch.rand(n_targets, generator=stream).to(work.rt.device) for stream in streams]
        for first in range(0, len(group), COST_ROWS):
            batch = collate(group[first : first + COST_ROWS], work.rt.device)
            drawn = sum(len(example.targets) for example in group[:first])
            own = [u[drawn : drawn + len(batch.at)] for u in draws]
            at = sample_tokens(batch.lengths, share, (seed, "tokens", number, first)) if token else None
            parts.append(((number, first), Measured(*once(lambda: batch_costs(work.model, batch, own, at)))))
    parts = collect(parts, work.rt)
    costs, inputs = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("costs", "inputs"))
    finite(costs, work.model, "Fisher costs")
    turned = torch.stack([part.turned for part in parts]).sum(0)
    if work.model.routing.experts:
        given = turned.clamp(min=0.5)  # an expert that no token was given has a load that is small, not none
        work.model.loads = (given / given.sum()).tolist()
    return Measured(costs.where(costs >= 0, math.nan), inputs, turned)


def batch_costs(model: Transformer, batch: Batch, draws: list[Tensor], at: tuple | None = None) -> list[Tensor]:
    """The same for one batch: costs (R,N), inputs (R,N,D), turned (R,).

    draws: uniform numbers (n,). at: rows and columns of the tokens that are asked for; None: (R,B,T) for units token.
    """
    device, routing = batch.tokens.device, model.routing
    shape = batch.tokens.shape if routing.unit == "token" else batch.tokens.shape[:1]
    gates = torch.ones(len(routing.places), *shape, device=device, requires_grad=True)
    with inputs_of(model) as inputs, sublayers_of(model) as seen:
        h, ran, _ = states(model, batch, route="mask", gates=gates)
    costs = torch.zeros_like(gates)
    for gradient in drawn_gradients(model, h, draws):
        costs += torch.autograd.grad(h, gates, gradient, retain_graph=True)[0] ** 2 / (2 * len(draws))
    if ran.dim() == 3 and routing.experts:
        costs[ran == 0] = -1.0  # until all parts are known to be finite
    units = (slice(None), *(at or ()))
    return [costs.detach()[units], torch.stack(inputs).float()[units], turned_by(model, batch, seen)]


def sample_tokens(lengths: list[int], share: int, key: tuple) -> tuple[list[int], list[int]]:
    """Rows and columns of at most `share` tokens of each row, first tokens left out."""
    rows, columns = [], []
    for row, length in enumerate(lengths):
        *name, first = key
        picked = permutation(length - 1, *name, first + row)[:share]
        rows += [row] * len(picked)
        columns += [1 + i for i in picked]
    return rows, columns


def drawn_gradients(model: Transformer, h: Tensor, draws: list[Tensor]) -> list[Tensor]:
    """Gradients (n,D) of the summed cross-entropy with respect to final states h (n,D), one for each of `draws`.

    draws: uniform numbers (n,), by which labels are drawn from the model's own distribution.
    """
    gradients = [[] for _ in draws]
    for part in head_blocks(model, h):
        own = h[part].detach().requires_grad_()
        logits = model.head(own)
        probs = logits.detach().softmax(-1)  # (n', V)
        for u, parts in zip(draws, gradients):
            change = probs.clone()  # of the loss, by logits: probabilities minus 1 at the label
            change[torch.arange(len(change)), draw_labels(probs, u[part])] -= 1.0
            parts.append(torch.autograd.grad(logits, own, change, retain_graph=True)[0])
    return [torch.cat(parts) for parts in gradients]


def draw_labels(probs: Tensor, u: Tensor) -> Tensor:
    """One label (n,) from each distribution (n,V), drawn by uniform numbers u (n,)."""
    rising = probs.cumsum(-1)
    labels = torch.searchsorted(rising, u[:, None] * rising[:, -1:]).squeeze(1)
    return labels.clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def turned_by(model: Transformer, batch: Batch, seen: list[dict[str, Tensor]]) -> Tensor:
    """1 - cos(x, y) of each place (R,), summed over real tokens, fp64: x enters its target, y is that plus its output.
    Of an expert the number of real tokens that its layer's gate gave it.

    Source: What Matters in Transformers, arXiv 2406.15786. seen: what `sublayers_of` collected.
    """
    lengths = torch.tensor(batch.lengths, device=batch.tokens.device)
    real = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < lengths[:, None]  # (B,T)
    totals = []
    for place in model.routing.places:
        layer = seen[place.layer]
        if place.target == "expert":
            (_, chosen), = layer["pairs"]
            totals.append((chosen[real.flatten()] == place.expert).sum().double())
            continue
        x = layer["x"]
        middle = x + layer["attn"].view_as(x)
        after = middle + layer["mlp"].view_as(x)
        before, changed = {"attn": (x, middle), "mlp": (middle, after), "block": (x, after)}[place.target]
        cosine = F.cosine_similarity(before[real].float(), changed[real].float(), dim=-1)
        totals.append((1 - cosine).double().sum())
    return torch.stack(totals).cpu()


def log_costs(costs: Tensor) -> Tensor:
    """Log of Fisher costs (R,N).

    A cost estimated from few labels is often near zero by chance: a tenth of the place's mean keeps its log in bounds.
    """
    return (costs + 0.1 * costs.nanmean(dim=1, keepdim=True)).clamp(min=LEAST_COST).log()


def typical_costs(costs: Tensor) -> Tensor:
    """(R,) geometric mean of Fisher costs (R,N).

    An arithmetic one follows the few units that cost the most: the ranking by it changes with the sample.
    """
    return log_costs(costs).nanmean(dim=1).nan_to_num(nan=-math.inf).exp()  # an expert that nobody was given is free


@torch.no_grad()
def first_inputs(work: Workload) -> Tensor:
    """What routers read (1,N,D) that all decide at the first routed layer."""

    def given(group: list[Example]) -> list[Tensor]:
        with inputs_of(work.model) as inputs:
            group_logits(work, group)
        return inputs

    if work.model.routing.pool == "prompt":
        work = work.of(prompts_of(work.examples))
    parts = [(number, once(lambda: given(group))[0]) for number, group in work.groups()]  # noqa: B023
    return torch.cat(collect(parts, work.rt))[None].cpu()


# -----------------------------------------------------------------------------
# Benefits


@torch.no_grad()
def measure_benefits(
    work: Workload, skipped: tuple[int, ...], distill: bool = False, places: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """What running each place is worth to each sequence (R,N) where everyone skips the `skipped` ones, and the router
    inputs (R,N,D) there, (1,N,D) where all read the same. places: those that are measured, None: all; of others 0.

    Benefit: the answer's loss without the place minus its loss with it, each measured, in nats over the square root of
    the answer's tokens: a sum over n tokens is as noisy as sqrt(n), and short answers should not drown. distill: the
    loss is the KL to the dense model.
    """
    assert work.model.routing.unit == "sequence"
    parts, places = [], list(range(len(work.model.routing.places))) if places is None else places
    for number, group in track(work.groups(), "benefits"):
        batch = collate(group, work.rt.device)
        benefits, inputs = batch_benefits(work, batch, skipped, distill, places)
        weight = torch.tensor([len(example.targets) for example in group]) ** -0.5
        parts.append((number, (benefits * weight, inputs)))
    parts = collect(parts, work.rt)
    benefits = torch.cat([benefits for benefits, _ in parts], dim=1)
    return finite(benefits, work.model, "benefits"), torch.cat([inputs for _, inputs in parts], dim=1)


def batch_benefits(
    work: Workload, batch: Batch, skipped: tuple[int, ...], distill: bool, places: list[int]
) -> tuple[Tensor, Tensor]:
    """Loss of each answer without a place minus its loss with it (R,B), and router inputs (R|1,B,D).

    Only what stands above a toggled place is computed again.
    """
    model, prefixes = work.model, Prefixes(room_for_prefixes(work.model))
    teacher = None
    if distill:
        teacher = states(model, batch, route="off", x=work.entered(batch), first_layer=work.first_layer)[0]

    def by_row(skipped: set[int]) -> Tensor:  # (B,) loss of each answer
        h = list_states(work, batch, tuple(sorted(skipped)), prefixes)
        losses = head_losses(model, h, batch.labels, teacher)
        return losses.new_zeros(len(batch.examples)).index_add_(0, batch.at // batch.tokens.shape[1], losses)

    def beside_the_list() -> list[Tensor]:
        with inputs_of(model) as inputs:
            return [by_row(set(skipped)), torch.stack(inputs)]

    now, inputs = once(beside_the_list)
    benefits = torch.zeros(len(model.routing.places), len(now))
    for place in sorted(places, reverse=True):  # from the top: what is kept for the places below stays longest
        difference = once(lambda: [by_row({*skipped} ^ {place})])[0] - now
        benefits[place] = -difference if place in skipped else difference
    return benefits, inputs


def contested(benefits: Tensor, weights: Tensor, budget: float) -> list[int]:
    """The half of the places on which sequences agree least: the route that is best for each, by its own benefits
    (R,N), runs some places for about half of the sequences and others for nearly all or none."""
    runs = fill_budget(benefits / weights[:, None], weights, budget).mean(dim=1)  # (R,) share of sequences
    return sorted((runs * (1 - runs)).argsort(descending=True)[: -(-len(runs) // 2)].tolist())
