"""Memory and speed of the data's way from a publisher's file to examples, on a file of any size. Not a test of CI.

    python tests/large_data.py --model=DIR --rows=alpaca_data.json [--megabytes=1024] [--max_samples=20000]

Rows of the file are written again and again, each with a number of its own, as one JSON list; then data/reformat.py,
data/mix.py (2.9 times) and train.load_data run on it, each in a process of its own. Printed: seconds, peak memory
beside that of the imports alone, bytes a row; and how much memory a pass over all examples adds.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime  # noqa: E402
from data.stream import read_rows  # noqa: E402
from runtime import setting  # noqa: E402

LOAD = """
import resource, sys, time
import train
from model import load_config
from runtime import setup
from tokenizer import load_tokenizer
samples = int(sys.argv[3]) or None
context = load_config(sys.argv[1]).max_seq_len
cfg = train.TrainConfig(model=sys.argv[1], data=(sys.argv[2],), out=sys.argv[4], max_samples=samples,
                        max_length=min(2048, context), truncate=True)
data = train.load_data(cfg, load_tokenizer(cfg.model), context, setup("cpu"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
longest = max(len(example.targets) for example in data.train)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
whole, mapped = (int(status[name].split()[0]) // 1024 for name in ("VmRSS", "RssFile"))
print(f"{len(data.train):,} examples, {data.report['tokens']:,} tokens; peak {peak // 1024:,} MB; after a pass over "
      f"all of them {whole:,} MB, of which mapped {mapped:,} MB")
"""


@dataclass
class Config:
    model: str = setting("checkpoints/smollm2-135m-instruct", "checkpoint folder, for its tokenizer")
    rows: str = setting("data/raw/alpaca/alpaca_data.json", "file of Alpaca rows that are written again and again")
    megabytes: int = setting(1024, "size of the file that is made")
    max_samples: int = setting(20_000, "examples to tokenise; 0: all")
    out: str = setting("/tmp/large_data", "folder for the files; what lies there is used again")


def make(path: Path, rows: list[dict], size: int) -> int:
    """Write the rows as a list of this size; how many there are."""
    number, done = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        file.write("[")
        while done < size:
            row = dict(rows[number % len(rows)])
            row["instruction"] += f" ({number})"
            text = ("" if number == 0 else ",\n") + json.dumps(row)
            file.write(text)
            number, done = number + 1, done + len(text)
        file.write("]")
    return number


def measured(name: str, *command: str) -> float:
    """Run and print seconds and peak memory; that memory in MB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read().strip().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    print(f"{name}: {time.monotonic() - started:,.0f} s ({usage.ru_utime:,.0f} s of one core), peak "
          f"{usage.ru_maxrss / 1024:,.0f} MB; {said[-1] if said else ''}", flush=True)
    return usage.ru_maxrss / 1024


def main() -> None:
    cfg = runtime.cli(Config)
    out = Path(cfg.out)
    path = out / "raw" / "alpaca" / "alpaca_data.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make(path, [row for _, row in read_rows(cfg.rows)], cfg.megabytes << 20)
    print(f"{path}: {path.stat().st_size:,} bytes", flush=True)
    plain = measured("imports", "-c", "import runtime, data.stream, data.portions")
    raw, ref = out / "raw", out / "ref"
    reformat = measured("reformat.py", "data/reformat.py", f"--raw={raw}", f"--out={ref}", "--only=alpaca")
    mixed = measured("mix.py", "data/mix.py", f"--from={ref}", f"--out={out / 'mix'}", "--portions=alpaca:2.9")
    report = json.loads((out / "mix" / "data.report.json").read_text())
    n = report["sources"]["alpaca"]["rows"]
    print(f"above the imports: reformat {reformat - plain:,.0f} MB; mix {mixed - plain:,.0f} MB, "
          f"{(mixed - plain) * 2**20 / (n + report['rows']):.1f} bytes a row read or written")
    measured("imports of train.py", "-c", "import train")
    run = (cfg.model, str(ref / "alpaca.jsonl"), str(cfg.max_samples), str(out / "run"))
    measured("tokenise", "-c", LOAD, *run)
    measured("open again", "-c", LOAD, *run)


if __name__ == "__main__":
    runtime.run_main(main)
