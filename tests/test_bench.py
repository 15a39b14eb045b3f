"""The benchmark: forced routes, runs, ceilings of published models, the report.

Run: python -m pytest tests/test_bench.py
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import bench
import runtime
from bench import MIXTURES, PUBLISHED, SHAPES, Point, forced_gates, random_model, roofline, run_decode, run_prefill
from model import KVCache, fingerprint, load_model
from recipe.cost import kv_bytes
from router import GRANULARITIES, RouterMeta, save_routers
from test_cost import BUDGETS, CONFIG, WIDTH, build, routing_of, tokens_of

KEYS = """phase batch context granularity route budget capacity seconds tokens_per_second speedup ceiling ratio
          kv_bytes peak_bytes""".split()

# -----------------------------------------------------------------------------
# Routes and runs


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("budget", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_forced_gates_realise_the_budget(granularity, budget):
    routing = routing_of(granularity, layers=tuple(range(16)))
    gates = forced_gates(routing, budget, 4, 200, mixed=True)
    assert gates.shape == (len(routing.places), 4, *((200,) if routing.unit == "token" else ()))
    assert gates.mean().item() == pytest.approx(budget, abs=0.02 if routing.unit == "token" else 0)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}


def test_forced_gates_of_rows_differ_where_they_may():
    routing = routing_of("attn_sequence")
    same, mixed = forced_gates(routing, 0.5, 2, 1), forced_gates(routing, 0.5, 2, 1, mixed=True)
    assert torch.equal(same[:, 0], same[:, 1]) and not torch.equal(mixed[:, 0], mixed[:, 1])
    tokens, again = (forced_gates(routing_of("mlp_token"), 0.5, 2, 50, seed=seed) for seed in (1, 1))
    assert torch.equal(tokens, again) and not torch.equal(tokens[:, 0], tokens[:, 1])
    assert not torch.equal(tokens, forced_gates(routing_of("mlp_token"), 0.5, 2, 50, seed=2))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mixed", [False, True])
def test_cache_bytes_follow_the_executed_layers_to_the_byte(budget, mixed):
    routing = routing_of("attn_sequence")
    model, gates = build(routing), forced_gates(routing, budget, 3, WIDTH, mixed=mixed)
    assert run_prefill(model, tokens_of(3, WIDTH), "off", None).kv_bytes == kv_bytes(CONFIG, 4, 3 * WIDTH)
    skipped = 3 * WIDTH * (1 - budget) * len(routing.layers)
    assert run_prefill(model, tokens_of(3, WIDTH), "gather", gates).kv_bytes == kv_bytes(CONFIG, 4, 3 * WIDTH, skipped)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_decode_run_leaves_the_cache_as_it_came(granularity):
    routing = routing_of(granularity)
    model, steps = build(routing), [None] * 3
    cache = KVCache(model, 2)
    with torch.inference_mode():
        model.hidden(tokens_of(2, WIDTH), cache=cache, route="gather", gates=forced_gates(routing, 0.5, 2, WIDTH))
    if routing.unit == "token":
        steps = list(forced_gates(routing, 0.5, 2, 3).split(1, dim=2))
    before = cache.used_bytes()
    first, second = [run_decode(model, cache, tokens_of(2, 1), "gather", steps) for _ in range(2)]
    assert cache.lengths == [WIDTH, WIDTH] and cache.used_bytes() == before == first.kv_bytes
    assert all(torch.equal(a, b) for a, b in zip(first.steps, second.steps, strict=True))


# -----------------------------------------------------------------------------
# Published models


@pytest.mark.parametrize("point, attn8, attn16, mlp8, block8", [
    (Point("decode", 1, 512), 1.048, 1.100, 1.230, 1.303),
    (Point("decode", 16, 2048), 1.099, 1.221, 1.171, 1.310),
    (Point("decode", 64, 2048), 1.182, 1.446, 1.096, 1.319),
    (Point("decode", 64, 8192), 1.271, 1.743, 1.035, 1.328),
    (Point("prefill", 1, 512), 1.053, None, 1.250, 1.333),
    (Point("prefill", 1, 2048), 1.059, None, 1.241, 1.333),
    (Point("prefill", 1, 8192), 1.081, None, 1.212, 1.333),
    (Point("prefill", 1, 32768), 1.143, None, 1.143, 1.333),
], ids=str)
def test_ceilings_of_llama_3_8b_agree_with_an_independent_roofline(point, attn8, attn16, mlp8, block8):
    """By hand, from published sizes: attention is 41.9 M of a layer's 218 M weights, and a token leaves 128 KiB."""
    def seconds(**skipped: int) -> float:
        return roofline(PUBLISHED["Llama-3-8B"], point, (989e12, 3.35e12), skipped)[0]

    for skipped, wanted in ((dict(attn=8), attn8), (dict(attn=16), attn16), (dict(mlp=8), mlp8)):
        assert wanted is None or seconds() / seconds(**skipped) == pytest.approx(wanted, abs=6e-4)
    assert seconds() / seconds(attn=8, mlp=8) == pytest.approx(block8, abs=6e-4)


