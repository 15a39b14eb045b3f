"""The model's own properties: mask = gather, prefill + decode = one pass, rows alone = rows in a batch, and skipped
work leaves no trace.

Run: python -m pytest tests/test_model.py
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model as model_module
from model import (
    KVCache,
    ModelConfig,
    Sampling,
    Transformer,
    exact_fingerprint,
    fill,
    fingerprint,
    generate,
    load_model,
    stream,
)
from recipe.int8 import rounded
from recipe.trunk import trunk
from router import GRANULARITIES, Place, RouterConfig, RouterMeta, save_routers

BASE = dataclasses.asdict(tiny.CONFIG) | {"vocab_size": 61}
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=5),
    "qwen2": dict(qkv_bias=True, sliding_window=6, window_layers=(1, 3)),
    "qwen3": dict(qk_norm=True, head_dim=16, tie_embeddings=False),
}
KEEPS = ("attn_token", "both_token")  # granularities that may leave the keys and values of skipped tokens
CASES = [(g, kv) for g in GRANULARITIES for kv in (("routed", "all") if g in KEEPS else ("routed",))]
CASES += [
    (g, "first") for g in GRANULARITIES if g.endswith("sequence")
]  # kv routed, all routers decide at the first routed layer


def reserved(cache: KVCache) -> int:
    """Bytes that a cache holds, used or not."""
    return sum(2 * layer.k.nbytes for layer in cache.layers if layer.k is not None)


def routing_of(granularity: str, kv: str = "routed", layers=(1, 2, 3)) -> RouterConfig:
    """Of both: one layer that gates both, one that gates its attention alone, one its MLP."""
    more = {"reads": "first"} if kv == "first" else {"kv": kv}
    whole = RouterConfig.of(granularity, layers, **more)
    if whole.target != "both":
        return whole
    places = [Place(layer, "attn") for layer in layers[:-1]] + [Place(layer, "mlp") for layer in layers[1:]]
    return RouterConfig(tuple(places), whole.unit, **more)


def build(
    family: str = "llama",
    granularity: str | None = None,
    kv: str = "routed",
    layers=(1, 2, 3),
    seed: int = 0,
    dtype=torch.float32,
    base_dtype: str | None = None,
) -> Transformer:
    """A tiny random model whose routers split their inputs about evenly."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**BASE, "family": family, **FAMILIES[family]}))
    if granularity is not None:
        model.add_routers(routing_of(granularity, kv, layers))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.data.normal_(0, 0.3)
    held = model.state_dict()
    if base_dtype is None:
        return fill(model, held.items()).to(dtype)
    return fill(model, rounded(model, held.items(), torch.float32)).to(dtype)


def tokens_of(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (batch, width), generator=torch.Generator().manual_seed(seed))


def random_gates(model: Transformer, batch: int, width: int, seed: int, share: float) -> torch.Tensor:
    shape = (len(model.routing.places), batch) + ((width,) if model.routing.unit == "token" else ())
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).float()


