"""Steps of tuning that must survive: ranks and accumulation, bad gradients, signals, recomputation, compilation.

Run: python -m pytest tests/test_train_steps.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from tuning import begun, settings

import runtime
import train
from recipe import checkpoint, passes
from recipe.checkpoint import read_checkpoint
from router import read_router_file

ROOT = Path(__file__).resolve().parent.parent

# Imports torch once and forks the ranks of one world after another; each takes a step, rank 0 keeps the gradient.
RANKS = """
import json, os, sys
from pathlib import Path
import torch
import torch._dynamo  # a first step imports it
import runtime, train
from tuning import settings
from model import load_model
from tokenizer import load_tokenizer


def first_step(rank, world, port, out, changes):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    cfg = settings(Path(sys.argv[1]), f"{out}-run", trunk_gb=0, **changes)
    rt = runtime.setup("cpu", cfg.dtype, cfg.seed)
    model = load_model(cfg.model, dtype=rt.dtype)
    data = train.load_data(cfg, load_tokenizer(cfg.model), model.config.max_seq_len, rt)
    run = train.begin(train.Job(cfg, rt, model, data, train.plan(cfg, data)))
    row = train.step(run)
    if rank == 0:
        gradient = torch.cat([run.optimizers[0].state[w]["exp_avg"] for w in run.weights.values()]) * 10
        torch.save((gradient, row["loss"], row["capacity"]), out)
    runtime.cleanup()
    os._exit(0)  # what a forked process destroys may wait for threads that stayed with its parent


