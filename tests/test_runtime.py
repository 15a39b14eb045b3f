"""Device and dtype choice, ranks, command line, progress, user errors and atomic files.

Run: python -m pytest tests/test_runtime.py
"""

import io
import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

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
    got = runtime.cli(Settings, ["--steps=5", "--lr", "1", "--name=a=b", "--resume=false", "--limit=7",
                                 "--layers=0,3, 5", "--recipe=paper"])
    assert got == Settings(5, 1.0, "a=b", False, 7, (0, 3, 5), "paper") and isinstance(got.lr, float)
    assert runtime.cli(Settings, ["--limit=none", "--lr", "-1e-2", "--layers="]) == Settings(lr=-0.01, layers=())
    assert runtime.cli(Settings, ["--heldout=0.2"]).heldout == 0.2
    assert runtime.cli(Settings, ["--heldout=f.jsonl"]).heldout == "f.jsonl"
    assert runtime.cli(Settings, ["--steps=1", "--steps=2"]).steps == 2
    assert runtime.cli(Settings, ["--lambda=0.1"]).lambda_ == 0.1


VALUES = {"steps": st.integers(), "lr": st.floats(allow_nan=False), "name": st.text(), "resume": st.booleans(),
          "limit": st.none() | st.integers(), "layers": st.lists(st.integers()).map(tuple),
          "recipe": st.sampled_from(["default", "paper"]), "lambda_": st.floats(-9, 9)}


@given(st.fixed_dictionaries({}, optional=VALUES), st.booleans())
def test_every_value_comes_back(values, apart):
    """Whatever is written as --name=value, or as two words where a value does not look like a setting."""
    argv = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = text.lower() if value is None or isinstance(value, bool) else text
        name = name.rstrip("_")
        argv += [f"--{name}", text] if apart and not text.startswith("--") else [f"--{name}={text}"]
    assert runtime.cli(Settings, argv) == Settings(**values)


def test_a_name_is_never_completed():
    for argv in (["--step=1"], ["--res"], ["--lay", "1"]):
        with pytest.raises(ValueError, match="is not a setting: the nearest one is"):
            runtime.cli(Settings, argv)


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


@pytest.mark.parametrize("capabilities, dtype", [
    ({"amx_bf16": True}, torch.bfloat16),
    ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
    ({"bf16": True}, torch.bfloat16),
    ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
    ({}, torch.float32),
])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, capabilities, dtype):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert runtime.setup(device="cpu").dtype == dtype


@pytest.mark.parametrize("arguments, part", [
    ({"device": "gpu"}, "'gpu'"), ({"device": "cuda:99"}, "cuda:99"), ({"device": "cpu", "dtype": "fp8"}, "'fp8'")])
def test_setup_refuses_what_is_not_there(arguments, part):
    with pytest.raises(ValueError, match=part):
        runtime.setup(**arguments)


# -----------------------------------------------------------------------------
# Errors


def outcome(capsys, body) -> tuple[int | None, str]:
    """Status and standard error of a main; status None: the error went through run_main as our bug."""
    try:
        runtime.run_main(body)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    except Exception:
        return None, capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize("body, code, stderr", [
    (lambda: None, 0, ""),
    (lambda: fail(ValueError("x was found, y was expected: do z")), 2, "error: x was found, y was expected: do z\n"),
    (lambda: fail(FileNotFoundError("no folder")), 2, "error: no folder\n"),
    (lambda: json.loads("{"), None, ""),  # out of a library: our bug, not the user's
    (lambda: fail(RuntimeError("bug")), None, ""),
    (lambda: fail(KeyboardInterrupt()), 130, "interrupted\n"),
    (lambda: fail(runtime.Interrupted(15)), 143, "interrupted, and saved: the same command goes on\n"),
    (lambda: fail(runtime.RankError("rank 0 is alone")), 1, "error: rank 0 is alone\n"),
])
def test_exit_status_and_message(capsys, body, code, stderr):
    assert outcome(capsys, body) == (code, stderr)


