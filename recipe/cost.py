"""What a forward pass costs, from sizes alone: FLOPs, bytes, and the ceilings that they set on a speed-up.

A new kind of sublayer is counted in `layer_flops` and `layer_bytes`, nowhere else.
"""

import statistics
from dataclasses import dataclass, replace

from torch import Tensor

from model import ModelConfig
from router import RouterConfig


@dataclass(frozen=True)
class Executed:
    """Share of units that execute per layer; None: all. `unit`, `kv`: as in RouterConfig.

    held: share of a context's slots that each layer's cache holds, where single tokens were skipped without a trace.
    """

    attn: list[float] | None = None
    mlp: list[float] | None = None
    unit: str = "sequence"
    kv: str = "routed"
    held: list[float] | None = None

    @classmethod
    def of(cls, config: ModelConfig, routing: RouterConfig | None, shares: list[float]) -> "Executed":
        """From the share of each place (R); no routing: dense."""
        if routing is None:
            return cls()
        layers = {"attn": [1.0] * config.n_layers, "mlp": [1.0] * config.n_layers}
        for place, share in zip(routing.places, shares):
            for target, executed in layers.items():
                if place.target in (target, "block"):
                    executed[place.layer] = share
        return cls(layers["attn"], layers["mlp"], routing.unit, routing.kv)

    def layer(self, layer: int) -> tuple[float, float, float]:
        """Shares of attention, MLP and slots held in one layer."""
        lists = (self.attn, self.mlp, self.held)
        return tuple(1.0 if shares is None else shares[layer] for shares in lists)


DENSE = Executed()


# -----------------------------------------------------------------------------
# FLOPs: 2 per multiply-add of a matrix product


def pairs(tokens: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees: the sum over queries of min(position + 1, window)."""
    window = min(window or tokens, tokens)
    return tokens * window - window * (window - 1) / 2


def layer_flops(config: ModelConfig, layer: int, tokens: int, executed: Executed) -> float:
    """One layer for one row of `tokens` tokens, causal.

    Per token: projections 2 D (2 H h + 2 K h), feed-forward 6 D F; scores and values 4 H h per pair. Unit token: a
    share p of executing tokens, spread evenly, leaves p^2 of the pairs with kv "routed" and p of them (and all of the
    key and value projections) with kv "all".
    """
    d, h = config.dim, config.head_dim
    p, m, _ = executed.layer(layer)
    keys = 1.0 if executed.kv == "all" else p
    seen = p if executed.unit == "sequence" else p * keys
    projections = p * 4 * d * config.n_heads * h + keys * 4 * d * config.n_kv_heads * h
    scores = 4 * config.n_heads * h * pairs(tokens, config.window(layer)) * seen
    return tokens * projections + scores + tokens * 6 * d * config.hidden_dim * m


def prefill_flops(config: ModelConfig, tokens: int, executed: Executed = DENSE, logits: int = 1) -> float:
    """One row of `tokens` tokens, with logits at `logits` positions."""
    layers = sum(layer_flops(config, layer, tokens, executed) for layer in range(config.n_layers))
    return layers + 2.0 * logits * config.dim * config.vocab_size


def step_flops(config: ModelConfig, first: int, lengths: list[int], n_targets: int, distill: bool) -> float:
    """What a tuning step really needs: layers below the first routed one forward only; above it forward, backward
    without weight gradients (as much again), and the teacher's forward; the head likewise, where loss is taken."""
    head, passes = 2 * config.dim * config.vocab_size, 2 + distill
    layers = sum(prefill_flops(config, length, logits=0) for length in lengths)
    return layers * (first + passes * (config.n_layers - first)) / config.n_layers + passes * head * n_targets


# -----------------------------------------------------------------------------
# Bytes


def layer_bytes(config: ModelConfig, layer: int, batch: int, context: int, executed: Executed) -> float:
    """Elements that one decode step reads of one layer: weights of what runs for at least one row, keys and values."""
    d, h = config.dim, config.head_dim
    p, m, held = executed.layer(layer)
    window = min(config.window(layer) or context, context)
    keys = config.n_kv_heads if p > 0 or executed.kv == "all" else 0
    queries = config.n_heads if p > 0 else 0
    mlp = 3 * d * config.hidden_dim if m > 0 else 0
    return 2 * d * h * (queries + keys) + mlp + 2 * batch * window * config.n_kv_heads * h * p * held


def decode_bytes(config: ModelConfig, batch: int, context: int, itemsize: int, executed: Executed = DENSE) -> float:
    """Bytes that one decode step of the whole batch must read: weights, head, keys and values of `context` slots."""
    layers = sum(layer_bytes(config, layer, batch, context, executed) for layer in range(config.n_layers))
    return (layers + config.dim * config.vocab_size + config.dim * batch) * itemsize


def kv_bytes(config: ModelConfig, itemsize: int, length: int, skipped: float = 0) -> int:
    """Bytes of keys and values that `length` tokens leave, less `skipped` (layer, token) pairs that leave none."""
    return int(2 * (length * config.n_layers - skipped) * config.n_kv_heads * config.head_dim * itemsize)


# -----------------------------------------------------------------------------
# Ceilings: dense work / routed work, the routers' own left out


def prefill_ceiling(config: ModelConfig, routing: RouterConfig, gates: Tensor, tokens: int) -> float:
    """By FLOPs, of a prompt of `tokens` tokens. gates (R,B) or (R,B,T)."""
    shares = gates.flatten(1).mean(dim=1).tolist()
    return prefill_flops(config, tokens) / prefill_flops(config, tokens, Executed.of(config, routing, shares))


def decode_ceiling(
    config: ModelConfig, routing: RouterConfig, itemsize: int, context: int, gates: Tensor, steps: list[Tensor]
) -> float:
    """By bytes, of a decode step: the mean over steps. gates: of the context, (R,B) or (R,B,T); steps: (R,B[,1])."""
    batch, held = gates.shape[1], None
    if routing.unit == "token" and routing.kv == "routed":
        held = Executed.of(config, routing, gates.flatten(1).mean(dim=1).tolist()).attn
    read = []
    for step in steps:
        executed = Executed.of(config, routing, step.flatten(1).mean(dim=1).tolist())
        read.append(decode_bytes(config, batch, context, itemsize, replace(executed, held=held)))
    return decode_bytes(config, batch, context, itemsize) / statistics.mean(read)
