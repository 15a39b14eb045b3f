"""Routers of Router-Tuning: where they stand, score, gate, capacity, cuts, and the router file.

A router is one linear map d -> 1 without bias, kept in fp32, beside a layer of a frozen model. Its logit z = w . x
decides whether the layer's target (attention, MLP or the whole block) runs: gate = sigmoid(z) >= threshold, held here
as z >= cut with cut = logit(threshold). The score is never multiplied into the output; the straight-through estimator
hands the gate's gradient to it. This module knows nothing of any Transformer: it works on every nn.Module that
contains `Router`s, and can be copied alone. Source: Router-Tuning, arXiv 2410.13184, eq. 1-4 and 10.

    python router.py FILE       what a router file holds: base, places, budgets, losses beside its controls

Legend: B batch, T tokens, D width, R routers. A place is where one router stands; gates, logits, cuts and capacities
have one row for each. An order lists the R numbers of places, the one to skip first in front.
"""

import json
import math
import os
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

UNITS = ("sequence", "token")
TARGETS = {"attn": ("attn",), "mlp": ("mlp",), "block": ("block",), "both": ("attn", "mlp")}  # what a name gates
GRANULARITIES = tuple(f"{target}_{unit}" for target in TARGETS for unit in UNITS)
EXPERT_GRANULARITIES = tuple(f"expert_{unit}" for unit in UNITS)  # of mixtures of experts alone
FILE_FORMAT = "router-tuning/2"
OLD_FORMAT = "router-tuning/1"  # named a granularity and layers instead of places


# -----------------------------------------------------------------------------
# Where routers stand


class Place(NamedTuple):
    """Where one router stands, and what it gates: attn, mlp or block of a layer, or one expert of its MLP."""

    layer: int
    target: str
    expert: int | None = None


