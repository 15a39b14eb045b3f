"""Device and dtype choice, command line, user errors and atomic files.  Run: python -m pytest tests/test_runtime.py"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

import runtime

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    steps: int = field(default=10, metadata={"help": "number of steps"})
    lr: float = 1e-3
    name: str = "x"
    resume: bool = True
    limit: int | None = None
    layers: tuple[int, ...] = (1, 2)
    recipe: Literal["default", "paper"] = "default"
    heldout: float | str = 0.1
    lambda_: float = 0.0


@dataclass
class Copy:
    src: str = field(metadata={"positional": True, "help": "folder to read"})
    out: str = field(metadata={"positional": True})
    to_hf: bool = False


def test_defaults_and_both_forms_of_a_setting():
    assert runtime.cli(Settings, []) == Settings()
    got = runtime.cli(Settings, ["--steps=5", "--lr", "1", "--name=a=b", "--resume=false", "--limit=7", "--layers=0,3, 5", "--recipe=paper"])
    assert got == Settings(5, 1.0, "a=b", False, 7, (0, 3, 5), "paper") and isinstance(got.lr, float)
    assert runtime.cli(Settings, ["--limit=none", "--lr", "-1e-2", "--layers="]) == Settings(limit=None, lr=-0.01, layers=())
    assert runtime.cli(Settings, ["--heldout=0.2"]).heldout == 0.2 and runtime.cli(Settings, ["--heldout=f.jsonl"]).heldout == "f.jsonl"
    assert runtime.cli(Settings, ["--steps=1", "--steps=2"]).steps == 2
    assert runtime.cli(Settings, ["--lambda=0.1"]).lambda_ == 0.1


def test_bool_flag_may_stand_alone_before_positionals():
    assert runtime.cli(Copy, ["a", "--to_hf", "b"]) == Copy("a", "b", True)
    assert runtime.cli(Copy, ["--to-hf", "true", "--out=b", "a"]) == Copy("a", "b", True)


@pytest.mark.parametrize("argv, parts", [
    (["--stepz=5"], ["--stepz", "--steps"]),
    (["--steps=1.5"], ["'1.5'", "int"]),
    (["--steps"], ["--steps", "no value", "int"]),
    (["--steps", "--lr=1"], ["--steps", "no value"]),
    (["--recipe=papers"], ["'papers'", "default|paper"]),
    (["--resume=maybe"], ["'maybe'", "true|false"]),
    (["--layers=1,x"], ["'1,x'", "int by comma"]),
    (["loose"], ["'loose'", "--name=value"]),
])
def test_what_is_not_understood_is_named(argv, parts):
    with pytest.raises(ValueError) as error:
        runtime.cli(Settings, argv)
    assert all(part in str(error.value) for part in parts), error.value


def test_missing_positional_is_named():
    with pytest.raises(ValueError, match="--out is missing"):
        runtime.cli(Copy, ["a"])


def test_help_lists_every_setting_with_default(capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.cli(Settings, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name.rstrip('_')} " in text for name in Settings.__dataclass_fields__)
    assert "number of steps (int; default 10)" in text and "int by comma; default 1,2" in text


def test_setup_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    rt = runtime.setup(device="cpu", dtype="float32", seed=3)
    first = torch.rand(())
    assert rt == runtime.Runtime(0, 1, 0, torch.device("cpu"), torch.float32, True)
    runtime.setup(device="cpu", dtype="bfloat16", seed=3)
    assert torch.rand(()) == first and not torch.distributed.is_initialized()
    runtime.cleanup()  # without a process group: nothing to do


@pytest.mark.parametrize("capabilities, dtype", [({"amx_bf16": True}, torch.bfloat16), ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16),
                                                 ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32), ({}, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, capabilities, dtype):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert runtime.setup(device="cpu").dtype == dtype


@pytest.mark.parametrize("arguments, part", [({"device": "gpu"}, "'gpu'"), ({"device": "cuda:99"}, "cuda:99"), ({"device": "cpu", "dtype": "fp8"}, "'fp8'")])
def test_setup_refuses_what_is_not_there(arguments, part):
    with pytest.raises(ValueError, match=part):
        runtime.setup(**arguments)


def run_script(tmp_path, body, **env):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport runtime\nruntime.PROJECT = __import__('pathlib').Path({str(tmp_path)!r})\n"
                      f"def main():\n    {body}\nruntime.run_main(main)\n")
    return subprocess.run([sys.executable, script], capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize("body, code, stderr, traceback", [
    ("pass", 0, "", False),
    ("raise ValueError('x was found, y was expected: do z')", 2, "error: x was found, y was expected: do z\n", False),
    ("raise FileNotFoundError('no folder')", 2, "error: no folder\n", False),
    ("import json; json.loads('{')", 1, "JSONDecodeError", True),  # out of a library: our bug, not the user's
    ("raise RuntimeError('bug')", 1, "bug", True),
    ("raise KeyboardInterrupt", 130, "interrupted\n", False),
])
def test_exit_status_and_message(tmp_path, body, code, stderr, traceback):
    result = run_script(tmp_path, body)
    assert result.returncode == code and ("Traceback" in result.stderr) == traceback
    assert stderr in result.stderr if traceback else result.stderr == stderr


def test_print0_speaks_on_the_master_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    runtime.print0("silent")
    monkeypatch.setenv("RANK", "0")
    runtime.print0("heard", 1)
    assert capsys.readouterr().out == "heard 1\n"


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "deep" / "file.json"
    runtime.write_json(path, {"a": [1, "é"]})
    assert runtime.read_json(path) == {"a": [1, "é"]}

    def half_then_fail(p):
        p.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        runtime.write_atomic(path, half_then_fail)
    assert runtime.read_json(path) == {"a": [1, "é"]} and os.listdir(path.parent) == ["file.json"]


def test_read_json_names_file_and_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        runtime.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(ValueError, match=r"bad.json is not JSON \(line 2, column 6"):
        runtime.read_json(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="byte 1 is not UTF-8"):
        runtime.read_json(tmp_path / "binary.json")


def test_read_records_gives_places_and_names_bad_lines(tmp_path):
    lines, items = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": "x\\u2028y"}\n\n{"a": "\u2028"}\n', encoding="utf-8")  # a line separator inside a string does not end a line
    items.write_text('[{"a": 1}, {"a": 2}]')
    assert [r for _, r in runtime.read_records(lines)] == [{"a": "x\u2028y"}, {"a": "\u2028"}]
    assert [p for p, _ in runtime.read_records(lines)] == [f"{lines}, line 1", f"{lines}, line 3"]
    assert runtime.read_records(items) == [(f"{items}, item 1", {"a": 1}), (f"{items}, item 2", {"a": 2})]
    for name, content, part in (("b.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"), ("b.jsonl", b'{"a": "\xff"}', "line 1 is not JSON"), ("b.jsonl", b"[1]", "line 1 is a JSON list"),
                                ("b.json", b'{"a": 1}', "expected a list"), ("b.json", b'[{"a": 1}, 3]', "item 2 is a JSON int"), ("b.jsonl", b"\n", "no record")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=part):
            runtime.read_records(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="c.jsonl"):
        runtime.read_records(tmp_path / "c.jsonl")


def test_peaks_prefer_the_specific_name_and_never_guess():
    assert runtime.peak_flops("NVIDIA H100 PCIe") == 756e12 and runtime.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert runtime.peak_bandwidth("NVIDIA A100-SXM4-80GB") == 2.039e12
    assert runtime.peak_flops("cpu") is None and runtime.peak_bandwidth("GeForce 256") is None
    assert runtime.peak_flops("NVIDIA L40S") == 362e12 and runtime.peak_flops("NVIDIA L4") == 121e12


def test_peak_memory_is_in_bytes():
    before = runtime.peak_memory_bytes("cpu")
    block = torch.ones(16 * 2**20)  # 64 MiB, touched
    assert runtime.peak_memory_bytes("cpu") >= before > 10 * 2**20 and block[0] == 1
    runtime.synchronize("cpu")
    assert runtime.device_name("cpu") == "cpu"
