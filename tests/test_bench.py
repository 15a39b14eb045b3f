"""The benchmark's formulas against what really runs: multiplications counted by torch, weights that are touched, keys and values that are cached.

Run: python -m pytest tests/test_bench.py
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import bench
import runtime
from bench import PUBLISHED, forced_gates, roofline, run_decode, run_prefill
from model import KVCache, ModelConfig, Transformer, fingerprint
from recipe.cost import Executed, decode_bytes, decode_ceiling, prefill_ceiling, prefill_flops
from router import GRANULARITIES, RouterConfig, RouterMeta, save_routers

CONFIG = ModelConfig(family="llama", dim=32, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=61, max_seq_len=128, norm_eps=1e-5,
                     rope_theta=10000.0, tie_embeddings=True)
CASES = [(g, kv) for g in GRANULARITIES for kv in (("routed", "all") if g in ("attn_token", "both_token") else ("routed",))]
BUDGETS = (0.0, 0.25, 0.5, 1.0)
WIDTH = 24


def routing_of(granularity: str, kv: str = "routed", layers=(1, 2, 3, 4)) -> RouterConfig:
    return RouterConfig.of(granularity, layers, kv=kv)


def build(granularity: str, kv: str = "routed", config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, routing_of(granularity, kv))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def tokens_of(batch: int, width: int) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, width), generator=torch.Generator().manual_seed(1))


def shares(routing: RouterConfig, gates: torch.Tensor) -> Executed:
    return Executed.of(CONFIG, routing, gates.flatten(1).mean(dim=1).tolist())


def touched(model: Transformer) -> set:
    """Weights of every matrix product that runs from now on, as a set that fills itself."""
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: seen.add(module.weight))
    return seen


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_prefill_flops_are_what_torch_counts(granularity, kv, budget):
    """Everything but the attention scores, which torch counts by the whole square and we by the pairs that a causal query sees."""
    model, batch = build(granularity, kv), 2
    gates = forced_gates(model.routing, budget, batch, WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        h, realised = model.hidden(tokens_of(batch, WIDTH), route="gather", gates=gates)
        model.head(h[:, -1])
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    counted -= len(model.routing.places) * batch * 2 * CONFIG.dim * (WIDTH if model.routing.unit == "token" else 1)  # the routers
    executed = shares(model.routing, realised)
    pairs = [p if model.routing.unit == "sequence" or kv == "all" else p * p for p in executed.attn]
    scores = sum(pairs) * 4 * CONFIG.n_heads * CONFIG.head_dim * WIDTH * (WIDTH + 1) / 2
    assert counted == pytest.approx(batch * (prefill_flops(CONFIG, WIDTH, executed) - scores), rel=1e-6)


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_decode_bytes_are_the_tensors_that_a_step_touches(granularity, kv, budget):
    model, context, itemsize = build(granularity, kv), WIDTH, 4
    cache, seen = KVCache(model, 1), touched(model)
    gates = forced_gates(model.routing, budget, 1, context)
    step = forced_gates(model.routing, budget, 1, 1, seed=3)
    with torch.inference_mode():
        _, realised = model.hidden(tokens_of(1, context), cache=cache, route="gather", gates=gates)
        cached = [0 if layer.k is None else 2 * layer.k.numel() * itemsize for layer in cache.layers]  # before the step, no slot is spare
        seen.clear()
        _, decided = model.hidden(tokens_of(1, 1), cache=cache, route="gather", gates=step if model.routing.unit == "token" else None)
    executed = shares(model.routing, decided)
    weights = sum(weight.numel() for weight in seen) + CONFIG.vocab_size * CONFIG.dim + CONFIG.dim  # the head, and one row of the embedding
    read = sum(n for n, share in zip(cached, executed.attn) if share)
    held = shares(model.routing, realised).attn if model.routing.unit == "token" and kv == "routed" else None
    assert decode_bytes(CONFIG, 1, context, itemsize, dataclasses.replace(executed, held=held)) == pytest.approx(weights * itemsize + read, rel=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mixed", [False, True])
def test_cache_bytes_follow_the_executed_layers_to_the_byte(budget, mixed):
    model = build("attn_sequence")
    dense = run_prefill(model, tokens_of(3, WIDTH), "off", None).kv_bytes
    routed = run_prefill(model, tokens_of(3, WIDTH), "gather", forced_gates(model.routing, budget, 3, WIDTH, mixed=mixed)).kv_bytes
    assert dense == 2 * 3 * WIDTH * CONFIG.n_kv_heads * CONFIG.head_dim * CONFIG.n_layers * 4
    assert routed * CONFIG.n_layers == dense * (CONFIG.n_layers - (1 - budget) * len(model.routing.layers))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forced_gates_realise_the_budget(granularity):
    routing = routing_of(granularity, layers=tuple(range(16)))
    for budget in (0.0, 0.25, 0.5, 0.75, 1.0):
        gates = forced_gates(routing, budget, 4, 200, mixed=True)
        assert gates.shape == (len(routing.places), 4, *((200,) if routing.unit == "token" else ()))
        assert gates.mean().item() == pytest.approx(budget, abs=0.02 if routing.unit == "token" else 0)
        assert set(gates.unique().tolist()) <= {0.0, 1.0}


def test_decode_run_leaves_the_cache_as_it_came():
    for granularity in GRANULARITIES:
        model = build(granularity)
        cache = KVCache(model, 2)
        with torch.inference_mode():
            model.hidden(tokens_of(2, WIDTH), cache=cache, route="gather", gates=forced_gates(model.routing, 0.5, 2, WIDTH))
        steps = list(forced_gates(model.routing, 0.5, 2, 3).split(1, dim=2)) if model.routing.unit == "token" else [None] * 3
        before = cache.used_bytes()
        samples = [run_decode(model, cache, tokens_of(2, 1), "gather", steps) for _ in range(2)]
        assert cache.lengths == [WIDTH, WIDTH] and cache.used_bytes() == before == samples[0].kv_bytes
        assert all(torch.equal(a, b) for a, b in zip(samples[0].steps, samples[1].steps))


@pytest.mark.parametrize("phase, batch, context, attn8, attn16, mlp8, block8", [
    ("decode", 1, 512, 1.048, 1.100, 1.230, 1.303), ("decode", 16, 2048, 1.099, 1.221, 1.171, 1.310), ("decode", 64, 2048, 1.182, 1.446, 1.096, 1.319),
    ("decode", 64, 8192, 1.271, 1.743, 1.035, 1.328), ("prefill", 1, 512, 1.053, None, 1.250, 1.333), ("prefill", 1, 2048, 1.059, None, 1.241, 1.333),
    ("prefill", 1, 8192, 1.081, None, 1.212, 1.333), ("prefill", 1, 32768, 1.143, None, 1.143, 1.333)])
def test_ceilings_of_llama_3_8b_agree_with_an_independent_roofline(phase, batch, context, attn8, attn16, mlp8, block8):
    """Expected values computed by hand from the published sizes: attention is 41.9 M of a layer's 218 M weights, 128 KiB of KV a token."""
    def seconds(**skipped: int) -> float:
        return roofline(PUBLISHED["Llama-3-8B"], phase, batch, context, 989e12, 3.35e12, skipped)[0]

    for skipped, wanted in ((dict(attn=8), attn8), (dict(attn=16), attn16), (dict(mlp=8), mlp8), (dict(attn=8, mlp=8), block8)):
        assert wanted is None or seconds() / seconds(**skipped) == pytest.approx(wanted, abs=6e-4)