for world, port, out, changes in json.loads(sys.argv[2]):
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            runtime.run_main(lambda: first_step(rank, world, port, out, changes))
            sys.exit(0)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_ranks_and_accumulation_give_one_gradient(base, tmp_path):
    """1 rank x 4 passes, 2 x 2 and 4 x 1: the same parts of the global batch, summed in another order."""
    cases = [("float32", 1), ("float32", 2), ("float32", 4), ("bfloat16", 1), ("bfloat16", 2)]
    cases = {(dtype, world): str(tmp_path / f"{dtype}{world}.pt") for dtype, world in cases}
    changes = {"recipe": "paper", "micro_batch": 2, "budget": 0.3, "lambda_": 0.5}
    runs = [(world, free_port(), out, {**changes, "dtype": dtype}) for (dtype, world), out in cases.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", RANKS, str(base), json.dumps(runs)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=270)
    assert done.returncode == 0, done.stderr
    found = {case: torch.load(out) for case, out in cases.items()}
    for (dtype, world), (gradient, loss, share) in found.items():
        expected, size = found[dtype, 1], found[dtype, 1][0].abs().max()
        assert size > 0 and (gradient - expected[0]).abs().max() <= 1e-6 * max(size, 1.0), (dtype, world)
        assert loss == pytest.approx(expected[1], rel=1e-6) and share == pytest.approx(expected[2], abs=1e-6)


def test_recomputed_blocks_give_the_same_gradient(base):
    found = []
    for recompute in (False, True):
        run = begun(base, recipe="paper", granularity="both_token", budget=0.3, lambda_=0.5,
                    checkpoint_activations=recompute)
        calls = []
        for block in run.model.layers:
            block.attention.register_forward_hook(lambda *_: calls.append(1))
        train.step(run)
        found.append((len(calls), [run.optimizers[0].state[w]["exp_avg"] for w in run.weights.values()]))
    assert found[1][0] > found[0][0]  # blocks ran again
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_steps_compile_nothing_after_the_first_ones(base, monkeypatch):
    """Lengths vary from batch to batch; what is compiled in warm-up serves them all."""
    torch.compiler.reset()
    counter, plain = CompileCounterWithBackend("eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: plain(self, **{**more, "backend": counter}))
    monkeypatch.setattr(train, "save_checkpoint", lambda *a: None)
    counts, step = [], train.step

    def counted(run):
        row = step(run)
        counts.append(counter.frame_count)
        return row

    monkeypatch.setattr(train, "step", counted)
    run = begun(base, recipe="paper", compile=True, steps=6, micro_batch=3)
    monkeypatch.setattr(train, "open", lambda *a: open(os.devnull, "w"), raising=False)
    monkeypatch.setattr(train, "clean_up", lambda *a: None)
    train.tune(run, Path("unused"))
    assert len(counts) == 6 and counts[0] > 0 and counts[2] == counts[-1]


def test_constant_schedule_stays_where_the_warm_up_ends():
    rates = [train.lr_at(step, 100, 1.0, 0.03, "constant") for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and set(rates[2:]) == {1.0}


# ----------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def broken_from(monkeypatch, first: int, last: int) -> None:
    """The loss's gradient is NaN in these steps (numbered from 0)."""
    accumulate = train.accumulate

    def broken(run, *rest):
        with monkeypatch.context() as patch:
            if first <= run.state.step <= last:

                def spoil(*a, **k):
                    return tuple(part * float("nan") for part in passes.head_gradient(*a, **k))

                patch.setattr(train, "head_gradient", spoil)
            return accumulate(run, *rest)

    monkeypatch.setattr(train, "accumulate", broken)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_step_without_finite_gradient_moves_nothing_and_is_named(base, tmp_path, monkeypatch, capsys, recipe):
    broken_from(monkeypatch, 2, 3)
    summary = train.train(settings(base, tmp_path, recipe=recipe, save_every=1))
    assert summary["bad_steps"] == 2 and "layers.1.router.weight" in summary["last_bad_step"]
    log = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["bad"] is not None for row in log] == [False, False, True, True, False, False]
    assert log[2]["loss"] is None and log[2]["cut"] == log[1]["cut"] and "step skipped" in capsys.readouterr().out


def test_bad_steps_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(base, tmp_path, monkeypatch):
    broken_from(monkeypatch, 3, 99)
    with pytest.raises(ValueError, match="2 steps in a row had no finite gradient.*last good checkpoint"):
        train.train(settings(base, tmp_path, steps=20, save_every=1, max_bad_steps=2))
    state, _, tensors = read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state.step == 3 and state.bad_steps == 0 and all(torch.isfinite(t).all() for t in tensors.values())


# ----------------------------------------------------------------------------------------------------------------------
# Another run's routers


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_router_file_begins_another_run(base, tmp_path, recipe):
    first = settings(base, tmp_path / "first", recipe=recipe, layers="auto:2", steps=2, lr=0.1)
    train.train(first)
    file = str(tmp_path / "first/routers.safetensors")
    more = replace(first, init=file, out=str(tmp_path / "more"), steps=0, evaluations=0)
    summary = train.train(more)
    ends = [read_router_file(tmp_path / name / "routers.safetensors") for name in ("first", "more")]
    assert all(torch.equal(tensor, ends[1][0][key]) for key, tensor in ends[0][0].items())
    assert ends[0][1].routing == ends[1][1].routing and summary["steps"] == 0
    if recipe == "default":
        assert summary["capacity"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("change, part", [
    ({"granularity": "mlp_sequence"}, r"granularity \('attn_sequence' there, 'mlp_sequence' now\)"),
    ({"layers": "1,3"}, "layers"), ({"layers": "auto:3"}, r"layers \(2 there, 3 now\)"), ({"pool": "all"}, "pool"),
    ({"recalibrate": "x"}, "each name a router file")])
def test_a_router_file_that_does_not_fit_is_refused_by_name(base, tmp_path, change, part):
    train.train(settings(base, tmp_path / "first", layers="1-2", steps=0))
    file = str(tmp_path / "first/routers.safetensors")
    with pytest.raises(ValueError, match=part):
        train.train(settings(base, tmp_path / "more", **{"layers": "1-2", "init": file, **change}))
    assert not (tmp_path / "more").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_same_command_goes_on(base, tmp_path, monkeypatch, number):
    whole, cut, step = settings(base, tmp_path / "whole"), settings(base, tmp_path / "cut", save_every=100), train.step
    train.train(whole)

    def signalled(run):
        if run.state.step == 3:
            os.kill(os.getpid(), number)
        return step(run)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(runtime.Interrupted) as stop:
        patch.setattr(train, "step", signalled)
        train.train(cut)
    assert stop.value.number == number and signal.getsignal(number) is before
    assert read_checkpoint(tmp_path / "cut/checkpoint.safetensors")[0].step == 4
    train.train(cut)
    ends = [(tmp_path / name / "routers.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("echo, end", [(0.0, KeyboardInterrupt), (60.0, runtime.Interrupted)])
def test_a_signal_that_comes_again_ends_at_once_unless_it_is_an_echo(monkeypatch, echo, end):
    monkeypatch.setattr(runtime, "SIGNAL_ECHO", echo)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born to ignore it
    try:
        with pytest.raises(end), runtime.noted_signals() as came:
            os.kill(os.getpid(), signal.SIGINT)
            assert came == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
            assert came == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_two_processes_do_not_share_a_folder(base, tmp_path):
    with runtime.alone_in(tmp_path), pytest.raises(ValueError, match="is in use by another process"):
        train.train(settings(base, tmp_path, steps=1))
    train.train(settings(base, tmp_path, steps=1))


def test_ranks_that_see_different_folders_are_told(base, monkeypatch):
    run = begun(base, recipe="paper")
    monkeypatch.setattr(checkpoint, "collect", lambda *a: ["step 3", "nothing"])
    with pytest.raises(ValueError, match="step 3, nothing; expected the same: .*machines share"):
        train.claim(run)


@pytest.mark.parametrize("name", ["routers.safetensors", "summary.json"])
def test_a_damaged_end_is_written_again(base, tmp_path, name, capsys):
    train.train(settings(base, tmp_path, steps=1))
    whole = (tmp_path / "routers.safetensors").read_bytes()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    train.train(settings(base, tmp_path, steps=1))
    assert "its end is written again" in capsys.readouterr().out
    assert (tmp_path / "routers.safetensors").read_bytes() == whole
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1


def test_nothing_draws_from_the_global_generator(base):
    """All randomness is keyed, so that a checkpoint need not hold a generator's state."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run = begun(base)
    train.step(run)
    assert torch.equal(torch.get_rng_state(), before)
