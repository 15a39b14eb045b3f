"""Llama, Mistral and Qwen in one file, with MindSkip: routers decide what runs, and what is skipped costs nothing.

One `Transformer` serves Llama 2/3/3.1/3.2, Mistral, Qwen2/2.5 and Qwen3, and the mixtures of experts Mixtral,
Qwen2-MoE, Qwen3-MoE and OLMoE; families differ by fields of ModelConfig only. Each routed layer owns a Router
(router.py), two, or one for each expert. Three route modes compute the same function:
    off     dense: routers are ignored
    mask    everything is computed, then multiplied by the gate: differentiable, static shapes, for training
    gather  only what executes is computed and cached: no projections, no scores, no keys and values for what is skipped
Where work is skipped: `Block.forward` asks a router, gets a `Selection` of the tokens that run, and gives these alone
to the attention or the feed-forward. No module keeps state in forward; what must persist lives in the KVCache, which
the caller owns. Needs torch, safetensors and router.py.

Legend: B batch rows, T tokens, D width, H heads, K kv heads, h head width, V vocabulary, S cache slots, R routers;
n tokens that run; packed into (N,M): N rows of M columns without gaps, padded to the longest.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from router import (
    Router, RouterConfig, RouterMeta, check_fingerprint, cut_of, cuts_for, fill_budget, load_router_weights, pool,
    read_router_file, routers_of, set_cuts, ste_gate,
)

ROUTES = ("off", "mask", "gather")
BUDGET_PER = ("workload", "sequence")  # what a budget is a share of: all that is routed, or each sequence by itself
ROPE_TYPES = {  # kinds of scaling, and the keys that each cannot do without
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # in safetensors
NOWHERE = 2**31 - 1  # position of a slot that holds no token: later than every query
QUERY_BLOCK = 256  # queries whose mask exists at once
ROWS_MULTIPLE = 64  # see Selection.tokens
PACKED_FOR_ROWS = 512  # rows that oneDNN orders a weight for; its order for 1 is slower at most of them
PACKED_LEAST, PACKED_LEAST_ALONE = 2**18, 2**19  # entries of the smallest weight that is packed; alone: one thread


# -----------------------------------------------------------------------------
# Sizes


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


@dataclass(frozen=True)
class ModelConfig:
    """Every size of a model, as it stands in a checkpoint's config.json."""

    family: str  # llama, qwen2, mixtral ...: a label for export and chat form, never a switch in the computation
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
    qk_norm_whole: bool = False  # OLMoE: RMSNorm over the queries, and the keys, of all heads together
    n_experts: int = 0  # feed-forwards of which each token runs experts_per_token; 0: one that all tokens run
    experts_per_token: int = 0
    expert_dim: int = 0  # hidden width of an expert
    shared_dim: int = 0  # hidden width of the expert that every token runs beside them (Qwen2-MoE); 0: none
    norm_topk: bool = False  # the weights of a token's experts are scaled to sum 1
    dense_layers: tuple[int, ...] = ()  # layers without experts

    def __post_init__(self):
        for field in fields(self):
            value, kind, optional = getattr(self, field.name), field.type, field.default is None
            if kind in (str, dict | None) or optional and value is None:
                continue
            if kind is bool:
                good, expected = type(value) is bool, "true or false"
            elif kind is float:
                good, expected = value == field.default or is_positive(value), "a positive number"
            elif kind in (int, int | None):
                least = int(field.default != 0)
                good, expected = type(value) is int and least <= value < NOWHERE, f"an integer of {least} or more"
            else:
                good = isinstance(value, (list, tuple)) and all(type(layer) is int for layer in value)
                expected = "layer numbers"
            if not good:
                raise ValueError(f"config: {field.name} is {value!r:.60}; expected {expected}{', or null' * optional}")
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        self._check_together()

    def _check_together(self):
        """Raise ValueError for sizes that do not go together."""
        scaling = self.rope_scaling
        if scaling is not None:
            kind = scaling.get("type") if isinstance(scaling, dict) else None
            if not isinstance(kind, str) or kind not in ROPE_TYPES:
                raise ValueError(f"config: rope_scaling type is {kind!r}; supported: {', '.join(ROPE_TYPES)}, or null")
            for key in ROPE_TYPES[kind]:
                if not is_positive(scaling.get(key)):
                    raise ValueError(f"config: rope_scaling {key} is {scaling.get(key)!r}; expected a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"config: {self.n_heads} heads cannot share {self.n_kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; rotary embeddings need an even one")
        if self.n_experts and not (1 <= self.experts_per_token <= self.n_experts and self.expert_dim):
            raise ValueError(f"config: a token runs {self.experts_per_token} of {self.n_experts} experts of width "
                             f"{self.expert_dim}; expected 1 to {self.n_experts}, of a positive width")
        if not self.n_experts and (self.experts_per_token or self.expert_dim or self.shared_dim or self.dense_layers):
            raise ValueError("config: n_experts is 0; expected no experts_per_token, expert_dim, shared_dim or "
                             "dense_layers beside it")

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Build from the JSON object of a config.json; an unknown or missing key is refused by name.

        `parent`, the fingerprint of the base that this one was made from, stands beside the sizes: it is none of them.
        """
        values = {name: value for name, value in values.items() if name != "parent"}
        known = {field.name for field in fields(cls)}
        required = {name for name in known if name not in cls.__dict__}  # fields without a default
        remedy = "this is not a config written by convert_hf.py: convert the folder first"
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config has unknown keys {unknown}; {remedy}")
        if missing := sorted(required - set(values)):
            raise ValueError(f"config lacks {missing}; {remedy}")
        return cls(**values)

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer, or None."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.n_experts > 0 and layer not in self.dense_layers

    def mlp_width(self, layer: int) -> int:
        """Hidden width that a token runs in one layer's MLP."""
        experts = self.experts_per_token * self.expert_dim + self.shared_dim
        return experts if self.has_experts(layer) else self.hidden_dim


# -----------------------------------------------------------------------------
# Rotary position embeddings, half-split layout (dimension i turns with i + h/2), as in Hugging Face checkpoints


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (h/2,) fp32 and the factor on cos and sin.

    Sources: RoPE arXiv 2104.09864; linear: arXiv 2306.15595; llama3: Llama 3.1 model card's scaled RoPE.
    """
    h, scaling = config.head_dim, config.rope_scaling
    inverse = config.rope_theta ** (-torch.arange(0, h, 2, dtype=torch.float32, device="cpu") / h)
    if scaling is None:
        return inverse, 1.0
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return inverse / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_seq_len
    if scaling["type"] == "yarn":
        return yarn_frequencies(inverse, scaling, original, config.rope_theta)
    # long wavelengths are stretched by `factor`, short ones kept, a ramp in between
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * inverse / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * inverse / factor + ramp * inverse, 1.0


def yarn_frequencies(inverse: Tensor, scaling: dict, original: int, theta: float) -> tuple[Tensor, float]:
    """The same for YaRN (arXiv 2309.00071): the ramp runs over dimensions, and attention is tempered."""
    h, factor = 2 * len(inverse), float(scaling["factor"])

    def dimension(rotations: float) -> float:  # the (fractional) pair that turns so often within the original context
        return h * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def temperature(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, h - 1)
    pairs = torch.arange(len(inverse), dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = mscale and mscale_all
        attention = temperature(mscale) / temperature(mscale_all) if both else temperature()
    return ramp * inverse / factor + (1 - ramp) * inverse, float(attention)


class Rope(nn.Module):
    """cos and sin for given positions. The frequencies stay fp32 whatever dtype the model is moved to."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        inverse, self.attention_factor = rope_frequencies(config)
        self.register_buffer("inverse", inverse, persistent=False)

    def _apply(self, fn, recurse=True):
        exact = self.inverse
        super()._apply(fn, recurse)
        self.inverse = exact.to(self.inverse.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions (...,) -> cos and sin (2,...,1,h), to multiply (...,H,h); the first half of sin is negative."""
        angles = positions[..., None, None].float() * self.inverse  # (...,1,h/2)
        cos, sin = angles.cos(), angles.sin()
        halves = torch.stack((cos, -sin)), torch.stack((cos, sin))
        return (torch.cat(halves, dim=-1) * self.attention_factor).to(dtype)


def apply_rope(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate x (...,H,h) by turn (2,...,1,h), cos and sin: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sin).addcmul_(x, cos)  # one temporary


# -----------------------------------------------------------------------------
# What a query sees: its own position and earlier ones, within the window


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Mask (1|N,1,M,S) from the positions of queries (1|N,M) and keys (1|N,S); a pad's key is later than any query."""
    query, key = query[:, :, None], key[:, None, :]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    return seen[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Grouped-query attention. q (N,H,M,h), k and v (N,K,S,h), mask (1|N,1,M,S) -> (N,H,M,h)."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and (q.shape[2] == 1 or mask is not None and q.device.type != "cpu"):
        return folded_sdpa(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def folded_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same with the heads of a group as queries of one head: a lone query reads each key once, and a GPU's kernels
    for masks, which know no groups, can be used."""
    groups, m = q.shape[1] // k.shape[1], q.shape[2]
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (N,K,g*M,h)
    if mask is not None and m > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return out.unflatten(2, (groups, m)).flatten(1, 2)


# -----------------------------------------------------------------------------
# The cache: keys and values of the tokens that ran


def upload(values, device: torch.device | str | None) -> Tensor:
    """Numbers on the host, a list (an empty one: of integers) or a tensor, as a tensor on the device.

    Nothing waits for the work under way there; torch.tensor(..., device=device) copies when all of it is done.
    """
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=None if len(values) else torch.long)
    return values.to(device, non_blocking=True)


class LayerCache:
    """Keys and values of one layer, of the batch rows (unit token: the tokens) that ran there."""

    def __init__(self, max_len: int | None):
        self.max_len = max_len
        self.k = self.v = None  # (N,K,S,h)
        self.position: Tensor | None = None  # (N,S) of the token in each slot; None: slot s holds token s
        self.used: list[int] = []  # slots in use, per row held
        self.kept: dict[str, list[int] | None] = {}  # router -> batch rows that run behind it; None: all of them
        self.experts: Tensor | None = None  # (B,E) gates of experts that hold for whole sequences
        self.past: dict[str, Tensor] = {}  # router -> (2,B,S) what its running cuts go by; later tokens overwrite it

    @property
    def rows(self) -> list[int] | None:
        """Batch rows whose keys and values are held here, in order; None: every row."""
        return self.kept.get("router")

    def extend(self, k: Tensor, v: Tensor, counts: list[int], position: Tensor | None,
               rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Append counts[i] tokens of k, v (n,K,M,h), pads behind them; returns all that is held (N,K,S,h).

        position (n,M) of the tokens, where slots have gaps. rows: to which of the rows held; None: to each.
        """
        held, width = list(self.used) or [0] * len(counts), k.shape[2]
        rows = range(len(held)) if rows is None else rows
        used = [held[row] for row in rows]
        least, end = min(used), max(used) + width
        if self.k is None:
            self.k = self.v = k[:, :, :0]
            self.position = None if position is None else position[:, :0]
        have = self.k.shape[2]
        if end > have:
            room = end if have == 0 else max(end, have + have // 2 + 16)  # by half, not one by one
            if self.max_len is not None and end <= self.max_len:
                room = self.max_len
            more = room - have
            # zeros, not empty: a masked slot still enters as 0 * value, and NaN would survive that
            self.k = F.pad(self.k, (0, 0, 0, more))
            self.v = F.pad(self.v, (0, 0, 0, more))
            if position is not None:
                self.position = F.pad(self.position, (0, more), value=NOWHERE)
        where = slice(None), slice(least, end)
        if least + width < end or len(rows) < len(held):  # each token has a slot of its own
            row = upload(rows, k.device)[:, None]
            column = torch.arange(width, device=k.device)
            where = row, upload(used, k.device)[:, None] + column
        self.k.transpose(1, 2)[where] = k.transpose(1, 2)  # (N,M,K,h)
        self.v.transpose(1, 2)[where] = v.transpose(1, 2)
        if position is not None:
            self.position[where] = position
        for row, count in zip(rows, counts):  # a pad's slot is its row's next one, and later tokens overwrite it
            held[row] += count
        self.used, end = held, max(held)
        return self.k[:, :, :end], self.v[:, :, :end]

    def select(self, batch_rows: list[int]) -> None:
        """Reorder, repeat or leave out batch rows."""
        places = None if self.rows is None else {row: index for index, row in enumerate(self.rows)}
        index = batch_rows if places is None else [places[row] for row in batch_rows if row in places]
        for router, held in self.kept.items():
            if held is not None:
                held = set(held)
                self.kept[router] = [new for new, row in enumerate(batch_rows) if row in held]
        if self.experts is not None:
            self.experts = self.experts[batch_rows]
        self.past = {router: past[:, batch_rows] for router, past in self.past.items()}
        if self.k is not None:
            self.used = [self.used[i] for i in index]
            index = upload(index, self.k.device)
            self.k, self.v = self.k[index], self.v[index]
            self.position = None if self.position is None else self.position[index]

    def rewind(self, lengths: list[int]) -> None:
        """Forget tokens from position lengths[row] on."""
        kept = lengths if self.rows is None else [lengths[row] for row in self.rows]
        if self.position is not None:
            late = self.position >= upload(kept, self.position.device)[:, None]
            self.position.masked_fill_(late, NOWHERE)
            kept = (self.position != NOWHERE).sum(1).tolist()
        self.used = kept if self.k is not None else []


class KVCache:
    """Keys and values of every layer, each row's length, and decisions that hold. Made and owned by the caller.

    `max_len` reserves that many slots a row; without it a layer starts at what the first call needs and grows by half.
    """

    def __init__(self, model: "Transformer", batch: int, max_len: int | None = None):
        self.layers = [LayerCache(max_len) for _ in range(model.config.n_layers)]
        self.lengths = [0] * batch  # tokens seen per row, on the host: no device sync is needed to know a shape
        self.route: str | None = None  # the mode that filled it; another mode may not continue it
        self.gates: Tensor | None = None  # (R,B) decisions held after the prompt
        self.scores: Tensor | None = None  # (R,B) their logits

    def hold(self, call: "Call", gates: Tensor | None, scores: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Note a call that ended, and decisions for whole sequences; returns its gates and scores, or those held."""
        if gates is None and call.route != "off":
            gates, scores = self.gates, self.scores
        elif gates is not None and gates.dim() == 2:
            self.gates, self.scores = gates, scores
        self.route = call.route
        self.lengths = [start + count for start, count in zip(call.starts, call.counts)]
        return gates, scores

    def row_bytes(self) -> list[int]:
        """Bytes of the slots that hold a real token, per batch row."""
        total = [0] * len(self.lengths)
        for layer in self.layers:
            rows = range(len(total)) if layer.rows is None else layer.rows
            for row, used in zip(rows, layer.used):
                total[row] += used * 2 * layer.k.shape[1] * layer.k.shape[3] * layer.k.element_size()
        return total

    def used_bytes(self) -> int:
        """Bytes of the slots that hold a real token."""
        return sum(self.row_bytes())

    def select(self, rows: list[int]) -> None:
        """Keep these batch rows in this order; a row may repeat (one context, several continuations)."""
        for layer in self.layers:
            layer.select(rows)
        self.lengths = [self.lengths[row] for row in rows]
        if self.gates is not None:
            index = upload(rows, self.gates.device)
            self.gates, self.scores = self.gates[:, index], self.scores[:, index]

    def clone(self) -> "KVCache":
        """An independent copy, to continue one context more than once."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer in other.layers:
            layer.kept = dict(layer.kept)
        other.select(list(range(len(self.lengths))))  # selecting copies every list and tensor
        return other

    def rewind(self, lengths: list[int]) -> None:
        """Forget what stands behind these lengths, one per row."""
        for layer in self.layers:
            layer.rewind(lengths)
        self.lengths = list(lengths)


# -----------------------------------------------------------------------------
# Who runs


class Call(NamedTuple):
    """What all layers of one call share; made once, before the layer loop."""

    route: str
    position: Tensor  # (1|B,T) of each token in its sequence; 1: every row began at the same one
    turn: Tensor  # (2,B*T,1,h) cos and sin
    real: Tensor | None  # (B,T) False on pads; None: there are none
    pool_lengths: Tensor | None  # (B,): tokens that a sequence router averages over
    fresh: bool  # nothing is cached yet
    starts: list[int] | None  # tokens cached before and real tokens now, per row, on the host; None where nobody asks:
    counts: list[int] | None  # route mask, and off without a cache
    chosen: dict  # batch rows -> their Selection


class Selection:
    """The tokens of a call that run one sublayer: everybody, whole batch rows, or single tokens.

    take picks them from (B,T,...) into (n,...); pack puts (n,H,h) into rows without gaps (N,H,M,h) for attention;
    add joins a sublayer's output (n,D) to x (B,T,D). Under route mask all tokens run and `gate` multiplies.
    """

    def __init__(self, call: Call, gate: Tensor | None = None, hidden: Tensor | None = None):
        self.call = call
        self.gate = gate  # (B,1|T,1)
        self.hidden = hidden  # (B,T): True where a token leaves no key and value (route mask)
        self.some = True  # somebody runs
        self.index: Tensor | None = None  # (n,) into B*T; None: everybody
        self.slot: Tensor | None = None  # (n,) into N*M; None: rows are packed as they stand
        self.n: int | None = None  # tokens that run; `index` and `slot` may repeat the last one
        self.turn = call.turn  # (2,n,1,h)
        self.position = call.position  # (1|N,M) of packed tokens
        self.starts, self.counts = call.starts, call.counts  # of packed rows
        self.table: Tensor | None = None  # (N,M) `position` on the host, where single tokens are packed
        self.single = False  # single tokens were asked: what they leave in a cache has gaps
        self.cached: list[int] | None = None  # the rows that run a decode step, of all that a cache holds; None: all
        self.everything: Tensor | None = None  # (B*T,D) everybody's input, where all leave keys and values (kv=all)

    @classmethod
    def rows(cls, call: Call, rows: list[int] | None) -> "Selection":
        """Whole batch rows, by their numbers; None: all of them."""
        known = None if rows is None else tuple(rows)
        if known in call.chosen:
            return call.chosen[known]
        who = call.chosen[known] = cls(call)
        if rows is None:
            return who
        width, device = call.position.shape[1], call.position.device
        who.n, who.some = len(rows) * width, bool(rows)
        who.index = number = upload(rows, device)
        if width > 1:
            who.index = (number[:, None] * width + torch.arange(width, device=device)).flatten()
        who.turn = call.turn.index_select(1, who.index)
        who.position = call.position if len(call.position) == 1 else call.position[number]
        who.starts = [call.starts[row] for row in rows]
        who.counts = [call.counts[row] for row in rows]
        return who

    @classmethod
    def tokens(cls, call: Call, opened: Tensor, dtype: torch.dtype) -> "Selection":
        """Single tokens, by gates (B,T) on the host. dtype: in which they will be computed (see ROWS_MULTIPLE)."""
        who, device = cls(call), call.position.device
        who.single = True
        index = opened.flatten().nonzero().squeeze(1)
        who.n, who.some = len(index), len(index) > 0
        if who.n == opened.numel():
            return who
        if dtype == torch.bfloat16 and device.type == "cpu" and who.n >= ROWS_MULTIPLE:
            index = torch.cat([index, index[-1:].expand(-who.n % ROWS_MULTIPLE)])
        who.index = upload(index, device)
        return who

    def pack_tokens(self, opened: Tensor) -> None:
        """Prepare attention among single tokens that run: each row's side by side, in order. opened (B,T) as before."""
        if self.index is None:
            return
        call, rows, device = self.call, len(opened), self.index.device
        self.turn = call.turn.index_select(1, self.index)
        self.counts = opened.sum(1).tolist()
        widest = max(self.counts)
        row, column = opened.nonzero(as_tuple=True)
        slot = row * widest + (opened.cumsum(1) - 1)[row, column]
        table = torch.full((rows * widest,), NOWHERE)
        table[slot] = column + torch.tensor(call.starts)[row]
        self.table = table.view(rows, widest)
        self.position = upload(self.table, device)
        repeats = len(self.index) - self.n
        if repeats or min(self.counts) < widest:
            self.slot = upload(torch.cat([slot, slot[-1:].expand(repeats)]), device)

    def keep_columns(self) -> None:
        """Prepare attention of single tokens over everybody's keys, each at its own place in its row."""
        if self.index is None:
            return
        self.slot = self.index
        self.turn = self.call.turn.index_select(1, self.index)

    def take(self, x: Tensor) -> Tensor:
        """(B,T,...) -> (n,...)"""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """x (B,T,D) plus out (n,D) where it ran; out, and without gradient x, may be overwritten."""
        if self.index is None:
            out = out.view_as(x)
            if self.gate is not None:
                return torch.addcmul(x, self.gate, out)
            # compiled code is fused anyway, and would be compiled anew for a view
            return x + out if torch.compiler.is_compiling() else out.add_(x)
        flat = x.flatten(0, 1)
        add = flat.index_add if torch.is_grad_enabled() else flat.index_add_
        return add(0, self.index[:self.n], out[:self.n]).view_as(x)

    def pack(self, x: Tensor) -> Tensor:
        """(n,H,h) -> (N,H,M,h)"""
        if self.slot is not None:
            packed = x.new_zeros(len(self.counts) * self.position.shape[1], *x.shape[1:])
            x = packed.index_copy_(0, self.slot[:self.n], x[:self.n])
        return x.unflatten(0, (-1, self.position.shape[1])).transpose(1, 2)

    def unpack(self, x: Tensor) -> Tensor:
        """(N,H,M,h) -> (n,H*h)"""
        x = x.transpose(1, 2).flatten(0, 1)  # (N*M,H,h)
        return (x if self.slot is None else x.index_select(0, self.slot)).flatten(1)

    def span(self, a: int, b: int, window: int | None) -> tuple[int, int]:
        """First position that some query of packed columns a..b-1 sees, and the one after the last, on the host."""
        if self.table is not None:
            part = self.table[:, a:b]
            last = part.masked_fill(part == NOWHERE, -1).max().item()
            least = part.min().item()
        else:
            starts = self.starts or [0]  # routes off and mask without a cache: a token's column is its position
            least, last = min(starts) + a, max(starts) + b - 1
        return 0 if window is None else max(0, least - window + 1), last + 1


# -----------------------------------------------------------------------------
# Kernels: what replaces a plain operator on the CPU because it pays there (figures: tests/compare_kernels.py)


class Costs(NamedTuple):
    """What decides between picking the tokens that run and computing everybody, in seconds of one thread."""

    call: float  # of an operator on few numbers
    move: float  # of a number copied between rows
    flop: float  # in a product of many rows
    tile: int  # rows that a product computes together: fewer take as long


COSTS = {torch.float32: Costs(call=5e-6, move=3.5e-10, flop=2.2e-11, tile=2)}  # of AVX2: tests/measure_costs.py
PICKS = 8  # operator calls that picking takes, whatever their size


@cache
def costs_of(device: str, dtype: torch.dtype) -> Costs | None:
    """Costs on this machine's device of that type; None: nothing was measured there."""
    has = torch.cpu.get_capabilities() if device == "cpu" else {}
    return COSTS.get(dtype) if has.get("avx2") and not has.get("avx512_f") else None


def cheaper_whole(n_run: int, n_all: int, flops: float, moved: float, costs: Costs | None) -> bool:
    """Whether computing all n_all tokens (or scores of queries) takes no longer than picking the n_run that run.

    flops: of a token; moved: numbers copied to pick a token and to put it back.
    """
    if costs is None or not n_run:
        return 0 < n_run == n_all

    def seconds(rows: int) -> float:
        return math.ceil(rows / costs.tile) * costs.tile * flops * costs.flop

    return seconds(n_all) <= seconds(n_run) + PICKS * costs.call + n_run * moved * costs.move


def lone_queries(q: Tensor, k: Tensor, v: Tensor, rows: list[int], used: list[int]) -> Tensor:
    """Queries (n,H,1,h) of these rows, each over what its row holds of k, v (N,K,S,h): other keys are not read."""
    held = ((slice(row, row + 1), slice(None), slice(used[row])) for row in rows)
    return torch.cat([sdpa(query, k[own], v[own]) for query, own in zip(q.split(1), held)])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            wide = x.float()  # the mean of squares needs fp32
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * (wide * scale).to(x.dtype)
        # asked first when compiling: a number of rows that code asks for is one that it is compiled for
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu"
        if plain or x.numel() < 64 * x.shape[-1]:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch's own holds x three times more, each a page fault per 4 KiB
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for compiled code: a lone token on the CPU is one pass over the weights, fused with its neighbours."""
    if x.device.type != "cpu" or x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    y = (weight * x.view(-1)).sum(dim=-1)  # (O,I) -> (O,)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


@cache
def rows_to_pack(dtype: torch.dtype, threads: int) -> int | None:
    """Fewest rows from which a weight reordered for oneDNN pays on this CPU; None: never, or torch cannot do it."""
    has = torch.cpu.get_capabilities()
    operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not (torch.backends.mkldnn.is_available() and operators and has.get("avx2")):
        return None
    if dtype == torch.bfloat16:  # torch's own product calls oneDNN as well, and reorders the weight in every call
        return 1 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if dtype == torch.float32 and "AMD" in has.get("cpu_name", ""):  # torch's own is MKL, which is made for Intel
        return 1 if has.get("avx512_f") or threads > 1 else 2  # and gives one row to one thread
    return None


def identity(weight: Tensor) -> tuple:
    """What tells that a weight was changed, moved or replaced."""
    return weight.data_ptr(), weight.dtype, weight._version


class Product(nn.Module):
    """A module with a weight (O,I) to multiply by, of which `pack_weights` lets it keep copies in oneDNN's order.

    Of a frozen weight they are made at first use, and anew when it has changed; a change through `.data` does not tell.
    """

    copies: dict[bool, Tensor] | None = None  # of the weight and (True) its transpose; None: none are made
    seen: tuple | None = None  # identity of the weight that they are copies of
    gone = False  # the weight itself was given up, and lives on in its copy
    looked_up = False  # something else than products reads the weight: it is never given up

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (...,I) -> (...,O)"""
        weight = self._parameters["weight"]
        if torch.compiler.is_compiling():
            if self.gone:
                raise ValueError("a weight is held as a reordered copy alone, which compiled code cannot read; "
                                 "expected plain weights: call unpack_weights(model) before compiling")
            return fused_linear(x, weight, bias)
        frozen = not (weight.requires_grad or bias is not None and bias.requires_grad)
        if self.copies is not None and frozen and self.pays(weight, x.numel() // x.shape[-1]):
            if torch.is_grad_enabled() and x.requires_grad:
                return FrozenProduct.apply(x, bias, self)
            return packed_product(x, self.packed(), bias)
        if self.copies and (self.gone or weight.requires_grad):
            self.plain()
        return F.linear(x, weight, bias)

    def pays(self, weight: Tensor, rows: int) -> bool:
        """Whether a product of so many rows is to take a copy of a frozen weight: on a CPU where that is faster."""
        threads = torch.get_num_threads()
        small = PACKED_LEAST if threads > 1 else PACKED_LEAST_ALONE
        # oneDNN adds a row's products in one chain: 4.0e-4 off float64 in logits after w2, where torch is off by 1.0e-4
        long_sums = weight.dtype == torch.float32 and weight.shape[1] > weight.shape[0]
        if weight.device.type != "cpu" or weight.numel() < small or long_sums or weight.is_inference():
            return False  # an inference tensor counts no changes
        least = rows_to_pack(weight.dtype, threads)
        return least is not None and rows >= (1 if self.gone else least)

    def packed(self, transposed: bool = False) -> Tensor:
        """The copy of the weight, or of its transpose (I,O), which gives the gradient of the input."""
        weight = self._parameters["weight"]
        if self.seen != identity(weight):
            self.seen, self.copies, self.gone = identity(weight), {}, False
        if transposed not in self.copies:
            if transposed:
                self.packed()  # a weight that is given up lives on in its own copy, not in its transpose's
            with torch.inference_mode(False), torch.no_grad():
                plain = self.copies[False].to_dense() if self.gone else weight.detach()
                plain = plain.t().contiguous() if transposed else plain
                self.copies[transposed] = torch.ops.mkldnn._reorder_linear_weight(plain, PACKED_FOR_ROWS)
                if not self.looked_up and weight.untyped_storage().resizable():  # torch's own memory, not a file's
                    weight.data = weight.new_full((1,), math.nan).expand(weight.shape)
                    self.seen, self.gone = identity(weight), True
        return self.copies[transposed]

    def plain(self) -> None:
        """Forget the copies, and hold the weight itself again."""
        if not self.copies:
            return
        weight = self._parameters["weight"]
        if self.gone and self.seen == identity(weight):
            with torch.inference_mode(False), torch.no_grad():
                weight.data = self.copies[False].to_dense()
        self.copies, self.seen, self.gone = {}, None, False

    def __getstate__(self):
        self.plain()
        return super().__getstate__()


class FrozenProduct(torch.autograd.Function):
    """x (...,I) times the copy of a module's weight: the gradient of x takes that of its transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, module: Product) -> Tensor:
        ctx.module, ctx.weight = module, module._parameters["weight"]
        return packed_product(x, module.packed(), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.module.looked_up:  # the weight is there anyway
            return grad @ ctx.weight, None, None
        return packed_product(grad, ctx.module.packed(transposed=True)), None, None


def packed_product(x: Tensor, copy: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


class Linear(Product, nn.Linear):
    """nn.Linear whose weight, once packed, is in memory as its copy alone; whoever asks for it finds it plain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self._parameters["bias"])

    @property
    def stored(self) -> torch.dtype:
        """What the weight is kept in. To ask the weight itself would give a reordered copy back."""
        return self._parameters["weight"].dtype

    def __getattr__(self, name: str):
        if name == "weight":  # to read, or to change it
            self.plain()
        return super().__getattr__(name)

    def _apply(self, *args, **kwargs):
        self.plain()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs):
        self.plain()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.plain()
        super()._load_from_state_dict(*args, **kwargs)


class Embedding(Product, nn.Embedding):
    """The table of embeddings, and the head where that is tied to it."""

    looked_up = True

    def logits(self, h: Tensor) -> Tensor:
        """Products (...,V) of states (...,D) with every embedding."""
        return self.product(h)


def products_of(model: nn.Module) -> list[Product]:
    return [module for module in model.modules() if isinstance(module, Product)]


def pack_weights(model: "Transformer") -> None:
    """Allow copies of frozen weights where the CPU multiplies faster by them; they are made at first use.

    Private memory is then at most that of the weights and a tied head in inference, twice the weights in tuning, beside
    pages mapped from disk. What trains, and other devices, go on as they were.
    """
    for module in products_of(model):
        module.copies = {}


def unpack_weights(model: "Transformer") -> None:
    """Take the copies away for good: what compiled code needs."""
    for module in products_of(model):
        module.plain()
        module.copies = None


def kernels(model: "Transformer") -> dict[str, str]:
    """What this model's calls ran on so far, by what is computed: for reports."""
    packed = [bool(module.copies) for module in products_of(model)]
    products = f"oneDNN with reordered weights ({sum(packed)} of {len(packed)})" if any(packed) else "torch's own"
    return {"products": products, "attention": "scaled_dot_product_attention"}


class SwiGLU(torch.autograd.Function):
    """silu(a) * b that keeps a and b alone for its backward pass: a third less memory where a layer is widest."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), grad * F.silu(a)


# -----------------------------------------------------------------------------
# Layers


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, width, bias=config.qkv_bias)
        self.wk = Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wv = Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wo = Linear(width, config.dim, bias=False)
        normed, whole = config.qk_norm or config.qk_norm_whole, config.qk_norm_whole
        self.norm_first = whole  # all heads together, before they are told apart
        self.q_norm = RMSNorm(width if whole else config.head_dim, config.norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(kv_width if whole else config.head_dim, config.norm_eps) if normed else nn.Identity()

    def project(self, x: Tensor, turn: Tensor, source: Tensor, source_turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (n,H,h) of normalised tokens x (n,D); rotated keys, and values (m,K,h), of source (m,D)."""
        return self.turned(self.wq(x), self.q_norm, turn), *self.remember(source, source_turn)

    def remember(self, source: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values (m,K,h), of normalised tokens (m,D)."""
        v = self.wv(source).unflatten(-1, (self.n_kv_heads, self.head_dim))
        return self.turned(self.wk(source), self.k_norm, turn), v

    def turned(self, x: Tensor, norm: nn.Module, turn: Tensor) -> Tensor:
        """Projections (n,H*h) as normalised and rotated heads (n,H,h)."""
        if self.norm_first:
            return apply_rope(norm(x).unflatten(-1, (-1, self.head_dim)), turn)
        return apply_rope(norm(x.unflatten(-1, (-1, self.head_dim))), turn)

    def forward(self, x: Tensor, who: Selection, cache: LayerCache | None = None) -> Tensor:
        """Attention of the normalised tokens x (n,D) that run, over what is cached and over themselves -> (n,D)."""
        owner, source = who, x  # of keys and values
        if who.everything is not None:  # kv=all: a skipped token is spared its query, scores and output projection
            owner, source = Selection(who.call), who.everything
        if who.some:
            q, k, v = self.project(x, who.turn, source, owner.turn)
        else:
            k, v = self.remember(source, owner.turn)
        k, v = owner.pack(k), owner.pack(v)  # (N,K,M,h)
        if cache is not None:
            position = owner.position.expand(len(owner.counts), -1) if owner.single else None
            held = cache.extend(k, v, owner.counts, position, owner.cached)
            k, v = (k, v) if who.call.fresh else held  # (N,K,S,h)
        if not who.some:
            return x
        out = self.look(who.pack(q), k, v, who, cache)  # (N,H,M,h)
        return self.wo(who.unpack(out))

    def look(self, q: Tensor, k: Tensor, v: Tensor, who: Selection, cache: LayerCache | None) -> Tensor:
        """What the queries (N,H,M,h) of `who` see of keys and values (N,K,S,h), theirs or the cache's -> (N,H,M,h)."""
        call, window, slots = who.call, self.window, k.shape[2]
        longest, key = call.position.shape[1], None  # (1|N,S) positions of keys; None: the numbers of their slots
        if who.hidden is not None:  # route mask: a skipped token is no key but to itself, so that no query sees nothing
            own = torch.eye(longest, dtype=torch.bool, device=q.device)
            seen = visible(call.position, call.position, window) & ~who.hidden[:, None, None]
            return sdpa(q, k, v, seen | own)
        if not call.fresh:
            key = None if cache.position is None else cache.position[:, :slots]
            near = window is None or max(call.starts) < window
            if who.cached is not None and near and q.device.type == "cpu":
                return lone_queries(q, k, v, who.cached, cache.used)
            if who.cached is not None:  # every row looks, whether it runs or not: no cache is copied
                asked = q.new_zeros(len(k), *q.shape[1:]).index_copy_(0, who.index, q)
                return self.look(asked, k, v, Selection(call), cache).index_select(0, who.index)
            if longest == 1 and near and min(cache.used) == slots:
                return sdpa(q, k, v)  # the latest token sees all that is held
        elif who.everything is None or who.table is None:
            key = None if who.table is None else who.position
            if window is None or longest <= window:
                return sdpa(q, k, v, causal=True)
        numbered = key is None
        key, out = torch.arange(slots, device=q.device)[None] if numbered else key, []
        for a in range(0, q.shape[2], QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, q.shape[2])
            low, high = who.span(a, b, window) if numbered else (0, slots)  # no key is touched that no query sees
            near = slice(low, high)
            mask = visible(who.position[:, a:b], key[:, near], window)
            out.append(sdpa(q[:, :, a:b], k[:, :, near], v[:, :, near], mask))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = Linear(dim, hidden_dim, bias=False)  # gate
        self.w3 = Linear(dim, hidden_dim, bias=False)  # up
        self.w2 = Linear(hidden_dim, dim, bias=False)  # down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        if gate.requires_grad or up.requires_grad:
            return self.w2(SwiGLU.apply(gate, up))
        return self.w2(F.silu(gate, inplace=True).mul_(up))


class Experts(nn.Module):
    """A mixture of experts: a token's output is the sum of its best k feed-forwards, weighted by a softmax gate.

    Pairs of a token and one of its experts run packed: sorted by expert, one product for each expert that has any.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.k, self.normed = config.experts_per_token, config.norm_topk
        self.gate = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config.dim, config.expert_dim) for _ in range(config.n_experts))
        self.shared = FeedForward(config.dim, config.shared_dim) if config.shared_dim else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if config.shared_dim else None

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (n,k) and numbers (n,k) of the experts of tokens x (n,D)."""
        weights, chosen = F.softmax(self.gate(x), dim=-1, dtype=torch.float32).topk(self.k, dim=-1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def forward(self, x: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (n,D) -> (n,D). pairs: weights (n,k) and experts (n,k) in place of the gate's own; expert -1: none runs.

        One host sync, whatever the route: how many tokens an expert has is known to the device alone.
        """
        weights, chosen = self.assign(x) if pairs is None else pairs
        flat, weights, out = chosen.flatten(), weights.flatten(), torch.zeros_like(x)
        order = flat.argsort(stable=True)
        skipped, *counts = torch.bincount(flat + 1, minlength=len(self.experts) + 1).tolist()  # the host sync
        for expert, pair in zip(self.experts, order[skipped:].split(counts)):
            if len(pair):
                token = pair // self.k
                out.index_add_(0, token, expert(x[token]) * weights[pair, None])
        if self.shared is None:
            return out
        return out + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class ExpertRouters(nn.ModuleList):
    """The routers of a layer's experts, asked together."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (...,E) fp32 of x (...,D)."""
        return F.linear(x.float(), torch.cat([router.weight for router in self]))


class Block(nn.Module):
    """One layer. With a router it is a MindSkip block:

        target attn    a = x + gate * attn(attention_norm(x))     y = a + mlp(ffn_norm(a))
        target mlp     a = x + attn(attention_norm(x))            y = a + gate * mlp(ffn_norm(a))
        target block   y = x + gate * (block(x) - x)
        target expert  a = x + attn(attention_norm(x))            y = a + sum_e gate_e * weight_e * e(ffn_norm(a))

    A router reads the normalised input of what it gates, unless all of them decided at the first routed layer
    (reads=first). `router` gates the attention or the whole block, `mlp_router` the MLP; a layer may have both.
    `expert_routers` gate the experts of a layer whose MLP is a mixture.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        experts = config.has_experts(layer)
        self.feed_forward = Experts(config) if experts else FeedForward(config.dim, config.hidden_dim)
        self.register_module("router", None)  # registered here, so that the order of routers does not depend on history
        self.register_module("expert_routers", None)
        self.register_module("mlp_router", None)
        self.routing: RouterConfig | None = None
        self.whole = False  # `router` gates the block
        self.n_routers = 0

    def forward(self, x: Tensor, call: Call, cache: LayerCache | None = None, forced=()):
        """x (B,T,D) -> y, and (gate, logit) of the routers here that decided now.

        forced: a list of gates in place of these routers' own decisions. Routes off and mask: no host sync, no
        data-dependent shape, but for experts. Route gather: one host sync per decision; without gradient x may be
        overwritten.
        """
        begin, blend = x, None
        who, h, made = self.ask("router", x, call, cache, forced[:1])
        if self.whole and who.gate is not None:  # route mask: all is computed, and blended at the end
            blend, who = who.gate, Selection(call, hidden=who.hidden)
        if who.some:
            x = who.add(x, self.attention(h, who, cache))
        elif who.everything is not None:
            self.attention(h, who, cache)  # for its keys and values

        if not self.whole and self.expert_routers is not None and call.route != "off":
            h = self.ffn_norm(x.flatten(0, 1))
            pairs, made = self.ask_experts(h.view_as(x), call, cache, forced)
            return Selection(call).add(x, self.feed_forward(h, pairs)), made
        if not self.whole:
            who, h, more = self.ask("mlp_router", x, call, cache, forced[-1:])
            made = made + more
        elif who.some:
            h = self.ffn_norm(who.take(x))
        if who.some:
            x = who.add(x, self.feed_forward(h))
        return x if blend is None else begin + blend * (x - begin), made

    def eager(self, *args):
        """The same, of which at most parts are compiled: for gather and caches."""
        return self.forward(*args)

    def ask(self, name: str, x: Tensor, call: Call, cache: LayerCache | None, forced: list):
        """Who runs behind the router of this name, their normalised input (n,D), and [(gate, logit)] if it decided now.

        Everybody runs where there is no such router. A decision for whole sequences is made with the prompt and held.
        """
        router, norm = getattr(self, name), self.attention_norm if name == "router" else self.ffn_norm
        if router is None or call.route == "off":
            return Selection(call), norm(x.flatten(0, 1)), []
        ahead = self.routing.reads == "first"
        held = not call.fresh and name in cache.kept
        if held or ahead and call.route == "gather":
            rows = cache.kept[name] if held else self.keep(name, forced[0], cache)
            who = Selection.rows(call, rows)
            return who, norm(who.take(x)) if who.some else None, []

        h = norm(x.flatten(0, 1)).view_as(x)  # (B,T,D); flat, so that compiled norms meet one shape
        if ahead:
            return Selection(call, forced[0].to(x.dtype).view(-1, 1, 1)), h.flatten(0, 1), []
        z = router(pool(h, call.pool_lengths) if self.routing.unit == "sequence" else h)  # (B,) sequences, (B,T) tokens
        gate = forced[0].to(z.dtype) if forced else ste_gate(z, self.cut(name, z, call, cache))
        single, keeps = gate.dim() == 2, name == "mlp_router" or self.routing.kv == "all"
        if single:  # the first token of a sequence always runs (attention sink), pads never do
            if call.starts is None or min(call.starts) == 0:
                gate = gate.masked_fill(call.position == 0, 1.0)
            gate = gate if call.real is None else gate * call.real

        if call.route == "mask":
            hidden = ~gate.detach().bool() if single and not keeps else None
            who = Selection(call, gate.to(x.dtype).view(len(x), -1, 1), hidden)
        elif single:
            step = x.shape[1] == 1 and not call.fresh
            who = self.pick_rows(name, call, gate, h) if step else self.pick(name, call, gate, h)
        else:
            who = Selection.rows(call, self.keep(name, gate, cache))
        return who, who.take(h), [(gate, z)]

    def cut(self, name: str, z: Tensor, call: Call, cache: LayerCache | None) -> Tensor:
        """The cut () of the router of this name, or running cuts (B,T) for its logits z (B,T)."""
        router = getattr(self, name)
        if router.running is None:
            return router.cut
        past = {} if cache is None else cache.past
        starts = call.starts or [0] * len(z)
        cuts, past[name] = router.running(z.detach(), starts, router.cut, past.get(name))
        return cuts

    def keep(self, name: str, gate: Tensor, cache: LayerCache | None) -> list[int] | None:
        """Batch rows that run behind a router by its gate (B,), for as long as the cache lives; None: all of them."""
        opened = gate.tolist()  # the host sync
        rows = None if all(opened) else [row for row, value in enumerate(opened) if value]
        if cache is not None:
            cache.kept[name] = rows
        return rows

    def read(self, x: Tensor, call: Call) -> Tensor:
        """What a sequence router of the attention or the block reads of x (B,T,D) -> (B,D)."""
        return pool(self.attention_norm(x.flatten(0, 1)).view_as(x), call.pool_lengths)

    def pick(self, name: str, call: Call, gate: Tensor, h: Tensor) -> Selection:
        """The single tokens that run behind a router, by gate (B,T): one host sync. h (B,T,D): everybody's input.

        Where that is cheaper everybody is computed: an MLP, then multiplied; with kv=all the scores, then picked from.
        """
        opened = gate.detach().bool().cpu()  # the host sync
        who, n = Selection.tokens(call, opened, h.dtype), opened.numel()
        if name == "mlp_router":
            whole = who.index is not None and self.cheap_mlp(who.n, n)
            return Selection(call, gate.detach().to(h.dtype)[..., None]) if whole else who
        if self.routing.kv == "all":
            who.everything = h.flatten(0, 1)
            flops = 2 * call.position.shape[1] * self.attention.wq.out_features  # of a query that sees half of all keys
            if call.fresh and cheaper_whole(who.n, n, flops, 0, self.costs()):
                who.keep_columns()
                return who
        who.pack_tokens(opened)
        return who

    def pick_rows(self, name: str, call: Call, gate: Tensor, h: Tensor) -> Selection:
        """As `pick`, in a decode step, by gate (B,1): rows, of all those that the cache holds."""
        opened = gate.flatten().tolist()  # the host sync
        rows = [row for row, value in enumerate(opened) if value]
        if len(rows) == len(opened):
            who = Selection(call)
        elif name == "mlp_router" and self.cheap_mlp(len(rows), len(opened)):
            return Selection(call, gate.detach().to(h.dtype)[..., None])
        else:
            who = copy.copy(Selection.rows(call, rows))
            who.cached = rows
        who.single = True
        if name == "router" and self.routing.kv == "all":
            who.everything = h.flatten(0, 1)
        return who

    def cheap_mlp(self, n_run: int, n_all: int) -> bool:
        """Whether the MLP of all tokens takes no longer than picking those that run."""
        if isinstance(self.feed_forward, Experts):
            return False
        dim, width = len(self.ffn_norm.weight), self.feed_forward.w1.out_features
        return cheaper_whole(n_run, n_all, 6 * dim * width, 2 * dim, self.costs())

    def costs(self) -> Costs | None:
        return costs_of(self.ffn_norm.weight.device.type, self.attention.wq.stored)

    def ask_experts(self, h: Tensor, call: Call, cache: LayerCache | None, forced: list):
        """Pairs of a token of h (B,T,D) and an expert, as Experts.forward takes them, and (gate, logit) of each expert.

        Unit token: (B,T), of the pairs that the layer's own gate assigned alone; the logit of any other is -inf. Unit
        sequence: (B,), made with the prompt and held. A skipped pair contributes 0, and other weights stay as they are
        (arXiv 2410.13184, eq. 6-8) unless the routing says renormalise.
        """
        weights, chosen = self.feed_forward.assign(h.flatten(0, 1))  # (n,k)
        assigned = h.new_zeros(*h.shape[:2], len(self.expert_routers), dtype=torch.bool)  # (B,T,E)
        assigned.flatten(0, 1).scatter_(1, chosen, True)
        if call.real is not None:
            assigned &= call.real[..., None]
        gate, z, made = None if cache is None else cache.experts, None, []
        token, held = self.routing.unit == "token", gate is not None
        if token or not held:
            z = self.expert_logits(h, call, weights, chosen)
        if not held:
            cut = torch.stack([router.cut for router in self.expert_routers])
            gate = torch.stack(forced, dim=-1).to(z.dtype) if forced else ste_gate(z, cut)
            if gate.dim() == 2 and cache is not None:
                cache.experts = gate
        each = gate if gate.dim() == 3 else gate[:, None]  # (B,T|1,E)
        if token:
            first = (call.position == 0)[..., None]
            if gate.dim() == 3:  # as elsewhere, the first token of a sequence always runs
                each = torch.where(first, torch.ones_like(each), each)
            z = z.masked_fill(first, math.inf).masked_fill(~assigned, -math.inf)
            made = list(zip((each * assigned).unbind(-1), z.unbind(-1)))
        elif not held:
            made = list(zip(gate.unbind(-1), z.unbind(-1)))
        runs = (each * assigned).flatten(0, 1).gather(1, chosen)  # (n,k)
        rest = weights * runs.to(weights.dtype)
        if self.routing.renormalise:
            rest = rest * (weights.sum(1, keepdim=True) / rest.sum(1, keepdim=True).clamp(min=1e-9))
        return (rest, chosen if call.route == "mask" else chosen.where(runs > 0, -1)), made

    def expert_logits(self, h: Tensor, call: Call, weights: Tensor, chosen: Tensor) -> Tensor:
        """(B,E) for sequences, (B,T,E) for tokens of h (B,T,D); what reads the gate's weights has no weights itself."""
        if self.routing.reads == "gate":
            z = torch.full((len(chosen), len(self.expert_routers)), -math.inf, device=h.device)
            return z.scatter(1, chosen, weights.float().log()).view(*h.shape[:2], -1)
        return self.expert_routers(pool(h, call.pool_lengths) if self.routing.unit == "sequence" else h)


# -----------------------------------------------------------------------------
# The model


class Transformer(nn.Module):
    """Decoder-only model; `routing` says where routers stand. Weights are not initialised for training from scratch."""

    def __init__(self, config: ModelConfig, routing: RouterConfig | None = None):
        super().__init__()
        self.config, self.routing = config, None
        self.loads: list[float] | None = None  # of each place that is an expert: its share of the pairs
        self.holds_budget = False  # routers have running cuts
        self.budget_each: float | None = None  # share of the places that each sequence runs; None: what cuts say
        self.fingerprint = self.exact_fingerprint = self.parent = None  # where it came from a checkpoint
        weight = torch.empty(config.vocab_size, config.dim)
        if not weight.is_meta:  # on the meta device normal_ imports half of torch's compiler for nothing: 1 s a load
            nn.init.normal_(weight)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, _weight=weight)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        self.rope = Rope(config)
        if routing is not None:
            self.add_routers(routing)

    def add_routers(self, routing: RouterConfig | None) -> None:
        """Put a fresh router at each place of `routing`, and take away any other; None leaves a dense model."""
        places = () if routing is None else routing.places
        if places and places[-1].layer >= self.config.n_layers:
            raise ValueError(f"routed layer {places[-1].layer} does not exist: this model has layers 0 to "
                             f"{self.config.n_layers - 1}")
        if routing is not None and routing.experts:
            self._check_experts(routing)
        self.routing, self.loads, self.holds_budget, self.budget_each = routing, None, False, None
        for block in self.layers:
            block.routing, block.whole, block.n_routers = routing, False, 0
            block.router = block.mlp_router = block.expert_routers = None
        for place in places:
            block, router = self.layers[place.layer], Router(self.config.dim, device=self.tok_embeddings.weight.device)
            block.n_routers += 1
            block.whole = place.target == "block"
            if place.target == "expert":
                block.expert_routers = block.expert_routers or ExpertRouters()
                block.expert_routers.append(router)
            else:
                setattr(block, "mlp_router" if place.target == "mlp" else "router", router)

    def _check_experts(self, routing: RouterConfig) -> None:
        """Raise ValueError unless routers stand at every expert of a routed layer."""
        for layer in routing.layers:
            found = [place.expert for place in routing.places if place.layer == layer]
            expected = self.config.n_experts if self.config.has_experts(layer) else 0
            if found != list(range(expected)):
                raise ValueError(f"routers stand at {len(found)} experts of layer {layer}, up to number {max(found)}; "
                                 f"expected one at each of its {expected}")

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes, whatever its weights are stored in."""
        return self.norm.weight.dtype

    def named_parameters(self, *args, **kwargs):
        for module in products_of(self):
            if module.gone:
                module.plain()
        return super().named_parameters(*args, **kwargs)

    def routers(self) -> list[Router]:
        """Routers in the order of `routing.places`."""
        return routers_of(self)

    def place_weights(self) -> Tensor:
        """What a unit of each place counts in the capacity (R,), of sum 1.

        All the same where targets are alike, so that capacity is a share of (place, unit) pairs; else the sublayer's
        share of the routed weight matrices, so that it is a share of compute. Of experts it is a share of the pairs of
        a token and one of its k experts: per token each pair counts 1 / (k * layers), hence a sum of E / k.
        """
        c, places = self.config, self.routing.places
        if self.routing.experts:
            if self.routing.unit == "sequence":
                return self.place_shares()
            pair = 1 / (c.experts_per_token * len(self.routing.layers))
            return torch.full((len(places),), pair, dtype=torch.float64)
        attn = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads)
        counts = [1.0] * len(places)
        if len({place.target for place in places}) > 1:
            mlp = [3 * c.dim * c.mlp_width(place.layer) for place in places]
            sizes = [{"attn": attn, "mlp": size, "block": attn + size} for size in mlp]
            counts = [size[place.target] for size, place in zip(sizes, places)]
        weights = torch.tensor(counts, dtype=torch.float64)
        return weights / weights.sum()

    def place_shares(self) -> Tensor:
        """What a whole place counts in the capacity (R,), of sum 1: of experts their measured share of the pairs."""
        if not self.routing.experts:
            return self.place_weights()
        loads = self.loads or [1.0] * len(self.routing.places)
        return torch.tensor(loads, dtype=torch.float64) / sum(loads)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B,T) -> activations (B,T,D) that enter the first layer."""
        return self.tok_embeddings(tokens).to(self.dtype)

    def head(self, h: Tensor) -> Tensor:
        """Logits in fp32 of final hidden states (..., D) -> (..., V)."""
        return (self.tok_embeddings.logits if self.output is None else self.output)(h).float()

    def forward(self, tokens: Tensor, lengths=None, prompt_lengths=None, cache=None, route: str = "off", **more):
        """Logits (B,T,V) fp32 and gates (and scores, if asked) of tokens (B,T); all else as in `hidden`."""
        own = dict(lengths=lengths, prompt_lengths=prompt_lengths, cache=cache, route=route)
        h, *rest = self.hidden(tokens, **own, **more)
        return self.head(h), *rest

    def hidden(self, tokens: Tensor | None, *, lengths=None, prompt_lengths=None, cache: KVCache | None = None,
               route: str = "off", gates: Tensor | None = None, x: Tensor | None = None, first_layer: int = 0,
               return_scores: bool = False, recompute: bool = False):
        """Run the layers: tokens (B,T) -> normalised final states (B,T,D), gates[, scores]. The head is apart.

        lengths         real tokens per row of this call, right-padded (list or tensor (B,)); None: all T
        prompt_lengths  tokens that a sequence router averages over (list or tensor (B,)); None: `lengths`
        cache           continue these rows; decisions for whole sequences are made in the call that finds it empty
        route           off (dense), mask (compute all, multiply; no cache), gather (compute only what executes)
        gates           forced gates instead of the routers', shape as returned. (R,B) with token routers: these
                        sequences skip whole, first tokens, keys and values too, and the decision is held
        x, first_layer  activations (B,T,D) that enter layer `first_layer`, instead of tokens
        recompute       the backward pass runs each block again instead of keeping what is in it (no cache)

        Gates are 0.0/1.0, (R,B) for sequences or (R,B,T) for tokens, pads 0; None for route off. Scores are the logits.
        Of experts per token gates are 1.0 at the pairs of token and expert that ran, scores -inf at pairs that a
        layer's own gate did not assign.
        R counts routers from first_layer on, in the order of `routing.places`. Host syncs: none for off and mask;
        for gather one per router and prompt (unit token: and call; reads=first: one per prompt); one more per layer
        with experts, in every route.
        Raises ValueError for what does not fit together.
        """
        x, call = self.begin(tokens, x, lengths, prompt_lengths, cache, route)
        routers = sum(block.n_routers for block in islice(self.layers, first_layer, None))
        if gates is not None and len(gates) != routers:
            raise ValueError(f"gates has {len(gates)} rows; expected {routers}, one for each router that is asked")
        made, scores, forced = [], None, iter(() if gates is None else gates)
        ahead = route != "off" and call.fresh and self.routing.reads == "first"
        decides = self.routing.places[0].layer if ahead else None
        if ahead and gates is None and first_layer > decides:
            raise ValueError(f"all routers decide at layer {decides} (reads=first), and this call begins at layer "
                             f"{first_layer}; expected gates, or a call that begins at layer {decides} or below")
        eager = route == "gather" or (route == "mask" and self.holds_budget)  # running cuts are not compiled
        whole = cache is None and not eager  # a block is one graph, if compiled
        for layer in range(first_layer, self.config.n_layers):
            if layer == decides:
                own, scores = self.ahead(x, call)
                gates = own if gates is None else gates.to(own)
                # the host sync; compiled blocks take gates of their own, not views whose offsets would count
                forced = iter(gates.cpu() if route == "gather" else [gate.clone() for gate in gates])
            block, held = self.layers[layer], None if cache is None else cache.layers[layer]
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block if whole else block.eager
            x, decided = run(x, call, held, list(islice(forced, block.n_routers)))
            made += decided
        if not ahead:
            gates, scores = (torch.stack(part) for part in zip(*made)) if made else (None, None)
        if cache is not None:
            gates, scores = cache.hold(call, gates, scores)
        x = self.norm(x)
        return (x, gates, scores) if return_scores else (x, gates)

    def begin(self, tokens: Tensor | None, x: Tensor | None = None, lengths=None, prompt_lengths=None,
              cache: KVCache | None = None, route: str = "off") -> tuple[Tensor, Call]:
        """Check a call; returns activations (B,T,D) that gather may overwrite, and what all layers share."""
        batch, width = (tokens if x is None else x).shape[:2]
        if route not in ROUTES:
            raise ValueError(f"route is {route!r}; expected one of {', '.join(ROUTES)}")
        if route != "off" and self.routing is None:
            raise ValueError(f"route {route!r} needs routers and this model has none: load it with routers=FILE, call "
                             "add_routers, or use route='off'")
        starts = [0] * batch if cache is None else cache.lengths
        if cache is not None and (route == "mask" or cache.route not in (None, route) or len(starts) != batch):
            raise ValueError(f"a cache filled under route {cache.route!r} for {len(starts)} rows cannot continue under "
                             f"{route!r} with {batch} rows; route mask takes no cache, and the others continue what "
                             "they began")
        if x is None:
            x = self.embed(tokens)
        elif route == "gather" and not torch.is_grad_enabled():
            x = x.clone()
        device, fresh = x.device, max(starts) == 0
        column, even = torch.arange(width, device=device)[None], min(starts) == max(starts)
        position = column + (starts[0] if even else upload(starts, device)[:, None])  # (1|B,T)
        turn = self.rope(position, x.dtype).expand(-1, batch, -1, -1, -1).flatten(1, 2)  # (2,B*T,1,h)
        real = pool_lengths = counts = None
        if route != "off":
            real = None if lengths is None else column < upload(lengths, device)[:, None]
            wanted = lengths if prompt_lengths is None or self.routing.pool == "all" else prompt_lengths
            pool_lengths = None if wanted is None or not fresh else upload(wanted, device)
        if route == "gather" or cache is not None:
            counts = [width] * batch if lengths is None else torch.as_tensor(lengths).tolist()
        return x, Call(route, position, turn, real, pool_lengths, fresh, counts and starts, counts, {})

    def ahead(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Gates and logits (R,B) of routers that all read what enters the first routed layer, x (B,T,D)."""
        routers, read = self.routers(), self.layers[self.routing.places[0].layer].read(x, call)
        z = torch.stack([router(read) for router in routers])
        cuts = torch.stack([router.cut for router in routers])[:, None]
        if self.budget_each is None:
            return ste_gate(z, cuts), z
        return fill_budget(z - cuts, self.place_weights(), self.budget_each), z


# -----------------------------------------------------------------------------
# Batches and generation


def pad(rows, device=None, width: int | None = None) -> Tensor:
    """Rows of tokens -> (B,T), padded with 0 on the right, to the longest or to `width`."""
    width = width or max(map(len, rows))
    padded = [list(row) + [0] * (width - len(row)) for row in rows]
    return upload(padded, device)


class Sampling(NamedTuple):
    """How next tokens are chosen: the likeliest at temperature 0, else drawn, from one generator per (seed, row)."""

    temperature: float = 0.0
    top_k: int | None = None  # from the k likeliest
    top_p: float | None = None  # from the fewest that hold this share of the probability
    seed: int = 0


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor | None = None) -> Tensor:
    """Next tokens (B,) of logits (B,V), drawn by uniform (B,) in [0,1) where the temperature is not 0."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    ordered, index = torch.sort(logits / sampling.temperature, dim=-1, descending=True, stable=True)  # (B,V)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k:] = -torch.inf
    probs = torch.softmax(ordered, dim=-1)
    mass = probs.cumsum(dim=-1)
    if sampling.top_p is not None:  # the fewest best tokens whose mass reaches top_p; the first always stays
        probs = probs.masked_fill(mass - probs >= sampling.top_p, 0.0)
        mass = probs.cumsum(dim=-1)
    drawn = uniform[:, None] * mass[:, -1:]
    place = torch.searchsorted(mass, drawn, right=True).clamp(max=mass.shape[1] - 1)
    return index.gather(1, place).squeeze(1)


class Step(NamedTuple):
    """New tokens of the rows still going; the gates of what was computed before they were chosen, and its cache."""

    rows: list[int]
    tokens: list[int]
    gates: Tensor | None
    cache: KVCache


@torch.inference_mode()
def decode(model: Transformer, cache: KVCache, last: Tensor, made: Tensor | None, choose: Callable, ends: Callable, *,
           route: str, gates: Callable | None = None) -> Iterator[Step]:
    """Continue the rows of a cache token by token; a row that has ended leaves the batch and costs nothing more.

    last (B,D): final states of the last tokens, made: the gates of that call. choose(logits (n,V), rows) -> tokens
    (n,). ends(answer) -> whether these new tokens of a row are all. gates(rows, starts, width) -> forced gates of
    `width` tokens from positions `starts` on, or None.
    """
    rows, answers = list(range(len(cache.lengths))), [[] for _ in cache.lengths]
    while True:
        tokens = choose(model.head(last), rows)
        step = Step(rows, tokens.tolist(), made, cache)  # the one host sync of a step
        for row, token in zip(rows, step.tokens):
            answers[row].append(token)
        yield step
        going = [index for index, row in enumerate(rows) if not ends(answers[row])]
        if not going:
            return
        if len(going) < len(rows):
            cache.select(going)
            rows = [rows[i] for i in going]
            tokens = tokens[upload(going, tokens.device)]
        forced = None if gates is None else gates(rows, cache.lengths, 1)
        h, made = model.hidden(tokens[:, None], cache=cache, route=route, gates=forced)
        last = h[:, -1]


@torch.inference_mode()
def stream(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, stop_tokens=(),
           sampling: Sampling = Sampling(), route: str | None = None, gates: Callable | None = None) -> Iterator[Step]:
    """Continue prompts of any lengths together, token by token: all but the return value as in `generate`."""
    room = model.config.max_seq_len - max_new_tokens
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens; expected 1 to {room}, the context of "
                             f"{model.config.max_seq_len} less {max_new_tokens} new tokens: shorten it or lower "
                             "max_new_tokens")
    temperature, top_k, top_p, seed = sampling
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}; expected temperature >= 0, "
                         "top_k >= 1, 0 < top_p <= 1")
    if not prompts or max_new_tokens < 1:
        return
    dice = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(len(prompts))]
    stop, route = set(stop_tokens), route or ("gather" if model.routing is not None else "off")

    def choose(logits: Tensor, rows: list[int]) -> Tensor:
        drawn = [torch.rand((), generator=dice[row]).item() for row in rows] if temperature else []
        return sample(logits, sampling, upload(drawn, logits.device))

    def ends(answer: list[int]) -> bool:
        return answer[-1] in stop or len(answer) == max_new_tokens

    lengths, device = [len(prompt) for prompt in prompts], model.tok_embeddings.weight.device
    cache = KVCache(model, len(prompts), max_len=max(lengths) + max_new_tokens)
    forced = None if gates is None else gates(list(range(len(prompts))), [0] * len(prompts), max(lengths))
    h, made = model.hidden(pad(prompts, device), lengths=lengths, cache=cache, route=route, gates=forced)
    last = h[torch.arange(len(prompts), device=device), upload(lengths, device) - 1]
    yield from decode(model, cache, last, made, choose, ends, route=route, gates=gates)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, stop_tokens=(),
             sampling: Sampling = Sampling(), route: str | None = None,
             gates: Callable | None = None) -> list[list[int]]:
    """Continue prompts of any lengths together; returns each row's new tokens, a stop token included.

    route None: gather where the model has routers, else off. gates(rows, starts, width) -> forced gates of `width`
    tokens of these rows from positions `starts` on, or None for those of the routers, or where a decision for whole
    sequences holds. A row's tokens do not depend on its neighbours. Raises ValueError for an empty prompt, one that
    leaves no room, or a setting out of range.
    """
    answers, how = [[] for _ in prompts], dict(stop_tokens=stop_tokens, sampling=sampling, route=route, gates=gates)
    for step in stream(model, prompts, max_new_tokens, **how):
        for row, token in zip(step.rows, step.tokens):
            answers[row].append(token)
    return answers


# -----------------------------------------------------------------------------
# Checkpoints


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index or alone. Raises FileNotFoundError with what is there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}; expected one written by convert_hf.py or "
                                "data/demo/prepare.py: check --model")
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} holds no config.json (found: {found}); convert the model with: "
                                "python convert_hf.py SRC OUT")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{index} is no index of a checkpoint; convert or copy it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the checkpoint is incomplete: convert or copy it again")
    return [folder / name for name in names]


