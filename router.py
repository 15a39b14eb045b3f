"""Routers of Router-Tuning: score, gate, pooling, capacity, and the router file.

A router is one linear map d -> 1 without bias, kept in fp32, beside a layer of a frozen model. Its logit z = w . x decides whether the
layer's target (attention, MLP or the whole block) runs: gate = sigmoid(z) >= threshold, held here as z >= cut with
cut = logit(threshold). The score is never multiplied into the output; the straight-through estimator hands the gate's gradient to it.
This module knows nothing of any Transformer: it works on every nn.Module that contains `Router`s, and can be copied alone.
Source: Router-Tuning, arXiv 2410.13184, eq. 1-4 and 10.

Legend: B batch, T tokens, D width, R routers.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

TARGETS = ("attn", "mlp", "block")
UNITS = ("sequence", "token")
GRANULARITIES = (*(f"{target}_{unit}" for target in TARGETS for unit in UNITS), "both_sequence")
FILE_FORMAT = "router-tuning/1"


class Place(NamedTuple):
    """Where one router stands, and what it gates: attn, mlp or block."""

    layer: int
    target: str


@dataclass(frozen=True)
class RouterConfig:
    """Which layers own a router and what it gates. `pool`: what a sequence router averages over; `kv`: what a skipped token leaves in the cache.

    Granularity both_sequence has a router beside the attention of each of `layers` and one beside the MLP of each of `mlp_layers`, all under one
    budget, which counts compute there.
    """

    granularity: str = "attn_sequence"
    layers: tuple[int, ...] = ()  # ascending, 0-based
    pool: str = "prompt"  # "prompt": before the answer, no look-ahead; "all": the whole row, as the paper pools while training
    kv: str = "routed"  # "routed": a skipped token leaves no keys and values; "all" (attn_token only): it leaves them
    mlp_layers: tuple[int, ...] = ()  # both_sequence alone

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "mlp_layers", tuple(self.mlp_layers))
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {self.granularity!r}; expected one of {', '.join(GRANULARITIES)}")
        if self.pool not in ("prompt", "all"):
            raise ValueError(f"pool is {self.pool!r}; expected 'prompt' or 'all'")
        if self.kv not in ("routed", "all") or (self.kv == "all" and self.granularity != "attn_token"):
            raise ValueError(f"kv is {self.kv!r} with granularity {self.granularity!r}; expected 'routed', or 'all' with 'attn_token' alone")
        if self.mlp_layers and self.target != "both":
            raise ValueError(f"mlp_layers is {list(self.mlp_layers)} with granularity {self.granularity!r}; expected it with 'both_sequence' alone")
        for layers in (self.layers, self.mlp_layers):
            if list(layers) != sorted(set(layers)) or any(layer < 0 for layer in layers):
                raise ValueError(f"routed layers are {list(layers)}; expected ascending 0-based layer numbers, each once")

    @property
    def target(self) -> str:
        return self.granularity.split("_")[0]

    @property
    def unit(self) -> str:
        return self.granularity.split("_")[1]

    @property
    def places(self) -> tuple[Place, ...]:
        """All routers in the order in which they are asked; gates, logits, thresholds and capacities have one row for each."""
        if self.target != "both":
            return tuple(Place(layer, self.target) for layer in self.layers)
        return tuple(sorted([*(Place(layer, "attn") for layer in self.layers), *(Place(layer, "mlp") for layer in self.mlp_layers)]))

    @property
    def names(self) -> tuple[str, ...]:
        """A word for each place: '5', the layer; for both_sequence '5.attn' or '5.mlp'."""
        return tuple(f"{place.layer}.{place.target}" if self.target == "both" else str(place.layer) for place in self.places)

    def at(self, names: list[str]) -> "RouterConfig":
        """The same with routers at the places of these names."""
        if self.target != "both":
            return replace(self, layers=tuple(sorted(map(int, names))))
        layers = {kind: tuple(sorted(int(name.split(".")[0]) for name in names if name.endswith(kind))) for kind in ("attn", "mlp")}
        return replace(self, layers=layers["attn"], mlp_layers=layers["mlp"])


def deep_layers(n: int, n_layers: int) -> tuple[int, ...]:
    """The deepest n layers except the last one: the paper's choice (arXiv 2410.13184, section 4)."""
    if not 1 <= n <= n_layers - 1:
        raise ValueError(f"deep:{n} asks for {n} layers; a model of {n_layers} layers has 1 to {n_layers - 1} before its last one")
    return tuple(range(n_layers - 1 - n, n_layers - 1))


