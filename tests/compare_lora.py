"""Do routers cost a LoRA-tuned model anything? (LoRA + routers) - LoRA and (LoRA + static list) - LoRA, over seeds.

Run: python tests/compare_lora.py --model=checkpoints/smollm2-135m-instruct --out=out/lora

Per seed: LoRA on the dense model (1), routers on that model frozen ("first"), LoRA and routers in the same steps
("joint"). On held-out rows, at each budget: loss and KL to the same model with route off, of the routers and of the
static list that loses least on the selection set. Differences are to the loss of (1). Both sides saw the same rows; a
difference counts against its spread over seeds. Killed, the same command goes on. Writes OUT/results.json.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
import train  # noqa: E402
from model import load_config  # noqa: E402
from recipe.calibrate import settle  # noqa: E402
from recipe.controls import Controls  # noqa: E402
from recipe.passes import Workload, collate, dense_states, head_losses, skip_everywhere, states  # noqa: E402
from recipe.start import best_static  # noqa: E402
from router import capacity  # noqa: E402
from runtime import setting  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402


@dataclass
class Config:
    model: str = field(metadata={"help": "checkpoint folder"})
    data: tuple[str, ...] = setting((os.path.relpath(ROOT / "data" / "demo" / "instructions.jsonl"),), "files of rows")
    out: str = setting("out/lora", "folder for runs and results.json")
    granularity: str = setting("attn_token", "what a gate skips, and for what")
    layers: str = setting("auto:16", "routed layers")
    budgets: tuple[float, ...] = setting((0.875, 0.75), "capacities; tuned at the last one")
    seeds: tuple[int, ...] = setting((1, 2, 3), "seeds of rows, order and LoRA")
    samples: int = setting(30, "training examples, selection set included")
    heldout: int = setting(16, "held-out examples")
    max_length: int = setting(112, "longest example; longer ones are cut")
    chat: str | None = setting(None, "chat form; none: the model's own")
    batch: int = setting(4, "examples a step")
    rank: int = setting(8, "rank of LoRA")
    variants: tuple[str, ...] = setting(("first", "joint"), "first: routers on a frozen LoRA; joint: both in one run")


def settings(cfg: Config, seed: int, variant: str) -> train.TrainConfig:
    """Of one run; `lora` is the first step of `first`."""
    out, effort = f"{cfg.out}/{seed}/{variant}", dict(cost_samples=4, select_samples=6, calibrate_samples=6)
    if variant == "first":
        effort |= {"train": "routers", "adapter": f"{cfg.out}/{seed}/lora", "epochs": 1.0}
    else:
        effort |= {"train": {"lora": "lora", "joint": "routers+lora"}[variant], "lora_first": False}
    return train.TrainConfig(
        model=cfg.model, data=cfg.data, out=out, granularity=cfg.granularity, layers=cfg.layers, seed=seed,
        budget=cfg.budgets[-1], max_samples=cfg.samples, max_length=cfg.max_length, truncate=True, dtype="float32",
        heldout_samples=cfg.heldout, batch_size=cfg.batch, micro_batch=4, lora_rank=cfg.rank, chat=cfg.chat,
        benefit_samples=0, report=(), **effort,
    )


@torch.no_grad()
def compared(work: Workload, dense: dict[int, torch.Tensor], skipped: tuple[int, ...] | None) -> dict:
    """Loss, KL to the same model with route off, and capacity, of the routers or where everyone skips these places.

    dense: its final states there, by group.
    """
    model, loss, kl, tokens, gates = work.model, 0.0, 0.0, 0, []
    for number, group in work.groups():
        batch = collate(group, work.rt.device)
        forced = None if skipped is None else skip_everywhere(skipped)(model, batch, number)
        h, made, _ = states(model, batch, route="gather", gates=forced)
        loss += head_losses(model, h, batch.labels).sum().item()
        kl += head_losses(model, h, batch.labels, dense[number]).sum().item()
        tokens += len(batch.labels)
        gates.append((made.flatten(1).sum(1), len(group) if made.dim() == 2 else sum(batch.lengths)))
    shares = sum(ran for ran, _ in gates) / sum(units for _, units in gates)
    realised = capacity(shares[:, None], weights=model.place_weights()).item()
    return {"loss": loss / tokens, "kl": kl / tokens, "capacity": realised, "tokens": tokens}


def run_of(tuning: train.TrainConfig) -> tuple[train.Job, Workload, train.State]:
    """A run up to its last step, begun or continued, with the routers that it chose."""
    rt, config = runtime.setup("cpu", "float32", tuning.seed), load_config(tuning.model)
    data = train.load_data(tuning, load_tokenizer(tuning.model), config.max_seq_len)
    epochs = tuning.epochs or 1.0
    tuning = replace(tuning, steps=-int(-epochs * len(data.train) // tuning.batch_size))
    job = train.Job(tuning, rt, train.prepared(tuning, rt), data, train.plan(tuning, data))
    work, state = train.tuned(job, train.claim(job)[1])
    train.keep_changes(job, work, state)
    return job, work, state


def measured(cfg: Config, seed: int, variant: str) -> list[dict]:
    """Rows of one variant: dense, and at each budget routers and static list."""
    job, work, state = run_of(settings(cfg, seed, variant))
    held, select = work.of(job.data.held), work.of(job.data.select)
    controls, dense = Controls(select), dense_states(held)
    about = {"seed": seed, "variant": variant, "seconds_per_step": state.step_seconds / max(1, state.step)}
    rows = [{**about, "budget": 1.0, "route": "dense", **compared(held, dense, ())}]
    for budget in cfg.budgets:
        name, skipped = best_static(controls, state.orders, budget)
        rows.append({**about, "budget": budget, "route": f"static ({name})", **compared(held, dense, skipped)})
        settle(select, budget)
        rows.append({**about, "budget": budget, "route": "routers", **compared(held, dense, None)})
    return rows


def difference(rows: list[dict], variant: str, budget: float, route: str) -> str:
    """Mean and spread over seeds of loss minus LoRA's own loss, and mean KL."""
    lora = {row["seed"]: row["loss"] for row in rows if row["variant"] == "first" and row["route"] == "dense"}
    found = [row for row in rows if (row["variant"], row["budget"]) == (variant, budget) and route in row["route"]]
    gaps = torch.tensor([row["loss"] - lora[row["seed"]] for row in found])
    kl = sum(row["kl"] for row in found) / len(found)
    spread = gaps.std().item() if len(gaps) > 1 else float("nan")
    return f"{variant:6} {budget:6.3f} {route:8} {gaps.mean().item():+8.4f} {spread:8.4f} {kl:8.4f}  n {len(gaps)}"


def main() -> None:
    cfg = runtime.cli(Config)
    path = Path(cfg.out) / "results.json"
    rows = runtime.read_json(path)["rows"] if path.exists() else []
    for seed in cfg.seeds:
        if not (Path(cfg.out) / str(seed) / "lora" / "summary.json").exists():
            train.train(settings(cfg, seed, "lora"))
        base = runtime.read_json(Path(cfg.out) / str(seed) / "lora" / "summary.json")
        for variant in cfg.variants:
            if not any((row["seed"], row["variant"]) == (seed, variant) for row in rows):
                rows += measured(cfg, seed, variant)
                runtime.write_json(path, {"settings": vars(cfg), "rows": rows})
        print(f"seed {seed}: held-out loss {base['heldout_loss_base']:.4f} of the base, "
              f"{base['heldout_loss_dense']:.4f} with LoRA")
    print("run    budget route     loss - LoRA's   spread  KL to its own dense")
    for variant in cfg.variants:
        for budget in cfg.budgets:
            for route in ("routers", "static"):
                print(difference(rows, variant, budget, route))


if __name__ == "__main__":
    runtime.run_main(main)