def test_ceilings_are_ordered_and_open_at_full_capacity():
    for granularity, kv in CASES:
        routing = routing_of(granularity, kv)
        prefill, decode = [], []
        for budget in BUDGETS:
            gates, step = forced_gates(routing, budget, 1, 400), forced_gates(routing, budget, 1, 1)
            prefill.append(prefill_ceiling(CONFIG, routing, gates, 400))
            decode.append(decode_ceiling(CONFIG, routing, 2, 400, gates, [step]))
        assert prefill == sorted(prefill, reverse=True) and decode == sorted(decode, reverse=True)
        assert prefill[-1] == decode[-1] == 1.0


# ---------------------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build("attn_sequence")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    save_file({name: tensor for name, tensor in model.state_dict().items() if "router" not in name}, str(folder / "model.safetensors"))
    calibration = {"budgets": [0.5], "thresholds": [[0.5] * 4]}
    save_routers(folder / "routers.safetensors", model, RouterMeta(model.routing, [0.5] * 4, fingerprint(folder), calibration))
    return folder


def script(monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_forced_routes_report(checkpoint, monkeypatch, capsys, tmp_path, granularity):
    out = tmp_path / "bench.json"
    report = script(monkeypatch, capsys, f"--model={checkpoint}", f"--granularity={granularity}", "--layers=deep:4", "--prefill=12", "--decode=9",
                    "--batch=1,2", "--rounds=1", "--steps=2", "--budget=0,0.5,1", "--dtype=float32", f"--out={out}")
    assert json.loads(out.read_text()) == report
    assert [(row["phase"], row["batch"], row["context"]) for row in report["rows"][::4]] == [("prefill", 1, 12), ("prefill", 2, 12), ("decode", 1, 9),
                                                                                           ("decode", 2, 9)]
    for row in report["rows"]:
        assert {"phase", "batch", "context", "granularity", "route", "budget", "capacity", "seconds", "tokens_per_second", "speedup", "ceiling", "ratio",
                "kv_bytes", "peak_bytes"} <= set(row)
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["ratio"] == row["speedup"] / row["ceiling"]
        assert row["tokens_per_second"] == row["batch"] * (row["context"] if row["phase"] == "prefill" else 1) / row["seconds"]
    assert [row["route"] for row in report["rows"]] == ["off", "gather", "gather", "gather"] * 4
    if granularity == "attn_sequence":
        assert [row["capacity"] for row in report["rows"]] == [1.0, 0.0, 0.5, 1.0] * 4


def test_router_file_report(checkpoint, monkeypatch, capsys):
    report = script(monkeypatch, capsys, f"--model={checkpoint}", f"--routers={checkpoint / 'routers.safetensors'}", "--budget=0,1", "--prefill=12",
                    "--decode=6", "--rounds=1", "--steps=2", "--dtype=float32")
    assert [row["capacity"] for row in report["rows"]] == [1.0, 0.0, 1.0] * 2


def test_analytic_report(monkeypatch, capsys):
    report = script(monkeypatch, capsys, "--analytic")
    assert {row["model"] for row in report["analytic"]} == set(PUBLISHED)
    assert {row["binds"] for row in report["analytic"] if row["phase"] == "decode"} == {"bytes"}
    assert {row["binds"] for row in report["analytic"] if row["phase"] == "prefill"} == {"flops"}


@pytest.mark.parametrize("arguments, reason", [
    ([], "nothing to measure"), (["--analytic", "--gpu=abacus"], "peaks are unknown"), (["--model=MODEL", "--prefill=4", "--layers=auto:3"], "deep:N"),
    (["--model=MODEL", "--prefill=4", "--layers=all", "--granularity=attn"], "expected one of"), (["--model=MODEL", "--prefil=4"], "--prefill")])
def test_wrong_settings_are_refused_with_a_reason(checkpoint, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(sys, "argv", ["bench.py", *(argument.replace("MODEL", str(checkpoint)) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(bench.main)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and reason in shown and "Traceback" not in shown
