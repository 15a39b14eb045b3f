"""Llama, Mistral and Qwen in one file, with MindSkip: routers decide what runs, and what is skipped costs nothing.

One `Transformer` serves Llama 2/3/3.1/3.2, Mistral, Qwen2/2.5 and Qwen3; families differ by fields of ModelConfig only. Each routed
layer owns a Router (router.py), or two. Three route modes compute the same function:
    off     dense: routers are ignored
    mask    everything is computed, then multiplied by the gate: differentiable, static shapes, for training
    gather  only what executes is computed and cached: no projections, no scores, no keys and values for what is skipped
Where work is skipped: `Block.gather`, by the choice of `Block.choose`: `Rows` (one decision per sequence) or `Picked` (one per token).
No module keeps state in forward; what must persist lives in the KVCache, which the caller owns. Needs torch, safetensors and router.py.

Legend: B batch rows, T tokens, D width, H heads, K kv heads, h head width, G = H/K, V vocabulary, S cache slots, R routers, n packed tokens.
"""

import bisect
import copy
import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from router import (Router, RouterConfig, check_fingerprint, load_router_weights, pool, read_router_file, routers_of, set_thresholds, ste_gate,
                    thresholds_for)

ROUTES = ("off", "mask", "gather")
ROPE_TYPES = ("linear", "llama3", "yarn")
ROWS_MULTIPLE = 64  # number of picked tokens is made a multiple of it in bfloat16 on a CPU
QUERY_BLOCK = 256  # queries a masked attention handles at once: bounds the mask's memory and skips keys that no query of the block can see