def rows(logits: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Only the real positions: what stands on pads means nothing."""
    return torch.cat([logits[row, :length] for row, length in enumerate(lengths)])


pattern = st.fixed_dictionaries(
    dict(
        case=st.sampled_from(CASES),
        family=st.sampled_from(sorted(FAMILIES)),
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
        share=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0, None]),
        seed=st.integers(0, 10_000),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        base_dtype=st.sampled_from([None, "int8"]),
    )
)


@settings(max_examples=250, deadline=None)
@given(pattern)
def test_mask_equals_gather(p):
    (granularity, kv), lengths = p["case"], p["lengths"]
    model = build(p["family"], granularity, kv, seed=p["seed"] % 5, dtype=p["dtype"], base_dtype=p["base_dtype"])
    width = max(lengths)
    tokens = tokens_of(len(lengths), width, p["seed"])
    gates = None if p["share"] is None else random_gates(model, len(lengths), width, p["seed"], p["share"])
    prompts = [max(1, length // 2) for length in lengths]
    masked, mask_gates = model(tokens, lengths, prompts, route="mask", gates=gates)
    gathered, gather_gates = model(tokens, lengths, prompts, route="gather", gates=gates)
    assert torch.equal(mask_gates, gather_gates)
    if gates is not None and model.routing.unit == "sequence":
        assert torch.equal(mask_gates, gates)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.5}[p["dtype"]]
    torch.testing.assert_close(rows(masked, lengths), rows(gathered, lengths), atol=tolerance, rtol=tolerance)


@settings(max_examples=250, deadline=None)
@given(pattern, st.integers(1, 4), st.booleans())
def test_prefill_and_cached_steps_equal_one_pass(p, step, reserve):
    """A prompt of ragged rows, then chunks of `step` tokens: the same logits as one uncached pass that pools over the
    same prompts.
    """
    (granularity, kv), prompts = p["case"], p["lengths"]
    model = build(p["family"], granularity, kv, seed=p["seed"] % 5, dtype=torch.float64, base_dtype=p["base_dtype"])
    more, batch = 7, len(prompts)
    full = [length + more for length in prompts]
    tokens = tokens_of(batch, max(full), p["seed"])
    forced = None
    if p["share"] is not None:
        forced = random_gates(model, batch, max(full), p["seed"], p["share"])
    expected, _ = model(tokens, full, prompts, route="mask", gates=forced)

    token_gates = forced is not None and model.routing.unit == "token"
    cache = KVCache(model, batch, max_len=max(full) if reserve else None)
    width = max(prompts)
    logits, gates = model(
        tokens[:, :width], prompts, cache=cache, route="gather", gates=forced[:, :, :width] if token_gates else forced
    )
    got = [[logits[row, :length]] for row, length in enumerate(prompts)]
    held = gates.clone()
    for at in range(0, more, step):
        n = min(step, more - at)
        columns = torch.tensor([[length + at + i for i in range(n)] for length in prompts])
        piece = tokens.gather(1, columns)
        chunk_gates = forced.gather(2, columns.expand(len(forced), -1, -1)) if token_gates else None
        logits, gates = model(piece, cache=cache, route="gather", gates=chunk_gates)
        for row in range(batch):
            got[row].append(logits[row])
        if model.routing.unit == "sequence":
            assert torch.equal(gates, held)
    torch.testing.assert_close(torch.cat([torch.cat(row) for row in got]), rows(expected, full), atol=1e-9, rtol=1e-9)
    assert cache.lengths == full and cache.used_bytes() <= reserved(cache)


sizes = st.fixed_dictionaries(
    dict(
        flops=st.floats(0, 1e9),
        moved=st.floats(0, 1e5),
        costs=st.builds(
            model_module.Costs,
            call=st.floats(0, 1e-3),
            move=st.floats(0, 1e-8),
            flop=st.floats(0, 1e-9),
            tile=st.integers(1, 64),
        ),
    )
)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 5000), sizes)
def test_the_choice_between_picking_and_computing_everybody(n_all, first, second, given):
    """Nobody runs: picked, that is nothing. Everybody: everybody. Between them it turns once, and later where picking
    costs less.
    """
    few, many = sorted((min(first, n_all), min(second, n_all)))
    assert not model_module.cheaper_whole(0, n_all, **given)
    assert model_module.cheaper_whole(n_all, n_all, **given)
    if few and model_module.cheaper_whole(few, n_all, **given):
        assert model_module.cheaper_whole(many, n_all, **given)
        dear = given | dict(costs=given["costs"]._replace(call=1.0), moved=given["moved"])
        assert model_module.cheaper_whole(few, n_all, **dear)
    unknown = given | dict(flops=max(given["flops"], 1e-6), costs=None)
    assert model_module.cheaper_whole(few, n_all, **unknown) == (few == n_all)


@pytest.mark.parametrize("choice", [lambda n_run, *_: n_run > 0, lambda n_run, n_all, *_: n_run == n_all])
@settings(max_examples=25, deadline=None)
@given(p=pattern, step=st.sampled_from([1, 1, 3]))
def test_either_choice_is_the_same_function(choice, p, step):
    """Computing everybody and picking who runs: a prompt of ragged rows and later tokens are those of one masked pass,
    the cache is as compact.
    """
    (granularity, kv), prompts, width = p["case"], p["lengths"], max(p["lengths"]) + 6
    model = build(p["family"], granularity, kv, seed=p["seed"] % 5, dtype=torch.float64)
    tokens, full = tokens_of(len(prompts), width, p["seed"]), [length + 6 for length in prompts]
    gates = random_gates(model, len(prompts), width, p["seed"], 0.5 if p["share"] is None else p["share"])
    by_token = model.routing.unit == "token"
    masked, realised = model(tokens, full, prompts, route="mask", gates=gates)
    cache, got = KVCache(model, len(prompts)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "cheaper_whole", choice)
        width = max(prompts)
        got.append(
            model(
                tokens[:, :width],
                prompts,
                cache=cache,
                route="gather",
                gates=gates[:, :, :width] if by_token else gates,
            )[0]
        )
        for at in range(0, 6, step):
            columns = torch.tensor([[length + at + i for i in range(step)] for length in prompts])
            later = gates.gather(2, columns.expand(len(gates), -1, -1)) if by_token else None
            got.append(model(tokens.gather(1, columns), cache=cache, route="gather", gates=later)[0])
    together = torch.cat(
        [torch.cat([got[0][row, :length], *(piece[row] for piece in got[1:])]) for row, length in enumerate(prompts)]
    )
    torch.testing.assert_close(together, rows(masked, full), atol=1e-9, rtol=1e-9)
    slot, ran = 2 * model.config.n_kv_heads * model.config.head_dim * 8, 4 * sum(full)
    for place, gate in zip(model.routing.places, realised):
        if kv != "all" and place.target != "mlp":
            shares = gate if by_token else gate[:, None].expand(-1, max(full))
            ran -= sum(length - int(shares[row, :length].sum()) for row, length in enumerate(full))
    assert cache.used_bytes() == slot * ran


@pytest.mark.parametrize(
    "granularity, kv", [case for case in CASES if case[0] in ("attn_token", "both_token", "block_token")]
)
def test_a_row_that_skips_a_step_takes_no_part_in_it(granularity, kv):
    """Whatever its cache holds in the layers that it skips is not read."""
    model, tokens = build("llama", granularity, kv), tokens_of(3, 8)
    cache = KVCache(model, 3)
    model(tokens, [8, 5, 6], cache=cache, route="gather")
    gates = torch.ones(len(model.routing.places), 3, 1)
    gates[:, 1] = 0.0
    attends = [place.layer for place in model.routing.places if place.target != "mlp"]
    step, other = tokens_of(3, 1, seed=4), cache.clone()
    wanted, _ = model(step, cache=cache, route="gather", gates=gates)
    for layer in attends:
        for held in (other.layers[layer].k, other.layers[layer].v):
            held[1] = math.nan
    got, _ = model(step, cache=other, route="gather", gates=gates)
    assert torch.equal(got, wanted) and got.isfinite().all()


@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g.endswith("sequence")])
def test_a_route_that_is_decided_at_the_first_routed_layer_depends_on_no_route(granularity):
    """Every router reads the same mean, so logits are those of one linear map of it, whatever runs; a call that begins
    above must bring gates.
    """
    model, tokens, lengths = build("llama", granularity, "first"), tokens_of(3, 9), [9, 4, 7]
    x = trunk(model, tokens)
    h = model.layers[1].attention_norm(x)
    mean = torch.stack([row[:length].mean(0) for row, length in zip(h, lengths)])
    wanted = torch.stack([router(mean) for router in model.routers()])
    for share in (0.0, 0.4, 1.0, None):
        gates = None if share is None else random_gates(model, 3, 9, 5, share)
        for route in ("mask", "gather"):
            _, ran, z = model.hidden(tokens, lengths=lengths, route=route, gates=gates, return_scores=True)
            torch.testing.assert_close(z, wanted, atol=1e-4, rtol=1e-4)
            assert torch.equal(ran, (z >= 0).float() if gates is None else gates)
    with pytest.raises(ValueError, match="decide at layer 1"):
        model.hidden(None, x=x, first_layer=2, route="gather")
    gates = random_gates(model, 3, 9, 5, 0.5)
    gates[model.routing.rows_of(1)] = 0.0
    if granularity == "block_sequence":  # nothing of layer 1 runs, so that what enters it enters layer 2
        got = model.hidden(None, x=x, first_layer=2, route="gather", gates=gates[1:], lengths=lengths)[0]
        want = model.hidden(tokens, route="gather", gates=gates, lengths=lengths)[0]
        torch.testing.assert_close(rows(got, lengths), rows(want, lengths))


@settings(max_examples=60, deadline=None)
@given(
    pattern,
    st.sampled_from([g for g in GRANULARITIES if g.endswith("sequence")]),
    st.sampled_from([0.0, 0.2, 0.4, 0.55, 0.8, 1.0]),
)
def test_a_budget_per_sequence_holds_for_every_row_of_any_batch(p, granularity, budget):
    """mask = gather = prompt and cached steps = the row alone, and each row runs as much as fits, whatever the cuts."""
    model, prompts = build(p["family"], granularity, "first", seed=p["seed"] % 5, dtype=torch.float64), p["lengths"]
    for number, router in enumerate(model.routers()):
        router.cut.fill_([math.inf, -math.inf, 0.7, -0.2][(p["seed"] + number) % 4])
    model.budget_each, weights = budget, model.place_weights()
    full = [length + 3 for length in prompts]
    tokens = tokens_of(len(prompts), max(full), p["seed"])
    expected, ran = model(tokens, full, prompts, route="mask")
    assert torch.equal(model(tokens, full, prompts, route="gather")[1], ran)
    used = weights @ ran.double()
    assert (used <= budget + 2e-6).all() and ((used + weights[:, None] > budget) | ran.bool()).all()
    cache = KVCache(model, len(prompts))
    got = [model(tokens[:, : max(prompts)], prompts, cache=cache, route="gather")[0]]
    for at in range(3):
        column = torch.tensor([[length + at] for length in prompts])
        logits, held = model(tokens.gather(1, column), cache=cache, route="gather")
        got.append(logits)
        assert torch.equal(held, ran)
    for row, length in enumerate(prompts):
        together = torch.cat([got[0][row, :length], *(piece[row] for piece in got[1:])])
        torch.testing.assert_close(together, expected[row, : full[row]], atol=1e-9, rtol=1e-9)
        alone, own = model(tokens[row : row + 1, : full[row]], prompt_lengths=[length], route="gather")
        torch.testing.assert_close(alone[0], together, atol=1e-9, rtol=1e-9)
        assert torch.equal(own[:, 0], ran[:, row])


@settings(max_examples=120, deadline=None)
@given(pattern)
def test_batch_equals_rows_alone(p):
    (granularity, kv), lengths = p["case"], p["lengths"]
    model = build(p["family"], granularity, kv, seed=p["seed"] % 5, dtype=torch.float64, base_dtype=p["base_dtype"])
    tokens = tokens_of(len(lengths), max(lengths), p["seed"])
    for route in ("mask", "gather"):
        together, gates = model(tokens, lengths, route=route)
        for row, length in enumerate(lengths):
            alone, own = model(tokens[row : row + 1, :length], route=route)
            torch.testing.assert_close(alone[0], together[row, :length], atol=1e-10, rtol=1e-10)
            assert torch.equal(own[:, 0], gates[:, row, :length] if model.routing.unit == "token" else gates[:, row])


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("case", CASES)
def test_new_routers_change_nothing(case, family):
    """Zero routers at threshold 0.5 execute everything: step 0 of training is the base model, bit for bit in mask and
    gather for attn and mlp.
    """
    model = build(family, *case)
    for router in model.routers():
        router.weight.data.zero_()
    tokens = tokens_of(3, 9)
    dense, none = model(tokens)
    assert none is None
    for route in ("mask", "gather"):
        logits, gates = model(tokens, route=route)
        assert gates.min() == 1
        torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g.endswith("sequence")])
def test_all_off_leaves_no_work_and_no_cache(granularity):
    """Projections of a closed layer are not called at all (hooks count), and its cache holds not one byte."""
    model = build("llama", granularity)
    calls = []
    for layer in (1, 2, 3):
        for part in (
            model.layers[layer].attention.wq,
            model.layers[layer].attention.wo,
            model.layers[layer].feed_forward.w1,
        ):
            part.register_forward_hook(lambda module, args, out: calls.append(module))
    cache = KVCache(model, 2)
    gates = torch.zeros(len(model.routing.places), 2)
    model(tokens_of(2, 6), cache=cache, route="gather", gates=gates)
    model(tokens_of(2, 1), cache=cache, route="gather")
    per_call = {"attn_sequence": 3, "mlp_sequence": 6, "block_sequence": 0, "both_sequence": 1 + 2}[granularity]
    assert len(calls) == 2 * per_call
    dense = KVCache(model, 2)
    model(tokens_of(2, 6), cache=dense)
    model(tokens_of(2, 1), cache=dense)
    held = {"mlp_sequence": 4, "both_sequence": 2}.get(granularity, 1)
    assert reserved(cache) * 4 == reserved(dense) * held and cache.used_bytes() * 4 == dense.used_bytes() * held


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_may_come_in_the_layout_of_a_gpu(family, granularity, kv, monkeypatch):
    """CUDA's kernels give (N,M,H,h) in memory, the CPU's (N,H,M,h): no step may count on either."""
    model, plain = build(family, granularity, kv), torch.nn.functional.scaled_dot_product_attention
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11, 12]]
    wanted = [generate(model, rows, 4, route=route) for rows in (prompts, prompts[:1]) for route in ("off", "gather")]

    def as_on_a_gpu(*args, **kwargs):
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_on_a_gpu)
    found = [generate(model, rows, 4, route=route) for rows in (prompts, prompts[:1]) for route in ("off", "gather")]
    assert found == wanted


@settings(max_examples=20)
@given(n=st.integers(1, 3), groups=st.integers(1, 4), m=st.integers(1, 5), masked=st.booleans(), shared=st.booleans())
def test_folded_heads_change_nothing(n, groups, m, masked, shared):
    rng = torch.Generator().manual_seed(m)
    q, k, v = (torch.randn(n, heads, length, 8, generator=rng) for heads, length in ((2 * groups, m), (2, 7), (2, 7)))
    mask = torch.rand(1 if shared else n, 1, m, 7, generator=rng) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(model_module.folded_sdpa(q, k, v, mask), wanted)


def test_token_cache_holds_what_executed():
    model = build("llama", "attn_token")
    tokens = tokens_of(2, 10)
    gates = random_gates(model, 2, 10, 3, 0.4)
    cache = KVCache(model, 2)
    _, realised = model(tokens, cache=cache, route="gather", gates=gates)
    slot = 2 * 2 * 8 * 4  # k and v, kv heads, head width, fp32
    assert cache.used_bytes() == slot * (2 * 10 + int(realised.sum()))


def test_select_and_clone_continue_correctly():
    """Rows of a cache reordered, dropped and repeated go on as if they had been alone; a clone is independent of its
    origin.
    """
    for granularity, kv in CASES:
        model = build("llama", granularity, kv, dtype=torch.float64)
        lengths = [4, 7, 5]
        tokens = tokens_of(3, 7)
        cache = KVCache(model, 3)
        model(tokens, lengths, cache=cache, route="gather")
        copy = cache.clone()
        order = [2, 0, 0]
        cache.select(order)
        step = tokens_of(3, 2, seed=9)
        got, _ = model(step, cache=cache, route="gather")
        for place, row in enumerate(order):
            alone = KVCache(model, 1)
            model(tokens[row : row + 1, : lengths[row]], cache=alone, route="gather")
            want, _ = model(step[place : place + 1], cache=alone, route="gather")
            torch.testing.assert_close(got[place], want[0], atol=1e-10, rtol=1e-10)
        assert copy.lengths == lengths
        model(step, cache=copy, route="gather")


def test_cache_grows_without_copying_every_token():
    model = build()
    cache = KVCache(model, 1)
    model(tokens_of(1, 4), cache=cache)
    moves, at = 0, cache.layers[0].k.data_ptr()
    for _ in range(60):
        model(tokens_of(1, 1), cache=cache)
        moves += cache.layers[0].k.data_ptr() != at
        at = cache.layers[0].k.data_ptr()
    assert moves <= 4


@pytest.mark.parametrize("case", CASES)
def test_generate_equals_repeated_full_passes(case):
    model = build("llama", *case)
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    got = generate(model, prompts, 12)
    for prompt, new in zip(prompts, got):
        text = list(prompt)
        for token in new:
            logits, _ = model(torch.tensor([text]), prompt_lengths=[len(prompt)], route="gather")
            assert token == int(logits[0, -1].argmax())
            text.append(token)
        assert len(new) == 12


def test_generate_stops_streams_and_samples():
    model = build("llama", "attn_sequence")
    prompts = [[1, 2, 3], [4, 5], [6]]
    plain = generate(model, prompts, 10)
    stop = plain[1][3]
    heard, stopped = [[], [], []], generate(model, prompts, 10, stop_tokens=[stop])
    for step in stream(model, prompts, 10, stop_tokens=[stop]):
        assert len(step.rows) == len(step.tokens) == len(step.cache.lengths) == step.gates.shape[1]
        for row, token in zip(step.rows, step.tokens):
            heard[row].append(token)
    for row in range(3):
        cut = plain[row].index(stop) + 1 if stop in plain[row] else 10
        assert stopped[row] == plain[row][:cut] == heard[row]
    hot, other = Sampling(1.3, 20, 0.9, seed=5), Sampling(1.3, 20, 0.9, seed=6)
    together = generate(model, prompts, 10, sampling=hot)
    assert together == generate(model, prompts, 10, sampling=hot) != generate(model, prompts, 10, sampling=other)
    alone = generate(model, prompts[:1], 10, sampling=hot)[0]
    assert together[0] == alone, "a row's draws must not depend on its neighbours"
    assert generate(model, prompts, 10, sampling=Sampling(temperature=1.0, top_k=1)) == plain
    for wrong in (Sampling(temperature=-1.0), Sampling(top_k=0), Sampling(top_p=0.0), Sampling(top_p=1.5)):
        with pytest.raises(ValueError, match="expected temperature >= 0, top_k >= 1, 0 < top_p <= 1"):
            generate(model, prompts, 10, sampling=wrong)


def test_interleaved_generations_do_not_disturb_each_other():
    """Two caches on one model advance in turn; each goes on as if it were alone: no state lives on the modules."""
    model = build("llama", "block_sequence")
    streams = [tokens_of(1, 20, seed) for seed in (1, 2)]
    alone = [model(text, prompt_lengths=[5], route="gather")[0][0, 5:] for text in streams]
    caches = [KVCache(model, 1) for _ in streams]
    for text, cache in zip(streams, caches):
        model(text[:, :5], cache=cache, route="gather")
    got = [[], []]
    for at in range(5, 20):
        for which, (text, cache) in enumerate(zip(streams, caches)):
            got[which].append(model(text[:, at : at + 1], cache=cache, route="gather")[0][0, 0])
    for which in range(2):
        torch.testing.assert_close(torch.stack(got[which]), alone[which], atol=1e-4, rtol=1e-4)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    uniform = (torch.arange(4000) + 0.5) / 4000
    drawn = model_module.sample(logits, Sampling(1.0), uniform)
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, torch.softmax(logits[0], 0), atol=1e-3, rtol=0)
    assert set(model_module.sample(logits, Sampling(1.0, top_k=2), uniform).tolist()) == {0, 1}
    assert set(model_module.sample(logits, Sampling(1.0, top_p=0.5), uniform).tolist()) == {0}


@pytest.mark.parametrize("case", CASES)
def test_gradient_reaches_the_routers_only_through_the_score(case):
    """With the straight-through estimator, d loss / d w equals d loss / d gate times the slope of the sigmoid, summed
    over units.
    """
    model = build("llama", *case, dtype=torch.float64)
    for router in model.routers():
        router.requires_grad_(True)
        router.float()
    tokens = tokens_of(2, 8)
    h, gates, z = model.hidden(tokens, route="mask", return_scores=True)
    gates.retain_grad()
    loss = h.square().mean()
    slope = torch.autograd.grad(
        loss, [gates, z, *[router.weight for router in model.routers()]], retain_graph=True, allow_unused=True
    )
    assert all(g is not None and g.abs().sum() > 0 for g in slope[2:])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"layers.{place.layer}.{'mlp_router' if place.target == 'mlp' else 'router'}.weight"
        for place in model.routing.places
    ]


def test_trunk_can_be_computed_once():
    model = build("llama", "attn_token", layers=(2, 3))
    tokens = tokens_of(2, 8)
    whole, gates = model(tokens, route="mask")
    h, again = model.hidden(None, x=trunk(model, tokens), first_layer=2, route="mask")
    torch.testing.assert_close(model.head(h), whole)
    assert torch.equal(gates, again)


def test_pool_setting_decides_what_a_sequence_router_sees():
    model = build("llama", "attn_sequence")
    tokens = tokens_of(1, 10)
    other = tokens.clone()
    other[0, 6:] = (other[0, 6:] + 1) % BASE["vocab_size"]
    score = lambda t: model.hidden(t, prompt_lengths=[6], route="mask", return_scores=True)[2]
    torch.testing.assert_close(score(tokens), score(other))  # the answer cannot be seen
    model.routing = dataclasses.replace(model.routing, pool="all")
    assert not torch.allclose(score(tokens), score(other))


def test_misuse_is_refused_with_a_reason():
    model = build()
    with pytest.raises(ValueError, match="needs routers"):
        model(tokens_of(1, 3), route="gather")
    with pytest.raises(ValueError, match="expected one of off, mask, gather"):
        model(tokens_of(1, 3), route="skip")
    with pytest.raises(ValueError, match="layers 0 to 3"):
        model.add_routers(RouterConfig.of("attn_sequence", (4,)))
    model = build("llama", "attn_sequence")
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"gates has {count} rows; expected 3"):
            model(tokens_of(1, 3), route="mask", gates=torch.ones(count, 1))
    cache = KVCache(model, 1)
    model(tokens_of(1, 3), cache=cache, route="gather")
    with pytest.raises(ValueError, match="cannot continue"):
        model(tokens_of(1, 3), cache=cache)
    with pytest.raises(ValueError, match="cannot continue"):
        model(tokens_of(1, 3), cache=KVCache(model, 1), route="mask")
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(model, [[1], []], 4)
    with pytest.raises(ValueError, match="leaves|less"):
        generate(model, [[1] * 126], 4)


@pytest.mark.parametrize("granularity, kv", [case for case in CASES if "token" in case[0]])
@pytest.mark.parametrize("grad", [False, True])
def test_tokens_that_round_their_number_up_change_nothing(granularity, kv, grad, monkeypatch):
    """In bfloat16 on a CPU the products of picked tokens see a multiple of rows; logits, cache and gradients are those
    without.
    """
    net = build("llama", granularity, kv, dtype=torch.bfloat16)
    tokens, gates, seen, results = tokens_of(2, 13), random_gates(net, 2, 13, 3, 0.6), [], []
    linears = [
        net.layers[place.layer].attention.wo if place.target != "mlp" else net.layers[place.layer].feed_forward.w2
        for place in net.routing.places
    ]
    for multiple in (4, 1000):
        monkeypatch.setattr(model_module, "ROWS_MULTIPLE", multiple)
        hooks = [
            linear.register_forward_pre_hook(lambda _, args: seen.append((multiple, args[0].shape[0])))
            for linear in linears
        ]
        x = net.tok_embeddings(tokens).requires_grad_(grad)
        cache = None if grad else KVCache(net, 2, 20)
        with torch.set_grad_enabled(grad):
            h = net.hidden(tokens, route="gather", gates=gates, cache=cache, x=x)[0]
        if grad:
            h.float().square().sum().backward()
        else:
            later = net.hidden(tokens_of(2, 3, 7), route="gather", gates=random_gates(net, 2, 3, 5, 0.6), cache=cache)[
                0
            ]
        results.append([h.detach(), x.grad if grad else later])
        for hook in hooks:
            hook.remove()
    assert (results[0][0] - results[1][0]).abs().max() < 0.1
    assert (results[0][1] - results[1][1]).abs().max() < 0.05 * results[1][1].abs().max().clamp(min=2)
    counts = {multiple: [n for m, n in seen if m == multiple] for multiple in (4, 1000)}
    assert any(n % 4 for n in counts[1000]) and all(n % 4 == 0 or n < 4 for n in counts[4])


def test_moving_dtype_keeps_routers_and_frequencies_exact():
    model = build("llama", "attn_sequence")
    weight, inverse = model.routers()[0].weight.clone(), model.rope.inverse.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.routers()[0].weight, weight) and torch.equal(model.rope.inverse, inverse)
    assert model.layers[0].attention.wq.weight.dtype == torch.bfloat16


def test_swiglu_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    a, b = (torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(model_module.SwiGLU.apply, (a, b))
    assert torch.equal(model_module.SwiGLU.apply(a, b), torch.nn.functional.silu(a) * b)


@pytest.mark.parametrize("case", CASES)
def test_a_list_skips_whole_sequences_whatever_the_unit(case):
    """Gates (R,B) with token routers too: no work, no keys, first tokens included; mask, gather and cached steps agree.
    """
    model = build("mistral", *case, dtype=torch.float64)
    tokens, lengths = tokens_of(3, 9), [9, 4, 7]
    gates = (torch.rand(len(model.routing.places), 3, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    gates[:, 0] = 0
    masked, returned = model(tokens, lengths, route="mask", gates=gates)
    cache = KVCache(model, 3)
    gathered, again = model(tokens, lengths, cache=cache, route="gather", gates=gates)
    assert torch.equal(returned, gates) and torch.equal(again, gates)
    torch.testing.assert_close(rows(masked, lengths), rows(gathered, lengths), atol=1e-10, rtol=1e-10)
    slot, kept = 2 * 2 * 8 * 8, []
    for row in range(3):
        skipped = sum(1 - gates[i, row].item() for i, place in enumerate(model.routing.places) if place.target != "mlp")
        kept.append(slot * lengths[row] * (4 - skipped))
    assert cache.row_bytes() == kept and cache.used_bytes() == sum(kept)
    step = tokens_of(3, 1, seed=4)
    later, held = model(step, cache=cache, route="gather")
    assert torch.equal(held, gates)
    whole = torch.stack(
        [torch.cat([tokens[row, :length], step[row], tokens[row, length:]]) for row, length in enumerate(lengths)]
    )
    full = model(whole, [length + 1 for length in lengths], route="mask", gates=gates)[0]
    torch.testing.assert_close(later[:, 0], full[torch.arange(3), lengths], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_rewound_cache_goes_on_as_if_nothing_had_come_after(case):
    model = build("mistral", *case, dtype=torch.float64)
    tokens, lengths = tokens_of(3, 7), [7, 3, 5]
    cache = KVCache(model, 3)
    model(tokens, lengths, cache=cache, route="gather")
    held, step = cache.used_bytes(), tokens_of(3, 4, seed=8)
    first = [model(step[:, i : i + 1], cache=cache, route="gather")[0] for i in range(4)]
    cache.rewind(lengths)
    assert cache.used_bytes() == held and cache.lengths == lengths
    for i in range(4):
        torch.testing.assert_close(
            model(step[:, i : i + 1], cache=cache, route="gather")[0], first[i], atol=1e-10, rtol=1e-10
        )


# -----------------------------------------------------------------------------
# Checkpoints


def stored(folder: Path, net: Transformer, dtype: torch.dtype | dict = torch.float32, **changes) -> Path:
    """A checkpoint folder of a model. dtype: of all tensors, or by a part of their names ("": of the others); changes:
    of config.json.
    """
    folder.mkdir(exist_ok=True)
    by_part = dtype if isinstance(dtype, dict) else {"": dtype}
    tensors = {
        name: tensor.to(next(kind for part, kind in by_part.items() if part in name))
        for name, tensor in net.state_dict().items()
        if "router" not in name
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(net.config), **changes}))
    return folder


def routers_for(path: Path, net: Transformer, base: str, granularity: str = "attn_sequence") -> Path:
    net.add_routers(RouterConfig.of(granularity, (1, 2)))
    for router in net.routers():
        router.weight.data.normal_()
    save_routers(path, net, RouterMeta(net.routing, [0.5] * len(net.routing.places), base))
    return path


@pytest.mark.parametrize(
    "parts, unified",
    [
        ({"norm": torch.float32, "": torch.bfloat16}, torch.bfloat16),
        ({"wq": torch.bfloat16, "": torch.float32}, torch.float32),
        ({"norm": torch.float16, "embeddings": torch.float32, "": torch.bfloat16}, torch.bfloat16),
        ({"layers.1": torch.float16, "": torch.float32}, torch.float32),
    ],
)
def test_a_checkpoint_of_mixed_dtypes_is_loaded_in_that_of_most_of_its_values(tmp_path, parts, unified):
    """bfloat16 weights with float32 norms crashed at the first product."""
    net = build("qwen2")
    mixed = load_model(stored(tmp_path, net, parts))
    assert {tensor.dtype for tensor in mixed.state_dict().values()} == {unified}
    logits = mixed(tokens_of(2, 7))[0]
    torch.testing.assert_close(
        logits, load_model(tmp_path, dtype=torch.float64)(tokens_of(2, 7))[0].float(), atol=0.3, rtol=0.05
    )
    assert load_model(tmp_path, dtype=torch.float64).norm.weight.dtype == torch.float64


def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(tmp_path):
    net = build()
    stored(tmp_path, net)
    save_file(
        {**load_file(tmp_path / "model.safetensors"), "norm.weight": torch.ones(32, dtype=torch.int8)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match="norm.weight has dtype int8; expected one of float32, bfloat16, float16, float64"
    ):
        load_model(tmp_path)


def test_a_base_is_the_same_in_another_dtype_context_or_label(tmp_path):
    """Routers tuned on one copy load on the others; any other change of the config or of the weights is another base.
    """
    net = build("qwen3")
    net.tok_embeddings.weight.data[0, :4] = torch.tensor(
        [1e-5, -3e-8, 6.1e-5, -7e-5]
    )  # subnormal in float16, or nearly
    first = stored(tmp_path / "first", net)
    known = fingerprint(first)
    file = routers_for(tmp_path / "r", build("qwen3"), known)
    half = build("qwen3")
    half.load_state_dict({name: tensor.bfloat16().float() for name, tensor in net.state_dict().items()})
    for i, (model, dtype, changes) in enumerate(
        [
            (net, torch.bfloat16, {}),
            (net, torch.float64, {}),
            (half, torch.float16, {}),
            (half, torch.float32, {}),
            (net, {"norm": torch.float32, "": torch.bfloat16}, {}),
            (net, torch.float32, dict(max_seq_len=4096)),
            (net, torch.float32, dict(family="llama")),
            (net, torch.float32, dict(parent="abc")),
        ]
    ):
        folder = stored(tmp_path / f"same{i}", model, dtype, **changes)
        assert fingerprint(folder) == known and load_model(folder, routers=file).routing is not None
    for i, changes in enumerate(
        [
            dict(rope_theta=2e4),
            dict(norm_eps=1e-6),
            dict(sliding_window=7),
            dict(qkv_bias=False, sliding_window=None, n_kv_heads=2, rope_theta=1e4 + 1),
            dict(rope_scaling={"type": "linear", "factor": 2.0}),
        ]
    ):
        assert fingerprint(stored(tmp_path / f"other{i}", net, **changes)) != known
    for name in ("tok_embeddings.weight", "layers.2.attention.wk.weight", "layers.3.ffn_norm.weight", "output.weight"):
        other = build("qwen3")
        other.load_state_dict({**net.state_dict(), name: net.state_dict()[name] * 1.02})
        folder = stored(tmp_path / f"other {name}", other)
        with pytest.raises(
            ValueError, match=f"tuned on a base with fingerprint {known}, this base has {fingerprint(folder)}"
        ):
            load_model(folder, routers=file)


def test_scaled_frequencies_are_part_of_a_base_its_longest_context_is_not(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    net = build()
    known = fingerprint(stored(tmp_path, net, rope_scaling=yarn, max_seq_len=32))
    assert fingerprint(stored(tmp_path, net, rope_scaling=yarn, max_seq_len=128)) == known
    bare = {
        "type": "yarn",
        "factor": 4.0,
    }  # the original context is then the longest one: raising that changes frequencies
    assert (
        fingerprint(stored(tmp_path, net, rope_scaling=bare, max_seq_len=32))
        == known
        != fingerprint(stored(tmp_path, net, rope_scaling=bare, max_seq_len=128))
    )


def test_routers_of_old_files_and_of_a_parent_are_accepted(tmp_path):
    net = build()
    base, other = stored(tmp_path / "base", net), stored(tmp_path / "other", build(seed=1))
    for name, known in (("old", exact_fingerprint(base)), ("new", fingerprint(base))):
        file = routers_for(tmp_path / name, build(), known)
        assert load_model(base, routers=file).routing is not None
        with pytest.raises(ValueError, match=f"tuned on a base with fingerprint {known}"):
            load_model(other, routers=file)
        child = stored(tmp_path / "child", build(seed=1), parent=known)
        assert load_model(child, routers=file).routing is not None
    assert exact_fingerprint(child) == exact_fingerprint(other), "what a base was made from is not what it is"
    with pytest.raises(ValueError, match="parent is 3"):
        load_model(stored(tmp_path / "child", net, parent=3))


def test_a_router_file_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    net = build()
    base = stored(tmp_path / "base", net)
    known = fingerprint(base)
    deep = Transformer(dataclasses.replace(net.config, n_layers=9), RouterConfig.of("attn_sequence", (1, 8)))
    save_routers(tmp_path / "deep", deep, RouterMeta(deep.routing, [0.5, 0.5], known))
    with pytest.raises(
        ValueError, match=r"deep: routed layer 8 does not exist: this model has layers 0 to 3; .*tune again"
    ):
        load_model(base, routers=tmp_path / "deep")
    file = routers_for(tmp_path / "r", net, known)
    good = file.read_bytes()
    for size in range(0, len(good), 37):
        file.write_bytes(good[:size])
        with pytest.raises(ValueError, match="is truncated or something else"):
            load_model(base, routers=file)
    file.write_bytes(good)
    with pytest.raises(ValueError, match="no calibration table"):
        load_model(base, routers=file, budget=0.5)


def test_a_budget_per_sequence_needs_a_budget_and_a_route_that_is_known_at_once(tmp_path):
    net = build("llama", "attn_sequence", "first")
    base, table = stored(tmp_path / "base", net), {"budgets": [0.5], "thresholds": [[0.5] * 3]}
    for reads in ("first", "own"):
        other = build("llama", "attn_sequence", reads if reads == "first" else "routed")
        save_routers(tmp_path / reads, other, RouterMeta(other.routing, [0.5] * 3, fingerprint(base), table))
    assert load_model(base, routers=tmp_path / "first", budget=0.5, budget_per="sequence").budget_each == 0.5
    assert load_model(base, routers=tmp_path / "first", budget=0.5).budget_each is None
    for name, budget, per, reason in (
        ("own", 0.5, "sequence", "tune with train.py --reads=first"),
        ("first", None, "sequence", "give a budget"),
        ("first", 0.5, "token", "expected one of workload, sequence"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_model(base, routers=tmp_path / name, budget=budget, budget_per=per)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "config lacks"),
        ('{"x": 1}', "unknown keys"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, reason):
    stored(tmp_path, build())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_model(tmp_path)


def test_a_config_with_any_one_number_wrong_is_refused_by_name(tmp_path):
    net = build()
    numbers = "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size max_seq_len norm_eps rope_theta".split()
    for name, value in (
        [(name, value) for name in numbers for value in (None, "x", [], {}, -1, 0, float("nan"))]
        + [("sliding_window", value) for value in ("x", 0, -1, 1.5, [])]
        + [
            ("rope_scaling", value)
            for value in (
                "yarn",
                [],
                {"factor": 2},
                {"type": "x"},
                {"type": ["yarn"]},
                {"type": "yarn"},
                {"type": "linear", "factor": "x"},
                {"type": "llama3", "factor": 2.0},
            )
        ]
    ):
        with pytest.raises(ValueError, match="config.json: ") as error:
            load_model(stored(tmp_path, net, **{name: value}))
        assert "\n" not in str(error.value)


def test_a_damaged_safetensors_header_or_index_is_refused(tmp_path):
    stored(tmp_path, build())
    weights = tmp_path / "model.safetensors"
    for header in (
        b"",
        b"[]",
        b"3",
        b"{}x",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"data_offsets": []}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ):
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_model(tmp_path)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="no index of a checkpoint"):
            load_model(tmp_path)


def test_yarn_is_right_up_to_factor_times_the_original_context():
    """There is no table of positions that could end: logits equal those of transformers as far as the scaling allows.
    """
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        **{
            **BASE,
            "max_seq_len": 128,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        }
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        )
    ).eval()
    ours = Transformer(config).eval()
    names = {
        "model.embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn": "attention",
        "mlp": "feed_forward",
        "q_proj": "wq",
        "k_proj": "wk",
        "v_proj": "wv",
        "o_proj": "wo",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
        "model.": "",
    }
    weights = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = (
            torch.randn_like(tensor) / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else tensor.uniform_(0.5, 1.5)
        )
    theirs.load_state_dict({name: weights[new] for name, new in zip(theirs.state_dict(), weights)})
    weights.pop("lm_head.weight")
    weights["tok_embeddings.weight"] = theirs.get_input_embeddings().weight.data
    ours.load_state_dict(weights)
    tokens = tokens_of(1, 128)
    with torch.no_grad():
        wanted = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens)[0], wanted, atol=1e-4, rtol=1e-4)
        cache = KVCache(ours, 1)
        ours(tokens[:, :120], cache=cache)
        torch.testing.assert_close(ours(tokens[:, 120:], cache=cache)[0], wanted[:, 120:], atol=1e-4, rtol=1e-4)
    assert len(generate(ours, [tokens[0, :100].tolist()], 28)[0]) == 28
