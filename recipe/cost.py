"""What a forward pass costs, from sizes alone: FLOPs, bytes, and the ceilings that they set on a speed-up.

A new kind of sublayer is counted in `layer_flops` and `layer_elements`, nowhere else. Letters in comments are the
model's: D width, H heads, K key heads, h head width, F hidden width, V vocabulary, E experts.
"""

import statistics
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from model import ModelConfig
from router import RouterConfig


@dataclass(frozen=True)
class Executed:
    """Share of units that execute per layer; None: all. `unit`, `kv`: as in RouterConfig.

    held: share of a context's slots that each layer's cache holds, where single tokens were skipped without a trace.
    pairs: share of the pairs of a token and one of its experts.
    """

    attn: list[float] | None = None
    mlp: list[float] | None = None
    unit: str = "sequence"
    kv: str = "routed"
    held: list[float] | None = None
    pairs: list[float] | None = None

    @classmethod
    def of(cls, config: ModelConfig, routing: RouterConfig | None, shares: list[float]) -> "Executed":
        """From the share of each place (R); no routing: dense."""
        if routing is None:
            return cls()
        attn, mlp = [1.0] * config.n_layers, [1.0] * config.n_layers
        if routing.experts:
            return replace(cls(), pairs=pair_shares(config, routing, shares))
        for place, share in zip(routing.places, shares):
            if place.target in ("attn", "block"):
                attn[place.layer] = share
            if place.target in ("mlp", "block"):
                mlp[place.layer] = share
        return cls(attn, mlp, routing.unit, routing.kv)

    @classmethod
    def by(cls, config: ModelConfig, routing: RouterConfig | None, gates: Tensor) -> "Executed":
        """From gates (R,B) or (R,B,T)."""
        return cls.of(config, routing, gates.flatten(1).mean(dim=1).tolist())

    def layer(self, layer: int) -> tuple[float, float, float]:
        """Shares of attention, MLP and slots held in one layer."""
        lists = (self.attn, self.mlp, self.held)
        return tuple(1.0 if shares is None else shares[layer] for shares in lists)

    def experts(self, config: ModelConfig, layer: int) -> float:
        """Experts that a token runs in one layer, on average."""
        return config.experts_per_token * (1.0 if self.pairs is None else self.pairs[layer])


def pair_shares(config: ModelConfig, routing: RouterConfig, shares: list[float]) -> list[float]:
    """Share of its pairs of a token and an expert that each layer runs, from the share of units of each place (R).

    Unit token: of all tokens, which k experts share. Unit sequence: of sequences, as if experts had equal loads.
    """
    pairs, each = [1.0] * config.n_layers, config.experts_per_token if routing.unit == "token" else config.n_experts
    for layer in routing.layers:
        pairs[layer] = min(1.0, sum(shares[routing.rows_of(layer)]) / each)
    return pairs


DENSE = Executed()


# -----------------------------------------------------------------------------
# FLOPs: 2 per multiply-add of a matrix product


def pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees: the sum over queries of min(position + 1, window)."""
    window = min(window or tokens, tokens)
    return tokens * window - window * (window - 1) / 2


def mlp_elements(config: ModelConfig, layer: int, experts: float) -> float:
    """Weights of one layer's MLP, of so many of its experts where it has any."""
    if not config.has_experts(layer):
        return 3 * config.dim * config.hidden_dim  # D F, three times
    gates = config.dim * (config.n_experts + (config.shared_dim > 0))  # D E
    return gates + 3 * config.dim * (experts * config.expert_dim + config.shared_dim)


def layer_flops(config: ModelConfig, layer: int, tokens: int, executed: Executed) -> float:
    """One layer for one row of `tokens` tokens, causal.

    A share p of tokens that execute, spread evenly, leaves p^2 of the pairs of query and key with kv "routed", and p of
    them, but all key and value projections, with kv "all"; whole sequences leave p of everything.
    """
    attn, mlp, _ = executed.layer(layer)
    stored = 1.0 if executed.kv == "all" else attn  # share of tokens that leave keys and values
    seen = attn if executed.unit == "sequence" else attn * stored
    width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim

    query_and_output = attn * 4 * config.dim * width  # D Hh, twice
    key_and_value = stored * 4 * config.dim * kv_width  # D Kh, twice
    feed_forward = mlp * 2 * mlp_elements(config, layer, executed.experts(config, layer))
    scores_and_values = seen * 4 * width * pairs(tokens, config.window(layer))  # Hh a pair, twice
    return tokens * (query_and_output + key_and_value + feed_forward) + scores_and_values


