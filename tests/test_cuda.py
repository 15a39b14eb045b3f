"""On a CUDA device: the same numbers as on the CPU, no hidden wait for the device, compiled tuning, one rank of NCCL.

Run: python -m pytest tests/test_cuda.py         skipped where torch sees no CUDA device
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runtime
from model import KVCache, generate, load_model
from recipe.speed import compile_model
from test_compile import CASES, FAMILIES, build, gates_of, tokens_of
from tiny import write_jsonl
from tuning import SETTINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).resolve().parent.parent
CLOSE = dict(rtol=1e-3, atol=1e-3)  # float32 sums in another order
LENGTHS = [9, 4, 6]


def gates_for(model, width: int = 9):
    """Forced routes of three rows: near-ties of a router's own logits may fall elsewhere on another device."""
    gates = gates_of(model, 3, width, seed=1)
    if gates.dim() == 3:
        gates[..., 0] = 1.0  # first tokens always run
        gates *= torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    return gates


def steps_of(model, device: str, route: str, gates, later) -> list[torch.Tensor]:
    """Logits of a prompt of three rows, and of three more tokens each, on the CPU."""
    cache, found = KVCache(model, 3), []
    with torch.inference_mode():
        h, _ = model.hidden(tokens_of(3, 9).to(device), lengths=LENGTHS, cache=cache, route=route, gates=gates)
        found.append(model.head(h)[torch.arange(3), torch.tensor(LENGTHS) - 1].cpu())
        for step in range(3):
            token = tokens_of(3, 1, seed=5 + step).to(device)
            found.append(model(token, cache=cache, route=route, gates=later)[0].cpu())
    return found


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("route", ["off", "gather"])
def test_a_cached_run_equals_the_cpus(granularity, kv, route):
    model = build(granularity, kv)
    by_token = model.routing.unit == "token" and route == "gather"
    gates = gates_for(model) if route == "gather" else None
    later = gates_of(model, 3, 1, seed=2) if by_token else None
    wanted = steps_of(model, "cpu", route, gates, later)
    own = [None if g is None else g.cuda() for g in (gates, later)]
    for found, expected in zip(steps_of(model.cuda(), "cuda", route, *own), wanted, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("granularity, kv", CASES)
def test_masked_pass_and_its_gradient_equal_the_cpus(granularity, kv):
    found = []
    for device in ("cpu", "cuda"):
        model = build(granularity, kv).to(device)
        for router in model.routers():
            router.requires_grad_(True)
        gates = gates_for(model).to(device)
        logits, _, z = model(tokens_of(3, 9).to(device), lengths=LENGTHS, route="mask", gates=gates, return_scores=True)
        real = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
        z.square().mean().backward()
        gradient = torch.cat([router.weight.grad for router in model.routers()])
        found.append((logits.detach().cpu()[real], gradient.cpu()))
    for own, expected in zip(found[1], found[0]):
        torch.testing.assert_close(own, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_the_cpus(family):
    model, prompts = build("attn_sequence", family=family), [tokens_of(1, n, n).tolist()[0] for n in (5, 9, 3)]
    gates = gates_of(model, 3, 0, seed=4)

    def answers(device: str) -> list[list[int]]:
        forced = gates.to(device)
        return generate(model.to(device), prompts, 8, gates=lambda rows, starts, width: None if starts[0] else forced)

    assert answers("cpu") == answers("cuda")


@pytest.mark.parametrize("granularity, kv", CASES)
def test_nothing_waits_for_the_device_but_decisions(granularity, kv):
    """Routes off and mask, with lengths as a list, and a decode step whose decisions are held."""
    model, tokens = build(granularity, kv).cuda(), tokens_of(3, 9).cuda()
    cache = KVCache(model, 3, max_len=16)
    with torch.inference_mode():
        model.hidden(tokens, lengths=LENGTHS, cache=cache, route="gather")
        model.hidden(tokens[:, :1], cache=cache, route="gather")  # kernels are loaded
        model.hidden(tokens, lengths=LENGTHS, route="mask")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens, lengths=LENGTHS)
            model(tokens, lengths=LENGTHS, route="mask")
            if model.routing.unit == "sequence":
                model(tokens[:, :1], cache=cache, route="gather")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "granularity, kv", [("attn_sequence", "first"), ("attn_token", "all"), ("block_sequence", "routed")]
)
def test_compiled_code_equals_eager(granularity, kv):
    torch._dynamo.reset()
    model, tokens = build(granularity, kv).cuda(), tokens_of(3, 9).cuda()
    gates = gates_for(model).cuda()
    with torch.inference_mode():
        wanted = [model(tokens, lengths=LENGTHS, route=route, gates=gates)[0] for route in ("mask", "gather")]
        compile_model(model)
        for route, expected in zip(("mask", "gather"), wanted):
            found = model(tokens, lengths=LENGTHS, route=route, gates=gates)[0]
            for row, length in enumerate(LENGTHS):
                torch.testing.assert_close(found[row, :length], expected[row, :length], **CLOSE)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- the commands


