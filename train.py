"""Router-Tuning: train the routers of a frozen model; on request LoRA beside them, or all weights as a baseline.

    python train.py                                   # demo: fetches a small model, tunes it, prints what came out
    python train.py --model=checkpoints/llama3 --data=sft.jsonl --layers=auto:16 --budget=0.5 --out=out/llama3
    torchrun --nproc_per_node=8 train.py ...          # the same global batches, the same result up to rounding

Writes OUT/routers.safetensors, OUT/log.jsonl (a line per step) and OUT/summary.json. Killed at any moment, the same
command goes on where the last checkpoint stands, or within a phase before or after the steps, and ends in the same
router file, bit for bit (on a GPU as far as its kernels are deterministic). See docs/RESULTS.md,
"Training that survives".

recipe=default: what recipe/ measures, fits and calibrates; steps of ridge regression in the space of logits, a running
quantile as the cut that holds the budget. recipe=paper: arXiv 2410.13184, eq. 1-4 and 9-10 (zero routers, penalty).
--train=lora, routers+lora, full: OUT then holds an adapter in peft's format (recipe/lora.py), or a base of its own.
Both recipes end beside controls: the same share of places skipped for everyone (by greedy search, by Fisher cost, by
similarity), random routes, and the routers' own routes made constant.

Legend: B batch rows, T tokens, D width, R routers, n loss-carrying tokens, N units (sequences, or tokens).
A place is where a router stands (`RouterConfig.places`); an order lists the numbers of places, the first to skip first.
"""

import contextlib
import json
import math
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import runtime
from data.draw import Draw
from data.load import Data, Request, load
from data.portions import source_of
from data.records import Example, Form
from model import Experts, load_config, unpack_weights
from recipe.check import check_run
from recipe.checkpoint import claim, clean_up, resume, save_checkpoint, stored_dtype
from recipe.cost import step_flops, trunk_flops
from recipe.finish import finish, keep_changes, next_command
from recipe.needs import announce, plan
from recipe.passes import (
    Batch, Workload, collate, head_gradient, n_units, quantile_cut, real_logits, states, under_budget,
)
from recipe.report import describe, show, show_step, verdict
from recipe.run import Job, Run, State, count_bad, put, what_is_bad
from recipe.settings import DEMO_MODEL, TrainConfig
from recipe.shard import average, even
from recipe.speed import speed_of
from recipe.start import begin, prepared, standing, try_out
from router import set_cuts
from runtime import ALONE, Runtime, collect, generator, mine, print0, sum_over_ranks, wait_for_all
from tokenizer import Tokenizer, load_tokenizer

CUT_MEMORY = 0.5  # share of the running cut that a step keeps: more is steadier, but lags while all logits rise


# -----------------------------------------------------------------------------
# Data


def load_data(cfg: TrainConfig, tok: Tokenizer, context: int, rt: Runtime = ALONE) -> Data:
    """The examples of a run, tokenised once under --out. Every row is checked; only those in use are encoded.

    Held-out rows come from a file, from "split" fields, or from a seeded draw; the selection set is taken out of the
    training rows. Raises ValueError that lists rows that cannot be used.
    """
    limit = min(cfg.max_length or context, context)
    apart = Path(cfg.heldout) if isinstance(cfg.heldout, str) else None
    request = Request(
        sources=[source_of(word) for word in cfg.data],
        heldout=apart,
        draw=Draw(cfg.seed, apart is not None or cfg.heldout, cfg.heldout_samples, cfg.max_samples, cfg.select_samples),
        skip_bad=cfg.skip_bad,
        model=Path(cfg.model),
        folder=Path(cfg.out) / "tokens",
    )
    print0(f"chat form: {cfg.chat or tok.chat_form}")
    return load(request, Form(tok, limit, cfg.chat, cfg.truncate, cfg.loss_on == "last", cfg.bare, cfg.seed), rt)


