"""Mix real data sets into one file to tune on, one held out, and one of other sources, in `messages` form.

    python data/mixture.py --source=DIR --model=checkpoints/smollm2-135m-instruct --out=OUT

DIR holds the publishers' files, as data/README.md names them: train/other/dolly_hhrlhf_train_small.jsonl, train/evol_code_alpaca/*.json,
eval/gsm8k, eval/arc, eval/openbookqa, eval/boolq; of other sources train/alpaca, train/slim_orca, eval/piqa. Writes OUT/train0.jsonl,
train1.jsonl, train2.jsonl (other draws of the same kinds), held.jsonl and other.jsonl. No held-out item stems from a file's tuning part.
"""

import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
from tokenizer import encode_chat, load_tokenizer  # noqa: E402

DOMAINS = ("dolly", "gsm8k", "code", "arc", "boolq")
OTHERS = ("alpaca", "orca", "arc_challenge", "piqa")


@dataclass
class MixtureConfig:
    source: str = field(metadata={"help": "folder with train/ and eval/"})
    model: str = field(metadata={"help": "checkpoint folder whose tokenizer counts the lengths"})
    out: str = field(metadata={"help": "folder to write"})
    per_domain: int = field(default=88, metadata={"help": "tuning items of each kind"})
    held: int = field(default=32, metadata={"help": "held-out items of each kind"})
    max_length: int = field(default=160, metadata={"help": "most tokens of an item; longer ones are left out"})


def pairs(source: Path, name: str, held: bool) -> list[tuple[str, str]]:
    """(question, answer) pairs of one kind: of its tuning part, or of its held-out part."""

    def lines(path: str) -> list[dict]:
        return [record for _, record in runtime.read_records(source / path)]

    def split(items: list, share: float) -> list:
        return items[int(share * len(items)):] if held else items[:int(share * len(items))]

    def choices(path: str) -> list[tuple[str, str]]:
        rows = [(row["question"], row["answerKey"]) for row in lines(path)]
        return [(f"Question: {q['stem']}\nAnswer:", c["text"]) for q, key in rows for c in q["choices"] if c["label"] == key]

    if name == "dolly":
        return split([(row["prompt"], row["response"]) for row in lines("train/other/dolly_hhrlhf_train_small.jsonl")], 0.7)
    if name == "code":
        return split([(row["instruction"], row["output"]) for row in lines("train/evol_code_alpaca/evol-codealpaca-2k-1.json")], 0.7)
    if name == "gsm8k":
        return [(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in lines(f"eval/gsm8k/{'test' if held else 'train'}.jsonl")]
    if name == "arc":
        part, small = ("Dev", "dev") if held else ("Train", "train")
        return choices(f"eval/arc/ARC-Easy/ARC-Easy-{part}.jsonl") + choices(f"eval/openbookqa/Main/{small}.jsonl")
    if name == "boolq":
        rows = lines("eval/boolq/dev.jsonl" if held else "eval/boolq/train_first.jsonl")
        return [(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", "yes" if row["answer"] else "no") for row in rows]
    if name == "alpaca":
        rows = lines("train/alpaca/alpaca_data_cleaned_1000.json")
        return [(row["instruction"] + (f"\n\n{row['input']}" if row["input"] else ""), row["output"]) for row in rows]
    if name == "orca":
        rows = [row["conversations"] for row in lines("train/slim_orca/STANDIN_openorca_284_as_slimorca.jsonl")]
        return [(turns[-2]["value"], turns[-1]["value"]) for turns in rows]
    if name == "arc_challenge":
        return choices("eval/arc/ARC-Challenge/ARC-Challenge-Dev.jsonl")
    labels = (source / "eval/piqa/valid-labels.lst").read_text().split()
    return [(f"Question: {row['goal']}\nAnswer:", row["sol1" if label == "0" else "sol2"]) for row, label in zip(lines("eval/piqa/valid.jsonl"), labels)]


def draw(cfg: MixtureConfig, tok, names: tuple[str, ...], held: bool, count: int, seed: int) -> list[dict]:
    """`count` items of each kind that fit, shuffled together; a function of the seed."""
    rows = []
    for name in names:
        items, taken = pairs(Path(cfg.source), name, held), 0
        random.Random(f"{name}{seed}").shuffle(items)
        for question, answer in items:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if taken == count:
                break
            if answer.strip() and len(question) + len(answer) < 8 * cfg.max_length and len(encode_chat(tok, messages)[0]) <= cfg.max_length:
                rows.append({"messages": messages, "domain": name})
                taken += 1
    random.Random(seed).shuffle(rows)
    return rows


def main() -> None:
    cfg = runtime.cli(MixtureConfig)
    tok, out = load_tokenizer(cfg.model), Path(cfg.out)
    files = {f"train{seed}.jsonl": draw(cfg, tok, DOMAINS, False, cfg.per_domain, seed) for seed in range(3)}
    files |= {"held.jsonl": draw(cfg, tok, DOMAINS, True, cfg.held, 7), "other.jsonl": draw(cfg, tok, OTHERS, True, cfg.held, 7)}
    for name, rows in files.items():
        runtime.write_atomic(out / name, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"))
        print(f"{out / name}: {len(rows)} items")


if __name__ == "__main__":
    runtime.run_main(main)