@pytest.fixture
def small_shapes(monkeypatch):
    """The published models, narrow enough for a test."""
    for shapes in (PUBLISHED, MIXTURES):
        for name, config in shapes.items():
            narrow = dict(dim=config.dim // 64, hidden_dim=96, vocab_size=64, head_dim=8)
            narrow |= dict(expert_dim=config.expert_dim // 64, shared_dim=config.shared_dim // 64)
            monkeypatch.setitem(shapes, name, replace(config, **narrow))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_the_published_model_with_fewer_layers(small_shapes, shape):
    rt = runtime.Runtime(0, 1, 0, torch.device("cpu"), torch.bfloat16, True)
    model, again, other = (random_model(shape, 2, seed, rt) for seed in (1, 1, 2))
    published = (PUBLISHED | MIXTURES)[SHAPES[shape]]
    assert replace(model.config, n_layers=published.n_layers, tie_embeddings=False) == published
    assert all(weight.dtype == torch.bfloat16 and not weight.requires_grad for weight in model.parameters())
    tokens = torch.arange(20)[None]
    logits = [m(tokens)[0] for m in (model, again, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert logits[0].isfinite().all() and logits[0].float().std() > 0.1


@pytest.mark.parametrize("shape, granularity", [
    ("mistral-7b", "attn_token"), ("qwen2.5-7b", "block_sequence"), ("olmoe-1b-7b", "expert_token")])
def test_shape_report(small_shapes, monkeypatch, capsys, shape, granularity):
    report = script(monkeypatch, capsys, f"--shape={shape}", "--shape_layers=4", f"--granularity={granularity}",
                    "--budget=0.5", "--prefill=12", "--decode=9", "--rounds=1", "--steps=2", "--dtype=float32")
    assert [row["route"] for row in report["rows"]] == ["off", "gather"] * 2
    assert report["rows"][1]["ceiling"] > 1 and report["settings"]["shape"] == shape


# -----------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tiny.write_base(tmp_path_factory.mktemp("checkpoint"), CONFIG)
    model = load_model(folder)
    model.add_routers(routing_of("attn_sequence"))
    calibration = {"budgets": [0.5], "thresholds": [[0.5] * 4]}
    meta = RouterMeta(model.routing, [0.5] * 4, fingerprint(folder), calibration)
    save_routers(folder / "routers.safetensors", model, meta)
    return folder


def script(monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_forced_routes_report(checkpoint, monkeypatch, capsys, tmp_path, granularity):
    out = tmp_path / "bench.json"
    report = script(monkeypatch, capsys, f"--model={checkpoint}", f"--granularity={granularity}", "--layers=deep:4",
                    "--prefill=12", "--decode=9", "--batch=1,2", "--rounds=1", "--steps=2", "--budget=0,0.5,1",
                    "--dtype=float32", f"--out={out}")
    rows = report["rows"]
    assert json.loads(out.read_text()) == report
    points = [(row["phase"], row["batch"], row["context"]) for row in rows[::4]]
    assert points == [("prefill", 1, 12), ("prefill", 2, 12), ("decode", 1, 9), ("decode", 2, 9)]
    for row in rows:
        tokens = row["batch"] * (row["context"] if row["phase"] == "prefill" else 1)
        assert set(KEYS) <= set(row) and row["seconds"] > 0 and row["peak_bytes"] > 0
        assert row["tokens_per_second"] == tokens / row["seconds"] and row["ratio"] == row["speedup"] / row["ceiling"]
    assert [row["route"] for row in rows] == ["off", "gather", "gather", "gather"] * 4
    if granularity == "attn_sequence":
        assert [row["capacity"] for row in rows] == [1.0, 0.0, 0.5, 1.0] * 4


def test_router_file_report(checkpoint, monkeypatch, capsys):
    report = script(monkeypatch, capsys, f"--model={checkpoint}", f"--routers={checkpoint / 'routers.safetensors'}",
                    "--budget=0,1", "--prefill=12", "--decode=6", "--rounds=1", "--steps=2", "--dtype=float32")
    assert [row["capacity"] for row in report["rows"]] == [1.0, 0.0, 1.0] * 2


def test_seconds_and_speedup_are_medians_of_rounds_in_turn():
    """A machine that slows down hurts both alike: each pair is timed one after the other, and the first one changes."""
    begun = []

    def run(name: str, cost: float):
        begun.append(name)
        return bench.Sample(cost * len(begun), None, [], 0, 0)

    pairs = bench.in_turn(lambda: run("dense", 2.0), lambda: run("routed", 1.0), 3)
    assert begun == ["dense", "routed", "routed", "dense", "dense", "routed"]
    assert [(a.seconds, b.seconds) for a, b in pairs] == [(2.0, 2.0), (8.0, 3.0), (10.0, 6.0)]


def test_rows_hold_medians_of_seconds_and_of_ratios(checkpoint, monkeypatch, capsys):
    seconds = [(2.0, 1.0), (9.0, 3.0), (5.0, 1.0)]  # dense, routed; the ratios are 2, 3 and 5

    def in_turn(dense, routed, rounds):
        return [(replace(dense(), seconds=a), replace(routed(), seconds=b)) for a, b in seconds]

    monkeypatch.setattr(bench, "in_turn", in_turn)
    report = script(monkeypatch, capsys, f"--model={checkpoint}", "--layers=all", "--prefill=12", "--budget=0.5")
    off, on = report["rows"]
    assert (off["seconds"], on["seconds"], on["speedup"]) == (5.0, 1.0, 3.0)


def test_analytic_report(monkeypatch, capsys):
    report = script(monkeypatch, capsys, "--analytic")
    assert {row["model"] for row in report["analytic"]} == set(PUBLISHED)
    assert {row["binds"] for row in report["analytic"] if row["phase"] == "decode"} == {"bytes"}
    assert {row["binds"] for row in report["analytic"] if row["phase"] == "prefill"} == {"flops"}


@pytest.mark.parametrize("arguments, reason", [
    ("", "nothing to measure"),
    ("--analytic --gpu=abacus", "peaks are unknown"),
    ("--model=MODEL --prefill=4 --layers=auto:3", "deep:N"),
    ("--model=MODEL --prefill=4 --layers=all --granularity=attn", "expected one of"),
    ("--model=MODEL --prefil=4", "--prefill"),
    ("--model=MODEL --shape=llama3-8b --prefill=4", "one of them"),
    ("--model=MODEL --prefill=4 --batch=", "nothing to measure"),
    ("--shape=llama3-8c --prefill=4", "llama3-8b|mistral-7b|qwen2.5-7b|olmoe-1b-7b"),
    ("--shape=llama3-8b --shape_layers=33 --prefill=4", "1 to the 32 layers"),
    ("--shape=llama3-8b --routers=x --prefill=4", "--model=DIR"),
    ("--model=MODEL --routers=x --layers=all --prefill=4", "leave out --layers"),
    ("--model=MODEL --prefill=0", "expected 1 or more"),
    ("--model=MODEL --prefill=4 --rounds=0", "expected 1 or more"),
    ("--model=MODEL --prefill=4 --threads=0", "expected 1 or more"),
    ("--model=MODEL --prefill=4 --budget=1.5", "between 0 and 1"),
    ("--model=MODEL --prefill=4 --budget=nan", "between 0 and 1"),
    ("--model=MODEL --decode=121", "129 tokens were asked for"),
])
def test_wrong_settings_are_refused_with_a_reason(checkpoint, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.replace("MODEL", str(checkpoint)).split()])
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(bench.main)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and reason in shown and "Traceback" not in shown