@dataclass(frozen=True)
class ModelConfig:
    """Every size of a model, as it stands in a checkpoint's config.json."""

    family: str  # llama, mistral, qwen2, qwen3: a label for export and chat form, never a switch in the computation
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None  # {"type": "linear" | "llama3" | "yarn", and the keys of that type}
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head's query and key
    sliding_window: int | None = None  # a query sees itself and the sliding_window - 1 tokens before it
    window_layers: tuple[int, ...] | None = None  # layers with the window; None: all of them
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.window_layers is not None:
            object.__setattr__(self, "window_layers", tuple(self.window_layers))
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"config: {name} is {getattr(self, name)!r}; expected a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: {self.n_heads} heads cannot share {self.n_kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even one")
        if self.rope_scaling is not None and self.rope_scaling.get("type") not in ROPE_TYPES:
            raise ValueError(f"config: rope_scaling type is {self.rope_scaling.get('type')!r}; supported: {', '.join(ROPE_TYPES)}, or null")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"config: sliding_window is {self.sliding_window}; expected a positive integer or null")

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Build from a JSON object; an unknown or missing key is refused by name."""
        known = {field.name for field in fields(cls)}
        required = {name for name in known if name not in cls.__dict__}  # fields without a default
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has unknown keys {unknown}; this is not a config written by convert_hf.py: convert the folder first")
        if missing := sorted(required - set(values)):
            raise ValueError(f"config lacks {missing}; this is not a config written by convert_hf.py: convert the folder first")
        return cls(**values)

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer, or None."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None


# ---------------------------------------------------------------------------------------------------------------------------------
# Rotary position embeddings, half-split layout (dimension i turns with i + h/2), as in Hugging Face checkpoints


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (h/2,) fp32 and the factor on cos and sin.

    Sources: RoPE arXiv 2104.09864; linear: arXiv 2306.15595; llama3: Llama 3.1 model card's scaled RoPE; yarn: arXiv 2309.00071.
    """
    h, scaling = config.head_dim, config.rope_scaling
    inverse = config.rope_theta ** (-torch.arange(0, h, 2, dtype=torch.float32, device="cpu") / h)
    if scaling is None:
        return inverse, 1.0
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return inverse / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_seq_len
    if scaling["type"] == "llama3":  # long wavelengths are stretched by `factor`, short ones kept, a ramp in between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        ramp = ((original * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - ramp) * inverse / factor + ramp * inverse, 1.0

    def dimension(rotations: float) -> float:  # the (fractional) pair that turns `rotations` times within the original context
        return h * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, h - 1)
    ramp = ((torch.arange(h // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)

    def temperature(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature()
    return ramp * inverse / factor + (1 - ramp) * inverse, float(attention)


class Rope(nn.Module):
    """cos and sin for given positions. The frequencies stay fp32 whatever dtype the model is moved to."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        inverse, self.attention_factor = rope_frequencies(config)
        self.register_buffer("inverse", inverse, persistent=False)

    def _apply(self, fn, recurse=True):
        exact = self.inverse
        super()._apply(fn, recurse)
        self.inverse = exact.to(self.inverse.device)
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions (...,) -> cos, sin (..., 1, h), ready to multiply (..., H, h); the first half of sin is negative."""
        angles = positions[..., None, None].float() * self.inverse  # (..., 1, h/2)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (..., H, h) by cos, sin (..., 1, h): (a, b) becomes (a cos - b sin, b cos + a sin). One temporary: pages cost more than flops here."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)


# ---------------------------------------------------------------------------------------------------------------------------------
# Cache and geometry: what a call knows before its layer loop


class LayerCache:
    """Keys and values of one layer for the rows (unit token: the tokens) that executed there. Slots grow by half, not one by one."""

    def __init__(self, max_len: int | None):
        self.max_len = max_len
        self.kept: dict[str, list[int] | None] = {}  # unit sequence, by router: batch rows whose gate is open; None: every row
        self.rows: list[int] | None = None  # batch rows whose keys and values are held here, in order; None: every row
        self.k = self.v = None  # (N, K, S, h)
        self.positions: list[list[int]] | None = None  # unit token, kv=routed: position of each slot's token, by row

    def reserve(self, k: torch.Tensor, slots: int) -> None:
        """Make room for `slots` slots of k's (N, K, ., h)."""
        have = 0 if self.k is None else self.k.shape[2]
        if slots <= have:
            return
        fits = self.max_len is not None and slots <= self.max_len
        room = self.max_len if fits else slots if have == 0 else max(slots, have + have // 2 + 16)
        for name in ("k", "v"):
            # zeros, not empty: a masked slot still enters as 0 * value, and NaN garbage would survive that
            fresh = k.new_zeros(k.shape[0], k.shape[1], room, k.shape[3])
            if have:
                fresh[:, :, :have] = getattr(self, name)
            setattr(self, name, fresh)

    def write(self, k: torch.Tensor, v: torch.Tensor, starts: list[int], slots: torch.Tensor | None = None) -> None:
        """Store k, v (N,K,M,h) at slots starts[row] .. starts[row] + M - 1; `slots` (1|N,M): the same on the device, where it is known.

        A pad's slot is overwritten by its row's next token.
        """
        width = k.shape[2]
        self.reserve(k, max(starts) + width)
        if min(starts) == max(starts):
            self.k[:, :, starts[0]:starts[0] + width] = k
            self.v[:, :, starts[0]:starts[0] + width] = v
            return
        if slots is None:
            slots = torch.tensor(starts, device=k.device)[:, None] + torch.arange(width, device=k.device)  # (N, M)
        row = torch.arange(len(starts), device=k.device)[:, None]
        self.k[row, :, slots] = k.transpose(1, 2)  # advanced indices come first: (N, M, K, h)
        self.v[row, :, slots] = v.transpose(1, 2)

    def select(self, batch_rows: list[int]) -> None:
        """Reorder, drop or repeat batch rows."""

        def renumber(held: list[int]) -> list[int]:
            return [new for new, row in enumerate(batch_rows) if row in set(held)]

        places = {row: place for place, row in enumerate(self.rows)} if self.rows is not None else {row: row for row in batch_rows}
        mine = [places[row] for row in batch_rows if row in places]
        self.rows = None if self.rows is None else renumber(self.rows)
        self.kept = {router: None if held is None else renumber(held) for router, held in self.kept.items()}
        if self.positions is not None:
            self.positions = [list(self.positions[row]) for row in batch_rows]
        if self.k is not None:
            index = torch.tensor(mine, device=self.k.device, dtype=torch.long)
            self.k, self.v = self.k[index], self.v[index]


class KVCache:
    """Keys and values of every layer, each row's length, and the decisions of sequence routers. Made and owned by the caller.

    `max_len` reserves that many slots a row at once; without it a layer starts at what the first call needs and grows by half.
    """

    def __init__(self, model: "Transformer", batch: int, max_len: int | None = None):
        self.layers = [LayerCache(max_len) for _ in range(model.config.n_layers)]
        self.lengths = [0] * batch  # tokens seen per row, on the host: no device sync is needed to know a shape
        self.route: str | None = None  # the mode that filled it; another mode may not continue it
        self.gates: torch.Tensor | None = None  # (R, B) held decisions, unit sequence
        self.scores: torch.Tensor | None = None  # (R, B) their logits

    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(2 * layer.k.numel() * layer.k.element_size() for layer in self.layers if layer.k is not None)

    def used_bytes(self) -> int:
        """Bytes of those slots that hold the keys and values of a real token."""
        total = 0
        for layer in (layer for layer in self.layers if layer.k is not None):
            rows = range(len(self.lengths)) if layer.rows is None else layer.rows
            slots = sum(self.lengths[row] if layer.positions is None else len(layer.positions[row]) for row in rows)
            total += 2 * slots * layer.k.shape[1] * layer.k.shape[3] * layer.k.element_size()
        return total

    def select(self, rows: list[int]) -> None:
        """Keep these batch rows in this order; a row may repeat (one context, several continuations)."""
        for layer in self.layers:
            layer.select(rows)
        self.lengths = [self.lengths[row] for row in rows]
        if self.gates is not None:
            index = torch.tensor(rows, device=self.gates.device, dtype=torch.long)
            self.gates, self.scores = self.gates[:, index], self.scores[:, index]

    def clone(self) -> "KVCache":
        """An independent copy, to continue one context more than once."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        other.select(list(range(len(self.lengths))))  # selecting copies every list and tensor
        return other


class Pass:
    """Geometry of one call over cached rows: row b's real tokens stand at positions starts[b] .. starts[b] + lengths[b] - 1 of `width` columns.

    Host lists, known without a device sync; made once a call, before the layer loop, and shared by all layers.
    """

    def __init__(self, rope: "Rope", starts: list[int], lengths: list[int], width: int, dtype: torch.dtype, device):
        self.starts, self.lengths, self.width, self.device = starts, lengths, width, device
        columns = torch.arange(width, device=device)
        even = min(starts) == max(starts)
        self.positions = columns[None] + starts[0] if even else columns + torch.tensor(starts, device=device)[:, None]  # (1|B, T)
        # (B*T, 1, h): flat like the tokens, so that compiled code meets one shape
        self.cos, self.sin = (t.expand(len(starts), -1, -1, -1).flatten(0, 1) for t in rope(self.positions, dtype))
        self.choices: dict[tuple[int, ...] | None, Rows] = {}
        self._prepare()

    def _prepare(self) -> None:
        self.fresh = max(self.starts) == 0  # nothing cached yet: causal attention needs no mask, since pads stand behind every real token
        self.spans = [(min(self.starts) + column, max(self.starts) + column) for column in range(self.width)]
        self.subsets: dict[tuple[int, ...], Pass] = {}
        self.masks: dict[tuple, torch.Tensor | None] = {}

    def choice(self, rows: list[int] | None) -> "Rows":
        """These rows as indices; layers that keep the same rows share them."""
        key = None if rows is None else tuple(rows)
        if key not in self.choices:
            self.choices[key] = Rows(rows, self.device)
        return self.choices[key]

    def subset(self, rows: list[int]) -> "Pass":
        """The same call for some of its rows; layers that keep the same rows share it."""
        key = tuple(rows)
        if key not in self.subsets:
            part, chosen = copy.copy(self), self.choice(rows)
            part.starts, part.lengths = [self.starts[row] for row in rows], [self.lengths[row] for row in rows]
            part.cos, part.sin = (chosen.take(t.unflatten(0, (-1, self.width))) for t in (self.cos, self.sin))  # (N*T, 1, h)
            if len(self.positions) > 1:
                part.positions = self.positions[chosen.index]  # (N, T)
            part._prepare()
            self.subsets[key] = part
        return self.subsets[key]


class Rows:
    """The batch rows of a call that execute (unit sequence); None: all of them, and nothing needs moving."""

    def __init__(self, rows: list[int] | None, device):
        self.rows, self.index = rows, None if rows is None else torch.tensor(rows, device=device, dtype=torch.long)
        self.empty = rows == []

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x (B,T,...) -> its executing tokens, flat (n, ...)"""
        return (x if self.index is None else x[self.index]).flatten(0, 1)

    def put(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """x (B,T,D) with its executing tokens replaced by part (n,D); in place where no gradient needs the old x."""
        part = part.view(-1, *x.shape[1:])
        if self.index is None:
            return part
        return x.index_copy(0, self.index, part) if torch.is_grad_enabled() else x.index_copy_(0, self.index, part)


class Picked:
    """The tokens of a (B,T) call that execute (unit token), chosen on the host. Packed means: without gaps, padded to the longest row (M).

    Where n tokens execute, what is taken has n + p rows: the last one repeats until their number is a multiple of `multiple`, and put and pack leave
    those out. Every layer has another n, and a CPU's bfloat16 kernels are built anew for each number of rows they meet, which takes longer than their product.
    """

    def __init__(self, chosen: torch.Tensor, device, multiple: int = 1):
        self.columns = [row.nonzero().squeeze(1).tolist() for row in chosen]  # ascending columns per row
        counts = [len(columns) for columns in self.columns]
        self.batch, self.width, self.empty, self.device = len(counts), max(counts), not any(counts), device
        self.count = sum(counts)
        pads = -self.count % multiple if self.count >= multiple else 0  # few rows have few numbers
        flat = chosen.flatten().nonzero().squeeze(1)
        self.flat = torch.cat([flat, flat[-1:].expand(pads)]).to(device)  # (n + p,) into B*T
        self.places = None  # (n + p,) into B*M; None: every row has M tokens and nothing repeats, so packing is a view
        if min(counts) < self.width or pads:
            places = [row * self.width + rank for row, count in enumerate(counts) for rank in range(count)]
            self.places = torch.tensor(places + places[-1:] * pads, device=device)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x (B,T,...) -> its executing tokens, flat (n + p, ...)"""
        return x.flatten(0, 1)[self.flat]

    def put(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """x (B,T,D) with its executing tokens replaced by part (n + p, D); in place where no gradient needs the old x."""
        flat, places, part = x.flatten(0, 1), self.flat[:self.count], part[:self.count]
        return (flat.index_copy(0, places, part) if torch.is_grad_enabled() else flat.index_copy_(0, places, part)).view_as(x)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(n + p, ...) -> (B, M, ...)"""
        if self.places is not None:
            x = x.new_zeros(self.batch * self.width, *x.shape[1:]).index_copy(0, self.places[:self.count], x[:self.count])
        return x.unflatten(0, (self.batch, self.width))

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, ...) -> (n + p, ...)"""
        x = x.flatten(0, 1)
        return x if self.places is None else x[self.places]

    def table(self, rows: list[list[int]]) -> tuple[torch.Tensor, list[int], list[int]]:
        """Ascending numbers per packed token as (B, M), and each column's least and greatest. A pad repeats its row's last number (or 0)."""
        table = torch.tensor([row + [row[-1] if row else 0] * (self.width - len(row)) for row in rows])
        return table.to(self.device), table.min(dim=0).values.tolist(), table.max(dim=0).values.tolist()


# ---------------------------------------------------------------------------------------------------------------------------------
# Attention kernels: torch's scaled_dot_product_attention, with a mask only where causality alone does not say what a query sees


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """Grouped-query attention. q (N,H,M,h), k and v (N,K,S,h) -> (N,H,M,h). A single query folds its G heads into the query axis."""
    n, heads, m, h = q.shape
    if m == 1 and heads != k.shape[1]:
        return F.scaled_dot_product_attention(q.reshape(n, k.shape[1], -1, h), k, v, attn_mask=mask).view(n, heads, 1, h)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads != k.shape[1])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, lows: torch.Tensor | None, spans: list[tuple[int, int]],
           masks: dict | None = None) -> torch.Tensor:
    """Attention in which the query in column i of row b sees the slots lows[b,i] .. slots[b,i] (lows None: from the first).

    q (N,H,M,h), k and v (N,K,S,h); slots and lows (1|N,M) on the device; spans[i] = (least lows or slots, greatest slots) of column i
    over the rows, ascending, on the host. Queries go in blocks, so that no key is touched that none of a block's queries can see.
    `masks` keeps the masks for the next layer with the same geometry.
    """
    out, masks = [], {} if masks is None else masks
    for a in range(0, q.shape[2], QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, q.shape[2])
        high = spans[b - 1][1] + 1
        low = 0 if lows is None else spans[a][0]
        key = (a, low, high, lows is None)
        if key not in masks:
            masks[key] = None  # a lone query, or rows in step, see all of low..high
            if b - a > 1 or (spans[a][0] < spans[a][1] if lows is None else len(slots) > 1):
                at = torch.arange(low, high, device=q.device)
                seen = at <= slots[:, a:b, None]  # (1|N, M', S')
                masks[key] = (seen if lows is None else seen & (at >= lows[:, a:b, None]))[:, None]  # (1|N, 1, M', S')
        out.append(sdpa(q[:, :, a:b], k[:, :, low:high], v[:, :, low:high], masks[key]))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


# ---------------------------------------------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            # torch's own CPU norm is ten calls, and holds x three times more, each a page fault per 4 KiB
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
            return (x * square.div_(x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)
        wide = x.float()  # the mean of squares needs fp32
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, but of a lone token on the CPU one pass over the weights at the memory's speed, where a library's matrix product is slower."""
    if x.device.type == "cpu" and x.numel() == x.shape[-1] and (torch.compiler.is_compiling() or x.dtype == torch.float32):
        y = (weight * x.view(-1)).sum(dim=-1) if torch.compiler.is_compiling() else torch.mv(weight, x.view(-1))  # (O, I) -> (O,)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.window = config.n_heads, config.n_kv_heads, config.head_dim, config.window(layer)
        self.wq = Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply_rope(self.q_norm(self.wq(x).view(*x.shape[:-1], self.n_heads, self.head_dim)), cos, sin)  # (..., D) -> (..., H, h)

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (*x.shape[:-1], self.n_kv_heads, self.head_dim)
        return apply_rope(self.k_norm(self.wk(x).view(heads)), cos, sin), self.wv(x).view(heads)  # (..., D) -> (..., K, h)

    def project(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries (n,H,h), rotated keys and values (n,K,h) of normalised tokens x (n,D)."""
        return self.queries(x, cos, sin), *self.keys_values(x, cos, sin)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, key_gate: torch.Tensor | None = None) -> torch.Tensor:
        """Causal self-attention of whole rows x (B,T,D) without a cache. key_gate (B,T): keys with 0 do not exist (unit token, kv=routed)."""
        q = self.queries(x, cos, sin).transpose(1, 2)  # (B, T, H, h) -> (B, H, T, h)
        k, v = (t.transpose(1, 2) for t in self.keys_values(x, cos, sin))  # (B, K, T, h)
        at, width = torch.arange(x.shape[1], device=x.device), x.shape[1]
        windowed = self.window is not None and width > self.window
        if key_gate is not None:
            seen = key_gate.bool()[:, None, None, :] & (at <= at[:, None])  # (B, 1, T, T)
            if windowed:
                seen = seen & (at > at[:, None] - self.window)
            # a query itself skipped may see nothing at all inside a window; its output is multiplied by 0, but NaN would survive that
            out = sdpa(q, k, v, seen | (at == at[:, None]) & ~key_gate.bool()[:, None, :, None])
        elif windowed:
            lows = (at - self.window + 1).clamp(min=0)
            spans = [(max(0, i - self.window + 1), i) for i in range(width)]
            out = attend(q, k, v, at[None], lows[None], spans)
        else:
            out = sdpa(q, k, v, causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, H, T, h) -> (B, T, H*h) -> (B, T, D)

    def rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, io: Pass, cache: LayerCache | None) -> torch.Tensor:
        """Attention of whole rows over what `cache` holds of them, and over themselves; their keys and values join the cache.

        q (N*T,H,h), k and v (N*T,K,h) -> heads' outputs (N*T, H*h).
        """
        q, k, v = (t.view(len(io.starts), io.width, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))  # (N, H, T, h) and (N, K, T, h)
        if cache is not None:
            cache.write(k, v, io.starts, io.positions)
        if io.fresh and (self.window is None or io.width <= self.window):
            out = sdpa(q, k, v, causal=True)
        else:
            k, v = (k, v) if io.fresh else (cache.k, cache.v)
            out = self.look_back(q, k, v, io.positions, io.spans, io.masks)
        return out.transpose(1, 2).reshape(len(io.starts) * io.width, -1)

    def look_back(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, spans: list[tuple[int, int]],
                  masks: dict | None = None) -> torch.Tensor:
        """`attend` where slots are positions, so that the window counts slots."""
        if self.window is None or spans[-1][1] < self.window:
            return attend(q, k, v, slots, None, spans, masks)
        lows = (slots - self.window + 1).clamp(min=0)
        return attend(q, k, v, slots, lows, [(max(0, low - self.window + 1), high) for low, high in spans], masks)

    def tokens(self, x: torch.Tensor, everything: torch.Tensor, io: Pass, picked: Picked, cache: LayerCache | None, kv: str) -> torch.Tensor:
        """Attention of the picked tokens only: x (n,D), taken out of everything (B,T,D), -> heads' outputs (n, H*h). n counts what repeats, too.

        kv "routed": only executing tokens have keys and values, stored without gaps. kv "all": every token has them, and a skipped one is
        spared its query, its scores and its output projection.
        """
        cos, sin = io.cos[picked.flat], io.sin[picked.flat]  # (n, 1, h)
        if kv == "all":
            k, v = (t.unflatten(0, everything.shape[:2]).transpose(1, 2) for t in self.keys_values(everything.flatten(0, 1), io.cos, io.sin))  # (B, K, T, h)
            if cache is not None:
                cache.write(k, v, io.starts, io.positions)
                k, v = (k, v) if io.fresh else (cache.k, cache.v)
            if picked.empty:
                return x
            q = picked.pack(self.queries(x, cos, sin)).transpose(1, 2)  # (n, H, h) -> (B, M, H, h) -> (B, H, M, h)
            slots, least, greatest = picked.table([[io.starts[row] + column for column in columns] for row, columns in enumerate(picked.columns)])
            out = self.look_back(q, k, v, slots, list(zip(least, greatest)))
        else:
            q, k, v = (picked.pack(t).transpose(1, 2) for t in self.project(x, cos, sin))  # (n, H, h) -> (B, M, H, h) -> (B, H, M, h); k, v (B, K, M, h)
            before = [[] for _ in picked.columns] if cache is None or cache.positions is None else cache.positions
            after = [before[row] + [io.starts[row] + column for column in columns] for row, columns in enumerate(picked.columns)]
            starts = [len(positions) for positions in before]
            if cache is not None:
                cache.write(k, v, starts)
                cache.positions = after
                k, v = (k, v) if max(starts) == 0 else (cache.k, cache.v)
            windowed = self.window is not None and max(positions[-1] for positions in after if positions) >= self.window
            if max(starts) == 0 and not windowed:
                out = sdpa(q, k, v, causal=True)  # packed tokens keep their order: what a query may see stands before it
            else:
                slots, least, greatest = picked.table([list(range(start, len(positions))) for start, positions in zip(starts, after)])
                lows = None
                if windowed:
                    lows, least, _ = picked.table([[bisect.bisect_right(positions, positions[slot] - self.window) for slot in range(start, len(positions))]
                                                   for start, positions in zip(starts, after)])
                out = attend(q, k, v, slots, lows, list(zip(least, greatest)))
        return picked.unpack(out.transpose(1, 2)).flatten(1)  # (B, M, H, h) -> (n, H, h) -> (n, H*h)


class SwiGLU(torch.autograd.Function):
    """silu(a) * b that keeps a and b for its backward pass and computes silu(a) again: a third less memory in a feed-forward's widest place."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), grad * F.silu(a)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w3 = Linear(config.dim, config.hidden_dim, bias=False)  # up
        self.w2 = Linear(config.hidden_dim, config.dim, bias=False)  # down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))


class Block(nn.Module):
    """One layer. With a router it is a MindSkip block:

        target attn    a = x + gate * attn(attention_norm(x))     y = a + mlp(ffn_norm(a))
        target mlp     a = x + attn(attention_norm(x))            y = a + gate * mlp(ffn_norm(a))
        target block   y = x + gate * (block(x) - x)
        target both    attn and mlp at once, each with a router of its own; either may be missing in a layer

    A router reads the normalised input of what it gates. `forward` computes everything (routes off and mask); `gather`
    computes what the gates let through and returns the same y.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.register_module("router", None)  # gates the attention or the whole block; registered here, so that its order does not depend on history
        self.register_module("mlp_router", None)  # gates the MLP
        self.routing: RouterConfig | None = None

    def score(self, router: Router, h: torch.Tensor, pool_lengths: torch.Tensor | None) -> torch.Tensor:
        """Router logits of normalised inputs h (B,T,D) -> (B,), unit sequence, or (B,T), unit token."""
        return router(pool(h, pool_lengths) if self.routing.unit == "sequence" else h)

    def decide(self, router: Router, z: torch.Tensor, gate: torch.Tensor | None, must: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
        """Gate of logits z, or the forced one. Unit token: `must` (first token of a sequence) always executes, pads never do."""
        gate = ste_gate(z, router.cut) if gate is None else gate.to(z.dtype)
        if self.routing.unit == "token":
            gate = torch.where(must, torch.ones_like(gate), gate)
            gate = gate if real is None else gate * real
        return gate

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, routed: bool = False, pool_lengths: torch.Tensor | None = None,
                gates: torch.Tensor | None = None, noise: torch.Tensor | None = None, must: torch.Tensor | None = None,
                real: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Compute everything; where `routed`, multiply by the gates. x (B,T,D) -> y, gates and logits, one of each per router here. `gates` (forced) and
        `noise` have as many rows. No host sync, no data-dependent shape."""
        made, logits = [], []

        def gate_of(router: Router, h: torch.Tensor) -> torch.Tensor:
            z, row = self.score(router, h, pool_lengths), len(made)
            made.append(self.decide(router, z if noise is None else z + noise[row], None if gates is None else gates[row], must, real))
            logits.append(z)
            return made[-1].to(x.dtype).view(x.shape[0], -1, 1)  # (B, 1|T, 1)

        opened = key_gate = None
        h = self.attention_norm(x)
        if routed and self.router is not None:
            opened = gate_of(self.router, h)
            if self.routing.unit == "token" and self.routing.kv == "routed":
                key_gate = made[0].detach()
        whole = opened is not None and self.routing.target == "block"
        attention = self.attention(h, cos, sin, key_gate)
        a = x + attention if opened is None or whole else x + opened * attention
        h = self.ffn_norm(a)
        mlp_opened = gate_of(self.mlp_router, h) if routed and self.mlp_router is not None else None
        mlp = self.feed_forward(h)
        y = a + mlp if mlp_opened is None else a + mlp_opened * mlp
        return (x + opened * (y - x) if whole else y), made, logits

    def gather(self, x: torch.Tensor, io: Pass, cache: LayerCache | None, routed: bool = False, pool_lengths: torch.Tensor | None = None,
               gates: torch.Tensor | None = None, must: torch.Tensor | None = None, real: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Compute and cache only what executes; all of it where not `routed`. x (B,T,D) -> y, gates and logits, one of each per router that decided
        now; without gradient x may be overwritten."""
        attn, mlp = (routed and router is not None for router in (self.router, self.mlp_router))
        forced = iter(() if gates is None else gates)
        made = []  # (gate, z) of each router here
        if attn:
            chosen, h, everything, decision = self.choose("router", self.attention_norm, x, io, cache, pool_lengths, next(forced, None), must, real)
            made += decision
            if isinstance(chosen, Picked):
                if not chosen.empty or self.routing.kv == "all":
                    out = self.attention.tokens(h, everything, io, chosen, cache, self.routing.kv)
            elif not chosen.empty:
                part = io if chosen.rows is None else io.subset(chosen.rows)
                heads = self.enter(chosen.take(x), part.cos, part.sin) if h is None else self.attention.project(h, part.cos, part.sin)
                out = self.attention.rows(*heads, part, cache)
            if not chosen.empty:
                x = chosen.put(x, (self.leave if self.routing.target == "block" else self.close)(chosen.take(x), out))
        else:
            flat = x.flatten(0, 1)  # (B, T, D) -> (B*T, D)
            out = self.attention.rows(*self.enter(flat, io.cos, io.sin), io, cache)
            x = (self.close if mlp else self.leave)(flat, out).view_as(x)
        if mlp:
            chosen, h, _, decision = self.choose("mlp_router", self.ffn_norm, x, io, cache, pool_lengths, next(forced, None), must, real)
            made += decision
            if not chosen.empty:
                part = chosen.take(x)
                x = chosen.put(x, self.feed(part) if h is None else self.feed_forward(h).add_(part))
        elif attn and self.routing.target != "block":
            x = self.feed(x.flatten(0, 1)).view_as(x)
        return x, [gate for gate, _ in made], [z for _, z in made]

    # What runs is static from here on: flat tokens (n,D), whatever the layer, the route and the cache. compile_model compiles these.

    def enter(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project tokens x (n,D) -> q (n,H,h), k and v (n,K,h)."""
        return self.attention.project(self.attention_norm(x), cos, sin)

    def close(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Project the heads' outputs (n, H*h) and add them to x (n,D)."""
        return self.attention.wo(out).add_(x)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """x (n,D) and its feed-forward."""
        return self.feed_forward(self.ffn_norm(x)).add_(x)

    def leave(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Both residuals of a block that runs as a whole."""
        return self.feed(self.close(x, out))

    def choose(self, name: str, norm: RMSNorm, x: torch.Tensor, io: Pass, cache: LayerCache | None, pool_lengths: torch.Tensor | None,
               gate: torch.Tensor | None, must: torch.Tensor | None, real: torch.Tensor | None):
        """Who executes by the router of this name, their normalised input (n,D), everybody's (B,T,D), and [(gate, z)], or [] where the decision was
        made before. One host sync: per prompt for unit sequence, per call for unit token."""
        if self.routing.unit == "sequence" and not io.fresh:  # decided with the prompt, held for every later token
            return io.choice(cache.kept[name]), None, None, []
        h, router = norm(x), getattr(self, name)
        z = self.score(router, h, pool_lengths)
        gate = self.decide(router, z, gate, must, real)
        if self.routing.unit == "token":
            chosen = Picked(gate.detach().bool().cpu(), x.device, ROWS_MULTIPLE if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1)  # the host sync
        else:
            opened = gate.tolist()  # the host sync
            rows = None if all(opened) else [row for row, value in enumerate(opened) if value]
            chosen = io.choice(rows)
            if cache is not None:
                cache.kept[name] = rows
                if name == "router":
                    cache.rows = rows
        return chosen, chosen.take(h), h, [(gate, z)]


class Transformer(nn.Module):
    """Decoder-only model; `routing` says which layers own a router. Weights are not initialised for training from scratch."""

    def __init__(self, config: ModelConfig, routing: RouterConfig | None = None):
        super().__init__()
        self.config, self.routing, self.fingerprint = config, None, None
        weight = torch.empty(config.vocab_size, config.dim)
        if not weight.is_meta:  # on the meta device normal_ imports half of torch's compiler for nothing: 1 s and 75 MB a load
            nn.init.normal_(weight)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=weight)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rope = Rope(config)
        if routing is not None:
            self.add_routers(routing)

    def add_routers(self, routing: RouterConfig | None) -> None:
        """Give the layers of `routing` a fresh router each, and take away any other; None leaves a dense model."""
        places = () if routing is None else routing.places
        if places and places[-1].layer >= self.config.n_layers:
            raise ValueError(f"routed layer {places[-1].layer} does not exist: this model has layers 0 to {self.config.n_layers - 1}")
        self.routing = routing
        for block in self.layers:
            block.routing = block.router = block.mlp_router = None
        for layer, target in places:
            self.layers[layer].routing = routing
            setattr(self.layers[layer], "mlp_router" if target == "mlp" else "router", Router(self.config.dim, device=self.tok_embeddings.weight.device))

    def routers(self) -> list[Router]:
        """Routers in the order of `routing.places`."""
        return routers_of(self)

    def place_weights(self) -> torch.Tensor:
        """What each place counts in the capacity (R,), of sum 1: all the same where a layer has one router, so that capacity is a share of (layer, unit)
        pairs; for both_sequence the sublayer's share of the routed weight matrices, so that it is a share of compute."""
        c, routing = self.config, self.routing
        size = {"attn": 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads), "mlp": 3 * c.dim * c.hidden_dim}
        weights = torch.tensor([float(size[place.target]) if routing.target == "both" else 1.0 for place in routing.places], dtype=torch.float64)
        return weights / weights.sum()

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 of final hidden states (..., D) -> (..., V)."""
        return linear(h, self.tok_embeddings.weight if self.output is None else self.output.weight).float()

    def forward(self, tokens: torch.Tensor, lengths=None, prompt_lengths=None, cache: KVCache | None = None, route: str = "off", **more):
        """Logits (B,T,V) fp32 and gates (and scores, if asked) of tokens (B,T); every argument and error as in `hidden`."""
        h, *rest = self.hidden(tokens, lengths=lengths, prompt_lengths=prompt_lengths, cache=cache, route=route, **more)
        return self.head(h), *rest

    def hidden(self, tokens: torch.Tensor | None, *, lengths=None, prompt_lengths=None, cache: KVCache | None = None, route: str = "off",
               gates: torch.Tensor | None = None, noise: torch.Tensor | None = None, x: torch.Tensor | None = None, first_layer: int = 0,
               return_scores: bool = False):
        """Run the layers: tokens (B,T) -> normalised final states (B,T,D), gates[, scores]. The head is apart, so that only needed logits are paid for.

        lengths         real tokens per row of this call, right-padded (list or tensor (B,)); None: all T
        prompt_lengths  tokens that a sequence router averages over (list or tensor (B,)); None: `lengths`, i.e. the call is a prompt
        cache           continue these rows; sequence routers decide in the call that finds it empty and hold that decision
        route           off (dense), mask (compute all, multiply; no cache), gather (compute only what executes)
        gates           forced gates instead of the routers', shape as returned; noise: added to the router logits (route mask only)
        x, first_layer  activations (B,T,D) that enter layer `first_layer`, instead of tokens

        Returned gates are 0.0/1.0 of shape (R,B), unit sequence, or (R,B,T), unit token, pads 0; None for route off. Scores are the logits z. R counts
        routers, from first_layer on, in the order of `routing.places`.
        Host syncs: none for off and mask; for gather one per router and prompt (unit token: and call), besides lengths on a device.
        Raises ValueError for an unknown route, a route without routers, mask with a cache, or a cache filled under another route.
        """
        batch, width = (tokens if x is None else x).shape[:2]
        device = (tokens if x is None else x).device
        routed = route != "off"
        if route not in ROUTES:
            raise ValueError(f"route is {route!r}; expected one of {', '.join(ROUTES)}")
        if routed and self.routing is None:
            raise ValueError(f"route {route!r} needs routers and this model has none: load it with routers=FILE, call add_routers, or use route='off'")
        if cache is not None and (route == "mask" or cache.route not in (None, route) or len(cache.lengths) != batch):
            raise ValueError(f"a cache filled under route {cache.route!r} for {len(cache.lengths)} rows cannot continue under {route!r} with {batch} rows; "
                             "route mask takes no cache, and the others continue what they began")
        first = cache is None or max(cache.lengths) == 0
        x = self.tok_embeddings(tokens) if x is None else x if torch.is_grad_enabled() or route != "gather" else x.clone()

        pool_lengths = real = must = None
        if routed and first:
            wanted = lengths if prompt_lengths is None or self.routing.pool == "all" else prompt_lengths
            pool_lengths = None if wanted is None else torch.as_tensor(wanted, device=device)
        if routed and self.routing.unit == "token":
            starts = None if first else torch.tensor(cache.lengths, device=device)[:, None]
            at = torch.arange(width, device=device)
            must = (at == 0)[None] if first else at + starts == 0  # (1|B, T) first token of a sequence
            real = None if lengths is None else at < torch.as_tensor(lengths, device=device)[:, None]  # (B, T)

        if cache is None and route != "gather":
            io, (cos, sin) = None, self.rope(torch.arange(width, device=device)[None], x.dtype)
        else:
            rows = [width] * batch if lengths is None else [int(n) for n in (lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths)]
            io = Pass(self.rope, [0] * batch if cache is None else cache.lengths, rows, width, x.dtype, device)

        seen, scores, index = [], [], 0
        for layer in range(first_layer, self.config.n_layers):
            block = self.layers[layer]
            own = slice(index, index + ((block.router is not None) + (block.mlp_router is not None) if routed else 0))  # rows of its routers
            index, here = own.stop, own.stop > own.start
            forced = gates[own] if here and gates is not None else None
            if io is None:
                x, made, z = block(x, cos, sin, here, pool_lengths, forced, noise[own] if here and noise is not None else None, must, real)
            else:
                x, made, z = block.gather(x, io, None if cache is None else cache.layers[layer], here, pool_lengths, forced, must, real)
            seen += made
            scores += z
        gates, scores = (torch.stack(seen), torch.stack(scores)) if seen else (None, None)
        if cache is not None:
            if routed and self.routing.unit == "sequence":
                cache.gates, cache.scores = (gates, scores) if first else (cache.gates, cache.scores)
                gates, scores = cache.gates, cache.scores
            cache.route, cache.lengths = route, [start + n for start, n in zip(cache.lengths, io.lengths)]
        x = self.norm(x)
        return (x, gates, scores) if return_scores else (x, gates)

    @torch.no_grad()
    def trunk(self, tokens: torch.Tensor) -> torch.Tensor:
        """Activations (B,T,D) that enter the first routed layer. They depend on no router: compute once, reuse with hidden(None, x=, first_layer=)."""
        x = self.tok_embeddings(tokens)
        cos, sin = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None], x.dtype)
        for layer in range(self.routing.places[0].layer):
            x = self.layers[layer](x, cos, sin)[0]
        return x


def compile_model(model: Transformer, **options) -> Transformer:
    """Compile in place, lazily, with torch.compile(**options): each block's `forward` as one graph, for routes mask and off without a cache, the
    static parts of a block, for gather and for every cached call, and the head. Returns the model.

    Code is compiled once for all layers, and for any number of rows and tokens but one: a lone token (decoding at batch 1) has its own. Names and
    weights stay as they are. The first calls take minutes.
    """
    parts = [(model, ("head",))]
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=True, **options)
        parts += [(block, ("enter", "close", "feed", "leave")), (block.attention, ("project",))]
    for owner, names in parts:
        for name in names:
            setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True, dynamic=True, **options))
    return model


# ---------------------------------------------------------------------------------------------------------------------------------
# Generation


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: torch.Tensor) -> torch.Tensor:
    """Next tokens (B,) of logits (B,V). temperature 0 takes the best; otherwise uniform (B,) in [0,1) picks by inverse distribution function."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    ordered, index = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)  # (B, V)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    probs = torch.softmax(ordered, dim=-1)
    mass = probs.cumsum(dim=-1)
    if top_p is not None:  # the fewest best tokens whose mass reaches top_p; the first always stays
        probs = probs.masked_fill(mass - probs >= top_p, 0.0)
        mass = probs.cumsum(dim=-1)
    place = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
    return index.gather(1, place).squeeze(1)


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, stop_tokens=(), route: str | None = None, gates: torch.Tensor | None = None, seed: int = 0,
             on_token=None) -> list[list[int]]:
    """Continue prompts of any lengths together; returns each row's new tokens, a stop token included.

    route None: gather where the model has routers, else off. gates: forced routes for the prompts. on_token(row, token) is called as tokens
    come. A finished row leaves the batch and costs nothing more. Sampling draws from one generator per (seed, row), so a row's tokens do not
    depend on its neighbours. Raises ValueError for an empty prompt, one that leaves no room in the context, or settings out of range.
    """
    config = model.config
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.max_seq_len - max_new_tokens:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens; expected 1 to {config.max_seq_len - max_new_tokens}, the context of {config.max_seq_len} "
                             f"less {max_new_tokens} new tokens: shorten it or lower max_new_tokens")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}; expected temperature >= 0, top_k >= 1, 0 < top_p <= 1")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.tok_embeddings.weight.device
    route = route or ("gather" if model.routing is not None else "off")
    dice = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(len(prompts))]
    stop, output, alive = set(stop_tokens), [[] for _ in prompts], list(range(len(prompts)))

    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts], device=device)
    cache = KVCache(model, len(prompts), max_len=max(lengths) + max_new_tokens)
    h, _ = model.hidden(tokens, lengths=lengths, cache=cache, route=route, gates=gates)
    last = h[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]  # (B, D): logits of the last tokens alone
    while True:
        uniform = torch.tensor([torch.rand((), generator=dice[row]).item() for row in alive], device=device) if temperature else None
        chosen = sample(model.head(last), temperature, top_k, top_p, uniform)
        going = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist())):  # the one host sync of a step
            output[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if token not in stop and len(output[row]) < max_new_tokens:
                going.append(place)
        if not going:
            return output
        if len(going) < len(alive):
            cache.select(going)
            alive, chosen = [alive[place] for place in going], chosen[torch.tensor(going, device=device)]
        h, _ = model.hidden(chosen[:, None], cache=cache, route=route)
        last = h[:, -1]


# ---------------------------------------------------------------------------------------------------------------------------------
# What a forward pass costs, from sizes alone


def executed_shares(config: ModelConfig, routing: RouterConfig | None, shares: list[float]) -> dict[str, list[float]]:
    """Share of units that execute in each layer, as prefill_flops and decode_bytes take it, from that of each place (R)."""
    executed = {"attn": [1.0] * config.n_layers, "mlp": [1.0] * config.n_layers}
    for place, share in zip(routing.places if routing else (), shares):
        for target in ("attn", "mlp"):
            if place.target in (target, "block"):
                executed[target][place.layer] = share
    return executed


def prefill_flops(config: ModelConfig, tokens: int, attn: list[float] | None = None, mlp: list[float] | None = None, *, kv: str = "routed",
                  unit: str = "sequence", logits: int = 1) -> float:
    """Matrix-multiply FLOPs (2 per multiply-add) of one row of `tokens` tokens, causal, with logits at `logits` positions.

    attn, mlp: share of the row's tokens (unit sequence: of its layer, 0 or 1) that execute per layer; None: all. Per token and layer:
    projections 2 D (2 H h + 2 K h), feed-forward 6 D F; scores and values 4 H h per pair of a query and a key it sees: sum over queries of
    min(position + 1, window). Unit token: a share p of executing tokens, spread evenly, leaves p^2 of the pairs with kv "routed" and p of
    them (and all of the key and value projections) with kv "all".
    """
    d, heads, kv_heads, h = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
    total = 2.0 * logits * d * config.vocab_size
    for layer in range(config.n_layers):
        p = 1.0 if attn is None else attn[layer]
        window = min(config.window(layer) or tokens, tokens)
        pairs = tokens * window - window * (window - 1) / 2
        keys = 1.0 if kv == "all" else p
        total += tokens * (p * 4 * d * heads * h + keys * 4 * d * kv_heads * h) + 4 * heads * h * pairs * (p if unit == "sequence" else p * keys)
        total += tokens * 6 * d * config.hidden_dim * (1.0 if mlp is None else mlp[layer])
    return total


def decode_bytes(config: ModelConfig, batch: int, context: int, itemsize: int, attn: list[float] | None = None, mlp: list[float] | None = None, *,
                 held: list[float] | None = None, kv: str = "routed") -> float:
    """Bytes that one decode step must read: the weights of every sublayer that runs for at least one row, the head, and the keys and values.

    attn, mlp: share of the batch's rows that execute per layer; None: all. A share p reads the sublayer's weights if p > 0, and the keys and
    values of p of the rows: `context` slots each, or (unit token) the share `held` of them that the layer holds. With kv "all" the key and
    value projections always run.
    """
    d, h = config.dim, config.head_dim
    total = d * config.vocab_size + d * batch
    for layer in range(config.n_layers):
        p, m, share = (1.0 if given is None else given[layer] for given in (attn, mlp, held))
        window = min(config.window(layer) or context, context)
        total += 2 * d * h * ((p > 0) * config.n_heads + (p > 0 or kv == "all") * config.n_kv_heads) + (m > 0) * 3 * d * config.hidden_dim
        total += 2 * batch * window * config.n_kv_heads * h * p * share
    return total * itemsize


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or alone. Raises FileNotFoundError with what is there and what is not."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; expected one written by convert_hf.py or data/demo/prepare.py: check --model")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json (found: {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}); "
                                "convert the model with: python convert_hf.py SRC OUT")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the checkpoint is incomplete: convert or copy it again")
    return [folder / name for name in names]


