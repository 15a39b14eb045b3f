"""What tuning begins with: where routers stand, and their first weights."""

from torch import Tensor

from recipe.calibrate import settle
from recipe.controls import Controls
from recipe.fit import benefit_prior, order_prior, token_prior
from recipe.measure import Measured, measure_benefits, measure_costs, typical_costs
from recipe.passes import Workload, evaluate
from router import RouterConfig, skipped_places
from runtime import print0


def place_routers(work: Workload, routing: RouterConfig, kept: int | None, seed: int) -> Measured:
    """Put zero routers at these places, or at the `kept` of them that cost least by what they count.

    Returns what those cost.
    """
    model = work.model
    model.add_routers(routing)
    measured = measure_costs(work, seed)
    typical = typical_costs(measured.costs)
    shown = zip(routing.names, typical.tolist())
    print0("cost of skipping, in nats: " + ", ".join(f"{name}: {cost:.3g}" for name, cost in shown))
    if kept is None:
        return measured
    prices, loads = typical / model.place_weights(), model.loads
    cheapest = cheapest_layers(routing, prices, kept) if routing.experts else sorted(prices.argsort()[:kept].tolist())
    model.add_routers(routing.at(cheapest))
    model.loads = loads and [loads[place] for place in cheapest]
    return measured.at(cheapest)


def cheapest_layers(routing: RouterConfig, prices: Tensor, kept: int) -> list[int]:
    """Places of all experts of the `kept` layers whose experts cost least on average. prices (R,)."""
    mean = {layer: prices[routing.rows_of(layer)].mean().item() for layer in routing.layers}
    layers = sorted(mean, key=mean.get)[:kept]
    return [number for number, place in enumerate(routing.places) if place.layer in layers]


def best_static(controls: Controls, orders: dict[str, list[int]], budget: float) -> tuple[str, tuple[int, ...]]:
    """Name of the order that loses least on the selection set at this budget, and the places that it skips."""
    weights = controls.work.model.place_shares()
    skipped = {name: skipped_places(order, weights, 1 - budget) for name, order in orders.items()}
    controls.measure(skipped.values())
    losses = {name: controls.loss(places) for name, places in skipped.items()}
    print0("selection loss of static orders: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    best = min(losses, key=losses.get)
    return best, skipped[best]


def router_starts(measured: Measured, name: str, order: list[int], unit: str) -> dict[str, Tensor]:
    """First routers (R,D) to choose from, by name: the static order as routers that say the same of everyone; unit
    token: routers fitted to each token's Fisher cost too, alone or mixed with the order."""
    static = order_prior(order, measured.inputs)
    starts = {f"static ({name})": static}
    if unit == "token":
        fisher = token_prior(measured.costs, measured.inputs)
        starts |= {"fisher": fisher, "fisher + static": fisher + 0.3 * static}
    return starts


def benefit_start(work: Workload, skipped: tuple[int, ...], distill: bool) -> Tensor:
    """First routers (R,D) fitted to what each place is worth to each sequence beside a static list."""
    benefits, inputs = measure_benefits(work, skipped, distill)
    return benefit_prior(benefits, inputs, work.model.place_weights())


def loss_at_budget(
    select: Workload, budget: float, teacher: dict[int, Tensor] | None = None
) -> tuple[float, float]:
    """Loss of the routers on the selection set at exactly the budget, and the cut there, at which they are left."""
    cut = settle(select, budget)
    return evaluate(select, teacher=teacher)["loss"], cut