def call(script: str, *words: str, ranks: int = 0) -> str:
    """Run a script to its end; what it printed."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
                    "--rdzv_endpoint=localhost:0"]
    done = subprocess.run([*command, str(ROOT / script), *words], capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tune(base, out, **changes) -> dict:
    """Tune by the command line, as `settings` of tests/tuning.py; the summary."""
    ranks = changes.pop("ranks", 0)
    values = {**SETTINGS, "clip": 1.0, "report": "", "model": base, "data": base / "data.jsonl", "out": out, **changes}
    call("train.py", *(f"--{name}={value}" for name, value in values.items()), ranks=ranks)
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("changes", [
    {}, {"granularity": "attn_token"}, {"granularity": "both_token"}, {"recipe": "paper", "lambda": 1.0},
    {"granularity": "block_sequence", "objective": "distill"}, {"base_dtype": "int8"}, {"train": "routers+lora"},
    {"train": "full", "recipe": "paper", "lambda": 1.0}], ids=str)
def test_tuning_ends_as_on_the_cpu(base, tmp_path, changes):
    summaries = [tune(base, tmp_path / device, device=device, compile="false", **changes) for device in ("cpu", "cuda")]
    found, wanted = (summary["report"][-1] for summary in reversed(summaries))
    assert found["dense"] == pytest.approx(wanted["dense"], rel=1e-3)
    assert found["routed"] == pytest.approx(wanted["routed"], rel=0.02)
    assert found["capacity"] == pytest.approx(wanted["capacity"], abs=0.05)


def test_compiled_tuning_and_one_rank_of_nccl_end_as_eager_tuning(base, tmp_path):
    runs = {"eager": dict(compile="false"), "compiled": {}, "rank": dict(compile="false", ranks=1)}
    reports = {name: tune(base, tmp_path / name, **changes)["report"][-1] for name, changes in runs.items()}
    for name in ("compiled", "rank"):
        assert reports[name]["routed"] == pytest.approx(reports["eager"]["routed"], rel=0.02)


def test_the_same_command_ends_in_nearly_the_same_routers(base, tmp_path):
    """Sums whose order a kernel does not promise move last bits, and no more."""
    for name in ("one", "two"):
        tune(base, tmp_path / name, compile="false")
    one, two = (load_file(tmp_path / name / "routers.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-4)


def test_scores_answers_and_times_come_out(base, tmp_path):
    """eval.py equals the CPU's in float32; sample.py, bench.py and int8 weights run."""
    tune(base, tmp_path / "run", compile="false")
    file = tmp_path / "run" / "routers.safetensors"
    choices = ["yes", "no way", "maybe so"]
    rows = [{"question": f"what is {i}", "choices": choices, "answer": i % 3} for i in range(9)]
    custom = write_jsonl(tmp_path / "custom.jsonl", rows)
    common = (f"--model={base}", f"--routers={file}", "--dtype=float32")
    results = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.json"
        call("eval.py", *common, f"--device={device}", f"--custom={custom}", f"--perplexity={base / 'data.jsonl'}",
             "--limit=9", f"--out={out}")
        results.append(json.loads(out.read_text()))
    [name] = [key for key in results[0]["results"] if "custom" in key]
    assert results[1]["results"][name]["acc"] == results[0]["results"][name]["acc"]
    assert call("sample.py", *common, "--device=cuda", "--prompt=what is 3", "--max_new_tokens=6", "--compare")
    grid = ("--layers=1-3", "--prefill=32", "--decode=32", "--batch=1,2", "--rounds=2")
    timed = call("bench.py", f"--model={base}", *grid, "--dtype=bfloat16", "--base_dtype=int8")
    report = json.loads(timed.splitlines()[-1])
    assert report["device"] == runtime.device_name("cuda") and min(row["peak_bytes"] for row in report["rows"]) > 0


def test_a_model_is_loaded_where_it_is_wanted(base):
    model = load_model(base, device="cuda", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    found = model(tokens.cuda())[0].float().cpu()
    wanted = load_model(base, dtype=torch.float32)(tokens)[0]
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.8
