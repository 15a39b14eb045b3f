"""Mutate the files of a tiny valid input: a script takes them or refuses them in a sentence, and writes nothing half.

Run: python tests/fuzz_files.py --script=convert_hf --n=60 --seed=1        (--script=all: every script; not part of CI)

Each case writes the valid files of a script afresh, mutates one of them, and runs the script in a forked process. It
fails when the script ends with a traceback, another status than 0 and 2, no `error:` or several at status 2, a file of
its output at status 2 that says it is finished, or a temporary file. The case's number and --seed make it
again: --first=K --n=1. A new script is one row of SCRIPTS.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import convert_hf  # noqa: E402
import runtime  # noqa: E402
import tiny  # noqa: E402

LIMIT = 120  # seconds until a case counts as hanging
VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "x" * 10_000,
    [],
    [[]],
    {},
    {"a": 1},
]


# --------------------------------------------------------------------------------------------------------- valid inputs


def hf_folder(folder: Path) -> None:
    """A Hugging Face folder in two shards with an index, a tokenizer and a chat template."""
    tiny.write_base(folder / "ours")
    convert_hf.convert(folder / "ours", folder / "hf", to_hf=True)
    shutil.rmtree(folder / "ours")
    (folder / "hf" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    split(folder / "hf")


def split(folder: Path) -> None:
    """Put a folder's tensors into two files with an index."""
    weights = convert_hf.read_header(folder / "model.safetensors")
    middle, where = len(weights) // 2, {}
    for i, part in enumerate((weights[:middle], weights[middle:]), 1):
        name = f"model-{i:05}-of-00002.safetensors"
        pairs = [(tensor.name, tensor) for tensor in part]
        (folder / name).write_bytes(b"".join(map(bytes, convert_hf.shard_chunks(pairs, torch.float32))))
        where.update({tensor.name: name for tensor in part})
    (folder / "model.safetensors").unlink()
    (folder / convert_hf.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def our_folder(folder: Path) -> None:
    """A checkpoint of ours with the kept config of its source."""
    hf_folder(folder)
    convert_hf.convert(folder / "hf", folder / "ours")
    shutil.rmtree(folder / "hf")


def tuning(folder: Path) -> None:
    """A base and a file of messages, some of them held out."""
    tiny.write_base(folder / "base")
    rows = [
        {
            "messages": [{"role": "user", "content": f"add {i} and 1"}, {"role": "assistant", "content": f"{i + 1}."}],
            "split": "heldout" if i % 4 == 0 else "train",
        }
        for i in range(16)
    ]
    tiny.write_jsonl(folder / "rows.jsonl", rows)


def scoring(folder: Path) -> None:
    """A base and a file of multiple-choice questions."""
    tiny.write_base(folder / "base")
    rows = [{"question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(6)]
    tiny.write_jsonl(folder / "items.jsonl", rows)


class Script(NamedTuple):
    """How to fuzz one script."""

    module: str
    make: Callable[[Path], None]  # writes valid inputs into a folder
    arguments: Callable[[Path, Path], list[str]]  # of the folder of inputs and the output
    finished: str  # a file in the output (or "", the output itself) that must not be there at status 2


SCRIPTS = {
    "convert_hf": Script("convert_hf", hf_folder, lambda src, out: [f"{src}/hf", f"{out}"], ""),
    "convert_back": Script("convert_hf", our_folder, lambda src, out: [f"{src}/ours", f"{out}", "--to_hf"], ""),
    "train": Script(
        "train",
        tuning,
        lambda src, out: [
            *(f"--model={src}/base", f"--data={src}/rows.jsonl", f"--out={out}", "--layers=0,2", "--steps=2"),
            *("--batch_size=2", "--device=cpu", "--dtype=float32", "--chat=plain"),
        ],
        "summary.json",
    ),
    "eval": Script(
        "eval",
        scoring,
        lambda src, out: [
            *(f"--model={src}/base", f"--custom={src}/items.jsonl", f"--out={out}/scores.json"),
            *("--device=cpu", "--dtype=float32"),
        ],
        "scores.json",
    ),
}


# ------------------------------------------------------------------------------------------------------------ mutations


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def empty(data: bytes, draw: random.Random) -> bytes:
    return b""


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.choice((1, 8, 4096)))


def flip(data: bytes, draw: random.Random) -> bytes:
    """Other bytes in a few places, more often near the front, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 3, 30))):
        changed[draw.randrange(draw.choice((min(64, len(data)), len(data))))] = draw.randrange(256)
    return bytes(changed)


def not_utf8(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + b"\xff\xfe\x80" + data[at:]


def byte_order_mark(data: bytes, draw: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


def double(data: bytes, draw: random.Random) -> bytes:
    return data + data


def deep(data: bytes, draw: random.Random) -> bytes:
    return b"[" * 100_000


def long_number(data: bytes, draw: random.Random) -> bytes:
    """The first digit becomes thousands of them."""
    at = next((i for i, byte in enumerate(data) if 48 <= byte < 58), 0)
    return data[:at] + b"7" * 5000 + data[at:]


def other_document(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(draw.choice(VALUES)).encode()


def in_json(data: bytes, draw: random.Random) -> bytes:
    """Another value, or none, somewhere in a JSON document, in a line of JSON, or in a safetensors header."""
    if data[8:9] == b"{" and data[:1] != b"{":
        length = int.from_bytes(data[:8], "little")
        text = in_json(data[8 : 8 + length], draw)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    lines = data.split(b"\n") if data.count(b"\n{") > 1 else [data]
    i = draw.randrange(max(1, len(lines) - 1))
    try:
        document = json.loads(lines[i])
    except ValueError:
        return flip(data, draw)
    lines[i] = json.dumps(changed_value(document, draw)).encode()
    return b"\n".join(lines)


def changed_value(document, draw: random.Random):
    """The document with one value replaced or deleted, at any depth."""
    if not isinstance(document, (dict, list)) or not document:
        return draw.choice(VALUES)
    keys = list(document) if isinstance(document, dict) else range(len(document))
    key = draw.choice(keys)
    if isinstance(document[key], (dict, list)) and draw.random() < 0.7:
        document[key] = changed_value(document[key], draw)
    elif draw.random() < 0.2:
        del document[key]
    else:
        document[key] = draw.choice(VALUES)
    return document


def no_file(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dead_link(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pickle_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    torch.save({"a": torch.zeros(2)}, path.with_suffix(".bin"))


def swap(path: Path, draw: random.Random) -> None:
    """Another file's content under this name."""
    path.write_bytes(draw.choice(sorted(other for other in path.parent.iterdir() if other.is_file())).read_bytes())


OF_BYTES = (cut, empty, append, flip, not_utf8, byte_order_mark, double, deep, long_number, other_document)
OF_BYTES += (in_json,) * 8  # the widest of them
OF_PATHS = (no_file, folder_instead, dead_link, pickle_instead, swap)


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file; returns what was done."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    mutation = draw.choice(OF_BYTES + OF_PATHS)
    if mutation in OF_PATHS:
        mutation(path, draw)
    else:
        path.write_bytes(mutation(path.read_bytes(), draw))
    return f"{mutation.__name__} {path.relative_to(folder)}"


# -------------------------------------------------------------------------------------------------------------- running


def run(script: Script, arguments: list[str], log: Path) -> int:
    """Run a script's main in a forked process, its output in `log`; returns its status, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(LIMIT)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [f"{script.module}.py", *arguments]
        runtime.run_main(importlib.import_module(script.module).main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def faults(script: Script, status: int, said: str, out: Path) -> list[str]:
    """What is wrong with the end of a case."""
    found = []
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if status not in (0, 2):
        found.append(f"status {status}")
    if "Traceback" in said:
        found.append("traceback: " + said.strip().splitlines()[-1][:300])
    if status == 2 and len(errors) != 1:
        found.append(f"{len(errors)} error lines at status 2")
    if status == 2 and (out / script.finished).exists():
        found.append(f"{script.finished or 'OUT'} was written at status 2")
    if out.is_dir() and list(out.rglob(".*.tmp")):
        found.append("a temporary file was left")
    return found


def fuzz(name: str, first: int, n: int, seed: int) -> int:
    """Run n cases of one script; prints the faults and returns their number."""
    script, bad, ends = SCRIPTS[name], 0, Counter()
    importlib.import_module(script.module)
    with tempfile.TemporaryDirectory() as place:
        valid, src, out, log = (Path(place) / part for part in ("valid", "src", "out", "log"))
        script.make(valid)
        for case in range(first - 1, first + n):  # the one before the first: nothing is mutated
            draw = random.Random(f"{name} {seed} {case}")
            shutil.copytree(valid, src)
            done = mutate(src, draw) if case >= first else "unchanged"
            status = run(script, script.arguments(src, out), log)
            said = log.read_text(errors="backslashreplace")
            found = faults(script, status, said, out)
            if case < first and status:
                raise ValueError(f"the valid input of {name} is refused: {said[-500:]}")
            if case >= first:
                ends[status] += 1
                bad += bool(found)
            for fault in found:
                print(f"{name} case {case} | {done} | {fault}", flush=True)
            for folder in (src, out):
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}: {n} cases from {first}, seed {seed}: {ends[2]} refused, {ends[0]} taken, {bad} faulty", flush=True)
    return bad


@dataclass
class Settings:
    script: str = field(default="all", metadata={"help": f"all, or one of {', '.join(SCRIPTS)}"})
    n: int = field(default=60, metadata={"help": "cases for each script"})
    seed: int = field(default=1, metadata={"help": "of all mutations"})
    first: int = field(default=1, metadata={"help": "number of the first case"})


def main() -> None:
    settings = runtime.cli(Settings)
    names = list(SCRIPTS) if settings.script == "all" else [settings.script]
    if names[0] not in SCRIPTS:
        raise ValueError(f"--script is {settings.script}, expected all or one of {', '.join(SCRIPTS)}")
    torch.set_num_threads(1)
    bad = sum(fuzz(name, settings.first, settings.n, settings.seed) for name in names)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    runtime.run_main(main)
