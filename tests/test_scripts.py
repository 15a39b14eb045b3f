"""Scripts that measure are no tests; that each still does its main job, on a tiny base, is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALPACA = [{"instruction": f"say {i}", "input": "", "output": "yes " * (800 + i)} for i in range(40)]
CASES = {  # script: its settings; {base}, {data}, {rows} and {out} are a checkpoint, its rows, Alpaca's and a folder
    "compare_grid": "--model={base} --routed=2 --prefill=8 --decode=8 --batch=1,2 --rounds=1 --least=1 --steps=2 "
                    "--at_once=10 --out={out}/grid.json",
    "compare_int8": "--model={base} --texts={data} --n=3 --tokens=16 --speed=false",
    "compare_kernels": "--shape=32,4,2,8,48,64 --rows=1,2 --copies=1 --tokens=16 --blocks=8 --rounds=1 "
                       "--what=products,backward,attention",
    "compare_lora": "--model={base} --data={data} --layers=auto:2 --samples=16 --heldout=4 --seeds=1 --chat=plain "
                    "--rank=2 --out={out}/lora",
    "compare_ranks": "--model={base} --data={data} --dtype=float32 --steps=2 --batch_size=4 --micro_batch=2 "
                     "--other_micro_batch=1 --layers=deep:2",
    "compare_training": "--model={base} --data={data} --layers=deep:2 --heldout=4 --timed=1 --out={out}/training.json",
    "compare_transformers": "--model={base} --prefill=8 --decode=2x8 --generate=2x8+3 --generate_dense --routed=2 "
                            "--rounds=1 --steps=2 --threads=1 --dtype=float32",
    "compare_tuning": "--model={base} --data={data} --routed=2 --batch_size=2 --micro_batch=2 --steps=1 --rounds=1 "
                      "--threads=1",
    "expert_ceilings": "",
    "large_data": "--model={base} --rows={rows} --megabytes=1 --max_samples=40 --out={out}/large",
    "profile_phases": "--narrow --model={base} --data={data} --layers=auto:2 --steps=2 --out={out}/phases",
    "torture": "--trials=1 --launcher=0",
    "upcycle": "--model={base} --data={data} --heldout={data} --layers=2-3 --experts=4 --active=2 --shared=16 "
               "--tokens=256 --minutes=0.01 --gap=0 --samples=4 --steps=1 --heldout_samples=4 --speed=false "
               "--out={out}/upcycled",
}


@pytest.fixture(scope="module")
def places(base, tmp_path_factory):
    """The base, its rows, Alpaca's and a folder to write to, by name."""
    folder = tmp_path_factory.mktemp("scripts")
    alpaca = folder / "alpaca_data.json"
    alpaca.write_text(json.dumps(ALPACA))
    return {"base": base, "data": base / "data.jsonl", "rows": alpaca, "out": folder}


@pytest.mark.parametrize("script", CASES)
def test_a_script_does_its_main_job(places, script):
    command = [sys.executable, f"tests/{script}.py", *CASES[script].format(**places).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
