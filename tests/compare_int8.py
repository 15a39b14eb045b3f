"""A base in int8 beside the same one in float32: memory of a process, distance of logits on text, speed.

    python tests/compare_int8.py --model=checkpoints/smollm2-135m-instruct --texts=data/demo/instructions.jsonl

Memory: a child process loads the model, and scores one text; private bytes (Private_Clean + Private_Dirty of
/proc/self/smaps_rollup) and the peak of resident ones (VmHWM) stand beside those of a child that only imports torch and
this project. float32 is loaded mapped, whose pages are the file's own, and copied, as a process without a file has it.
KL: the mean over tokens of KL(float32 || int8), in nats, and how often the likeliest token is the same.
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import runtime
from data.records import read_records
from model import KVCache
from recipe.base import load_base
from runtime import ALONE, setting
from tokenizer import load_tokenizer


@dataclass
class Config:
    model: str = setting("checkpoints/smollm2-135m-instruct", "checkpoint folder")
    texts: str = setting("data/demo/instructions.jsonl", "rows with messages, whose contents are read as text")
    speed: bool = setting(True, "time them too")
    n: int = setting(40, "texts that are compared")
    tokens: int = setting(256, "tokens of a text, at most, and of the prefill that is timed")
    dtype: str = setting("float32", "in which both compute")
    child: str | None = setting(None, "(internal) what a child process loads: nothing, mapped, copied, int8")


def memory() -> dict[str, int]:
    """Private and peak resident bytes of this process."""
    kb = {"private": 0, "peak": 0}
    for path, names in (("smaps_rollup", {"Private_Clean:": "private", "Private_Dirty:": "private"}),
                        ("status", {"VmHWM:": "peak"})):
        for line in Path(f"/proc/self/{path}").read_text().splitlines():
            name, *rest = line.split()
            if name in names:
                kb[names[name]] += int(rest[0])
    return {name: 1024 * value for name, value in kb.items()}


def most_private(ended: threading.Event, found: list[int]) -> None:
    while not ended.wait(0.002):
        found.append(memory()["private"])


def load(cfg: Config, how: str):
    rt = replace(ALONE, dtype=runtime.DTYPES[cfg.dtype])
    model = load_base(cfg.model, rt, base_dtype="int8" if how == "int8" else None)
    if how == "copied":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


def texts(cfg: Config) -> list[torch.Tensor]:
    tok, found = load_tokenizer(cfg.model), []
    for _, row in read_records(cfg.texts, []):
        text = "\n".join(message["content"] for message in row["messages"])
        found.append(torch.tensor(tok.encode(text)[: cfg.tokens])[None])
    return found[:: max(1, len(found) // cfg.n)][: cfg.n]


@torch.inference_mode()
def child(cfg: Config) -> None:
    if cfg.child != "nothing":
        ended, seen = threading.Event(), []
        watch = threading.Thread(target=most_private, args=(ended, seen))
        watch.start()
        model = load(cfg, cfg.child)
        ended.set()
        watch.join()
        loaded = memory() | {"private while loading": max(seen)}
        model(torch.arange(64)[None])
        loaded["scored"] = memory()["private"]
    else:
        loaded = memory()
    print(json.dumps(loaded))


def measured(how: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--child={how}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def distance(cfg: Config, plain, small) -> dict:
    kl, same, n = 0.0, 0, 0
    for tokens in texts(cfg):
        p, q = (model(tokens)[0][0].log_softmax(-1) for model in (plain, small))
        kl += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        n += len(p)
    return {"kl": kl / n, "same_top": same / n, "tokens": n}


@torch.inference_mode()
def seconds(cfg: Config, models: dict) -> dict:
    """Medians, in turn: a prefill, and a decode step behind 64 tokens at batch 1 and 8."""
    found: dict = {}
    caches = {}
    for name, model in models.items():
        for batch in (1, 8):
            caches[name, batch] = KVCache(model, batch, max_len=160)
            model.hidden(torch.arange(64).expand(batch, -1), cache=caches[name, batch])
    for _ in range(5):
        for name, model in models.items():
            started = time.perf_counter()
            model.head(model.hidden(torch.arange(cfg.tokens)[None])[0][:, -1])
            found.setdefault(f"{name} prefill", []).append(time.perf_counter() - started)
            for batch in (1, 8):
                started = time.perf_counter()
                for _ in range(4):
                    model(torch.zeros(batch, 1, dtype=torch.long), cache=caches[name, batch])
                found.setdefault(f"{name} decode batch {batch}", []).append((time.perf_counter() - started) / 4)
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in found.items()}


def main() -> None:
    cfg = runtime.cli(Config)
    if cfg.child:
        return child(cfg)
    nothing = measured("nothing")
    for how in ("mapped", "copied", "int8"):
        now = measured(how)
        print(how, " | ".join(f"{name} {(value - nothing.get(name, nothing['private'])) / 1e6:,.1f} MB more"
                              for name, value in now.items()), flush=True)
    models = {"float32": load(cfg, "mapped"), "int8": load(cfg, "int8")}
    if cfg.n:
        print(json.dumps(distance(cfg, *models.values())), flush=True)
    for name, value in seconds(cfg, models).items() if cfg.speed else ():
        print(f"{name} {value:.1f} ms")


if __name__ == "__main__":
    runtime.run_main(main)
