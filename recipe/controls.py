"""Static lists, the mean route and random routes beside the routers, on the same examples at the same capacity."""

from dataclasses import replace

import runtime
from model import Transformer
from recipe.cost import Executed, prefill_flops
from recipe.passes import Example, evaluate
from recipe.trunk import TrunkCache
from router import RouterConfig, mean_order, skipped_shares


def routed_flops(config, routing: RouterConfig, shares: list[float], tokens: int, logits: int = 0) -> float:
    """FLOPs of a prompt of `tokens` tokens when the places (R) execute these shares of their units."""
    return prefill_flops(config, tokens, Executed.of(config, routing, shares), logits)


class Controls:
    """What simple alternatives reach on the same examples at the capacity that a router realised. Each set of dropped layers is measured once."""

    def __init__(self, model: Transformer, examples: list[Example], rt: runtime.Runtime, trunk: TrunkCache | None = None):
        self.model, self.examples, self.rt, self.trunk, self.known = model, examples, rt, trunk, {}

    def loss(self, skipped: tuple[int, ...]) -> float:
        """Loss where everyone skips these places, given in any order."""
        skipped = tuple(sorted(skipped))
        if skipped not in self.known:
            self.known[skipped] = evaluate(self.model, self.examples, self.rt, route="gather", skipped=skipped, trunk=self.trunk)["loss"]
        return self.known[skipped]

    def static(self, order: list[int], share: float) -> float:
        """Loss where everyone skips the first places of an order, `share` of all they count; where that ends within a place it is interpolated."""
        shares = skipped_shares(order, self.model.place_weights(), share)
        part = next((value for value in shares if 0.0 < value < 1.0), 0.0)
        loss = self.loss(tuple(place for place, value in enumerate(shares) if value == 1.0))
        if part == 0.0:
            return loss
        more = self.loss(tuple(place for place, value in enumerate(shares) if value >= part))
        return loss + part * (more - loss)

    def share_saved(self, shares: list[float]) -> tuple[float, float]:
        """What share of whole layers one must drop to save as many prefill FLOPs as routes with these shares do, and the ceiling of those routes."""
        routing = self.model.routing

        def flops(routing: RouterConfig, shares: list[float]) -> float:
            return sum(routed_flops(self.model.config, routing, shares, len(example.tokens)) for example in self.examples)

        plain = replace(routing, unit="sequence", kv="routed")  # whole sequences: a skipped place leaves nothing behind
        dense, routed, none = flops(plain, [1.0] * len(shares)), flops(routing, shares), flops(plain, [0.0] * len(shares))
        return (dense - routed) / (dense - none), dense / routed

    def row(self, budget: float, orders: dict[str, list[int]]) -> dict:
        """Losses of the routers, as their thresholds stand, and of all controls at equal capacity and (static orders) at equal ceiling."""
        routed = evaluate(self.model, self.examples, self.rt, route="gather", trunk=self.trunk)
        shares, skipped = routed["capacity_per_layer"], 1 - routed["capacity"]
        saved, ceiling = self.share_saved(shares)
        losses = {name: self.static(order, skipped) for name, order in orders.items()}
        cheap = {name: self.static(order, saved) for name, order in orders.items()}
        best, best_cheap, dense = min(losses.values()), min(cheap.values()), self.loss(())

        def gap_closed(static: float) -> float | None:
            """Share of the gap between static and dense that routing closes; None where skipping for everyone costs nothing."""
            return (static - routed["loss"]) / (static - dense) if static > dense else None

        return {"budget": budget, "capacity": routed["capacity"], "capacity_per_layer": shares, "dense": dense, "routed": routed["loss"], **losses,
                "mean_route": self.static(mean_order(shares), skipped),
                "random": evaluate(self.model, self.examples, self.rt, route="gather", random_at=routed["capacity"], trunk=self.trunk)["loss"],
                "gap_closed": gap_closed(best), "ceiling": ceiling, "static_at_equal_ceiling": best_cheap, "gap_closed_at_equal_ceiling": gap_closed(best_cheap)}