def start_script(folder, body: str, *, name: str = "script.py", **env: str) -> subprocess.Popen:
    """A script of a project of its own in `folder`, with this main."""
    lines = [f"import sys; sys.path.insert(0, {str(ROOT)!r})", "import pathlib, torch, runtime",
             f"runtime.PROJECT = pathlib.Path({str(folder)!r})", "def main():",
             *(f"    {line}" for line in body.split("\n")), "runtime.run_main(main)"]
    (folder / name).write_text("\n".join(lines))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, folder / name], stdin=pipe, stdout=pipe, stderr=pipe, text=True,
                            env={**os.environ, **env})


@pytest.mark.parametrize("body, code, stderr, traceback", [
    ("raise ValueError('a: b')", 2, "error: a: b\n", False), ("raise RuntimeError('bug')", 1, "bug", True)])
def test_exit_status_of_a_process(tmp_path, body, code, stderr, traceback):
    process = start_script(tmp_path, body)
    shown = process.communicate()[1]
    assert process.returncode == code and ("Traceback" in shown) == traceback
    assert stderr in shown if traceback else shown == stderr


def fail(error: BaseException):
    raise error


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [line for line in file]


BAD_PATHS = {
    "missing": (lambda d: (d / "none").read_text(), "none was not found"),
    "open": (lambda d: open(d / "none"), "none was not found"),
    "folder": (lambda d: d.read_bytes(), "is a folder, expected a file"),
    "below a file": (lambda d: (d / "file" / "x").read_text(), "file/x lies below a file"),
    "out is a file": (lambda d: (d / "file").mkdir(exist_ok=True), "file is a file, expected a folder"),
    "too long": (lambda d: (d / ("x" * 5000)).is_file(), "is too long"),
    "permission": (lambda d: fail(PermissionError(13, "Permission denied", str(d / "x"))), "x may not be read"),
    "read only": (lambda d: fail(OSError(30, "Read-only file system", str(d / "x"))), "x lies on a file system"),
    "quota": (lambda d: fail(OSError(122, "Disk quota exceeded")), "disk full (Disk quota exceeded): free space"),
    "full": (lambda d: open("/dev/full", "wb", buffering=0).write(b"x"), "disk full"),
    "safetensors, missing": (lambda d: safe_open(d / "none", "pt"), "none"),
    "latin-1": (lambda d: (d / "latin").read_text(encoding="utf-8"), "latin is not UTF-8 text"),
    "latin-1 by line": (lambda d: read_lines(d / "latin"), "latin is not UTF-8 text"),
    "package": (lambda d: fail(ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken")), "pip install -r"),
}


@pytest.mark.parametrize("name", BAD_PATHS)
def test_what_a_user_must_mend_is_one_line_with_the_path(tmp_path, monkeypatch, capsys, name):
    body, part = BAD_PATHS[name]
    (tmp_path / "file").write_text("x")
    (tmp_path / "latin").write_bytes("prélude\n".encode("latin-1"))
    monkeypatch.setattr(runtime, "PROJECT", tmp_path)
    code, shown = outcome(capsys, lambda: body(tmp_path))
    assert code == 2 and shown.startswith("error: ") and part in shown and shown.count("\n") == 1


@pytest.mark.parametrize("error", [
    ValueError("library"), OSError("no path, no number"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    ModuleNotFoundError("No module named 'mine'", name="mine"), KeyError("x")])
def test_our_bugs_keep_their_traceback(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(runtime, "PROJECT", tmp_path)  # so this file stands outside the project, as a library does
    assert outcome(capsys, lambda: fail(error)) == (None, "")


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = start_script(tmp_path, "print('x')")  # short: Python writes it when it flushes at the end
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


# -----------------------------------------------------------------------------
# Progress


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Lines as a terminal shows them: what stands before a carriage return is overwritten or wiped."""
        return [line.rsplit("\r\x1b[K", 1)[-1] for line in self.getvalue().split("\n")]


def watch(monkeypatch, kind) -> io.StringIO:
    """Standard error of the master from now on."""
    monkeypatch.setattr(sys, "stderr", kind())
    monkeypatch.delenv("RANK", raising=False)
    return sys.stderr


LOG_AND_TERMINAL = pytest.mark.parametrize("kind", [io.StringIO, Terminal])


@LOG_AND_TERMINAL
def test_nothing_shows_before_two_seconds(monkeypatch, kind):
    stderr, clock = watch(monkeypatch, kind), Clock()
    for _ in runtime.track(range(19), "score", clock=clock):
        clock.now += 0.1
    assert stderr.getvalue() == ""
    for _ in runtime.track(range(1), "score", clock=clock):
        clock.now += 3.0
    assert stderr.getvalue().removeprefix("\r\x1b[K") == "score | 1/1 | 0.1m\n"


@LOG_AND_TERMINAL
@pytest.mark.parametrize("pace", [0.01, 0.5, 7.0])
def test_lines_are_few_and_the_last_one_is_whole(monkeypatch, kind, pace):
    stderr, clock, n = watch(monkeypatch, kind), Clock(), 300
    for _ in runtime.track(iter(range(n)), "score", total=n, clock=clock):
        clock.now += pace
    shown, seconds = stderr.getvalue(), n * pace
    assert shown.endswith(f"score | 300/300 | {seconds / 60:.1f}m\n")
    if kind is Terminal:
        assert stderr.screen() == [shown.rsplit("\r\x1b[K", 1)[-1].strip(), ""]  # one line in all
        assert min(n, (seconds - 2) / 0.2) / 2 < shown.count("eta") <= seconds / 0.2
    else:
        assert 1 <= shown.count("eta") <= 1 + seconds / 20 and "\r" not in shown and "\x1b" not in shown


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(2.0, 1e5))
def test_eta_is_the_time_left_at_the_rate_so_far(done, left, seconds):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        with runtime.Progress("score", done + left, clock=clock) as progress:
            clock.now += seconds
            progress.step(done, "loss 2.0")
            line = sys.stderr.getvalue()
    assert line == f"score | {done:,}/{done + left:,} | eta {seconds * left / done / 60:.1f}m | loss 2.0\n"


@LOG_AND_TERMINAL
def test_an_error_leaves_the_terminal_clean(monkeypatch, kind):
    stderr, clock = watch(monkeypatch, kind), Clock()
    with pytest.raises(KeyError):
        with runtime.Progress("score", 10, clock=clock) as progress:
            clock.now += 3
            progress.step()
            raise KeyError
    assert "eta" in stderr.getvalue() and runtime.Progress.active is None
    if kind is Terminal:
        assert stderr.screen() == [""]


def test_what_is_printed_meanwhile_gets_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # one terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    clock = Clock()
    with runtime.Progress("score", 10, clock=clock) as progress:
        clock.now += 3
        progress.step()
        runtime.print0("a word")
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].endswith("\r\x1b[Ka word") and lines[1].endswith("\r\x1b[Kscore | 1/10 | 0.1m")


@LOG_AND_TERMINAL
def test_only_the_outermost_shows_and_only_on_the_master(monkeypatch, kind):
    stderr, clock = watch(monkeypatch, kind), Clock()
    for _ in runtime.track(range(3), "search", clock=clock):
        for _ in runtime.track(range(3), "pass", clock=clock):
            clock.now += 30
    assert "search | 3/3" in stderr.getvalue() and "pass" not in stderr.getvalue()
    before = stderr.getvalue()
    monkeypatch.setenv("RANK", "1")
    for _ in runtime.track(range(3), "search", clock=clock):
        clock.now += 30
    with runtime.Phases({"a": 1.0}, clock)("a"):
        pass
    assert stderr.getvalue() == before


@LOG_AND_TERMINAL
def test_phases_tell_when_the_run_ends(monkeypatch, kind):
    """At a steady pace every estimate is exact, whatever phase runs; a phase that is left out is not waited for."""
    stderr, clock = watch(monkeypatch, kind), Clock()
    phases = runtime.Phases({"read": 30.0, "orders": 60.0, "fit": 120.0, "save": 90.0}, clock)
    for name in ("orders", "fit", "save"):
        with phases(name):
            for _ in runtime.track(range(10), name, clock=clock):
                clock.now += phases.work[name] / 10
    shown = stderr.getvalue().replace("\r\x1b[K", "\n")
    assert "phase 2/4: orders\n" in shown and "phase 3/4: fit (run eta 3.5m)\n" in shown
    assert "phase 4/4: save (run eta 1.5m)\n" in shown
    assert "orders | 1/10 | eta 0.9m | run eta 4.4m" in shown and "fit | 5/10 | eta 1.0m | run eta 2.5m" in shown


def test_a_resumed_phase_counts_what_this_run_did(monkeypatch):
    stderr, clock = watch(monkeypatch, io.StringIO), Clock()
    phases = runtime.Phases({"tune": 600.0, "report": 60.0}, clock)
    with phases("tune", begun=0.9):
        assert phases.eta(0.9) == "run eta n/a"
        clock.now += 30.0
        assert phases.eta(0.95) == "run eta 1.5m"
        clock.now += 30.0
    with phases("report"):
        assert "phase 2/2: report (run eta 1.0m)\n" in stderr.getvalue()


# -----------------------------------------------------------------------------
# Ranks


def test_generators_depend_on_the_key_alone():
    first = torch.rand(3, generator=runtime.generator(1, "split"))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, generator=runtime.generator(1, "split")))
    assert not torch.equal(first, torch.rand(3, generator=runtime.generator(2, "split")))
    assert sorted(runtime.permutation(100, 7)) == list(range(100)) and runtime.permutation(100, 7) != list(range(100))


@pytest.mark.parametrize("n, ranks", [(0, 1), (0, 3), (1, 2), (5, 1), (5, 2), (8, 3)])
def test_every_group_belongs_to_one_rank(n, ranks):
    groups = [f"group {i}" for i in range(n)]
    shares = [runtime.mine(groups, rank_of(rank, ranks)) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == list(enumerate(groups))
    assert runtime.collect(shares[0][::-1], rank_of(0, 1)) == [group for _, group in shares[0]]  # one rank: sorted


def rank_of(rank: int, world_size: int) -> runtime.Runtime:
    return runtime.Runtime(rank, world_size, rank, torch.device("cpu"), torch.float32, rank == 0)


def test_ranks_share_work_and_a_silent_one_ends_the_others_with_a_sentence(tmp_path):
    body = """
rt = runtime.setup("cpu", "float32", timeout=4 / 60)
assert runtime.sum_over_ranks(torch.tensor([1.0 + rt.rank]), rt).item() == 3
assert runtime.collect([(1 - rt.rank, rt.rank)], rt) == [1, 0]
runtime.wait_for_all(rt)
if rt.rank == 1:
    sys.stdin.read()  # until the other one has given up
else:
    runtime.wait_for_all(rt)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [start_script(tmp_path, body, name=f"rank{rank}.py", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    shown = ranks[0].communicate()[1]
    ranks[1].communicate("")
    assert ranks[0].returncode == 1 and "Traceback" not in shown
    assert "error: rank 0 has waited 4 s for another rank" in shown


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


def test_write_atomic_names_the_path_that_the_user_gave(tmp_path):
    """Not the temporary file, which is gone; safetensors raises an error that is no OSError and hides the number."""
    path = tmp_path / "out.json"

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    def full_in_safetensors(temporary):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    for writer in (full, full_in_safetensors):
        with pytest.raises(OSError) as error:
            runtime.write_atomic(path, writer)
        assert error.value.errno == 28 and error.value.filename == str(path) and not os.listdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:  # a file that the writer reads keeps its own name
        runtime.write_atomic(path, lambda temporary: temporary.write_text((tmp_path / "source").read_text()))
    assert error.value.filename == str(tmp_path / "source")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        runtime.write_json(tmp_path / "folder", {})
    assert error.value.filename == str(tmp_path / "folder")


@pytest.mark.parametrize("content, reason", [
    (b'{"a": 1,\n "b" 2}', r"bad.json is not JSON \(line 2, column 6"), (b'"\xff"', "byte 1 is not UTF-8"),
    (b"", "line 1"),
    (b"[" * 200_000, "nested too deeply"), (b"1" * 5000, "digits")])
def test_read_json_names_file_and_place(tmp_path, content, reason):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        runtime.read_json(tmp_path / "bad.json")


def test_read_json_of_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        runtime.read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        runtime.read_json(tmp_path)
    (tmp_path / "bom.json").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert runtime.read_json(tmp_path / "bom.json") == {"a": "é"}


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
