"""What a run will need, told before it starts: memory and disk from sizes, time from a short measurement."""

import itertools
import statistics
import time
from pathlib import Path

import torch

from data.load import Data
from data.records import Example
from model import ModelConfig, Transformer
from recipe.calibrate import PASSES
from recipe.passes import EVAL_BATCH, LOGITS_AT_ONCE, Workload, collate
from recipe.run import Job
from recipe.start import INPUT_SAMPLES, PILOT_SAMPLES, SEARCH_SAMPLES, candidates
from runtime import Phases, free_bytes, print0, synchronize

TRIES = 3  # forward passes that are timed, after one that warms up


def kept_elements(config: ModelConfig, first: int, tokens: int, recompute: bool) -> int:
    """Elements that autograd keeps between forward and backward pass over `tokens` tokens, from layer `first` on.

    A frozen product keeps nothing of its input; norms, attention and the gated product do. recompute: each block keeps
    what enters it, and one block at a time the rest.
    """
    attention = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)  # q, its result, k, v
    block = 4 * config.dim + attention + 3 * config.hidden_dim  # both norms, both sums; gate, its silu, up
    layers = config.n_layers - first
    return tokens * (layers * config.dim + block if recompute else layers * block)


def memory_needed(model: Transformer, first: int, tokens: int, recompute: bool) -> int:
    """Bytes of a rank: weights, what a pass over `tokens` tokens keeps, logits with their gradient."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    itemsize = model.tok_embeddings.weight.element_size()
    return weights + kept_elements(model.config, first, tokens, recompute) * itemsize + 3 * 4 * LOGITS_AT_ONCE


def disk_needed(model: Transformer, examples: list[Example], limit: float, inputs: int) -> int:
    """Most bytes in --out: stored activations, and journal and checkpoint (twice, while one is written) of so many
    router inputs."""
    tokens = sum(len(example.tokens) + example.prompt for example in examples)
    stored = min(limit, tokens * model.config.dim * model.tok_embeddings.weight.element_size())
    return int(stored + 3 * 4 * inputs * model.config.dim * model.config.n_layers)


@torch.no_grad()
def seconds_per_example(work: Workload, rows: int) -> float:
    """Median time of a dense forward pass over `rows` examples of middling length, by example."""
    some = sorted(work.examples[:1000], key=lambda example: len(example.tokens))
    middle = some[len(some) // 2 :][:rows]
    batch, times = collate(middle, work.rt.device), []
    for number in range(1 + TRIES):
        synchronize(work.rt.device)
        started = time.perf_counter()
        work.model.hidden(batch.tokens)
        synchronize(work.rt.device)
        if number:
            times.append(time.perf_counter() - started)
    return statistics.median(times) / len(middle)


def show_needs(memory: int, disk: int, out: Path, each: float, passes: float) -> None:
    """Print them. each: seconds of a forward pass over an example; passes: how many of these are left to a rank."""
    free = free_bytes(out)
    print0(f"needs about: {memory / 1e9:.2f} GB of memory a rank, up to {disk / 1e9:.2f} GB of disk in {out} "
           f"({free / 1e9:,.1f} GB are free), {each * passes / 60:,.1f} minutes (an example takes {each:.3f} s "
           "forward, measured)")
    if disk > free:
        print0(f"warning: {out} may run full: free space, lower --trunk_gb, or give another --out")


def plan(cfg, data: Data) -> Phases:
    """The phases of a run and roughly what each takes, in forward passes over an example."""
    if cfg.train == "lora":
        return Phases({"tuning": 4 * cfg.steps * cfg.batch_size, "held out": 2 * len(data.held)})
    n_places = 16  # as in the demo: the phases' shares depend little on it
    sequences = cfg.granularity.endswith("sequence")
    few = list(itertools.islice(data.all, 1000))  # enough to tell how much of an example is its prompt
    read = sum(example.prompt if sequences else len(example.tokens) for example in few)
    routes = read / sum(len(example.tokens) for example in few)  # of what a pass over the whole example takes
    trial, budgets = (1 + 2 * routes) * len(data.select), len({cfg.budget, *cfg.report})
    searched = (1 - min((cfg.budget, *cfg.report))) * n_places
    start = {"costs": 3 * cfg.cost_samples, "orders": (2 + 0.8 * searched) * min(cfg.cost_samples, SEARCH_SAMPLES)}
    if cfg.recipe == "default":
        pilot = min(cfg.benefit_samples, PILOT_SAMPLES)  # beyond them half of the places are toggled
        toggled = 0.55 * n_places * (cfg.benefit_samples + pilot) / 2  # layers below a toggled place are shared
        start["first routers"] = 2 * trial + 2 * len(data.select) + sequences * (cfg.benefit_samples + toggled)
    tuning = {"tuning": 2.2 * cfg.steps * cfg.batch_size + cfg.evaluations * trial}
    passes = 1 if cfg.reads == "first" else PASSES
    calibration = passes * routes * max(cfg.calibrate_samples, len(data.select)) + 10 * len(data.select)
    end = {"calibration": calibration, "held out": (1 + 6 * budgets) * len(data.held)}
    return Phases(end if cfg.recalibrate or cfg.import_official else {**start, **tuning, **end})


def announce(job: Job, done: float | None) -> None:
    """Say what the run needs before it starts. done: share of the steps of a run that goes on; None: a new one."""
    cfg, rt, examples, config = job.cfg, job.rt, job.data.all, job.model.config
    lengths = sorted(examples.lengths(), reverse=True)
    rows = min(cfg.micro_batch, max(1, cfg.batch_size // rt.world_size), max(1, cfg.batch_tokens // lengths[0]))
    first = candidates(cfg, config)[0].places[0].layer
    memory = memory_needed(job.model, first, sum(lengths[:rows]), cfg.checkpoint_activations)
    disk = disk_needed(job.model, examples, cfg.trunk_gb * 1e9, INPUT_SAMPLES)
    work = dict(job.phases.work)
    if done is not None:
        work = {name: passes for name, passes in work.items() if name in ("calibration", "held out")}
        work["tuning"] = job.phases.work["tuning"] * (1 - done)
    each = seconds_per_example(Workload(job.model, examples, job.passes), EVAL_BATCH)
    show_needs(memory, disk, Path(cfg.out), each, sum(work.values()) / job.passes.world_size)
