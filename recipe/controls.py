"""Static lists, the mean route and random routes beside the routers, on the same examples at the same capacity."""

from dataclasses import replace

from recipe.cost import Executed, prefill_flops
from recipe.passes import Workload, evaluate, random_routes, skip_everywhere
from router import RouterConfig, mean_order, skipped_shares


class Controls:
    """What simple alternatives reach on the same examples at the capacity that a router realised.

    Each set of skipped places is measured once.
    """

    def __init__(self, work: Workload):
        self.work, self.known = work, {}

    def loss(self, skipped: tuple[int, ...]) -> float:
        """Loss where everyone skips these places, given in any order."""
        skipped = tuple(sorted(skipped))
        if skipped not in self.known:
            self.known[skipped] = evaluate(self.work, skip_everywhere(skipped))["loss"]
        return self.known[skipped]

    def static(self, order: list[int], skip: float) -> float:
        """Loss where everyone skips the first places of an order, `skip` of all they count.

        Where that ends within a place the loss is interpolated.
        """
        shares = skipped_shares(order, self.work.model.place_weights(), skip)
        part = next((share for share in shares if 0.0 < share < 1.0), 0.0)
        loss = self.loss(tuple(place for place, share in enumerate(shares) if share == 1.0))
        if part == 0.0:
            return loss
        more = self.loss(tuple(place for place, share in enumerate(shares) if share > 0.0))
        return loss + part * (more - loss)

    def prefill_flops(self, routing: RouterConfig, shares: list[float]) -> float:
        """FLOPs of all examples when the places (R) execute these shares of their units."""
        config = self.work.model.config
        executed = Executed.of(config, routing, shares)
        return sum(prefill_flops(config, len(example.tokens), executed, logits=0) for example in self.work.examples)

    def share_saved(self, shares: list[float]) -> tuple[float, float]:
        """What share of whole places one must skip to save as many prefill FLOPs as routes with these shares do, and
        the ceiling of those routes."""
        routing = self.work.model.routing
        whole = replace(routing, unit="sequence", kv="routed")  # a place skipped for a sequence leaves nothing behind
        routed = self.prefill_flops(routing, shares)
        dense, none = (self.prefill_flops(whole, [share] * len(shares)) for share in (1.0, 0.0))
        return (dense - routed) / (dense - none), dense / routed

    def row(self, budget: float, orders: dict[str, list[int]]) -> dict:
        """Losses of the routers, as their cuts stand, and of all controls: at equal capacity and at equal ceiling."""
        routed = evaluate(self.work)
        shares, realised, loss = routed["capacity_per_layer"], routed["capacity"], routed["loss"]
        saved, ceiling = self.share_saved(shares)
        static = {name: self.static(order, 1 - realised) for name, order in orders.items()}
        cheap = min(self.static(order, saved) for order in orders.values())
        dense = self.loss(())

        def gap_closed(static: float) -> float | None:
            """Share of the gap between static and dense that routing closes; None where static skipping is free."""
            return (static - loss) / (static - dense) if static > dense else None

        return {
            "budget": budget,
            "capacity": realised,
            "capacity_per_layer": shares,
            "dense": dense,
            "routed": loss,
            **static,
            "mean_route": self.static(mean_order(shares), 1 - realised),
            "random": evaluate(self.work, random_routes(realised))["loss"],
            "gap_closed": gap_closed(min(static.values())),
            "ceiling": ceiling,
            "static_at_equal_ceiling": cheap,
            "gap_closed_at_equal_ceiling": gap_closed(cheap),
        }
