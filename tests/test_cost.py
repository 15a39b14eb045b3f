"""FLOPs and bytes against what really runs: multiplications that torch counts, weights touched, keys and values held.

Run: python -m pytest tests/test_cost.py
"""

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
import runtime
from model import KVCache, ModelConfig, Transformer
from recipe.cost import (
    DENSE,
    Executed,
    ItemSize,
    decode_bytes,
    decode_ceiling,
    kv_bytes,
    pairs,
    prefill_ceiling,
    prefill_flops,
    step_flops,
)
from recipe.lora import let_train
from recipe.places import random_route
from router import GRANULARITIES, RouterConfig

CONFIG = replace(tiny.CONFIG, n_layers=6, vocab_size=61)
UNTIED = replace(CONFIG, family="mistral", tie_embeddings=False, sliding_window=7, n_kv_heads=1, head_dim=12)
KV = {granularity: ("routed", "all") if granularity in ("attn_token", "both_token") else ("routed",)
      for granularity in GRANULARITIES}
CASES = [(granularity, kv) for granularity in GRANULARITIES for kv in KV[granularity]]
BUDGETS = (0.0, 0.25, 0.5, 1.0)
WIDTH = 24


def routing_of(granularity: str, kv: str = "routed", layers=(1, 2, 3, 4)) -> RouterConfig:
    return RouterConfig.of(granularity, layers, kv=kv)


def build(routing: RouterConfig | None, config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, routing)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def tokens_of(batch: int, width: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, width), generator=runtime.generator("tokens"))


def gates_of(routing: RouterConfig, budget: float, batch: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random gates (R,B) or (R,B,width); of a seed, those of a lower budget are among those of a higher one."""
    places, tokens = len(routing.places), width if routing.unit == "token" else None
    weights = torch.full((places,), 1 / places, dtype=torch.float64)
    rows = [random_route(weights, budget, runtime.generator(seed, row), tokens) for row in range(batch)]
    return torch.stack(rows, dim=1)


def counted_flops(model: Transformer, tokens: torch.Tensor, **how) -> tuple[int, torch.Tensor]:
    """FLOPs that torch counts in a prefill up to one logit, without attention's scores, and the realised gates.

    Scores are counted by torch by the whole square, by us by the pairs that a causal query sees.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        h, realised = model.hidden(tokens, **how)
        model.head(h[:, -1])
    counts = counter.get_flop_counts()["Global"].items()
    return sum(n for op, n in counts if "attention" not in str(op)), realised


def score_flops(config: ModelConfig, shares: list[float]) -> float:
    """FLOPs of scores and values of a row of WIDTH tokens whose layers see these shares of the causal pairs."""
    seen = [min(query + 1, config.sliding_window or WIDTH) for query in range(WIDTH)]
    return sum(shares) * 4 * config.n_heads * config.head_dim * sum(seen)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("batch", [2, 3])  # with one row the head is no matrix product, which torch does not count
def test_dense_prefill_flops_are_what_torch_counts(config, batch):
    counted, _ = counted_flops(build(None, config), tokens_of(batch, WIDTH), route="off")
    scores = score_flops(config, [1.0] * config.n_layers)
    assert counted == pytest.approx(batch * (prefill_flops(config, WIDTH) - scores), rel=1e-9)


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_prefill_flops_are_what_torch_counts(granularity, kv, budget, monkeypatch):
    monkeypatch.setattr(model_module, "cheaper_whole", lambda *_: False)  # so few tokens would all be computed
    routing, batch = routing_of(granularity, kv), 2
    gates = gates_of(routing, budget, batch, WIDTH)
    counted, realised = counted_flops(build(routing), tokens_of(batch, WIDTH), route="gather", gates=gates)
    inputs = WIDTH if routing.unit == "token" else 1
    counted -= len(routing.places) * batch * 2 * CONFIG.dim * inputs  # the routers
    executed = Executed.by(CONFIG, routing, realised)
    seen = [p if routing.unit == "sequence" or kv == "all" else p * p for p in executed.attn]
    expected = batch * (prefill_flops(CONFIG, WIDTH, executed) - score_flops(CONFIG, seen))
    assert counted == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 60), st.none() | st.integers(1, 80))
def test_pairs_are_those_of_the_mask(tokens, window):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (key <= query) & (key > query - (window or tokens))
    assert pairs(tokens, window) == seen.sum().item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("distill", [False, True])
