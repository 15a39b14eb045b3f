"""A fixed route built into a model: what everybody skips is left out of it, or adds exactly nothing.

A layer of which attention and MLP are skipped goes, and later layers move up. Where one of the two stays, the other's
last projection becomes zero: the same function, but the layer costs what it did, since a checkpoint's layers are alike.
"""

from dataclasses import replace

import torch
import torch.nn as nn

import runtime
from model import ModelConfig, Transformer, load_routers
from recipe.experts import mean_route
from recipe.places import skipped_places

ENDS = {"attn": "attention.wo", "mlp": "feed_forward.w2"}  # what a sublayer ends with
Skipped = set[tuple[int, str]]  # layer, and attn or mlp


def listed(text: str, n_layers: int) -> Skipped:
    """What a list such as 5,7.attn,9.mlp skips; a number alone is the whole layer."""
    skipped = set()
    for name in text.split(","):
        layer, _, target = name.strip().partition(".")
        if not layer.isdecimal() or int(layer) >= n_layers or target not in ("", *ENDS):
            raise ValueError(f"skip is {text!r}, expected layers from 0 to {n_layers - 1} such as 5,7.attn,9.mlp; with "
                             "--routers=FILE an order that it holds, or mean:FILE.json")
        skipped |= {(int(layer), kind) for kind in ENDS if target in ("", kind)}
    return skipped


def by_routers(text: str, model: Transformer, routers: str, budget: float | None) -> Skipped:
    """What a router file's routes skip when they are made constant: by one of its orders at a budget, or by
    mean:FILE.json, the mean route in a summary of train.py or in a result of eval.py on one task."""
    orders = load_routers(model, routers).orders
    routing, weights = model.routing, model.place_weights()
    if text.startswith("mean:"):
        shares = mean_shares(text.removeprefix("mean:"), len(weights))
        order, realised = mean_route(model, shares)
        budget = realised if budget is None else budget
    elif text in orders and budget is not None and 0 <= budget <= 1:
        order = [routing.names.index(name) for name in orders[text]]
    else:
        raise ValueError(f"skip is {text!r} with budget {budget}; expected {', '.join(orders) or 'no order'} of the "
                         "router file with --budget=0..1, or mean:FILE.json")
    places = [routing.places[number] for number in skipped_places(order, weights, 1 - budget)]
    if other := {place.target for place in places} - {*ENDS, "block"}:
        raise ValueError(f"the route skips {', '.join(other)}; expected attn, mlp or block, which can be left out")
    return {(place.layer, kind) for place in places for kind in ENDS if place.target in (kind, "block")}


def mean_shares(path: str, places: int) -> list[float]:
    """Share of units that ran each place, from a summary of train.py or a result of eval.py on one task."""
    report = runtime.read_json(path)
    report = report if isinstance(report, dict) else {}
    results = report.get("results") if isinstance(report.get("results"), dict) else {"": report}
    shares = [entry.get("capacity_per_layer") for entry in results.values() if isinstance(entry, dict)]
    good = len(shares) == 1 and isinstance(shares[0], list) and len(shares[0]) == places
    if not good or not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares[0]):
        raise ValueError(f"{path} does not hold one capacity_per_layer of {places} shares; expected the summary.json "
                         "of these routers, or a result of eval.py with them on one task")
    return shares[0]


@torch.no_grad()
def fix_route(model: Transformer, skipped: Skipped) -> None:
    """Leave out of a model what is skipped, its routers too; see above for what stays as zeros."""
    config = model.config
    whole = {layer for layer in range(config.n_layers) if all((layer, kind) in skipped for kind in ENDS)}
    stay = [layer for layer in range(config.n_layers) if layer not in whole]
    if not stay:
        raise ValueError(f"all {config.n_layers} layers are skipped, expected one that stays: skip less")
    for layer, kind in sorted((layer, kind) for layer, kind in skipped if layer in stay):
        end = dict(model.layers[layer].named_modules()).get(ENDS[kind])
        if end is None:
            raise ValueError(f"{layer}.{kind} is a mixture of experts, expected one projection at its end that can "
                             "become zero: skip the whole layer, or its attention alone")
        end.weight = nn.Parameter(torch.zeros_like(end.weight), requires_grad=False)
    model.add_routers(None)
    model.layers = nn.ModuleList(model.layers[layer] for layer in stay)
    model.config = replace(config, n_layers=len(stay), **windows(config, stay))


def windows(config: ModelConfig, stay: list[int]) -> dict:
    """The sliding window of a model of these layers alone."""
    windowed = [new for new, layer in enumerate(stay) if config.window(layer) is not None]
    if not windowed:
        return {"sliding_window": None, "window_layers": None}
    return {"window_layers": None if len(windowed) == len(stay) else tuple(windowed)}
