"""What a mixture of experts adds: the control that needs no router, first routers from its gate, and loads."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from model import Transformer
from recipe.passes import Workload, collate, evaluate, real_logits, settle, states
from router import RouterConfig, set_cuts


ROUNDS = 3  # in which the smallest gates' cut is found


def reads_gates(model: Transformer) -> bool:
    """Whether pairs of a token and an expert are gated one by one, so that the smallest gate is a control."""
    return model.routing.experts and model.routing.unit == "token"


def read(model: Transformer, routing: RouterConfig) -> None:
    """Let the routers of a model, which stay where they are, decide as `routing` says."""
    model.routing = routing
    for block in model.layers:
        block.routing = routing


def read_gates(model: Transformer) -> None:
    """From now on a pair's logit is the log of the weight that its layer's own gate gave it; cuts (R) begin at 0."""
    read(model, replace(model.routing, reads="gate"))
    set_cuts(model, 0.0)


@contextlib.contextmanager
def reading_gates(model: Transformer):
    """The same for a while. Cuts are put back."""
    routing, cuts = model.routing, [router.cut.item() for router in model.routers()]
    read_gates(model)
    try:
        yield
    finally:
        read(model, routing)
        set_cuts(model, cuts)


def smallest_gate(work: Workload, budget: float) -> float:
    """Loss where the pairs with the smallest weights are skipped, so many that `budget` of all pairs run."""
    with reading_gates(work.model):
        settle(work, budget, ROUNDS)
        return evaluate(work)["loss"]


def mean_route(model: Transformer, shares: list[float]) -> tuple[list[int], float]:
    """The mean route of routes that ran these shares (R) of all units, as an order, and its capacity.

    An expert is rare where it ran for few of the tokens that were given it, not where few were.
    """
    weights, given = model.place_weights(), torch.ones(len(shares))
    if reads_gates(model):
        given = (model.place_shares() / weights).clamp(min=1e-12)  # share of the tokens that an expert is given
    ran = [share / load for share, load in zip(shares, given.tolist())]
    return sorted(range(len(ran)), key=ran.__getitem__), (weights @ torch.tensor(shares, dtype=torch.float64)).item()


def gate_start(model: Transformer, inputs: Tensor) -> Tensor:
    """First routers (R,D) that read what the gates of their layers read: an expert's logit there less the mean's.

    inputs (R,N,D). Their logits together have mean square 1 about their mean, as `fit_routers` scales them.
    """
    rows = []
    for layer in model.routing.layers:
        gate = model.layers[layer].feed_forward.gate.weight.float().cpu()  # (E,D)
        rows.append(gate - gate.mean(0))
    weights = torch.cat(rows)
    return weights / torch.einsum("rnd,rd->rn", inputs, weights).std().clamp(min=1e-12)


@torch.no_grad()
def loads(work: Workload) -> tuple[list[float], list[float]]:
    """Pairs of each place (R) that its layer's gate assigned, and those of them that ran, as shares of the tokens."""
    assigned = ran = tokens = 0
    for _, group in work.groups():
        batch = collate(group, work.rt.device)
        start = {"x": work.entered(batch), "first_layer": work.first_layer}
        _, gates, z = states(work.model, batch, route="gather", **start)
        assigned = assigned + (real_logits(z, batch.lengths) > -torch.inf).sum(1)  # (R,N) -> (R,)
        ran, tokens = ran + gates.flatten(1).sum(1).cpu(), tokens + sum(batch.lengths)
    return (assigned / tokens).tolist(), (ran / tokens).tolist()
