"""The end of a run: routers are calibrated, written, and compared with their controls on held-out examples."""

import time
from pathlib import Path

import runtime
from model import fingerprint, kernels
from recipe.adapter import save_adapter
from recipe.base import save_base
from recipe.calibrate import calibrate
from recipe.controls import Controls
from recipe.lora import changes
from recipe.measure import measure_costs
from recipe.passes import Workload, evaluate
from recipe.report import compare
from recipe.run import Job, State
from recipe.start import orders_of
from router import RouterMeta, cuts_for, save_routers, threshold_of
from runtime import print0


def keep_changes(job: Job, work: Workload, state: State) -> None:
    """Write the adapter that routers stand beside, or the base that full tuning made; static lists are searched again
    where the model that they were searched on has changed."""
    cfg, model, out = job.cfg, job.model, Path(job.cfg.out)
    model.requires_grad_(False)
    if changes(model) and job.rt.is_master:
        save_adapter(model, out, cfg.model)
    if cfg.train == "full":
        save_base(model, cfg.model, out / "base")
        model.fingerprint = fingerprint(out / "base")
    if cfg.train in ("routers+lora", "full"):
        state.orders = orders_of(job, work, measure_costs(job.costed(), cfg.seed))


def finish(job: Job, work: Workload, state: State) -> dict:
    """Compare what was trained on held-out examples, and write the summary; returns it."""
    started = time.perf_counter()
    summary = (finish_lora if job.cfg.train == "lora" else finish_routers)(job, work, state)
    summary |= about(job, state) | {"seconds": state.seconds + time.perf_counter() - started}
    if job.rt.is_master:
        runtime.write_json(Path(job.cfg.out) / "summary.json", summary)
    return summary


def finish_routers(job: Job, work: Workload, state: State) -> dict:
    """Calibrate the routers as they stand, write their file, and set them beside their controls."""
    cfg, data, path = job.cfg, job.data, Path(job.cfg.out) / "routers.safetensors"
    plain = cfg.recipe == "paper" or cfg.import_official is not None  # cuts of 0, and no static lists in the table
    with job.phases("calibration"):
        examples = data.select + data.train[::-1]  # last first: the least fitted ones
        calibration = work.of(examples[: max(cfg.calibrate_samples, len(data.select))])
        table = calibrate(calibration, cfg.budget, Controls(work.of(data.select)), None if plain else state.orders)
        cuts = [0.0] * len(job.model.routing.places) if plain else cuts_for(cfg.budget, table)
    meta = router_meta(job, state, table, cuts)
    if job.rt.is_master:
        save_routers(path, job.model, meta)
    with job.phases("held out"):
        budgets = [budget for budget in cfg.report if budget != cfg.budget]
        by_budget = {budget: cuts_for(budget, table) for budget in budgets} | {cfg.budget: cuts}  # its own last
        rows = compare(work.of(data.held), by_budget, state.orders)
    meta.report = [{name: value for name, value in row.items() if not name.startswith("prefill")} for row in rows]
    if job.rt.is_master:
        save_routers(path, job.model, meta)  # with what the comparison found, but for times, which differ between runs
    return summarise(job, state, rows) | {"routers": str(path)}


def finish_lora(job: Job, work: Workload, state: State) -> dict:
    """Compare the dense model with its changes and without."""
    held = work.of(job.data.held)
    with job.phases("held out"):
        with_lora = evaluate(held)
        for lora in changes(job.model).values():
            lora.scale = 0.0
        base = evaluate(held)
    print0(f"held-out loss of the dense model: {base['loss']:.4f} without LoRA, {with_lora['loss']:.4f} with it; the "
           f"adapter is in {job.cfg.out}")
    return {
        "heldout_loss_base": base["loss"],
        "heldout_loss_dense": with_lora["loss"],
        "heldout_tokens": with_lora["tokens"],
        "adapter": job.cfg.out,
    }


def about(job: Job, state: State) -> dict:
    """What a summary says of any run: what it took, on what, and of which examples."""
    return {
        "train": job.cfg.train,
        "steps": state.step,
        "trainable_parameters": state.trainable,
        "optimizer_bytes": state.optimizer_bytes,
        "seconds_per_step": state.step_seconds / state.step if state.step else 0.0,
        "tokens_per_second": state.tokens / state.step_seconds if state.step else 0.0,
        "peak_memory_bytes": runtime.peak_memory_bytes(job.rt.device),
        "device": runtime.device_name(job.rt.device),
        "kernels": kernels(job.model),
        "identity": job.identity,
        "data": job.data.report,
    }


def router_meta(job: Job, state: State, table: dict, cuts: list[float]) -> RouterMeta:
    """What the router file says of the routers, with these cuts (R)."""
    cfg, names = job.cfg, job.model.routing.names
    return RouterMeta(
        routing=job.model.routing,
        thresholds=[threshold_of(cut) for cut in cuts],
        base_fingerprint=job.model.fingerprint,
        calibration=table,
        recipe=cfg.recipe,
        step=state.best_step if cfg.recipe == "default" else state.step,
        config=cfg.decisive,
        orders={name: [names[place] for place in order] for name, order in state.orders.items()},
        loads=job.model.loads,
    )


def summarise(job: Job, state: State, rows: list[dict]) -> dict:
    """What a summary says of routers; the cuts stand at the run's own budget, the last row's."""
    cfg, own, routing = job.cfg, rows[-1], job.model.routing
    return {
        "heldout_loss_dense": own["dense"],
        "heldout_loss_routed": own["routed"],
        "heldout_loss_static": min(own[name] for name in state.orders),
        "heldout_tokens": sum(len(example.targets) for example in job.data.held),
        "capacity": own["capacity"],
        "budget": cfg.budget,
        "capacity_per_layer": own["capacity_per_layer"],
        "granularity": routing.granularity,
        "layers": [name if "." in name else int(name) for name in routing.names],
        "kv": routing.kv,
        "recipe": cfg.recipe,
        "objective": cfg.objective,
        "best_step": state.best_step,
        "bad_steps": state.bad_steps,
        "last_bad_step": state.last_bad or None,
        **{name: value for name, value in own.items() if name.startswith("prefill")},
        "report": sorted(rows, key=lambda row: row["budget"]),
    }


def next_command(cfg, summary: dict) -> str:
    """How to score what was written: on the held-out rows where a file names them, else on a task."""
    routers, files = summary["routers"], summary["data"]["files"]
    marked = [file["file"] for file in files if file["has_split"]]
    adapter = cfg.out if "lora" in cfg.train else cfg.adapter
    start = f"python eval.py --model={f'{cfg.out}/base' if cfg.train == 'full' else cfg.model} --routers={routers}"
    start += f" --adapter={adapter}" if adapter else ""
    if isinstance(cfg.heldout, str):
        what = f"--perplexity={cfg.heldout}"
    elif marked:
        what = f"--perplexity={marked[0]} --perplexity_split=heldout"
    else:
        return f"{start} --tasks=arc_easy --data=data/eval"
    form = {"chat": cfg.chat, "max_length": cfg.max_length, "truncate": cfg.truncate, "skip_bad": cfg.skip_bad}
    flags = "".join(
        f" --{name}={str(value).lower() if value is True else value}" for name, value in form.items() if value
    )
    return f"{start} {what}{flags}"