def test_a_tuning_step_costs_what_torch_counts(distill, recompute):
    """Forward, backward, teacher and recomputation, all above the first router; scores apart, which torch counts by the
    whole square. The first routed attention has no gradient to pass on, so that its backward pass is not run, and
    recomputation stops before each block's last product.
    """
    routing, rows, n = RouterConfig.of("attn_sequence", range(CONFIG.n_layers)), 3, 3 * (WIDTH - 1)
    model, tokens = build(routing).train(), tokens_of(rows, WIDTH)
    let_train(model, "routers")
    with FlopCounterMode(display=False) as counter:
        if distill:
            with torch.no_grad():
                model.head(model.hidden(tokens)[0][:, :-1].flatten(0, 1))
        h, gates = model.hidden(tokens, route="mask", recompute=recompute)
        model.head(h[:, :-1].flatten(0, 1)).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(count for op, count in counts if "attention" not in str(op))
    lengths, scores = [WIDTH] * rows, rows * score_flops(CONFIG, [1.0] * CONFIG.n_layers)
    found = step_flops(CONFIG, 0, lengths, n, distill, int(recompute))
    found -= (3 + distill + recompute) * scores  # forward once each, backward twice
    width, kv_width = CONFIG.n_heads * CONFIG.head_dim, CONFIG.n_kv_heads * CONFIG.head_dim
    found -= rows * WIDTH * 4 * CONFIG.dim * (width + kv_width)
    found -= recompute * CONFIG.n_layers * rows * WIDTH * 2 * CONFIG.dim * CONFIG.hidden_dim
    assert counted == pytest.approx(found, rel=0.01)


def touched(model: Transformer) -> set:
    """Weights of every matrix product that runs for some token from now on, as a set that fills itself."""
    seen = set()

    def note(module, args, out):
        if len(out):
            seen.add(module.weight)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_decode_bytes_are_the_tensors_that_a_step_touches(granularity, kv, budget):
    routing, itemsize = routing_of(granularity, kv), ItemSize(1, 4)
    model = build(routing)
    cache, seen = KVCache(model, 1), touched(model)
    step = gates_of(routing, budget, 1, 1, seed=3) if routing.unit == "token" else None
    with torch.inference_mode():
        _, realised = model.hidden(tokens_of(1, WIDTH), cache=cache, route="gather",
                                   gates=gates_of(routing, budget, 1, WIDTH))
        # before the step, no slot is spare
        cached = [0 if layer.k is None else 2 * layer.k.numel() * itemsize.kv for layer in cache.layers]
        seen.clear()
        _, decided = model.hidden(tokens_of(1, 1), cache=cache, route="gather", gates=step)
    executed = Executed.by(CONFIG, routing, decided)
    head, embedding = CONFIG.vocab_size * CONFIG.dim, CONFIG.dim
    weights = sum(weight.numel() for weight in seen) + head + embedding
    read = sum(n for n, share in zip(cached, executed.attn) if share)
    if routing.unit == "token" and kv == "routed":
        executed = replace(executed, held=Executed.by(CONFIG, routing, realised).attn)
    found = decode_bytes(CONFIG, 1, WIDTH, itemsize, executed)
    assert found == pytest.approx(weights * itemsize.weight + read, rel=1e-6)


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_decode_bytes_are_all_tensors(config, batch):
    """All weights but the embedding's other rows and norms, and keys and values of all slots that a window shows."""
    model, slots = build(None, config), min(config.sliding_window or WIDTH, WIDTH)
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = [] if model.output is not None else [model.tok_embeddings.weight]
    weights = sum(weight.numel() for weight in [*matrices, *head]) + batch * config.dim
    cache = kv_bytes(config, 4, batch * slots)
    assert decode_bytes(config, batch, WIDTH, ItemSize(4, 4), DENSE) == weights * 4 + cache


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_kv_bytes_are_those_of_the_cache(granularity, budget):
    routing = routing_of(granularity)
    model = build(routing)
    cache = KVCache(model, 2)
    with torch.inference_mode():
        _, realised = model.hidden(tokens_of(2, WIDTH), cache=cache, route="gather",
                                   gates=gates_of(routing, budget, 2, WIDTH))
    each = 1 if routing.unit == "token" else WIDTH  # tokens that one gate decides about
    attends = [place.target != "mlp" for place in routing.places]
    skipped = each * (1 - realised[attends]).sum().item()
    assert cache.used_bytes() == kv_bytes(CONFIG, 4, 2 * WIDTH, skipped)


@pytest.mark.parametrize("granularity, kv", CASES)
def test_ceilings_fall_with_the_budget_and_end_at_one(granularity, kv):
    routing = routing_of(granularity, kv)
    prefill, decode = [], []
    for budget in BUDGETS:
        gates, step = gates_of(routing, budget, 1, 400), gates_of(routing, budget, 1, 1)
        prefill.append(prefill_ceiling(CONFIG, routing, gates, 400))
        decode.append(decode_ceiling(CONFIG, routing, ItemSize(2, 2), 400, gates, [step]))
    assert prefill == sorted(prefill, reverse=True) and decode == sorted(decode, reverse=True)
    assert prefill[0] > 1.0 and decode[0] > 1.0 and prefill[-1] == decode[-1] == 1.0
