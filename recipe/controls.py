"""Static lists, the mean route and random routes beside the routers, on the same examples at the same capacity."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from recipe.cost import Executed, prefill_flops
from recipe.experts import mean_route, reads_gates, smallest_gate
from recipe.journal import once
from recipe.lists import Prefixes, list_states, room_for_prefixes
from recipe.passes import Batch, Workload, collate, evaluate, finite, head_losses, random_routes
from recipe.places import skipped_shares
from router import RouterConfig
from runtime import sum_over_ranks, track


class Controls:
    """What simple alternatives reach on the same examples at the capacity that a router realised.

    Each set of skipped places is measured once. searching: sets are asked for one after another, so activations are
    kept from one to the next, for as long as this object lives.
    """

    def __init__(self, work: Workload, searching: bool = False):
        self.work, self.known = work, {}
        self.kept: dict[int, Prefixes] | None = {} if searching else None  # by number of the group

    def measure(self, sets: Iterable[tuple[int, ...]]) -> None:
        """Measure the loss of each set of skipped places that is not known, in one walk over the examples."""
        model, groups = self.work.model, self.work.groups()
        places = range(len(model.routing.places))
        new = {tuple(sorted(skipped)) for skipped in sets} - self.known.keys()
        ordered = sorted(new, key=lambda skipped: [place in skipped for place in places])  # neighbours begin alike
        sums = torch.zeros(len(ordered), dtype=torch.float64, device=self.work.rt.device)
        for number, group in track(groups, "loss") if ordered else ():
            batch, room = collate(group, self.work.rt.device), room_for_prefixes(model)
            if self.kept is None:
                prefixes = Prefixes(room)
            else:
                prefixes = self.kept.setdefault(number, Prefixes(room // len(groups)))
            for index, skipped in enumerate(ordered):
                sums[index] += once(lambda: [self.list_loss(batch, skipped, prefixes)])[0].to(sums.device)
        tokens = sum(len(example.targets) for example in self.work.examples)
        losses = finite(sum_over_ranks(sums, self.work.rt), model, "loss") / tokens
        self.known |= dict(zip(ordered, losses.tolist()))

    def list_loss(self, batch: Batch, skipped: tuple[int, ...], prefixes: Prefixes) -> Tensor:
        """Summed loss of one batch."""
        h = list_states(self.work, batch, skipped, prefixes)
        return head_losses(self.work.model, h, batch.labels).sum()

    def loss(self, skipped: tuple[int, ...]) -> float:
        """Loss where everyone skips these places, given in any order."""
        self.measure([skipped])
        return self.known[tuple(sorted(skipped))]

    def ends(self, order: list[int], skip: float) -> tuple[tuple[int, ...], tuple[int, ...], float]:
        """Places of a static list that skips `skip` of all they count, the first of the order in front: those that it
        skips whole, those and the one within which it ends, and how much of that one it skips."""
        shares = skipped_shares(order, self.work.model.place_shares(), skip)
        whole = tuple(place for place, share in enumerate(shares) if share == 1.0)
        touched = tuple(place for place, share in enumerate(shares) if share > 0.0)
        return whole, touched, next((share for share in shares if 0.0 < share < 1.0), 0.0)

    def static(self, order: list[int], skip: float) -> float:
        """Loss of that list; where it ends within a place the loss is interpolated."""
        whole, touched, part = self.ends(order, skip)
        self.measure([whole, touched])
        return self.loss(whole) + part * (self.loss(touched) - self.loss(whole))

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

    def rows(self, routed: dict[float, dict], orders: dict[str, list[int]]) -> list[dict]:
        """A row for each budget, whose routes `evaluate` scored: their loss beside that of all controls, at equal
        capacity and at equal ceiling."""
        sets = [()]
        for found in routed.values():
            skips = (1 - found["capacity"], self.share_saved(found["capacity_per_layer"])[0])
            lists = [(order, skip) for order in orders.values() for skip in skips]
            lists.append((mean_route(self.work.model, found["capacity_per_layer"])[0], skips[0]))
            sets += [part for order, skip in lists for part in self.ends(order, skip)[:2]]
        self.measure(sets)  # of all budgets together
        return [self.row(budget, found, orders) for budget, found in routed.items()]

    def row(self, budget: float, routed: dict, orders: dict[str, list[int]]) -> dict:
        """The same for one budget."""
        shares, realised, loss = routed["capacity_per_layer"], routed["capacity"], routed["loss"]
        saved, ceiling = self.share_saved(shares)
        static = {name: self.static(order, 1 - realised) for name, order in orders.items()}
        gates = {"smallest_gate": smallest_gate(self.work, realised)} if reads_gates(self.work.model) else {}
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
            **gates,
            "mean_route": self.static(mean_route(self.work.model, shares)[0], 1 - realised),
            "random": evaluate(self.work, random_routes(realised))["loss"],
            "gap_closed": gap_closed(min(static.values())),
            "ceiling": ceiling,
            "static_at_equal_ceiling": cheap,
            "gap_closed_at_equal_ceiling": gap_closed(cheap),
        }