def parse_layers(text: str, n_layers: int) -> tuple[str, int | tuple[int, ...]]:
    """Read a `--layers` setting: 'deep:16' and 'auto:16' give (kind, n); '3,5,7' or '3-7' or 'all' give ('list', layers)."""
    kind, _, number = text.partition(":")
    if kind in ("deep", "auto") and number.isdigit():
        if not 1 <= int(number) <= n_layers:
            raise ValueError(f"layers is {text!r}; this model has {n_layers} layers: ask for 1 to {n_layers}")
        return kind, int(number)
    if text == "all":
        return "list", tuple(range(n_layers))
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
        layers = sorted({layer for span in spans for layer in range(span[0], span[-1] + 1)})
    except ValueError:
        raise ValueError(f"layers is {text!r}; expected deep:N, auto:N, all, or numbers such as 3,5,8-12") from None
    if not layers or layers[-1] >= n_layers:
        raise ValueError(f"layers is {text!r}; this model has layers 0 to {n_layers - 1}")
    return "list", tuple(layers)


def logit(score: float) -> float:
    """Inverse sigmoid of a threshold; 0 gives -inf (every unit executes), anything above 1 - 1e-16 gives +inf (none does)."""
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"threshold is {score}; expected a score from 0 to 1")
    return -math.inf if score == 0.0 else math.inf if score == 1.0 else math.log(score) - math.log1p(-score)


def pool(x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each row's first `lengths` tokens, in fp32. x (B,T,D), lengths (B,) or None for all T -> (B,D). Pads never count."""
    if lengths is None:
        return x.mean(dim=1, dtype=torch.float32)  # (B,T,D) -> (B,D)
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B,T)
    weight = real.float() / lengths[:, None]  # (B,T)
    return torch.bmm(weight[:, None], x.float().masked_fill(~real[..., None], 0.0)).squeeze(1)  # (B,1,T) x (B,T,D) -> (B,D)


