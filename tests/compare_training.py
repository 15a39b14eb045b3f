"""What routers, LoRA and full tuning take, and what each reaches in the same time.

Run: python tests/compare_training.py --model=checkpoints/smollm2-135m-instruct --out=out/training.json
     python tests/compare_training.py --model=... --out=out/training.json --seconds=60

The first command times steps, each side in a process of its own, in processor time, which others on the machine hardly
change (so OMP_NUM_THREADS=1); the second gives each side as many steps as fit into so many seconds by that time, and
scores held-out rows: dense, and with routers at exactly the budget on the selection set. All
sides: recipe=paper, deep layers, the same rows in the same order, float32.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
import train  # noqa: E402
from model import load_config  # noqa: E402
from recipe.calibrate import settle  # noqa: E402
from recipe.passes import evaluate, skip_everywhere  # noqa: E402
from recipe.run import build  # noqa: E402
from recipe.start import candidates  # noqa: E402
from runtime import setting  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

SIDES = ("routers", "lora", "routers+lora", "full")


@dataclass
class Config:
    model: str = field(metadata={"help": "checkpoint folder"})
    data: str = setting(os.path.relpath(ROOT / "data" / "demo" / "instructions.jsonl"), "rows")
    out: str = setting("out/training.json", "file of results")
    granularity: str = setting("attn_token", "what a gate skips, and for what")
    layers: str = setting("deep:16", "routed layers")
    budget: float = setting(0.75, "capacity at which the routed loss is taken")
    batch: int = setting(4, "examples a step")
    max_length: int = setting(128, "longest example; longer ones are cut")
    heldout: int = setting(32, "held-out examples")
    timed: int = setting(2, "steps that are timed, after one that warms up")
    seconds: float = setting(0.0, "time that each side gets; 0: time the steps")
    side: str = setting("", "one side alone, as the comparison runs it")


def begun(cfg: Config, steps: int) -> train.Run:
    tuning = train.TrainConfig(
        model=cfg.model, data=(cfg.data,), train=cfg.side, recipe="paper", granularity=cfg.granularity, steps=steps,
        layers=cfg.layers, budget=cfg.budget, batch_size=cfg.batch, max_length=cfg.max_length, truncate=True,
        heldout_samples=cfg.heldout, select_samples=16, cost_samples=2, trunk_gb=0.0, lora_first=False, lr=1e-3,
        dtype="float32", out=str(Path(cfg.out).parent / "none"),
    )  # fmt: skip
    rt, config = runtime.setup("cpu", "float32", tuning.seed), load_config(cfg.model)
    data = train.load_data(tuning, load_tokenizer(cfg.model), config.max_seq_len)
    job = train.Job(tuning, rt, train.prepared(tuning, rt), data, train.plan(tuning, data))
    if cfg.side == "lora":
        return train.begin(job)
    routing = candidates(tuning, config)[0]
    job.model.add_routers(routing)
    return build(job, job.workload(), train.State(), None)  # no orders: nothing here is compared with them


def timed(cfg: Config) -> dict:
    """Processor seconds and peak memory of a step of one side."""
    run, spent = begun(cfg, cfg.timed + 1), []
    for _ in range(cfg.timed + 1):
        started = time.process_time()
        train.step(run)
        spent.append(time.process_time() - started)
    about = {"trainable": run.state.trainable, "optimizer_bytes": run.state.optimizer_bytes}
    return {**about, "seconds_per_step": min(spent[1:]), "peak_bytes": runtime.peak_memory_bytes("cpu")}


def reached(cfg: Config, seconds_per_step: float) -> dict:
    """Held-out losses of one side after as many steps as fit."""
    run = begun(cfg, max(1, round(cfg.seconds / seconds_per_step)))
    held, select = run.work.of(run.data.held), run.work.of(run.data.select)
    before = evaluate(held, skip_everywhere(()))["loss"]
    for _ in range(run.cfg.steps):
        train.step(run)
    found = {"steps": run.cfg.steps, "base": before, "dense": evaluate(held, skip_everywhere(()))["loss"]}
    if cfg.side != "lora":
        settle(select, cfg.budget)
        routed = evaluate(held)
        found |= {"routed": routed["loss"], "capacity": routed["capacity"]}
    return found


def main() -> None:
    cfg = runtime.cli(Config)
    path = Path(cfg.out)
    rows = runtime.read_json(path) if path.exists() else {}
    if cfg.side:
        found = reached(cfg, rows[cfg.side]["seconds_per_step"]) if cfg.seconds else timed(cfg)
        runtime.write_json(path, {**rows, cfg.side: {**rows.get(cfg.side, {}), **found}})
        return
    for side in SIDES:
        if not cfg.seconds or rows[side].get("steps") is None:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--side={side}"], check=True)
    rows = runtime.read_json(path)
    print("train         trainable  optimizer MiB  peak MiB  s/step  steps   dense  routed  capacity")
    for side, row in rows.items():
        sizes = f"{row['optimizer_bytes'] / 2**20:13.2f} {row['peak_bytes'] / 2**20:9.0f}"
        losses = "  ".join(f"{row[name]:6.3f}" if name in row else "     -" for name in ("dense", "routed", "capacity"))
        taken = f"{row['seconds_per_step']:7.3f}  {row.get('steps', 0):5}"
        print(f"{side:12} {row['trainable']:10,} {sizes} {taken}  {losses}")
    print(json.dumps(rows))


if __name__ == "__main__":
    runtime.run_main(main)
