"""Passes over a set of examples: batches, losses, what routers decide, and cuts that realise a budget there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.records import Example
from model import Transformer, pad
from recipe.journal import once
from recipe.places import random_route
from recipe.trunk import TrunkCache, trunk
from router import RouterConfig, capacity, set_cuts
from runtime import Runtime, collect, generator, mine, sum_over_ranks, track

NEVER = -1e30  # a logit below every other
EVAL_BATCH = 8  # rows per forward pass where nothing is learnt
LOGITS_AT_ONCE = 2**22  # 16 MiB in fp32, on a GPU 16 times that: the head runs over blocks of rows


@dataclass(frozen=True)
class Workload:
    """Examples and how passes over them run: on these ranks, with activations of the trunk from a store, if there is
    one.
    """

    model: Transformer
    examples: list[Example]
    rt: Runtime
    trunk: TrunkCache | None = None
    moving: bool = False  # the trunk trains too: passes begin with the embeddings

    def of(self, examples: list[Example]) -> "Workload":
        return replace(self, examples=examples)

    def groups(self, rows: int = EVAL_BATCH) -> list[tuple[int, list[Example]]]:
        """This rank's share of the groups of at most `rows` examples, numbered over all ranks."""
        return mine(by_length(self.examples, rows), self.rt)

    def entered(self, batch: "Batch") -> Tensor:
        """Activations (B,T,D) that enter `first_layer`."""
        if self.moving:
            return self.model.embed(batch.tokens)
        if self.trunk is None:
            return trunk(self.model, batch.tokens)
        return self.trunk(self.model, batch.examples, batch.tokens)

    @property
    def first_layer(self) -> int:
        """The first layer that a pass over a batch computes."""
        return 0 if self.moving else self.model.routing.places[0].layer


# -----------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class Batch:
    """Right-padded rows (B,T). `at` (n,) picks, from (B*T), the positions that predict `labels` (n,)."""

    examples: list[Example]
    tokens: Tensor
    at: Tensor
    labels: Tensor

    @property
    def lengths(self) -> list[int]:
        return [len(example.tokens) for example in self.examples]

    @property
    def prompts(self) -> list[int]:
        return [example.prompt for example in self.examples]