def safetensors_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset of its data. Raises ValueError for a truncated or foreign file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file or its header is cut off ({size:,} bytes); convert or copy it again")
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header announces {expected:,}; the file is truncated or damaged: convert or copy it again")
    return header, 8 + length


def fingerprint(folder: str | Path) -> str:
    """Identity of a base model: SHA-256 over its config and, for each tensor, name, dtype, shape and three samples of 4 KiB. Reads a few MB."""
    files = checkpoint_files(folder)
    digest = hashlib.sha256(json.dumps(json.loads((Path(folder) / "config.json").read_text()), sort_keys=True).encode())
    entries = [(name, path, entry, start) for path in files for header, start in [safetensors_header(path)] for name, entry in header.items()]
    for name, path, entry, start in sorted(entries, key=lambda item: item[0]):
        low, high = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with open(path, "rb") as file:
            for at in (low, max(low, (low + high) // 2 - 2048), max(low, high - 4096)):
                file.seek(start + at)
                digest.update(file.read(min(4096, high - at)))
    return digest.hexdigest()[:32]


def load_config(folder: str | Path) -> ModelConfig:
    """Read and check a checkpoint's config.json."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); convert the model again") from None
    try:
        return ModelConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_model(folder: str | Path, routers: str | Path | None = None, budget: float | None = None, device=None, dtype: torch.dtype | None = None) -> Transformer:
    """Load a checkpoint folder, frozen and in eval mode, and a router file where one is given.

    Weights are mapped from disk: on the CPU in their own dtype nothing is copied. device None: CPU; dtype None: as stored. budget sets the
    routers' thresholds by their calibration table (0 skips every routed unit, 1 none); None keeps the thresholds of the file.
    Raises FileNotFoundError or ValueError for a missing, truncated or mismatched file, or routers of another base.
    """
    files = checkpoint_files(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        safetensors_header(path)  # a clear word about a truncated file, before the library's own
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name not in expected or name in tensors:
                    what = "twice" if name in tensors else "though the config has no place for it"
                    raise ValueError(f"{path} holds {name} {what}; config and weights disagree: convert the model again")
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != expected[name]:
                    raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the config needs {expected[name]}; convert the model again")
                tensors[name] = tensor.to(device=device or "cpu", dtype=dtype or tensor.dtype)
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; the checkpoint is incomplete: convert the model again")
    model.load_state_dict(tensors, assign=True)
    model = model.to(device or "cpu").eval().requires_grad_(False)
    model.fingerprint = fingerprint(folder)
    if routers is not None:
        load_routers(model, routers, budget)
    elif budget is not None:
        raise ValueError(f"budget is {budget} but there are no routers to hold it; give routers=FILE as well")
    return model


def load_routers(model: Transformer, path: str | Path, budget: float | None = None) -> dict:
    """Give a loaded base the routers of a file, strictly: same base, same layers, same shapes. Returns the file's metadata."""
    weights, meta = read_router_file(path)
    check_fingerprint(path, meta["base_fingerprint"], model.fingerprint)
    routing = RouterConfig(**{field.name: meta[field.name] for field in fields(RouterConfig) if field.name in meta})
    thresholds = meta["thresholds"] if budget is None else thresholds_for(budget, meta["calibration"])
    model.add_routers(routing)
    load_router_weights(path, model, weights, routing)
    set_thresholds(model, thresholds)
    for router in model.routers():
        router.requires_grad_(False)
    return meta
