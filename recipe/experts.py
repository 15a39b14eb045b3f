"""What a mixture of experts adds: the control that needs no router, first routers from its gate, and loads."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from model import Transformer
from recipe.passes import Workload, collate, evaluate, real_logits, route_logits, states
from router import quantile_cut, set_cuts


ROUNDS = 3  # in which the smallest gates' cut is found


def reads_gates(model: Transformer) -> bool:
    """Whether pairs of a token and an expert are gated one by one, so that the smallest gate is a control."""
    return model.routing.experts and model.routing.unit == "token"


@contextlib.contextmanager
def reading_gates(model: Transformer):
    """For a while a pair's logit is the log of the weight that its layer's own gate gave it. Cuts are put back."""
    routing, cuts = model.routing, [router.cut.item() for router in model.routers()]

    def route_by(chosen) -> None:
        model.routing = chosen
        for block in model.layers:
            block.routing = chosen

    route_by(replace(routing, reads="gate"))
    try:
        yield
    finally:
        route_by(routing)
        set_cuts(model, cuts)


def smallest_gate(work: Workload, budget: float) -> float:
    """Loss where the pairs with the smallest weights are skipped, so many that `budget` of all pairs run."""
    with reading_gates(work.model):
        for _ in range(ROUNDS):  # what is skipped changes what deeper gates see
            set_cuts(work.model, quantile_cut(route_logits(work), budget))
        return evaluate(work)["loss"]


def run_shares(model: Transformer, shares: list[float]) -> list[float]:
    """What share of its units each place (R) ran: of experts, of the tokens that were given them."""
    if not reads_gates(model):
        return shares
    given = (model.place_shares() / model.place_weights()).tolist()  # tokens that an expert is given
    return [share / max(load, 1e-12) for share, load in zip(shares, given)]


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
