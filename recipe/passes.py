"""Passes over a data set: batches, losses, what routers decide, and the work of several ranks put together."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import runtime
from model import Transformer, pad
from router import RouterConfig, capacity, random_route

EVAL_BATCH = 8  # rows per forward pass where nothing is learnt
LOGITS_AT_ONCE = 2**22  # logits held at a time, 16 MiB in fp32 (on a GPU 16 times that): the head and its loss run over blocks of rows


@dataclass(frozen=True)
class Example:
    """One whole document. `prompt`: tokens before the first loss-carrying one; `targets`: positions whose token is predicted."""

    tokens: list[int]
    prompt: int
    targets: list[int]


@dataclass
class Batch:
    """Right-padded rows. `at` (n,) picks, from (B*T), the positions that predict `labels` (n,)."""

    tokens: torch.Tensor
    lengths: list[int]
    prompts: list[int]
    at: torch.Tensor
    labels: torch.Tensor


def generator(*key) -> torch.Generator:
    """A random generator that depends on the key alone: no state to save, the same on every rank."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def permutation(n: int, *key) -> list[int]:
    return torch.randperm(n, generator=generator(*key)).tolist()


def collate(examples: list[Example], device: torch.device, multiple: int = 1) -> Batch:
    """Pad on the right to the longest example, rounded up to `multiple` (few shapes for a compiled model)."""
    width = -(-max(len(e.tokens) for e in examples) // multiple) * multiple
    tokens = pad([e.tokens for e in examples], width=width)  # (B, T)
    at = torch.tensor([row * width + i - 1 for row, e in enumerate(examples) for i in e.targets])
    labels = torch.tensor([e.tokens[i] for e in examples for i in e.targets])
    return Batch(tokens.to(device), [len(e.tokens) for e in examples], [e.prompt for e in examples], at.to(device), labels.to(device))


def by_length(examples: list[Example], rows: int) -> list[list[Example]]:
    """Groups of at most `rows` examples of similar length: little padding. The same on every rank."""
    order = sorted(examples, key=lambda e: -len(e.tokens))
    return [order[i:i + rows] for i in range(0, len(order), rows)]


def token_losses(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each token (n,), fp32: cross-entropy with labels (n,), or KL(teacher || model) of logits (n,V) where a teacher's are given."""
    if teacher is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)


def head_blocks(model: Transformer, h: torch.Tensor) -> list[slice]:
    """The rows of final states h (n,D), so many at a time that no more than LOGITS_AT_ONCE logits exist; none should outlive its block."""
    size = max(1, LOGITS_AT_ONCE * (1 if h.device.type == "cpu" else 16) // model.config.vocab_size)
    return [slice(a, a + size) for a in range(0, len(h), size)]


@torch.no_grad()
def head_losses(model: Transformer, h: torch.Tensor, labels: torch.Tensor, teacher_h: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each token (n,) of final states h (n,D)."""
    return torch.cat([token_losses(model.head(h[part]), labels[part], None if teacher_h is None else model.head(teacher_h[part]))
                      for part in head_blocks(model, h)])


def head_gradient(model: Transformer, h: torch.Tensor, labels: torch.Tensor, teacher_h: torch.Tensor | None = None, *,
                  scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of final states h (n,D), and the gradient (n,D) of scale * loss with respect to them."""
    total, gradients = h.new_zeros((), dtype=torch.float32), []
    for part in head_blocks(model, h):
        own = h[part].detach().requires_grad_()
        teacher = None if teacher_h is None else model.head(teacher_h[part]).detach()
        loss = token_losses(model.head(own), labels[part], teacher).sum()
        total += loss.detach()
        gradients.append(torch.autograd.grad(loss * scale, own)[0])
    return total, torch.cat(gradients)


def states(model: Transformer, batch: Batch, **kwargs):
    """Final states (n,D) at the positions that predict, gates and logits of one batch. Everything else is left to Transformer.hidden."""
    h, gates, z = model.hidden(batch.tokens, lengths=batch.lengths, prompt_lengths=batch.prompts, return_scores=True, **kwargs)
    return h.flatten(0, 1)[batch.at], gates, z  # (B,T,D) -> (B*T,D) -> (n,D)


def mine(groups: list, rt: runtime.Runtime) -> list[tuple[int, list]]:
    """This rank's share of the groups, numbered. Groups never depend on the number of ranks, only who works on them does."""
    return list(enumerate(groups))[rt.rank::rt.world_size]


def sum_over_ranks(values: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    if rt.world_size > 1:
        dist.all_reduce(values)
    return values


def wait_for_all(rt: runtime.Runtime) -> None:
    if rt.world_size > 1:
        dist.barrier()


def collect(parts: list, rt: runtime.Runtime) -> list:
    """Numbered parts of all ranks, in order of their numbers."""
    if rt.world_size > 1:
        everyone = [None] * rt.world_size
        dist.all_gather_object(everyone, parts)
        parts = [part for rank_parts in everyone for part in rank_parts]
    return [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]


@torch.no_grad()
def evaluate(model: Transformer, examples: list[Example], rt: runtime.Runtime, *, route: str, skipped: tuple[int, ...] | None = None,
             random_at: float | None = None, teacher: dict[int, torch.Tensor] | None = None, trunk: Callable | None = None) -> dict:
    """Mean loss per loss-carrying token, and realised capacity in all and by place.

    Instead of the routers: skipped, places that everyone skips (a static list); random_at, the random control at this budget.
    teacher: dense final states by group, as `dense_states` gives them: the loss is then the KL to the dense model.
    """
    n_routed = 0 if model.routing is None or route == "off" else len(model.routing.places)
    sums = torch.zeros(3 + n_routed, dtype=torch.float64, device=rt.device)  # loss, tokens, units, executed units by place
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch, gates = collate(group, rt.device), None
        if skipped is not None:  # (R,B) whatever the unit: a place that everyone skips costs nothing, first tokens and keys included
            gates = torch.ones(n_routed, len(group), device=rt.device)
            gates[list(skipped)] = 0.0
        elif random_at is not None:
            gates = random_gates(model, batch, random_at, number).to(rt.device)
        start = {} if trunk is None or not n_routed else {"x": trunk(model, group, batch), "first_layer": model.routing.places[0].layer}
        h, gates, _ = states(model, batch, route=route, gates=gates, **start)
        sums[0] += head_losses(model, h, batch.labels, None if teacher is None else teacher[number]).sum()
        sums[1] += len(batch.labels)
        if n_routed:
            sums[2] += len(group) if gates.dim() == 2 else sum(batch.lengths)
            sums[3:] += gates.flatten(1).sum(1)  # (R,B) or (R,B,T) -> (R,)
    loss, tokens, units, *executed = sum_over_ranks(sums, rt).tolist()
    shares = [n / units for n in executed]
    return {"loss": loss / tokens, "tokens": int(tokens), "capacity_per_layer": shares,
            "capacity": capacity(torch.tensor(shares)[:, None], weights=model.place_weights()).item() if n_routed else 1.0}


def random_gates(model: Transformer, batch: Batch, budget: float, number: int) -> torch.Tensor:
    """Gates (R,B) or (R,B,T) of the random control for a numbered group of examples."""
    width = batch.tokens.shape[1] if model.routing.unit == "token" else None
    weights = model.place_weights()
    routes = [random_route(weights, budget, generator("random routes", number, row), width) for row in range(len(batch.lengths))]
    return torch.stack(routes, dim=1)


def n_units(routing: RouterConfig, lengths: list[int]) -> int:
    """What one layer decides about: sequences, or their real tokens."""
    return len(lengths) if routing.unit == "sequence" else sum(lengths)


@torch.no_grad()
def dense_states(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> dict[int, torch.Tensor]:
    """Final states (n,D) of the dense model, by group of `evaluate`, for this rank's groups."""
    groups = mine(by_length(examples, EVAL_BATCH), rt)
    return {number: states(model, collate(group, rt.device), route="off")[0] for number, group in groups}


def real_logits(z: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits (R,B) or (R,B,T) of real units as (R,N) on the CPU. A first token's is +inf, since it always executes."""
    if z.dim() == 3:
        z = torch.cat([F.pad(z[:, row, 1:length], (1, 0), value=math.inf) for row, length in enumerate(lengths)], dim=1)  # (R,B,T) -> (R,N)
    return z.detach().cpu()


@torch.no_grad()
def route_logits(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> torch.Tensor:
    """Logits (R,N) of every unit under the current cuts. A sequence decides on its prompt, so only that is run."""
    if model.routing.unit == "sequence" and model.routing.pool == "prompt":
        examples = [Example(e.tokens[:e.prompt], e.prompt, []) for e in examples]
    parts = []
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        tokens = pad([e.tokens for e in group], rt.device)
        lengths = [len(e.tokens) for e in group]
        z = model.hidden(tokens, lengths=lengths, route="gather", return_scores=True)[2]
        parts.append((number, real_logits(z, lengths)))
    return torch.cat(collect(parts, rt), dim=1)