def open_checkpoint(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, mapped from its files: what is read of them takes memory.

    Raises FileNotFoundError or ValueError for a file that is missing, cut off or damaged, or a tensor that comes twice.
    """
    tensors = {}
    for path in checkpoint_files(folder):
        try:
            held = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file, or it is truncated or damaged ({error}; "
                             f"{path.stat().st_size:,} bytes): convert or copy it again") from None
        if twice := sorted(set(held) & set(tensors)):
            raise ValueError(f"{path} holds {twice[0]} twice; config and weights disagree: convert the model again")
        tensors |= held
    return tensors


def usual_dtype(folder: str | Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> torch.dtype:
    """The dtype in which most values of a checkpoint are stored.

    Raises ValueError unless its tensors are exactly those expected, by name and shape, and floating-point numbers.
    """
    counts = dict.fromkeys(DTYPES, 0)
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{folder} holds {name} though the config has no place for it; config and weights "
                             "disagree: convert the model again")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{folder}: {name} has shape {tuple(tensor.shape)}, the config needs "
                             f"{tuple(expected[name].shape)}; convert the model again")
        if tensor.dtype not in DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{folder}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected one of "
                             f"{kinds}: convert the unquantised model")
        counts[tensor.dtype] += tensor.numel()
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; the checkpoint is "
                         "incomplete: convert the model again")
    return max(counts, key=counts.get)


def read_config(folder: str | Path) -> dict:
    """The JSON object of a checkpoint's config.json."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); convert the model again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected an object: convert the model again")
    if not isinstance(values.get("parent", ""), str | None):
        raise ValueError(f"{path}: parent is {values['parent']!r:.60}; expected a base's fingerprint, or null")
    return values


def load_config(folder: str | Path) -> ModelConfig:
    """Read and check a checkpoint's config.json."""
    try:
        return ModelConfig.from_dict(read_config(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / 'config.json'}: {error}") from None


def fingerprint(folder: str | Path, tensors: dict[str, Tensor] | None = None) -> str:
    """Identity of a base model, whatever dtype it is stored in and however long its context may be.

    SHA-256 over the config, without max_seq_len, the family's name and what is at its default, and of each tensor its
    name, shape and a sample rounded to bfloat16: of a matrix 1,024 columns of the first, middle and last row, of a
    vector everything. What float16 holds with fewer bits than bfloat16 (below 2^-14) counts as 0. Values in float16
    that were rounded from float32 differ: such a base names its `parent` in config.json. tensors: if they are open.
    """
    config = load_config(folder)
    sizes = {field.name: getattr(config, field.name) for field in fields(config)
             if field.name not in ("family", "max_seq_len") and getattr(config, field.name) != field.default}
    if config.rope_scaling and config.rope_scaling["type"] != "linear":  # its frequencies follow the original context
        original = config.rope_scaling.get("original_max_position_embeddings") or config.max_seq_len
        sizes["rope_scaling"] = {**config.rope_scaling, "original_max_position_embeddings": original}
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for name, tensor in sorted((tensors or open_checkpoint(folder)).items()):
        rows = (0, len(tensor) // 2, len(tensor) - 1)
        sample = tensor if tensor.dim() < 2 else torch.cat([tensor[row:row + 1, :1024] for row in rows])
        sample = sample.to(torch.bfloat16)
        sample = sample.masked_fill(sample.abs() < 2**-14, 0).view(torch.int16)
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def exact_fingerprint(folder: str | Path, tensors: dict[str, Tensor] | None = None) -> str:
    """Identity of a checkpoint's values: SHA-256 over its config and, of each tensor, name, dtype, shape and 3 x 4 KiB.

    Router files from before `fingerprint` survived another dtype or context name this one.
    """
    config = read_config(folder)
    config.pop("parent", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted((tensors or open_checkpoint(folder)).items()):
        digest.update(json.dumps([name, DTYPES[tensor.dtype], list(tensor.shape)]).encode())
        raw = tensor.flatten().view(torch.uint8).numpy()
        for at in (0, max(0, len(raw) // 2 - 2048), max(0, len(raw) - 4096)):
            digest.update(raw[at:at + 4096])
    return digest.hexdigest()[:32]


def fill(model: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> Transformer:
    """Give a model its tensors by name, frozen and in eval mode."""
    model.requires_grad_(False)
    model.load_state_dict(dict(tensors), assign=True)
    pack_weights(model)
    return model.eval()


@torch.inference_mode(False)  # its weights count their changes wherever it is called
def load_model(folder: str | Path, routers: str | Path | None = None, budget: float | None = None, device=None,
               dtype: torch.dtype | None = None, read: Callable | None = None,
               budget_per: str = "workload") -> Transformer:
    """Load a checkpoint folder, frozen and in eval mode, and a router file where one is given.

    Weights are mapped from disk: on the CPU in their own dtype nothing is copied. device None: CPU; dtype None: the one
    in which most values are stored, for all of them. budget sets the routers' cuts by their calibration table (0 skips
    every routed unit, 1 none); None keeps the thresholds of the file. budget_per "workload": sequences run this share
    on average, some more, some less; "sequence" (routers with reads=first): each as much of it as fits, on any source.
    read(model, folder, device, dtype): what fills the model, still on the meta device, in place of the tensors as they
    are. Raises FileNotFoundError or ValueError for a missing, truncated or mismatched file, or routers of another base.
    """
    tensors = open_checkpoint(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected the floating-point one to compute in")
    with torch.device("meta"):
        model = Transformer(load_config(folder))
    usual = usual_dtype(folder, tensors, model.state_dict())
    dtype, device = dtype or usual, device or "cpu"
    own = ((name, tensor.to(device, dtype)) for name, tensor in tensors.items())
    fill(model, own if read is None else read(model, folder, device, dtype)).to(device)
    model.fingerprint, model.exact_fingerprint = fingerprint(folder, tensors), exact_fingerprint(folder, tensors)
    model.parent = read_config(folder).get("parent")
    if routers is not None:
        load_routers(model, routers, budget, budget_per)
    elif budget is not None:
        raise ValueError(f"budget is {budget} but there are no routers to hold it; give routers=FILE as well")
    return model


def load_routers(model: Transformer, path: str | Path, budget: float | None = None,
                 budget_per: str = "workload") -> RouterMeta:
    """Give a loaded base the routers of a file, strictly: same base, same places, same shapes. Returns what it says."""
    tensors, meta = read_router_file(path)
    if budget_per not in BUDGET_PER:
        raise ValueError(f"budget_per is {budget_per!r}; expected one of {', '.join(BUDGET_PER)}")
    if budget_per == "sequence" and (budget is None or meta.routing.reads != "first"):
        raise ValueError(f"budget_per is 'sequence' with budget {budget} and {path} ({meta.routing.unit} routers, "
                         f"reads {meta.routing.reads}); expected a budget, and sequence routers that all decide at the "
                         "first routed layer: give a budget, or tune with train.py --reads=first, or use "
                         "budget_per=workload")
    check_fingerprint(path, meta.base_fingerprint, model.fingerprint, model.exact_fingerprint, model.parent)
    cuts = list(map(cut_of, meta.thresholds)) if budget is None else cuts_for(budget, meta.calibration)
    try:
        model.add_routers(meta.routing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the file is damaged: tune again or copy it again") from None
    model.loads = meta.loads
    load_router_weights(path, model, tensors, meta.routing)
    set_cuts(model, cuts)
    model.budget_each = budget if budget_per == "sequence" else None
    for router in model.routers():
        router.requires_grad_(False)
    return meta