def prefill_flops(config: ModelConfig, tokens: int, executed: Executed = DENSE, logits: int = 1) -> float:
    """One row of `tokens` tokens, with logits at `logits` positions."""
    head = 2.0 * config.dim * config.vocab_size  # D V
    layers = 0.0
    for layer in range(config.n_layers):
        layers += layer_flops(config, layer, tokens, executed)
    return layers + logits * head


def trunk_flops(config: ModelConfig, first: int, lengths: list[int]) -> float:
    """Forward passes of rows of these lengths through the layers below `first`."""
    return sum(layer_flops(config, layer, length, DENSE) for layer in range(first) for length in lengths)


def step_flops(
    config: ModelConfig, first: int, lengths: list[int], n_targets: int, distill: bool, again: int = 0
) -> float:
    """What a tuning step does from layer `first` on, for rows of these lengths and logits at n_targets positions.

    Forward and backward: without weight gradients a product costs as much again, scores and values twice as much. The
    teacher's forward. again: what costs a forward pass of the layers alone (recomputation, capacity before the
    penalty, gradients of all weights).
    """
    forwards = 2 if distill else 1
    layers = scores = 0.0
    for layer in range(first, config.n_layers):
        for length in lengths:
            layers += layer_flops(config, layer, length, DENSE)
            scores += 4 * config.n_heads * config.head_dim * pairs(length, config.window(layer))
    head = 2 * config.dim * config.vocab_size * n_targets
    return (forwards + again + 1) * layers + scores + (forwards + 1) * head


# -----------------------------------------------------------------------------
# Bytes


class ItemSize(NamedTuple):
    """Bytes of one element."""

    weight: int
    kv: int


def layer_elements(
    config: ModelConfig, layer: int, batch: int, context: int, executed: Executed
) -> tuple[float, float]:
    """Elements that one decode step reads of one layer: weights of what runs for at least one row; keys and values."""
    attn, mlp, held = executed.layer(layer)
    slots = min(config.window(layer) or context, context) * attn * held
    kv_width = config.n_kv_heads * config.head_dim

    elements = 0.0
    if attn > 0:
        elements += 2 * config.dim * config.n_heads * config.head_dim
    if attn > 0 or executed.kv == "all":
        elements += 2 * config.dim * kv_width
    if mlp > 0:
        elements += mlp_elements(config, layer, distinct_experts(config, batch, executed.experts(config, layer)))
    return elements, 2 * batch * slots * kv_width


def distinct_experts(config: ModelConfig, batch: int, each: float) -> float:
    """Experts that at least one of `batch` tokens runs, where each runs `each` of them, chosen evenly."""
    total = max(config.n_experts, 1)
    return total * (1 - (1 - each / total) ** batch)


def decode_bytes(
    config: ModelConfig, batch: int, context: int, itemsize: ItemSize, executed: Executed = DENSE
) -> float:
    """Bytes that one decode step of the whole batch must read: weights, head, keys and values of `context` slots."""
    weights, kv = config.dim * (config.vocab_size + batch), 0.0  # head, and embeddings of a token each
    for layer in range(config.n_layers):
        own, held = layer_elements(config, layer, batch, context, executed)
        weights, kv = weights + own, kv + held
    return weights * itemsize.weight + kv * itemsize.kv


def kv_bytes(config: ModelConfig, itemsize: int, length: int, skipped: float = 0) -> int:
    """Bytes of keys and values that `length` tokens leave, less `skipped` (layer, token) pairs that leave none."""
    kept = length * config.n_layers - skipped
    return int(2 * kept * config.n_kv_heads * config.head_dim * itemsize)


# -----------------------------------------------------------------------------
# Ceilings: dense work / routed work, the routers' own left out


def prefill_ceiling(config: ModelConfig, routing: RouterConfig, gates: Tensor, tokens: int) -> float:
    """By FLOPs, of a prompt of `tokens` tokens. gates (R,B) or (R,B,T)."""
    executed = Executed.by(config, routing, gates)
    return prefill_flops(config, tokens) / prefill_flops(config, tokens, executed)


def decode_ceiling(
    config: ModelConfig, routing: RouterConfig, itemsize: ItemSize, context: int, gates: Tensor, steps: list[Tensor]
) -> float:
    """By bytes, of a decode step: the mean over steps. gates: of the context, (R,B) or (R,B,T); steps: (R,B[,1])."""
    batch, held = gates.shape[1], None
    if routing.unit == "token" and routing.kv == "routed":
        held = Executed.by(config, routing, gates).attn
    read = []
    for step in steps:
        executed = replace(Executed.by(config, routing, step), held=held)
        read.append(decode_bytes(config, batch, context, itemsize, executed))
    return decode_bytes(config, batch, context, itemsize) / statistics.mean(read)