def global_batch(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Examples of one step, over all ranks: a stream of seeded permutations, so a pure function of its arguments."""
    places = (divmod(position, n) for position in range(step * batch_size, (step + 1) * batch_size))
    return [epoch_order(n, seed, epoch)[at].item() for epoch, at in places]


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) of the examples in an epoch."""
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def lr_at(step: int, steps: int, lr: float, warmup: float, schedule: str = "cosine") -> float:
    """Linear warm-up over a share of the steps, then constant, or cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return lr * (step + 1) / rising
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# -----------------------------------------------------------------------------
# Steps


def tune(run: Run, out: Path) -> None:
    """All steps that are left, each with a line in OUT/log.jsonl, and checkpoints between them."""
    cfg, rt, state = run.cfg, run.rt, run.state
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    tries = {round(cfg.steps * i / cfg.evaluations) for i in range(1, cfg.evaluations + 1)}
    if rt.is_master:
        clean_up(log, state.step)
        if state.step == 0:
            save_checkpoint(run, checkpoint)
            run.end_journals()
    if run.compiled:  # only steps run compiled: what is measured before them looks into the blocks
        unpack_weights(run.model)
        for block in run.model.layers:
            block.compile(fullgraph=not isinstance(block.feed_forward, Experts))
    begun, asked = time.perf_counter() - state.seconds, False
    with runtime.noted_signals() as signals:
        while state.step < cfg.steps and not asked:
            started = time.perf_counter()
            row = step(run)
            seconds = time.perf_counter() - started
            tried = try_out(run)[0] if cfg.measures and state.step in tries else None
            row |= {"select_loss": tried, **speed_of(rt, row.pop("tokens"), row.pop("flops"), seconds)}
            state.step_seconds += seconds
            state.seconds = time.perf_counter() - begun
            show_step(row, cfg.steps, state.best_step == state.step)
            asked = runtime.spread_signal(signals, rt)
            due = state.step % cfg.save_every == 0 or state.step == cfg.steps
            if rt.is_master:
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
                if asked or due and not state.bad_in_row:
                    save_checkpoint(run, checkpoint)
        wait_for_all(rt)  # else the launcher would end the master, still writing, when the first rank has gone


def step(run: Run) -> dict:
    """One optimizer step on one global batch; returns its line of the log.

    The result depends neither on the number of ranks nor on micro_batch, but for rounding.
    """
    cfg, rt, model, state, trunk = run.cfg, run.rt, run.model, run.state, run.work.trunk
    if trunk is not None:
        trunk.computed.clear()
    whole, batches = micro_batches(run, state.step)
    lengths = [len(example.tokens) for example in whole]
    n_targets, units = sum(len(example.targets) for example in whole), n_units(model.routing, lengths)
    loss, executed, logits = accumulate(run, batches, n_targets, units)
    norm = torch.nn.utils.get_total_norm([w.grad for w in run.weights.values() if w.grad is not None])
    computed = [length for _, batch in batches for length in batch.lengths] if trunk is None else trunk.computed
    below = trunk_flops(model.config, run.work.first_layer, computed)
    sums = torch.stack([loss, executed, torch.tensor(below, device=rt.device)])
    loss, executed, below = sum_over_ranks(sums, rt).tolist()
    bad = what_is_bad(run, loss, norm.item())
    if bad is None:
        torch.nn.utils.clip_grads_with_norm_(run.weights.values(), cfg.clip, norm)
        rises = [move(optimizer, state.step, cfg) for optimizer in run.optimizers]
        if cfg.measures:
            hold_budget(run, torch.cat(collect(logits, rt), dim=1), rises[0])
    for w in run.weights.values():
        w.grad = None
    count_bad(state, bad, cfg.max_bad_steps)
    state.step += 1
    state.tokens += sum(lengths)
    again = cfg.checkpoint_activations + (cfg.lambda_ > 0 and len(batches) > 1) + (cfg.train == "full")
    above = (lengths, n_targets, cfg.objective == "distill", again)
    flops = below + step_flops(model.config, run.work.first_layer, *above)
    row = {"step": state.step, "loss": loss / n_targets, "capacity": executed / units,
           "lr": run.optimizers[0].param_groups[0]["lr"], "grad_norm": norm.item(), "budget": cfg.budget,
           "cut": state.cut, "bad": bad, "tokens": sum(lengths), "flops": flops}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


def accumulate(run: Run, batches: list[tuple[int, Batch]], n_targets: int, units: int) -> tuple[Tensor, Tensor, list]:
    """Gradients of a step, summed over micro-batches and ranks.

    Returns this rank's loss and executed units, as sums, and its numbered logits (R,N).
    """
    cfg, rt, model = run.cfg, run.rt, run.model
    alone = len(batches) == 1  # the one pass of this step tells the capacity itself
    over = cfg.lambda_ > 0 and not alone and capacity_of(run, batches, units) > cfg.budget
    loss, executed, logits = torch.zeros((), device=rt.device), torch.zeros((), device=rt.device), []
    model.train(cfg.lora_dropout > 0)
    if model.training:  # what is left out is a function of seed, step and rank
        torch.manual_seed(generator(cfg.seed, "dropout", run.state.step, rt.rank).initial_seed())
    for number, batch in batches:
        with contextlib.nullcontext() if batch is batches[-1][1] else no_sync(run):
            x = run.work.entered(batch)
            h, gates, z = run.student(batch, x)
            if cfg.lambda_ > 0 and alone:
                over = sum_over_ranks(executed_units(run, gates), rt).item() / units > cfg.budget
            # the wrapper averages gradients over ranks, hence the factor world_size on what is a sum
            part, dh = head_gradient(model, h, batch.labels, teacher(run, batch, x), scale=rt.world_size / n_targets)
            with runtime.together():
                torch.autograd.backward(*roots(run, h, dh, gates, units if over else None))
        loss += part
        executed += executed_units(run, gates)
        logits.append((number, real_logits(z, batch.lengths)))
    if run.shared:
        average([w.grad for w in run.weights.values()], rt)
    model.eval()
    return loss, executed, logits


def move(optimizer: torch.optim.Optimizer, step: int, cfg: TrainConfig):
    """One step of an optimizer at the learning rate of this step; returns what it returns."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg.steps, group["peak"], cfg.warmup, cfg.schedule)
    return optimizer.step()


def micro_batches(run: Run, step: int) -> tuple[list[Example], list[tuple[int, Batch]]]:
    """The global batch of a step, longest example first, and this rank's numbered parts of it.

    The parts are the same for any number of ranks (down to micro_batch examples a rank), and so is their rounding.
    """
    cfg, rt, train = run.cfg, run.rt, run.data.train
    whole = [train[i] for i in global_batch(len(train), cfg.batch_size, cfg.seed, step)]
    whole.sort(key=lambda example: -len(example.tokens))
    rows, multiple = min(cfg.micro_batch, cfg.batch_size // rt.world_size), 64 if run.compiled else 1
    groups = under_budget(whole, rows, cfg.batch_tokens)
    groups = even(groups, rt.world_size) if run.shared else groups
    return whole, [(number, collate(group, rt.device, multiple)) for number, group in mine(groups, rt)]


def no_sync(run: Run):
    """Gradients are summed over ranks at a step's last backward pass only."""
    return run.student.no_sync() if run.rt.world_size > 1 and not run.shared else contextlib.nullcontext()


@torch.no_grad()
def teacher(run: Run, batch: Batch, x: Tensor) -> Tensor | None:
    """Final states (n,D) of the dense model, where it teaches."""
    if run.cfg.objective != "distill":
        return None
    return states(run.model, batch, route="off", x=x, first_layer=run.work.first_layer)[0]


def roots(run: Run, h: Tensor, dh: Tensor, gates: Tensor, over: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Where the backward pass begins, and with which gradients.

    over: units of the global batch, where its capacity exceeds the budget. The penalty's gradient is then
    lambda * d capacity; it is nothing else.
    """
    if over is None:
        return [h], [dh]
    each = run.cfg.lambda_ * run.rt.world_size / over * run.counts  # (R,)
    return [h, gates], [dh, each.view(-1, *[1] * (gates.dim() - 1)).expand_as(gates)]


def executed_units(run: Run, gates: Tensor) -> Tensor:
    """How many units of gates (R,B) or (R,B,T) execute, on average over places by what they count."""
    return (gates.detach().flatten(1).sum(dim=1) * run.counts).sum()


@torch.no_grad()
def capacity_of(run: Run, batches: list[tuple[int, Batch]], units: int) -> float:
    """Capacity of the whole global batch, over all accumulation steps and ranks, before any gradient."""
    executed = torch.zeros((), device=run.rt.device)
    for _, batch in batches:
        x = run.work.entered(batch)
        gates = states(run.model, batch, route="mask", x=x, first_layer=run.work.first_layer)[1]
        executed += executed_units(run, gates)
    return sum_over_ranks(executed, run.rt).item() / units


def hold_budget(run: Run, z: Tensor, rise: float) -> None:
    """Move the running cut to the quantile of a step's logits z (R,N), and after the weights, which just moved."""
    cut, state = quantile_cut(z, run.cfg.budget, run.counts.cpu()), run.state
    if math.isfinite(cut):
        state.cut = CUT_MEMORY * state.cut + (1 - CUT_MEMORY) * cut
    state.cut += rise
    set_cuts(run.model, state.cut)


# -----------------------------------------------------------------------------
# From settings to a router file


def tuned(job: Job, saved: tuple | None) -> tuple[Workload, State]:
    """Begin or resume a run, take the steps that are left, and put its best routers into the model."""
    if saved is None:
        with job.journal("start"):
            run = begin(job)
    else:
        run = resume(job, saved)
    describe(run)
    with job.phases("tuning", begun=run.state.step / max(1, job.cfg.steps)):
        tune(run, Path(job.cfg.out))
    if job.cfg.measures and run.state.best_loss < math.inf:
        put(run.weights.values(), run.best.values())
    return run.work, run.state


def train(cfg: TrainConfig) -> dict:
    """Run or continue what `cfg` says; returns the summary."""
    if cfg.train == "routers+lora" and cfg.lora_first:
        first = replace(cfg, train="lora", out=str(Path(cfg.out) / "lora"))
        train(first)
        return train(replace(cfg, train="routers", adapter=first.out))
    rt = runtime.setup(cfg.device, stored_dtype(cfg), cfg.seed, cfg.rank_timeout)
    fetch_demo(cfg, rt)
    config = load_config(cfg.model)
    check_run(cfg, rt, config)  # a wrong setting is told before anything is loaded
    data = load_data(cfg, load_tokenizer(cfg.model), config.max_seq_len, rt)
    epochs = cfg.epochs if cfg.epochs is not None else 0.1 if cfg.train == "routers" else 1.0
    steps = math.ceil(epochs * len(data.train) / cfg.batch_size) if cfg.steps is None else cfg.steps
    cfg = replace(cfg, steps=steps)
    job = Job(cfg, rt, prepared(cfg, rt), data, plan(cfg, data))
    with runtime.alone_in(Path(cfg.out)) if rt.is_master else contextlib.nullcontext():
        return run_job(job)


def run_job(job: Job) -> dict:
    """The same, with everything loaded."""
    cfg = job.cfg
    summary, saved = claim(job)
    if summary is not None:
        print0(f"{cfg.out} holds this run, finished: nothing to do (--overwrite begins anew)")
        job.end_journals()
        return summary
    announce(job, None if saved is None else saved[0].step / max(1, cfg.steps))
    if cfg.recalibrate or cfg.import_official:
        with job.journal("start"):
            work, state = standing(job)
    else:
        work, state = tuned(job, saved)
    keep_changes(job, work, state)
    with job.journal("end"):
        summary = finish(job, work, state)
    wait_for_all(job.rt)
    job.end_journals()
    return summary


def fetch_demo(cfg: TrainConfig, rt: Runtime) -> None:
    """Get the demo's model, where it is asked for and not there."""
    if cfg.model == DEMO_MODEL and not (Path(DEMO_MODEL) / "config.json").exists():
        if rt.is_master:
            from data.demo.prepare import prepare

            prepare(DEMO_MODEL)
        wait_for_all(rt)


def main() -> None:
    cfg = runtime.cli(TrainConfig, about=__doc__)
    summary = train(cfg)
    if "prefill_speedup" in summary:  # the master's
        print0(show(summary))
        print0(f"next               {next_command(cfg, summary)}")
        print0("\n".join(verdict(row) for row in summary["report"]))
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
