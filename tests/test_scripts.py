"""Scripts that measure are no tests; that each still does its main job, on a tiny base, is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model import load_model
from router import RouterConfig, RouterMeta, save_routers
from tiny import write_jsonl

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
    "task_lists": "--model={base} --routers={out}/routers.safetensors --data={out} --tasks=openbookqa --examples=4 "
                  "--out={out}/lists.json",
    "torture": "--trials=1 --launcher=0",
    "upcycle": "--model={base} --data={data} --heldout={data} --layers=2-3 --experts=4 --active=2 --shared=16 "
               "--tokens=256 --minutes=0.01 --gap=0 --samples=4 --steps=1 --heldout_samples=4 --speed=false "
               "--out={out}/upcycled",
}


def question(split: str, number: int) -> dict:
    """A row of OpenBookQA."""
    words = {"A": "one", "B": "two", "C": "six", "D": "ten"}
    choices = [{"text": f"{word} {number}", "label": label} for label, word in words.items()]
    return {"question": {"stem": f"{split} {number} is", "choices": choices}, "answerKey": "ABCD"[number % 4]}


@pytest.fixture(scope="module")
def places(base, tmp_path_factory):
    """The base, its rows, Alpaca's, and a folder to write to that holds a router file and a task; by name."""
    folder = tmp_path_factory.mktemp("scripts")
    alpaca = folder / "alpaca_data.json"
    alpaca.write_text(json.dumps(ALPACA))
    model = load_model(base)
    model.add_routers(RouterConfig.of("attn_sequence", (1, 2, 3)))
    save_routers(folder / "routers.safetensors", model, RouterMeta(model.routing, [0.5] * 3, model.fingerprint))
    for split in ("train", "test"):
        write_jsonl(folder / "openbookqa" / "Main" / f"{split}.jsonl", [question(split, i) for i in range(6)])
    return {"base": base, "data": base / "data.jsonl", "rows": alpaca, "out": folder}


@pytest.mark.parametrize("script", CASES)
def test_a_script_does_its_main_job(places, script):
    command = [sys.executable, f"tests/{script}.py", *CASES[script].format(**places).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