def ste_gate(z: torch.Tensor, cut: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Gate z >= cut as 0.0/1.0; its gradient goes unchanged to the score sigmoid(z) (straight-through estimator, eq. 4). Any shape."""
    hard = (z >= cut).to(z.dtype)
    if not (torch.is_grad_enabled() and z.requires_grad):
        return hard
    score = torch.sigmoid(z)
    return hard + (score - score.detach())  # the bracket is exactly 0.0, so the forward value stays exactly 0 or 1


class Router(nn.Module):
    """One linear map d -> 1 without bias, fp32, zero at birth: sigmoid(0) = 0.5 >= 0.5, so a new router executes everything."""

    def __init__(self, dim: int, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim, dtype=torch.float32, device=device))
        self.register_buffer("cut", torch.zeros((), dtype=torch.float32, device=device), persistent=False)  # logit(threshold)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of pooled sequences (B,D) -> (B,) or of tokens (B,T,D) -> (B,T), fp32."""
        return F.linear(x.float(), self.weight).squeeze(-1)

    def _apply(self, fn, recurse=True):
        """Follow the model to its device but stay in fp32: a bf16 router could not be tuned, and would flip gates near the cut."""
        weight, cut = self.weight.data, self.cut
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight.data, self.cut = weight.to(self.weight.device), cut.to(self.cut.device)
        return self


def routers_of(model: nn.Module) -> list[Router]:
    """All routers of a model in the order in which they are asked; found by type, never by name."""
    return [module for module in model.modules() if isinstance(module, Router)]


def freeze_all_but_routers(model: nn.Module) -> tuple[int, int]:
    """Let only the routers require gradients. Returns the numbers of (trainable, frozen) parameters."""
    model.requires_grad_(False)
    for router in routers_of(model):
        router.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def capacity(gates: torch.Tensor, real: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Share of (place, unit) pairs that execute: ONE number over all places and units. gates (R,B) or (R,B,T); real (B,T) marks non-pads;
    weights (R,) of sum 1, where places do not count alike (`Transformer.place_weights`)."""
    each = gates.flatten(1).mean(dim=1) if real is None or gates.dim() == 2 else (gates * real).flatten(1).sum(dim=1) / real.sum()  # (R,)
    return each.mean() if weights is None else (weights.to(each) * each).sum()


# ---------------------------------------------------------------------------------------------------------------------------------
# Calibration: one router, every budget. A table of (budget, threshold per routed layer); between two entries the logits interpolate.


def thresholds_for(budget: float, calibration: dict) -> list[float]:
    """Threshold per routed layer that realises `budget`, from a table {"budgets": [...], "thresholds": [[per layer] per budget]}.

    Between two budgets the cuts interpolate linearly in logit space; 0 and 1 mean exactly nothing and everything.
    Raises ValueError for a budget outside 0..1 or an empty table.
    """
    if not 0.0 <= budget <= 1.0:
        raise ValueError(f"budget is {budget}; expected a share from 0 (skip every routed unit) to 1 (skip none)")
    budgets, table = calibration.get("budgets", []), calibration.get("thresholds", [])
    n_layers = len(table[0]) if table else 0
    if budget in (0.0, 1.0) and n_layers:
        return [1.0 - budget] * n_layers
    if not budgets:
        raise ValueError("this router file carries no calibration table, so a budget cannot be set; leave --budget away or tune with train.py")
    points = sorted(zip(budgets, table))
    low = max((p for p in points if p[0] <= budget), key=lambda p: p[0], default=points[0])
    high = min((p for p in points if p[0] >= budget), key=lambda p: p[0], default=points[-1])
    share = 0.0 if high[0] == low[0] else (budget - low[0]) / (high[0] - low[0])
    thresholds = []
    for a, b in zip(low[1], high[1]):
        cut_a, cut_b = logit(a), logit(b)
        cut = cut_a if a == b or math.isinf(cut_a) or math.isinf(cut_b) else cut_a + share * (cut_b - cut_a)
        thresholds.append(1.0 / (1.0 + math.exp(-cut)) if abs(cut) < 700 else float(cut > 0))
    return thresholds


def quantile_cuts(z: torch.Tensor, budgets: list[float], weights: torch.Tensor | None = None) -> list[float]:
    """For each budget the cut that lets this share of the logits z (R,...) through (z >= cut), midway between its neighbours. weights (R,): what a
    logit of each place counts; None: all the same."""
    ordered, index = z.flatten().double().sort(descending=True)
    weight = torch.ones_like(ordered) if weights is None else weights.double().repeat_interleave(z[0].numel())[index]
    middles = weight.cumsum(0) - weight / 2  # what is through when half of this logit is
    cuts = []
    for k in torch.searchsorted(middles, torch.tensor(budgets, dtype=torch.float64) * weight.sum(), right=True).tolist():
        cuts.append(math.inf if k == 0 else -math.inf if k == len(ordered) else ((ordered[k - 1] + ordered[k]) / 2).item())
    return cuts


def quantile_cut(z: torch.Tensor, budget: float, weights: torch.Tensor | None = None) -> float:
    """The cut of `quantile_cuts` for one budget."""
    return quantile_cuts(z, [budget], weights)[0]


def closed_shares(order: list[int], weights: torch.Tensor, closed: float) -> list[float]:
    """What share of each place (R) is off when the first ones of an order are off for everyone, so that `closed` of all `weights` (R,) is: 1 for those,
    a fraction for the next one, 0 for the rest."""
    shares = [0.0] * len(order)
    for place in order:
        share = min(max(closed / weights[place].item(), 0.0), 1.0)
        shares[place] = 0.0 if share < 1e-6 else 1.0 if share > 1 - 1e-6 else share
        closed -= weights[place].item()
    return shares


def closed_places(order: list[int], weights: torch.Tensor, closed: float) -> tuple[int, ...]:
    """The places that `closed_shares` closes, to the nearest whole one, ascending."""
    return tuple(place for place, share in enumerate(closed_shares(order, weights, closed)) if share >= 0.5)


def set_thresholds(model: nn.Module, thresholds: list[float]) -> None:
    """Put one threshold (score units, 0..1) on each router, in order of their places."""
    routers = routers_of(model)
    assert len(routers) == len(thresholds)
    for router, threshold in zip(routers, thresholds):
        router.cut.fill_(logit(threshold))


# ---------------------------------------------------------------------------------------------------------------------------------
# The router file: the official code's tensor names and shapes, plus everything needed to refuse a wrong base, as JSON in the metadata


def _key(name: str) -> str:
    """Tensor of the place of this name. The official code knows one router per layer; the second one of both_sequence has a name of its own."""
    layer, _, target = name.partition(".")
    return f"model.layers.{layer}.{'mlp_router' if target == 'mlp' else 'router'}.weight"


def save_routers(path: str | Path, model: nn.Module, routing: RouterConfig, *, fingerprint: str, thresholds: list[float], calibration: dict | None = None,
                 recipe: str = "", step: int = 0, config: dict | None = None, orders: dict[str, list[str]] | None = None) -> None:
    """Write routers.safetensors atomically. Tensors `model.layers.{i}.router.weight` (1,D) fp32 (both_sequence: `mlp_router` beside the MLP);
    metadata {"router_tuning": JSON}.

    orders: static alternatives by name, each the names of all places, the one to drop first in front.
    """
    routers = routers_of(model)
    assert len(routers) == len(routing.places) == len(thresholds)
    meta = {"format": FILE_FORMAT, **asdict(routing), "thresholds": thresholds, "calibration": calibration or {}, "recipe": recipe, "step": step,
            "base_fingerprint": fingerprint, "config": config or {}, "orders": orders or {}}
    tensors = {_key(name): router.weight.detach().cpu().contiguous() for name, router in zip(routing.names, routers)}
    data = save(tensors, metadata={"router_tuning": json.dumps(meta)})
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


def read_router_file(path: str | Path, *, official: bool = False) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors by name of the place, and the metadata ({} for an official file). Raises FileNotFoundError or ValueError with reason and mend."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no router file at {path}; expected the routers.safetensors that train.py writes: check --routers")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("router_tuning", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a router file ({error}); it is truncated or something else: tune again or copy it again") from None
    if meta and meta.get("format") != FILE_FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')!r}; this code reads {FILE_FORMAT!r}")
    if not meta and not official:
        raise ValueError(f"{path} carries no router_tuning metadata, so its granularity and base are unknown; for a file of the official code "
                         "use `train.py --import_official=FILE --granularity=...` to turn it into ours")
    both = meta.get("granularity", "").startswith("both")
    weights = {}
    for key, tensor in tensors.items():
        layer = key.split(".")[2] if key.count(".") == 4 else ""
        names = (f"{layer}.attn", f"{layer}.mlp") if both else (layer,)
        name = next((name for name in names if layer.isdigit() and key == _key(name)), None)
        if name is None:
            raise ValueError(f"{path} holds a tensor {key!r}; expected only names like {_key('14')!r}: this is not a router file")
        weights[name] = tensor
    if not weights:
        raise ValueError(f"{path} holds no router; expected tensors named like {_key('14')!r}")
    return weights, meta


def load_router_weights(path: str | Path, model: nn.Module, weights: dict[str, torch.Tensor], routing: RouterConfig) -> None:
    """Copy the tensors of a router file into a model's routers; a missing or extra layer or a wrong shape is refused by name."""
    if set(weights) != set(routing.names):
        missing, extra = sorted(set(routing.names) - set(weights)), sorted(set(weights) - set(routing.names))
        raise ValueError(f"{path} does not match its own list of routed layers (missing {missing}, extra {extra}); the file is damaged: tune again")
    for name, router in zip(routing.names, routers_of(model)):
        tensor = weights[name]
        if tuple(tensor.shape) != tuple(router.weight.shape):
            raise ValueError(f"{path}: {_key(name)} has shape {tuple(tensor.shape)}, this model needs {tuple(router.weight.shape)}; "
                             "it belongs to a model of another width: load it with its own base")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {_key(name)} holds NaN or infinity; the tuning run diverged: tune again with a smaller --lr")
        with torch.no_grad():
            router.weight.copy_(tensor)


def check_fingerprint(path: str | Path, found: str, expected: str) -> None:
    """Refuse a router file that was tuned beside another base model."""
    if found != expected:
        raise ValueError(f"{path} was tuned on a base with fingerprint {found}, this base has {expected}; load the base it was tuned on, or tune again with "
                         "train.py --model=THIS_BASE")
