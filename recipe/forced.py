"""Routes that no router chose, as eval.py's --control names them: static lists, random routes, the mean route."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import runtime
from model import Transformer
from recipe.experts import mean_route, read_gates, reads_gates
from recipe.orders import GATE_NORM, gate_norm_order
from recipe.places import parse_layers, random_route, static_route
from runtime import generator

SMALLEST_GATE = "smallest_gate"

@dataclass(frozen=True)
class Control:
    """Forced routes over the same places: static lists by task, or (no lists) routes by chance at `budget`.

    lists: task -> an order of the places, and the capacity down to which it skips; the place at which that ends is
    skipped for a share of the items, so that the average is the capacity asked for.
    """

    weights: Tensor  # what each place counts (R)
    budget: float = 1.0
    seed: str = ""
    per_token: bool = False  # random routes are drawn for each token
    lists: dict[str, tuple[list[int], float]] | None = None

    @property
    def whole(self) -> bool:
        """Routes are for whole sequences."""
        return not self.per_token

    def gates(self, owner: tuple[str, int], start: int, stop: int) -> Tensor:
        """Gates of an item (task, index): (R), or of its tokens start .. stop - 1: (R, stop - start)."""
        if self.lists is not None:
            order, budget = self.lists[owner[0]]
            return static_route(order, self.weights, budget, generator("list", *owner))
        rng = generator("random", self.seed, *owner)
        route = random_route(self.weights, self.budget, rng, stop if self.per_token else None)
        return route[:, start:] if self.per_token else route

    def batch(self, owners: Sequence[tuple[str, int]], starts: Sequence[int], width: int) -> Tensor | None:
        """Gates (R,B) or (R,B,T) of `width` columns of items that begin at `starts`; None where a decision for whole
        sequences was made with what stands before them."""
        if self.whole and max(starts) > 0:
            return None
        return torch.stack([self.gates(own, start, start + width) for own, start in zip(owners, starts)], dim=1)


def make_control(
    text: str, model: Transformer, budget: float | None, orders: dict[str, list[str]], tasks: Sequence[str]
) -> Control | None:
    """--control for these tasks: none, static:LAYERS (skipped for everyone; of both: names such as 5.attn,7.mlp), one
    of the router file's orders (a static list at capacity `budget`), gate_norm (the same by weights alone, for any file
    of attentions), random:SEED (at `budget`), or mean:FILE.json (the average of a routed run's routes as a list, by
    task at its capacity). None for smallest_gate too: the model then reads the weights of its experts' gates, whose
    cuts its caller sets."""
    kind, _, value = text.partition(":")
    if kind == "none":
        return None
    weights, names = model.place_shares(), model.routing.names
    if text == GATE_NORM:
        orders = orders | {GATE_NORM: [names[place] for place in gate_norm_order(model)]}
    if budget is None and (kind in ("random", SMALLEST_GATE) or kind in orders):
        raise ValueError(f"--control={text} needs the capacity at which it skips: give --budget=0..1")
    if text == SMALLEST_GATE:
        if not reads_gates(model):
            raise ValueError(f"--control={text} skips pairs of a token and an expert, and these routers are "
                             f"{model.routing.granularity}; expected expert_token: use another control")
        read_gates(model)
        return None
    if kind == "random" and value.isdigit():
        return Control(weights, budget, value, per_token=model.routing.unit == "token")
    if kind in orders and not value:
        found = [names.index(name) for name in orders[kind]], budget
    elif kind == "static":
        found = static_list(text, value, model)
    elif kind == "mean":
        return Control(weights, lists=mean_lists(text, value, model, tasks))
    else:
        raise ValueError(
            f"--control is {text!r}; expected none, static:LAYERS, random:SEED, mean:FILE.json, gate_norm, "
            f"smallest_gate, or an order of the router file ({', '.join(orders) or 'this one holds none'})"
        )
    return Control(weights, lists=dict.fromkeys(tasks, found))


def static_list(text: str, value: str, model: Transformer) -> tuple[list[int], float]:
    """The places of static:LAYERS in front, and the capacity that is left without them."""
    names, weights = model.routing.names, model.place_shares()
    wanted, kept = (value.split(","), None) if "." in names[0] else parse_layers(value, model.config.n_layers)
    skipped = set(map(str, wanted))
    if kept is not None or not skipped <= set(names):
        raise ValueError(f"--control={text}: expected numbers of routed layers, which are {', '.join(names)}")
    order = sorted(range(len(names)), key=lambda place: names[place] not in skipped)
    return order, 1 - sum(weights[place].item() for place in order[: len(skipped)])


def mean_lists(text: str, path: str, model: Transformer, tasks: Sequence[str]) -> dict[str, tuple[list[int], float]]:
    """Of each task the mean route of a run that wrote `path`, as an order, and its capacity."""
    report, lists, n = runtime.read_json(path), {}, len(model.routing.places)
    results = report.get("results") if isinstance(report, dict) else None
    for task in tasks:
        entry = results.get(task) if isinstance(results, dict) else None
        shares = entry.get("capacity_per_layer") if isinstance(entry, dict) else None
        if not isinstance(shares, list) or len(shares) != n:
            raise ValueError(
                f"--control={text}: {task} has no {n} routed layers there; write it with the same --routers"
            )
        if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares):
            raise ValueError(f"--control={text}: {task} has the shares {shares} there; expected numbers from 0 to 1")
        lists[task] = mean_route(model, shares)
    return lists
