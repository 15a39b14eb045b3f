"""Blocks shared out over two gloo processes: routers, losses and answers as of one process that holds them all.

Run: python -m pytest tests/test_shard.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_base, write_jsonl
from tuning import CPU, settings

import train
from eval import EvalConfig, check_settings, evaluate
from recipe.shard import even

ROOT = Path(__file__).resolve().parent.parent
TWO_RANKS = """
import sys, torch, runtime
from recipe import shard
made = shard.load_shared
def checked(*args):
    model = made(*args)
    whole = sum(p.numel() for p in model.layers.parameters())
    own = sum(p.to_local().numel() for p in model.layers.parameters() if hasattr(p, "to_local"))
    assert 0.5 * whole <= own <= 0.6 * whole, (own, whole)  # uneven sizes are rounded up
    runtime.print0("shared out")
    return model
shard.load_shared = checked
script = sys.argv.pop(1)
runtime.run_main(__import__(script).main)
"""


def run(script: str, *arguments, ranks: int = 2) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(Path(arguments[0])), script, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("shard") / "base")
    (folder / "ranks.py").write_text(TWO_RANKS)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "ab " * (3 + n % 7)},
                {"role": "assistant", "content": "cde" * (1 + n % 5)},
            ]
        }
        for n in range(41)
    ]  # an uneven number, of uneven lengths
    write_jsonl(folder / "data.jsonl", rows)
    return folder


def test_tuning_ends_in_the_routers_of_a_process_that_holds_everything(base, tmp_path):
    changes = {
        "recipe": "paper",
        "granularity": "attn_token",
        "batch_size": 6,
        "micro_batch": 2,
        "steps": 2,
        "lr": 0.01,
        "select_samples": 7,
        "cost_samples": 5,
        "calibrate_samples": 7,
        "clip": 1.0,
        "overwrite": True,
    }
    train.train(settings(base, tmp_path / "whole", **changes))
    flags = {
        "model": base,
        "data": base / "data.jsonl",
        "dtype": "float32",
        "layers": "1-3",
        "out": tmp_path / "shard",
        "shard": "true",
    }
    out = run(
        "train",
        base / "ranks.py",
        *(f"--{name}={str(value).lower() if value is True else value}" for name, value in (changes | flags).items()),
    )
    assert "shared out" in out
    one, two = (load_file(tmp_path / name / "routers.safetensors") for name in ("whole", "shard"))
    assert set(one) == set(two) and max(tensor.abs().max() for tensor in one.values()) > 0.01
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "shard")
    ]
    for whole, shared in zip(*logs, strict=True):
        assert shared["loss"] == pytest.approx(whole["loss"], abs=1e-5) and shared["capacity"] == pytest.approx(
            whole["capacity"], abs=1e-6
        )
    kept = [load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "shard")]
    assert {name: tensor.shape for name, tensor in kept[0].items()} == {
        name: tensor.shape for name, tensor in kept[1].items()
    }


def test_scores_are_those_of_a_process_that_holds_everything(base, tmp_path):
    cfg = EvalConfig(str(base), perplexity=str(base / "data.jsonl"), dtype="float32", max_batch_tokens=300)
    whole = evaluate(cfg, CPU)["results"]["perplexity"]
    flags = [
        f"--model={base}",
        f"--perplexity={cfg.perplexity}",
        "--dtype=float32",
        "--max_batch_tokens=300",
        "--threads=1",
    ]
    assert "shared out" in run("eval", base / "ranks.py", *flags, f"--out={tmp_path / 'shard.json'}", "--shard")
    shared = json.loads((tmp_path / "shard.json").read_text())["results"]["perplexity"]
    assert shared["loss"] == pytest.approx(whole["loss"], abs=1e-5) and shared["n"] == whole["n"] == 41


@pytest.mark.parametrize("sizes, n", [([2, 2, 2], 2), ([5, 1], 3), ([1, 1, 1, 1], 4), ([8], 8), ([4, 4], 1)])
def test_every_rank_has_as_many_groups(sizes, n):
    groups = [list(range(size)) for size in sizes]
    cut = even(groups, n)
    assert len(cut) % n == 0 and all(cut) and sorted(sum(cut, [])) == sorted(sum(groups, []))


def test_one_process_runs_plainly_and_says_so(base, tmp_path, capsys):
    train.train(settings(base, tmp_path, shard=True, steps=0, recipe="paper"))
    assert "--shard on one process holds the whole base" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [dict(train="full"), dict(base_dtype="int8"), dict(compile=True)])
def test_what_blocks_that_are_shared_out_cannot_do_is_told(base, tmp_path, changes):
    with pytest.raises(ValueError, match="--shard with"):
        settings(base, tmp_path, shard=True, **changes)
    with pytest.raises(ValueError, match="--shard with"):
        check_settings(EvalConfig(str(base), perplexity="x", shard=True, base_dtype="int8"))