@dataclass(frozen=True)
class RouterConfig:
    """Where routers stand and how they decide."""

    places: tuple[Place, ...]  # in the order in which they are asked
    unit: str = "sequence"  # what one gate decides for: a sequence, or a token
    pool: str = "prompt"  # what a sequence router averages over: the prompt, or "all": the whole row, as the paper does
    kv: str = "routed"  # "routed": a skipped token leaves no keys and values; "all" (attention per token): it does
    reads: str = "own"  # a router reads the input of what it gates; "first" (unit sequence): that of the first routed
    # layer, all routers alike, so that a route is known before it begins; "gate" (experts): the weight their gate gave
    renormalise: bool = False  # experts: a token's remaining weights are scaled to their old sum; the paper: they stay

    def __post_init__(self):
        places = sorted((Place(*place) for place in self.places), key=lambda place: (*place[:2], place[2] or 0))
        object.__setattr__(self, "places", tuple(places))
        layers = [place.layer for place in self.places]
        if not layers or min(layers) < 0 or len(set(self.places)) < len(layers):
            raise ValueError(f"routers stand at {list(map(tuple, self.places))}; expected one or more 0-based layers, "
                             "each place once")
        kinds = {place.target for place in self.places}
        if not (kinds <= {"attn", "mlp", "block"} or kinds == {"expert"}):
            raise ValueError(f"targets are {sorted(kinds)}; expected attn, mlp or block, or expert alone")
        blocks = {place.layer for place in self.places if place.target == "block"}
        if shared := sorted(layer for layer in blocks if layers.count(layer) > 1):
            raise ValueError(f"layer {shared[0]} has a router for the block and another one; expected one of the two: "
                             "a block that is skipped skips its attention and MLP")
        if any((place.expert is None) == self.experts or (place.expert or 0) < 0 for place in self.places):
            raise ValueError("a place names an expert and no expert is its target, or the other way round; expected "
                             "both, or neither")
        reads = ("own", "gate") if self.experts else ("own", "first")
        reads = reads if (self.unit == "token") == self.experts else ("own",)
        for name, allowed in (("unit", UNITS), ("pool", ("prompt", "all")), ("reads", reads)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; expected one of {', '.join(allowed)}")
        if type(self.renormalise) is not bool or (self.renormalise and not self.experts):
            raise ValueError(f"renormalise is {self.renormalise!r:.60} with granularity {self.granularity!r}; expected "
                             "false, or true with experts")
        keeps = self.unit == "token" and "attn" in kinds and "block" not in kinds
        if self.kv not in ("routed", "all") or (self.kv == "all" and not keeps):
            raise ValueError(f"kv is {self.kv!r:.60} with granularity {self.granularity!r}; expected 'routed', or "
                             "'all' with 'attn_token' and 'both_token' alone")

    @classmethod
    def of(cls, granularity: str, layers, n_experts: int = 0, **more) -> "RouterConfig":
        """Routers of a named granularity at all of these layers, of experts at each of n_experts.

        Raises ValueError for an unknown name.
        """
        if granularity not in (*GRANULARITIES, *EXPERT_GRANULARITIES):
            names = ", ".join((*GRANULARITIES, *EXPERT_GRANULARITIES))
            raise ValueError(f"granularity is {granularity!r}; expected one of {names}")
        target, unit = granularity.split("_")
        if target == "expert":
            return cls(tuple(Place(layer, target, e) for layer in layers for e in range(n_experts)), unit, **more)
        return cls(tuple(Place(layer, kind) for layer in layers for kind in TARGETS[target]), unit, **more)

    @property
    def target(self) -> str:
        """attn, mlp, block, both (attention and MLP), or the targets joined by +."""
        kinds = sorted({place.target for place in self.places})
        return "both" if kinds == ["attn", "mlp"] else "+".join(kinds)

    @property
    def granularity(self) -> str:
        return f"{self.target}_{self.unit}"

    @property
    def experts(self) -> bool:
        """Routers gate single experts."""
        return any(place.target == "expert" for place in self.places)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that own a router, ascending."""
        return tuple(sorted({place.layer for place in self.places}))

    @property
    def names(self) -> tuple[str, ...]:
        """A word for each place: '5', the layer, where all targets are alike; else '5.attn' or '5.mlp'; '5.e3'."""
        if self.experts:
            return tuple(f"{place.layer}.e{place.expert}" for place in self.places)
        alike = len({place.target for place in self.places}) == 1
        return tuple(str(place.layer) if alike else f"{place.layer}.{place.target}" for place in self.places)

    def rows_of(self, layer: int) -> slice:
        """Rows of gates, logits, cuts and capacities that belong to a layer's routers."""
        before = sum(place.layer < layer for place in self.places)
        return slice(before, before + sum(place.layer == layer for place in self.places))

    def at(self, numbers) -> "RouterConfig":
        """The same with routers at these of its places alone; kv is "routed" where they gate no attention."""
        places = tuple(self.places[number] for number in numbers)
        kv = self.kv if any(place.target == "attn" for place in places) else "routed"
        return replace(self, places=places, kv=kv)


# -----------------------------------------------------------------------------
# Score, gate, capacity


def pool(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean over each row's first `lengths` tokens, in fp32; pads never count.

    x (B,T,D), lengths (B,) or None for all T -> (B,D).
    """
    if lengths is None:
        return x.mean(dim=1, dtype=torch.float32)  # (B,T,D) -> (B,D)
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B,T)
    weight = real.float() / lengths[:, None]  # (B,T)
    return torch.bmm(weight[:, None], x.float().masked_fill(~real[..., None], 0.0)).squeeze(1)  # (B,1,T) x (B,T,D)


def ste_gate(z: Tensor, cut: Tensor | float = 0.0) -> Tensor:
    """Gate z >= cut as 0.0/1.0, any shape; its gradient goes unchanged to the score sigmoid(z) (eq. 4)."""
    hard = (z >= cut).to(z.dtype)
    if not (torch.is_grad_enabled() and z.requires_grad):
        return hard
    score = torch.sigmoid(z)
    return hard + (score - score.detach())  # the bracket is exactly 0.0, so the forward value stays exactly 0 or 1


class Router(nn.Module):
    """One linear map d -> 1 without bias, fp32, zero at birth: sigmoid(0) = 0.5 >= 0.5, so it skips nothing yet."""

    def __init__(self, dim: int, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, dtype=torch.float32, device=device))
        cut = torch.zeros((), dtype=torch.float32, device=device)  # logit(threshold)
        self.register_buffer("cut", cut, persistent=False)
        self.running: Callable | None = None  # (z, starts, cut, past) -> cuts for logits z in place of `cut`, and past

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pooled sequences (B,D) -> (B,) or of tokens (B,T,D) -> (B,T), fp32."""
        return F.linear(x.float(), self.weight).squeeze(-1)

    def _apply(self, fn, recurse=True):
        """Follow the model to its device but stay in fp32: a bf16 router would flip gates near the cut."""
        weight, cut = self.weight.data, self.cut
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight.data, self.cut = weight.to(self.weight.device), cut.to(self.cut.device)
        return self


def routers_of(model: nn.Module) -> list[Router]:
    """All routers of a model in the order in which they are asked; found by type, never by name."""
    return [module for module in model.modules() if isinstance(module, Router)]


def capacity(gates: Tensor, real: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Share of (place, unit) pairs that execute: ONE number over all places and units.

    gates (R,B) or (R,B,T); real (B,T) marks non-pads; weights (R,) of sum 1, where places do not count alike.
    """
    if real is None or gates.dim() == 2:
        each = gates.flatten(1).mean(dim=1)  # (R,)
    else:
        each = (gates * real).flatten(1).sum(dim=1) / real.sum()
    return each.mean() if weights is None else (weights.to(each) * each).sum()


# -----------------------------------------------------------------------------
# Cuts. Files hold thresholds (scores, 0..1), code holds cuts (logits)


def cut_of(threshold: float) -> float:
    """Inverse sigmoid; 0 gives -inf (nothing is skipped), 1 gives +inf (everything is)."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}; expected a score from 0 to 1")
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold) - math.log1p(-threshold)


def threshold_of(cut: float) -> float:
    """Sigmoid of a cut."""
    return 1.0 / (1.0 + math.exp(-cut)) if abs(cut) < 700 else float(cut > 0)


def cuts_for(budget: float, calibration: dict) -> list[float]:
    """Cut of each place that realises `budget`, from {"budgets": [...], "thresholds": [[per place] per budget]}.

    Between two budgets the cuts interpolate linearly; 0 and 1 mean exactly nothing and everything. Raises ValueError
    for a budget outside 0..1 or an empty table.
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget is {budget}; expected a share from 0 (skip every routed unit) to 1 (skip none)")
    if not calibration.get("budgets"):
        raise ValueError("this router file carries no calibration table, so a budget cannot be set; leave --budget "
                         "away or tune with train.py")
    if budget in (0.0, 1.0):
        return [cut_of(1.0 - budget)] * len(calibration["thresholds"][0])
    return row_at(budget, calibration, "thresholds", cut_of)


def row_at(budget: float, calibration: dict, name: str, value: Callable = float) -> list[float]:
    """The row of a table at a budget: the values of the entries at the nearest ones below and above, interpolated."""
    rows = dict(zip(calibration["budgets"], calibration[name]))
    low, high, part = around(rows, budget)
    return [between(value(a), value(b), part) for a, b in zip(rows[low], rows[high])]


def around(points: Iterable[float], budget: float) -> tuple[float, float, float]:
    """The nearest of some shares below and above a budget, and how far between them it lies."""
    points = sorted(points)
    low = points[max(bisect_right(points, budget) - 1, 0)]
    high = points[min(bisect_left(points, budget), len(points) - 1)]
    return low, high, 0.0 if high == low else (budget - low) / (high - low)


def between(a: float, b: float, share: float) -> float:
    """a + share (b - a), and a where an end is infinite."""
    return a if a == b or math.isinf(a) or math.isinf(b) else a + share * (b - a)


def set_cuts(model: nn.Module, cuts: float | list[float]) -> None:
    """One cut for all routers, or one for each in order of their places."""
    routers = routers_of(model)
    cuts = cuts if isinstance(cuts, list) else [cuts] * len(routers)
    if len(routers) != len(cuts):
        raise ValueError(f"found {len(cuts)} cuts for {len(routers)} routers; expected one for each")
    for router, cut in zip(routers, cuts):
        router.cut.fill_(cut)


def fill_budget(margins: Tensor, weights: Tensor, budget: float) -> Tensor:
    """Gates (R,B) of sequences that each run every place that still fits the budget, by margin (R,B), largest first.

    weights (R,) of sum 1: what a place counts. No sequence runs more than the budget, none could run one place more.
    """
    gates, weights = torch.zeros_like(margins), weights.to(margins.device, torch.float64)
    left = weights.new_full(margins.shape[1:], budget + 1e-6)  # (B,): for sums that are off by rounding
    for place in margins.argsort(dim=0, descending=True, stable=True):  # (B,)
        runs = weights[place] <= left
        left = left - weights[place] * runs
        gates.scatter_(0, place[None], runs[None].to(gates))
    return gates


# -----------------------------------------------------------------------------
# The router file: the official code's tensor names and shapes, and all that is needed to refuse a wrong base


@dataclass
class RouterMeta:
    """What a router file says of its routers, as JSON in its metadata."""

    routing: RouterConfig
    thresholds: list[float]
    base_fingerprint: str
    calibration: dict = field(default_factory=dict)
    recipe: str = ""
    step: int = 0
    config: dict = field(default_factory=dict)
    orders: dict[str, list[str]] = field(default_factory=dict)  # static lists: names of places, first to skip in front
    loads: list[float] | None = None  # of experts: each one's share of the pairs, as measured
    report: list[dict] = field(default_factory=list)  # by budget: held-out losses of the routers and their controls

    def __post_init__(self):
        kinds = dict(base_fingerprint=str, calibration=dict, recipe=str, step=int, config=dict, orders=dict)
        kinds["report"] = list
        for name, kind in kinds.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r:.60}; expected a {kind.__name__}")
        if not all(isinstance(order, list) for order in self.orders.values()):
            raise ValueError(f"orders is {self.orders!r:.60}; expected a list of places for each name")
        if not all(isinstance(row, dict) for row in self.report):
            raise ValueError(f"report is {self.report!r:.60}; expected an object for each budget")
        _check_shares("thresholds", self.thresholds, len(self.routing.places))
        if self.loads is not None:
            _check_shares("loads", self.loads, len(self.routing.places))
        budgets = self.calibration.get("budgets", [])
        rows = self.calibration.get("thresholds", [])
        shares = self.calibration.get("shares", rows)
        lists = all(isinstance(part, list) for part in (budgets, rows, shares))
        if not lists or not len(budgets) == len(rows) == len(shares):
            raise ValueError(f"calibration is {self.calibration!r:.60}; expected thresholds and shares for each of its "
                             "budgets")
        for row in [budgets, *rows, *shares]:
            _check_shares("a row of the calibration", row)

    def to_json(self) -> str:
        routing, rest = asdict(self.routing), {**vars(self)}
        del rest["routing"]
        return json.dumps({"format": FILE_FORMAT, "granularity": self.routing.granularity, **routing, **rest})

    @classmethod
    def from_json(cls, text: str) -> "RouterMeta":
        """Read format 2, or 1. Raises ValueError with the reason."""
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
        if not isinstance(meta, dict) or meta.get("format") not in (FILE_FORMAT, OLD_FORMAT):
            found = meta.get("format") if isinstance(meta, dict) else meta
            raise ValueError(f"has format {found!r:.60}; this code reads {FILE_FORMAT!r} and {OLD_FORMAT!r}")
        old = meta["format"] == OLD_FORMAT
        needed = ("granularity", "layers", "pool", "kv") if old else ("places", "unit", "pool", "kv", "reads")
        if missing := [repr(name) for name in (*needed, "thresholds", "base_fingerprint") if name not in meta]:
            raise ValueError(f"lacks {', '.join(missing)}")
        meta = _upgraded(meta) if old else meta
        places = meta["places"]
        if not isinstance(places, list) or not all(map(_is_place, places)):
            raise ValueError(f"places is {places!r:.60}; expected a list of [layer, target, null]")
        routing, own = ({f.name: meta[f.name] for f in fields(kind) if f.name in meta} for kind in (RouterConfig, cls))
        routing = RouterConfig(**routing)
        read = cls(**own | {"routing": routing})
        read.orders = {name: list(map(str, order)) for name, order in read.orders.items()}
        if old:
            return read
        if meta.get("granularity", routing.granularity) != routing.granularity:
            raise ValueError(f"granularity is {meta['granularity']!r:.60}; its places make {routing.granularity!r}")
        for row in [row for name in ("thresholds", "shares") for row in read.calibration.get(name, ())]:
            _check_shares("a row of the calibration", row, len(places))
        for name, order in read.orders.items():
            if sorted(order) != sorted(routing.names):
                raise ValueError(f"order {name!r} is {order!r:.60}; expected each of its places once")
        return read


def _check_shares(name: str, values, n: int | None = None) -> None:
    good = isinstance(values, list) and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    if not good or len(values) != (len(values) if n is None else n):
        raise ValueError(f"{name} is {values!r:.60}; expected {n or 'only'} numbers from 0 to 1")


def _is_place(place) -> bool:
    if not isinstance(place, list) or len(place) != 3:
        return False
    layer, target, expert = place
    return type(layer) is int and isinstance(target, str) and (expert is None or type(expert) is int)


def _upgraded(meta: dict) -> dict:
    """Metadata of format 1 as format 2 has them. It named a granularity, the layers of its target, and beside those of
    `both` the layers of MLPs."""
    granularity, layers, mlps = meta["granularity"], meta["layers"], meta.get("mlp_layers", [])
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r:.60}; expected one of {', '.join(GRANULARITIES)}")
    if not isinstance(layers, list) or not isinstance(mlps, list):
        raise ValueError(f"layers is {layers!r:.60} and mlp_layers {mlps!r:.60}; expected lists of numbers")
    target, unit = granularity.split("_")
    places = [[layer, TARGETS[target][0], None] for layer in layers] + [[layer, "mlp", None] for layer in mlps]
    return meta | {"places": places, "unit": unit, "reads": "own"}


def _key(place: Place, routing: RouterConfig) -> str:
    """Tensor of a place. The official code knows one router per layer; an MLP's beside attentions' has its own name,
    and so has an expert's."""
    if place.target == "expert":
        return f"model.layers.{place.layer}.experts.{place.expert}.router.weight"
    second = place.target == "mlp" and routing.target != "mlp"
    return f"model.layers.{place.layer}.{'mlp_router' if second else 'router'}.weight"


def save_routers(path: str | Path, model: nn.Module, meta: RouterMeta) -> None:
    """Write routers.safetensors atomically: tensors (1,D) fp32, metadata {"router_tuning": JSON}."""
    routers, places = routers_of(model), meta.routing.places
    assert len(routers) == len(places) == len(meta.thresholds)
    tensors = {_key(place, meta.routing): router.weight.detach().cpu().contiguous()
               for place, router in zip(places, routers)}
    data = save(tensors, metadata={"router_tuning": meta.to_json()})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_router_file(path: str | Path, *, official: bool = False) -> tuple[dict[str, Tensor], RouterMeta | None]:
    """Tensors by key, and the metadata (None for an official file, which has none).

    Raises FileNotFoundError or ValueError with the reason and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no router file at {path}; expected the routers.safetensors that train.py writes: "
                                "check --routers")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("router_tuning")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a router file ({error}); it is truncated or something else: tune "
                         "again or copy it again") from None
    if text is None and not official:
        raise ValueError(f"{path} carries no router_tuning metadata, so its granularity and base are unknown; for a "
                         "file of the official code use `train.py --import_official=FILE --granularity=...`")
    for key, tensor in tensors.items():
        if not re.fullmatch(r"model\.layers\.(0|[1-9]\d*)\.(mlp_|experts\.(0|[1-9]\d*)\.)?router\.weight", key):
            raise ValueError(f"{path} holds a tensor {key!r}; expected only names like "
                             "'model.layers.14.router.weight': this is not a router file")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} holds {tensor.dtype} numbers; expected floating point ones: the file is "
                             "damaged, tune again or copy it again")
    if not tensors:
        raise ValueError(f"{path} holds no router; expected tensors named like 'model.layers.14.router.weight'")
    if text is None:
        return tensors, None
    try:
        meta = RouterMeta.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata cannot be used: {error}; expected what train.py writes: tune again or "
                         "copy it again") from None
    if meta.routing.target == "mlp":  # format 1 named them so where `both` had chosen MLPs alone
        tensors = {key.replace(".mlp_router.", ".router."): tensor for key, tensor in tensors.items()}
    return tensors, meta


def load_router_weights(path: str | Path, model: nn.Module, tensors: dict[str, Tensor], routing: RouterConfig) -> None:
    """Copy a file's tensors into a model's routers; a missing or extra place or a wrong shape is refused by name."""
    keys = [_key(place, routing) for place in routing.places]
    if set(tensors) != set(keys):
        missing = sorted(set(keys) - set(tensors))
        extra = sorted(set(tensors) - set(keys))
        raise ValueError(f"{path} does not match its own list of routed layers (missing {missing}, extra {extra}); the "
                         "file is damaged: tune again")
    for key, router in zip(keys, routers_of(model)):
        tensor = tensors[key]
        if tuple(tensor.shape) != tuple(router.weight.shape):
            raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, this model needs "
                             f"{tuple(router.weight.shape)}; it belongs to a model of another width: load its own base")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the tuning run diverged: tune again with a smaller "
                             "--lr")
        with torch.no_grad():
            router.weight.copy_(tensor)


def check_fingerprint(path: str | Path, found: str, *known: str) -> None:
    """Refuse a router file that was tuned beside another base model. known: this base's fingerprint, others it has."""
    if found not in known:
        raise ValueError(f"{path} was tuned on a base with fingerprint {found}, this base has {known[0]}; load the "
                         "base it was tuned on, or tune again with train.py --model=THIS_BASE (or write "
                         f'"parent": "{found}" into the config.json of a base that was made from that one)')


# -----------------------------------------------------------------------------
# What a router file holds, in words


def describe(path: str | Path) -> list[str]:
    """Lines about a router file. Raises FileNotFoundError or ValueError as `read_router_file` does."""
    tensors, meta = read_router_file(path)
    routing, budgets = meta.routing, meta.calibration.get("budgets", [])
    static = meta.calibration.get("static", {})
    norms = [f"{tensors[key].norm().item():.3g}" for key in (_key(place, routing) for place in routing.places)]
    cuts = "none" if not budgets else f"{len(budgets)}, from {min(budgets):g} to {max(budgets):g}"
    lines = [
        f"base       {meta.base_fingerprint}",
        f"routers    {len(routing.places)} x {next(iter(tensors.values())).shape[-1]}, {routing.granularity}, pool "
        f"{routing.pool}, kv {routing.kv}, reads {routing.reads}",
        f"places     {', '.join(routing.names)}",
        f"norms      {', '.join(norms)}",
        f"recipe     {meta.recipe or 'unknown'}, step {meta.step}",
        f"thresholds {', '.join(f'{threshold:.3f}' for threshold in meta.thresholds)}",
        f"budgets    {cuts}" + (f"; a static list at {len(static)} of them" if static else ""),
    ]
    lines += [f"list       {name}: {', '.join(order)}" for name, order in meta.orders.items()]
    for row in meta.report:
        losses = [f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float) and name != "budget"]
        lines.append(f"held out   budget {row.get('budget')}: {', '.join(losses)}")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python router.py FILE (a routers.safetensors that train.py wrote)")
    try:
        print("\n".join(describe(sys.argv[1])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
