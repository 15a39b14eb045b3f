"""Routers of Router-Tuning: score, gate, pooling, capacity, and the router file.

A router is one linear map d -> 1 without bias, kept in fp32, beside a layer of a frozen model. Its logit z = w . x decides whether the
layer's target (attention, MLP or the whole block) runs: gate = sigmoid(z) >= threshold, held here as z >= cut with
cut = logit(threshold). The score is never multiplied into the output; the straight-through estimator hands the gate's gradient to it.
This module knows nothing of any Transformer: it works on every nn.Module that contains `Router`s, and can be copied alone.
Source: Router-Tuning, arXiv 2410.13184, eq. 1-4 and 10.

Legend: B batch, T tokens, D width, R routed layers.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

TARGETS = ("attn", "mlp", "block")
UNITS = ("sequence", "token")
GRANULARITIES = tuple(f"{target}_{unit}" for target in TARGETS for unit in UNITS)
FILE_FORMAT = "router-tuning/1"


@dataclass(frozen=True)
class RouterConfig:
    """Which layers own a router and what it gates. `pool`: what a sequence router averages over; `kv`: what a skipped token leaves in the cache."""

    granularity: str = "attn_sequence"
    layers: tuple[int, ...] = ()  # ascending, 0-based
    pool: str = "prompt"  # "prompt": before the answer, no look-ahead; "all": the whole row, as the paper pools while training
    kv: str = "routed"  # "routed": a skipped token leaves no keys and values; "all" (attn_token only): it leaves them

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {self.granularity!r}; expected one of {', '.join(GRANULARITIES)}")
        if self.pool not in ("prompt", "all"):
            raise ValueError(f"pool is {self.pool!r}; expected 'prompt' or 'all'")
        if self.kv not in ("routed", "all") or (self.kv == "all" and self.granularity != "attn_token"):
            raise ValueError(f"kv is {self.kv!r} with granularity {self.granularity!r}; expected 'routed', or 'all' with 'attn_token' alone")
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"routed layers are {list(self.layers)}; expected ascending 0-based layer numbers, each once")

    @property
    def target(self) -> str:
        return self.granularity.split("_")[0]

    @property
    def unit(self) -> str:
        return self.granularity.split("_")[1]


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
    """All routers of a model in layer order; found by type, never by name."""
    return [module for module in model.modules() if isinstance(module, Router)]


def freeze_all_but_routers(model: nn.Module) -> tuple[int, int]:
    """Let only the routers require gradients. Returns the numbers of (trainable, frozen) parameters."""
    model.requires_grad_(False)
    for router in routers_of(model):
        router.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters()) - trainable


def capacity(gates: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Share of (layer, unit) pairs that execute: ONE number over all layers and units. gates (R,B) or (R,B,T); real (B,T) marks non-pads."""
    if real is None or gates.dim() == 2:
        return gates.mean()
    return (gates * real).sum() / (gates.shape[0] * real.sum())


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


def quantile_cuts(z: torch.Tensor, budgets: list[float]) -> list[float]:
    """For each budget the cut that lets this share of the logits z (any shape) through (z >= cut), midway between its neighbours."""
    ordered = z.flatten().double().sort(descending=True).values
    cuts = []
    for k in (round(budget * len(ordered)) for budget in budgets):
        cuts.append(math.inf if k == 0 else -math.inf if k == len(ordered) else ((ordered[k - 1] + ordered[k]) / 2).item())
    return cuts


def quantile_cut(z: torch.Tensor, budget: float) -> float:
    """The cut of `quantile_cuts` for one budget."""
    return quantile_cuts(z, [budget])[0]


def set_thresholds(model: nn.Module, thresholds: list[float]) -> None:
    """Put one threshold (score units, 0..1) on each router in layer order."""
    routers = routers_of(model)
    assert len(routers) == len(thresholds)
    for router, threshold in zip(routers, thresholds):
        router.cut.fill_(logit(threshold))


# ---------------------------------------------------------------------------------------------------------------------------------
# The router file: the official code's tensor names and shapes, plus everything needed to refuse a wrong base, as JSON in the metadata


def _key(layer: int) -> str:
    return f"model.layers.{layer}.router.weight"


def save_routers(path: str | Path, model: nn.Module, routing: RouterConfig, *, fingerprint: str, thresholds: list[float], calibration: dict | None = None,
                 recipe: str = "", step: int = 0, config: dict | None = None, orders: dict[str, list[int]] | None = None) -> None:
    """Write routers.safetensors atomically. Tensors `model.layers.{i}.router.weight` (1,D) fp32; metadata {"router_tuning": JSON}.

    orders: static alternatives by name, each all routed layers, the one to drop first in front.
    """
    routers = routers_of(model)
    assert len(routers) == len(routing.layers) == len(thresholds)
    meta = {"format": FILE_FORMAT, **asdict(routing), "thresholds": thresholds, "calibration": calibration or {}, "recipe": recipe, "step": step,
            "base_fingerprint": fingerprint, "config": config or {}, "orders": orders or {}}
    tensors = {_key(layer): router.weight.detach().cpu().contiguous() for layer, router in zip(routing.layers, routers)}
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


def read_router_file(path: str | Path, *, official: bool = False) -> tuple[dict[int, torch.Tensor], dict]:
    """Tensors by layer number, and the metadata ({} for an official file). Raises FileNotFoundError or ValueError with reason and mend."""
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
    weights = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if len(parts) != 5 or not parts[2].isdigit() or name != _key(int(parts[2])):
            raise ValueError(f"{path} holds a tensor {name!r}; expected only names like {_key(14)!r}: this is not a router file")
        weights[int(parts[2])] = tensor
    if not weights:
        raise ValueError(f"{path} holds no router; expected tensors named like {_key(14)!r}")
    return dict(sorted(weights.items())), meta


def load_router_weights(path: str | Path, model: nn.Module, weights: dict[int, torch.Tensor], routing: RouterConfig) -> None:
    """Copy the tensors of a router file into a model's routers; a missing or extra layer or a wrong shape is refused by name."""
    if set(weights) != set(routing.layers):
        missing, extra = sorted(set(routing.layers) - set(weights)), sorted(set(weights) - set(routing.layers))
        raise ValueError(f"{path} does not match its own list of routed layers (missing {missing}, extra {extra}); the file is damaged: tune again")
    for layer, router in zip(routing.layers, routers_of(model)):
        tensor = weights[layer]
        if tuple(tensor.shape) != tuple(router.weight.shape):
            raise ValueError(f"{path}: {_key(layer)} has shape {tuple(tensor.shape)}, this model needs {tuple(router.weight.shape)}; "
                             "it belongs to a model of another width: load it with its own base")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {_key(layer)} holds NaN or infinity; the tuning run diverged: tune again with a smaller --lr")
        with torch.no_grad():
            router.weight.copy_(tensor)


def check_fingerprint(path: str | Path, found: str, expected: str) -> None:
    """Refuse a router file that was tuned beside another base model."""
    if found != expected:
        raise ValueError(f"{path} was tuned on a base with fingerprint {found}, this base has {expected}; load the base it was tuned on, or tune again with "
                         "train.py --model=THIS_BASE")
