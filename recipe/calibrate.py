"""Cuts for every budget, from routes that the routers really take."""

import math

import torch

import runtime
from model import Transformer
from recipe.controls import Controls
from recipe.passes import Example, evaluate, route_logits
from router import capacity, quantile_cut, quantile_cuts, set_cuts, skipped_shares, threshold_of

BUDGETS = [round(i * 0.0125, 4) for i in range(81)]  # entries of the calibration table
PASSES = 9  # routes that calibration runs to fill it
ANCHORS = (0.25, 0.5, 0.75)  # budgets at which it compares the routers with the static order


def settle(model: Transformer, examples: list[Example], rt: runtime.Runtime, budget: float, rounds: int = 2) -> float:
    """Set and return the global cut that realises `budget`. Routes change what deeper routers see, hence more than one round."""
    for _ in range(rounds):
        cut = quantile_cut(route_logits(model, examples, rt), budget, model.place_weights())
        set_cuts(model, cut)
    return cut


def calibrate(model: Transformer, examples: list[Example], rt: runtime.Runtime, own: float, controls: "Controls | None" = None,
              orders: dict[str, list[int]] | None = None) -> dict:
    """Table of cuts for every budget in BUDGETS, one for all layers. Deeper logits depend on the route, so the routers run at PASSES cuts: twice
    for the budget `own`, else for the middle of the widest gap between the capacities realised so far; between two of those routes the cuts blend.
    With drop orders, budgets near one of ANCHORS where one loses less than the routers on the controls' examples get its cuts instead (`static`: budget -> its name)."""
    routes = {}  # capacity realised -> the cut for each budget, by the logits of that route
    weights = model.place_weights()

    def blended(budget: float) -> float:
        low = max((realised for realised in routes if realised <= budget), default=min(routes))
        high = min((realised for realised in routes if realised >= budget), default=max(routes))
        a, b = routes[low][budget], routes[high][budget]
        return a if low == high or math.isinf(a) or math.isinf(b) else a + (budget - low) / (high - low) * (b - a)

    for i in range(PASSES):
        if i < 2:
            cut = (-math.inf, math.inf)[i]
        else:
            ends = sorted(routes)
            low, high = max(zip(ends, ends[1:]), key=lambda gap: gap[1] - gap[0])
            wanted = own if i in (2, PASSES - 1) else (low + high) / 2
            cut = blended(min(BUDGETS, key=lambda budget: abs(budget - wanted)))
        set_cuts(model, cut)
        z = route_logits(model, examples, rt)
        dense = z if i == 0 else dense
        routes[capacity((z >= cut).double(), weights=weights).item()] = dict(zip(BUDGETS, quantile_cuts(z, BUDGETS, weights)))
    cuts, cut = {1.0: -math.inf, 0.0: math.inf}, -math.inf
    for budget in reversed(BUDGETS[1:-1]):
        cut = max(cut, blended(budget))  # a smaller budget never has a lower cut
        cuts[budget] = cut
    rows = {budget: [cut] * len(weights) for budget, cut in cuts.items()}
    static = {}
    for anchor in ANCHORS if orders else ():
        set_cuts(model, rows[anchor])
        settle(model, controls.examples, rt, anchor, rounds=1)  # compared at exactly this capacity
        routed = evaluate(model, controls.examples, rt, route="gather", trunk=controls.trunk)["loss"]
        losses = {name: controls.static(order, 1 - anchor) for name, order in orders.items()}
        best = min(losses, key=losses.get)
        if losses[best] < routed:
            static |= {budget: best for budget in rows if min(ANCHORS, key=lambda a: abs(a - budget)) == anchor}
    rows |= {budget: static_cuts(dense, orders[name], budget, weights) for budget, name in static.items()}
    budgets = sorted(rows)
    return {"budgets": budgets, "thresholds": [[threshold_of(cut) for cut in rows[budget]] for budget in budgets], "static": static}


def static_cuts(z: torch.Tensor, order: list[int], budget: float, weights: torch.Tensor) -> list[float]:
    """Cuts (R) that skip the first places of an order for everyone and run the others; a fraction of a place goes by its logits z (R,N)."""
    return [quantile_cut(z[place], 1 - share) for place, share in enumerate(skipped_shares(order, weights, 1 - budget))]
