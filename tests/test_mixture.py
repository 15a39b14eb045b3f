"""The mixture of real data sets: who is held out, how long, the same every time.  Run: python -m pytest tests/test_mixture.py"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from test_train import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A miniature of every file that the script reads, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("source")

    def write(path: str, rows: list, whole: bool = False) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows))

    def choices(name: str) -> list[dict]:
        return [{"question": {"stem": f"{name} {i}?", "choices": [{"label": "A", "text": "no"}, {"label": "B", "text": f"{name} {i}"}]}, "answerKey": "B"} for i in range(12)]

    write("train/other/dolly_hhrlhf_train_small.jsonl", [{"prompt": f"dolly {i}", "response": "x" * (200 if i == 1 else 5)} for i in range(20)])
    write("train/evol_code_alpaca/evol-codealpaca-2k-1.json", [{"instruction": f"code {i}", "output": "print()"} for i in range(20)], whole=True)
    for part in ("train", "test"):
        write(f"eval/gsm8k/{part}.jsonl", [{"question": f"{part} gsm {i}", "answer": "1+1=<<1+1=2>>2\n#### 2"} for i in range(12)])
    for part, small in (("Train", "train"), ("Dev", "dev")):
        write(f"eval/arc/ARC-Easy/ARC-Easy-{part}.jsonl", choices(f"easy {part}"))
        write(f"eval/openbookqa/Main/{small}.jsonl", choices(f"book {part}"))
    for name in ("train_first", "dev"):
        write(f"eval/boolq/{name}.jsonl", [{"passage": f"{name} {i}", "question": "is it", "answer": i % 2 == 0} for i in range(12)])
    write("train/alpaca/alpaca_data_cleaned_1000.json", [{"instruction": f"alpaca {i}", "input": "", "output": "yes"} for i in range(12)], whole=True)
    write("train/slim_orca/STANDIN_openorca_284_as_slimorca.jsonl",
          [{"conversations": [{"from": "human", "value": f"orca {i}"}, {"from": "gpt", "value": "yes"}]} for i in range(12)])
    write("eval/arc/ARC-Challenge/ARC-Challenge-Dev.jsonl", choices("hard"))
    write("eval/piqa/valid.jsonl", [{"goal": f"goal {i}", "sol1": "first", "sol2": "second"} for i in range(12)])
    (folder / "eval/piqa/valid-labels.lst").write_text("0\n1\n" * 6)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}))
    return folder


def mix(source: Path, out: Path, **changes) -> subprocess.CompletedProcess:
    flags = {"source": source, "model": source, "out": out, "per_domain": 8, "held": 4, **changes}
    return subprocess.run([sys.executable, ROOT / "data" / "mixture.py", *(f"--{k}={v}" for k, v in flags.items())], capture_output=True, text=True)


def test_mixture_holds_what_it_says(source, tmp_path):
    for name in ("a", "b"):
        done = mix(source, tmp_path / name)
        assert done.returncode == 0, done.stderr
    files = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "a").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert set(files) == {"train0.jsonl", "train1.jsonl", "train2.jsonl", "held.jsonl", "other.jsonl"}
    for seed in range(3):
        assert Counter(row["domain"] for row in files[f"train{seed}.jsonl"]) == dict.fromkeys(("dolly", "gsm8k", "code", "arc", "boolq"), 8)
    assert Counter(row["domain"] for row in files["held.jsonl"]) == dict.fromkeys(("dolly", "gsm8k", "code", "arc", "boolq"), 4)
    assert Counter(row["domain"] for row in files["other.jsonl"]) == dict.fromkeys(("alpaca", "orca", "arc_challenge", "piqa"), 4)
    asked = {name: {row["messages"][0]["content"] for row in rows} for name, rows in files.items()}
    assert not asked["held.jsonl"] & (asked["train0.jsonl"] | asked["train1.jsonl"] | asked["train2.jsonl"]) and asked["train0.jsonl"] != asked["train1.jsonl"]
    answers = {row["domain"]: row["messages"][1]["content"] for rows in files.values() for row in rows}
    assert "<<" not in answers["gsm8k"] and answers["boolq"] in ("yes", "no") and answers["arc"] != "no"
    assert all(row["messages"][1]["content"] == {"0": "first", "1": "second"}[str(int(row["messages"][0]["content"].split()[2].split("\n")[0]) % 2)]
               for row in files["other.jsonl"] if row["domain"] == "piqa")
    assert not any("x" * 200 in row["messages"][1]["content"] for rows in files.values() for row in rows)  # beyond 160 tokens


def test_a_missing_file_is_named_and_nothing_is_written(source, tmp_path):
    done = mix(tmp_path / "nowhere", tmp_path / "out", model=source)
    assert done.returncode == 2 and "dolly_hhrlhf_train_small.jsonl was not found" in done.stderr and not (tmp_path / "out").exists()
