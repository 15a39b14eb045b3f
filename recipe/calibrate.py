"""Cuts for every budget, from routes that the routers really take."""

import math

from torch import Tensor

from recipe.controls import Controls
from recipe.passes import Workload, evaluate, quantile_cut, quantile_cuts, route_logits, settle
from recipe.places import skipped_shares
from router import around, between, capacity, set_cuts, threshold_of
from runtime import print0, track

BUDGETS = [round(i * 0.0125, 4) for i in range(81)]  # entries of the calibration table
PASSES = 9  # routes that calibration runs to fill it
ANCHORS = (0.25, 0.5, 0.75)  # budgets at which it compares the routers with the static lists


def calibrate(work: Workload, own: float, controls: Controls | None = None, orders: dict | None = None) -> dict:
    """Table for every budget in BUDGETS: {budgets, thresholds and shares of units that run (for each place), static}.

    work: the examples whose routes are run; own: the budget that is realised best. With controls and orders a static
    list stands wherever it loses less than the routers on the controls' examples (`static`: budget -> its name).
    """
    logits, routes = probe_routes(work, own)
    dense = logits[max(logits)]
    rows = {budget: [cut] * len(dense) for budget, cut in cuts_by_budget(routes).items()}
    static = prefer_static(rows, controls, orders) if orders else {}
    shares = {budget: place_shares(logits, routes, budget) for budget in rows}
    for budget, name in static.items():
        rows[budget] = static_cuts(dense, orders[name], budget, work.model.place_shares())
        skipped = skipped_shares(orders[name], work.model.place_shares(), 1 - budget)
        shares[budget] = [1 - share for share in skipped]
    budgets = sorted(rows)
    thresholds = [[threshold_of(cut) for cut in rows[budget]] for budget in budgets]
    table = {"budgets": budgets, "thresholds": thresholds, "static": static}
    holds = work.model.routing.unit == "token" and not work.model.routing.experts
    return table | ({"shares": [shares[budget] for budget in budgets]} if holds else {})


def place_shares(logits: dict[float, Tensor], routes: dict[float, dict[float, float]], budget: float) -> list[float]:
    """Share of its units that each place (R) runs at a budget, by the logits of the routes nearest to it."""
    low, high, part = around(routes, budget)
    low, high = ((logits[at] >= routes[at][budget]).double().mean(1) for at in (low, high))
    return (low + part * (high - low)).tolist()


def probe_routes(work: Workload, own: float) -> tuple[dict[float, Tensor], dict[float, dict[float, float]]]:
    """By the capacity that a route realised: its logits (R,N), and {budget: the cut by these logits}.

    Deeper logits depend on the route, so the routers run at PASSES cuts: none and all skipped, twice the budget `own`,
    else the middle of the widest gap between the capacities realised so far. Those of the first routed layer do not,
    and one pass tells all (reads=first).
    """
    weights, routes, logits = work.model.place_weights(), {}, {}
    for number in track(range(1 if work.model.routing.reads == "first" else PASSES), "calibration"):
        if number < 2:
            cut = (-math.inf, math.inf)[number]
        else:
            ends = sorted(routes)
            low, high = max(zip(ends, ends[1:]), key=lambda gap: gap[1] - gap[0])
            wanted = own if number in (2, PASSES - 1) else (low + high) / 2
            cut = blended(routes, min(BUDGETS, key=lambda budget: abs(budget - wanted)))
        set_cuts(work.model, cut)
        z = route_logits(work)
        realised = capacity(((z >= cut) & (z > -math.inf)).double(), weights=weights).item()
        routes[realised] = dict(zip(BUDGETS, quantile_cuts(z, BUDGETS, weights)))
        logits[realised] = z
    return logits, routes


def blended(routes: dict[float, dict[float, float]], budget: float) -> float:
    """Cut for a budget, between those of the two routes that realised the nearest capacities below and above it."""
    low, high, part = around(routes, budget)
    return between(routes[low][budget], routes[high][budget], part)


def cuts_by_budget(routes: dict[float, dict[float, float]]) -> dict[float, float]:
    """One cut for all places, by budget: a smaller budget never has a lower cut."""
    cuts, cut = {1.0: -math.inf, 0.0: math.inf}, -math.inf
    for budget in reversed(BUDGETS[1:-1]):
        cut = max(cut, blended(routes, budget))
        cuts[budget] = cut
    return cuts


def prefer_static(rows: dict[float, list[float]], controls: Controls, orders: dict[str, list[int]]) -> dict[float, str]:
    """Budgets near one of ANCHORS where a static list loses less than the routers -> the name of its order."""
    static, work = {}, controls.work
    ends = [controls.ends(order, 1 - anchor) for order in orders.values() for anchor in ANCHORS]
    controls.measure(part for whole, touched, _ in ends for part in (whole, touched))
    for anchor in ANCHORS:
        set_cuts(work.model, rows[anchor])
        settle(work, anchor, rounds=1)  # compared at exactly this capacity
        routed = evaluate(work)["loss"]
        losses = {name: controls.static(order, 1 - anchor) for name, order in orders.items()}
        best = min(losses, key=losses.get)
        if losses[best] < routed:
            print0(f"calibration: around budget {anchor:g} the static order {best} loses less on the selection set "
                   "than the routers, and stands in the table")
            near = [budget for budget in rows if min(ANCHORS, key=lambda a: abs(a - budget)) == anchor]
            static |= dict.fromkeys(near, best)
    return static


def static_cuts(z: Tensor, order: list[int], budget: float, weights: Tensor) -> list[float]:
    """Cuts (R) that skip the first places of an order for everyone and run the others; a fraction of a place goes by
    its logits z (R,N)."""
    shares = skipped_shares(order, weights, 1 - budget)
    return [quantile_cut(z[place], 1 - share) for place, share in enumerate(shares)]