def collate(examples: list[Example], device: torch.device, multiple: int = 1) -> Batch:
    """Pad on the right to the longest example, rounded up to `multiple` (few shapes for a compiled model)."""
    width = -(-max(len(example.tokens) for example in examples) // multiple) * multiple
    tokens = pad([example.tokens for example in examples], width=width)  # (B, T)
    at = [row * width + i - 1 for row, example in enumerate(examples) for i in example.targets]
    labels = [example.tokens[i] for example in examples for i in example.targets]
    return Batch(examples, tokens.to(device), torch.tensor(at).to(device), torch.tensor(labels).to(device))


def by_length(examples: list[Example], rows: int) -> list[list[Example]]:
    """Groups of at most `rows` examples of similar length: little padding. The same on every rank."""
    order = sorted(examples, key=lambda example: -len(example.tokens))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def under_budget(examples: list[Example], rows: int, tokens: int) -> list[list[Example]]:
    """Groups of examples, given longest first, of at most `rows` and at most `tokens` with their pads; or of one."""
    groups, start = [], 0
    while start < len(examples):
        size = max(1, min(rows, tokens // len(examples[start].tokens)))
        groups.append(examples[start : start + size])
        start += size
    return groups


def prompts_of(examples: list[Example]) -> list[Example]:
    """What sequence routers read of the examples: no answers."""
    return [Example(example.tokens[: example.prompt], example.prompt, []) for example in examples]


def n_units(routing: RouterConfig, lengths: list[int]) -> int:
    """What one place decides about: sequences, or their real tokens."""
    return len(lengths) if routing.unit == "sequence" else sum(lengths)


# -----------------------------------------------------------------------------
# Losses, with few logits at a time


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """Loss of each token (n,), fp32: cross-entropy with labels (n,), or KL(teacher || model) where a teacher's logits
    (n,V) are given."""
    if teacher is None:
        return F.cross_entropy(logits, labels, reduction="none")
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(logits, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def head_blocks(model: Transformer, h: Tensor) -> list[slice]:
    """Rows of final states h (n,D), so many at a time that no more than LOGITS_AT_ONCE logits exist."""
    at_once = LOGITS_AT_ONCE * (1 if h.device.type == "cpu" else 16)
    size = max(1, at_once // model.config.vocab_size)
    return [slice(a, a + size) for a in range(0, len(h), size)]


@torch.no_grad()
def head_losses(model: Transformer, h: Tensor, labels: Tensor, teacher_h: Tensor | None = None) -> Tensor:
    """Loss of each token (n,) of final states h (n,D)."""
    losses = []
    for part in head_blocks(model, h):
        teacher = None if teacher_h is None else model.head(teacher_h[part])
        losses.append(token_losses(model.head(h[part]), labels[part], teacher))
    return torch.cat(losses)


def head_gradient(
    model: Transformer, h: Tensor, labels: Tensor, teacher_h: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Summed loss of final states h (n,D), and the gradient (n,D) of scale * loss with respect to them."""
    total, gradients = h.new_zeros((), dtype=torch.float32), []
    for part in head_blocks(model, h):
        own = h[part].detach().requires_grad_()
        teacher = None if teacher_h is None else model.head(teacher_h[part]).detach()
        loss = token_losses(model.head(own), labels[part], teacher).sum()
        total += loss.detach()
        (loss * scale).backward()  # reaches the head's weight too, where that trains
        gradients.append(own.grad)
    return total, torch.cat(gradients)


# -----------------------------------------------------------------------------
# Passes


def states(model: Transformer, batch: Batch, **kwargs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Final states (n,D) at the positions that predict, gates and logits of one batch. kwargs as Transformer.hidden."""
    own = {"lengths": batch.lengths, "prompt_lengths": batch.prompts, "return_scores": True}
    h, gates, z = model.hidden(batch.tokens, **own, **kwargs)
    return h.flatten(0, 1)[batch.at], gates, z  # (B,T,D) -> (B*T,D) -> (n,D)


def finite(values: Tensor, model: Transformer, what: str) -> Tensor:
    """The values, none of which is NaN or infinite. Raises ValueError with what to do: the base overflows, or is
    broken.
    """
    if not torch.isfinite(values).all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"{what}: the model's outputs are not finite numbers in {dtype}; expected finite ones: use "
                         "--dtype=float32 or --dtype=bfloat16, and if that does not help convert the checkpoint again")
    return values


@torch.no_grad()
def evaluate(work: Workload, force: Callable | None = None, teacher: dict[int, Tensor] | None = None) -> dict:
    """Mean loss per loss-carrying token, realised capacity in all and by place, of the routers or of forced routes.

    force: one of `skip_everywhere` and `random_routes`. teacher: dense final states by group, as `dense_states` gives
    them: the loss is then the KL to the dense model.
    """
    model, rt = work.model, work.rt
    sums = torch.zeros(3 + len(model.routing.places), dtype=torch.float64, device=rt.device)  # loss, n, units, by place

    def group_sums(number: int, group: list[Example]) -> Tensor:
        batch, part = collate(group, rt.device), torch.zeros_like(sums)
        forced = None if force is None else force(model, batch, number)
        start = {"x": work.entered(batch), "first_layer": work.first_layer}
        h, gates, _ = states(model, batch, route="gather", gates=forced, **start)
        part[0] = head_losses(model, h, batch.labels, None if teacher is None else teacher[number]).sum()
        part[1] = len(batch.labels)
        part[2] = len(group) if gates.dim() == 2 else sum(batch.lengths)
        part[3:] = gates.flatten(1).sum(1)  # (R,B) or (R,B,T) -> (R,)
        return part

    for number, group in track(work.groups(), "loss"):
        sums += once(lambda: [group_sums(number, group)])[0].to(rt.device)
    loss, tokens, units, *executed = finite(sum_over_ranks(sums, rt), model, "loss").tolist()
    shares = [count / units for count in executed]
    realised = capacity(torch.tensor(shares)[:, None], weights=model.place_weights()).item()
    return {"loss": loss / tokens, "tokens": int(tokens), "capacity_per_layer": shares, "capacity": realised}


def skip_everywhere(places: tuple[int, ...]) -> Callable:
    """Routes of a static list: everyone skips these places, whole sequences of them whatever the unit."""

    def gates(model: Transformer, batch: Batch, number: int) -> Tensor:
        gates = torch.ones(len(model.routing.places), len(batch.lengths), device=batch.tokens.device)
        gates[list(places)] = 0.0
        return gates  # (R,B)

    return gates


def random_routes(budget: float) -> Callable:
    """Routes of the random control at this budget."""

    def gates(model: Transformer, batch: Batch, number: int) -> Tensor:
        width = batch.tokens.shape[1] if model.routing.unit == "token" else None
        weights = model.place_weights()
        rows = range(len(batch.lengths))
        routes = [random_route(weights, budget, generator("random routes", number, row), width) for row in rows]
        return torch.stack(routes, dim=1).to(batch.tokens.device)  # (R,B) or (R,B,T)

    return gates


@torch.no_grad()
def dense_states(work: Workload) -> dict[int, Tensor]:
    """Final states (n,D) of the dense model, by group of `evaluate`, for this rank's groups."""
    device = work.rt.device
    return {number: states(work.model, collate(group, device), route="off")[0] for number, group in work.groups()}


def real_logits(z: Tensor, lengths: list[int]) -> Tensor:
    """Logits (R,B) or (R,B,T) of real units as (R,N) on the CPU. A first token's is +inf, since it always executes
    (-inf where its expert is none of those that it was given)."""
    if z.dim() == 3:
        first = z[..., :1].where(z[..., :1].isinf(), math.inf)
        z = torch.cat((first, z[..., 1:]), dim=-1)
        z = torch.cat([z[:, row, :length] for row, length in enumerate(lengths)], dim=1)  # (R,B,T) -> (R,N)
    return z.detach().cpu()


def group_logits(work: Workload, group: list[Example]) -> Tensor:
    """The same of a few examples, whole."""
    batch, model = collate(group, work.rt.device), work.model
    x, lengths = work.entered(batch), batch.lengths
    if model.routing.reads == "first" and not work.moving:  # known before the routed part begins
        z = model.ahead(*model.begin(None, x, lengths, route="gather"))[1]
    else:
        start = {"x": x, "first_layer": work.first_layer}
        z = model.hidden(None, lengths=lengths, route="gather", return_scores=True, **start)[2]
    finite(z.masked_fill(z.isinf(), 0.0) if model.routing.experts else z, model, "router logits")
    return real_logits(z, batch.lengths)


@torch.no_grad()
def route_logits(work: Workload) -> Tensor:
    """Logits (R,N) of every unit under the current cuts. A sequence decides on its prompt, so only that is run."""
    routing = work.model.routing
    if routing.unit == "sequence" and routing.pool == "prompt":
        work = work.of(prompts_of(work.examples))
    parts = []
    for number, group in track(work.groups(), "routes"):
        parts.append((number, once(lambda: [group_logits(work, group)])[0]))
    return torch.cat(collect(parts, work.rt), dim=1)


def quantile_cuts(z: Tensor, budgets: list[float], weights: Tensor | None = None) -> list[float]:
    """For each budget the cut that lets this share of the logits z (R,...) through, midway between its neighbours.

    weights (R,): what a logit of each place counts; None: all the same. A logit of -inf, which never runs, counts
    nothing.
    """
    ordered, index = z.flatten().double().sort(descending=True)
    weight = torch.ones_like(ordered)
    if weights is not None:
        weight = weights.double().repeat_interleave(z[0].numel())[index]
    weight = weight.masked_fill(ordered == -math.inf, 0.0)
    middles = weight.cumsum(0) - weight / 2  # what is through when half of this logit is
    wanted = torch.tensor(budgets, dtype=torch.float64) * weight.sum()
    ends = [math.inf, *ordered.tolist(), -math.inf]
    through = torch.searchsorted(middles, wanted, right=True).tolist()
    return [(ends[k] + ends[k + 1]) / 2 for k in through]


def quantile_cut(z: Tensor, budget: float, weights: Tensor | None = None) -> float:
    """The cut of `quantile_cuts` for one budget."""
    return quantile_cuts(z, [budget], weights)[0]


def settle(
    work: Workload, budget: float, rounds: int = 2, base: list[float] | None = None, memory: float = 0.0
) -> float:
    """Move all cuts by one amount, in logits, until the routers realise `budget` on the examples; returns that amount.

    Routes change what deeper routers see, hence more than one round, unless all read the same (reads=first). base (R):
    the cuts that are moved, 0 by default.
    memory: share of the last amount that a round keeps, so that two routes do not take turns.
    """
    weights = work.model.place_weights()
    base, move = base or [0.0] * len(weights), None
    for _ in range(1 if work.model.routing.reads == "first" else rounds):
        z = route_logits(work)
        above = z - torch.tensor(base)[:, None]  # (R,N)
        # at an infinite cut a first token still runs, and what never runs still counts, unless nothing assigned it
        above = above.nan_to_num(nan=math.inf, posinf=math.inf, neginf=NEVER).masked_fill(z == -math.inf, -math.inf)
        found = quantile_cut(above, budget, weights)
        move = found if move is None else memory * move + (1 - memory) * found
        set_cuts(work.model, [cut + move for cut in base])
    return move
