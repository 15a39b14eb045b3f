"""Router-Tuning: train the routers of a frozen model; on request LoRA beside them, or all weights as a baseline.

    python train.py                                   # demo: fetches a small model, tunes it, prints what came out
    python train.py --model=checkpoints/llama3 --data=sft.jsonl --layers=auto:16 --budget=0.5 --out=out/llama3
    torchrun --nproc_per_node=8 train.py ...          # the same global batches, the same result up to rounding

Writes OUT/routers.safetensors, OUT/log.jsonl (a line per step) and OUT/summary.json. Killed at any moment, the same
command goes on where the last checkpoint stands, or within a phase before or after the steps, and ends in the same
router file, bit for bit (on a GPU as far as its kernels are deterministic). See docs/TRAINING.md.

recipe=default: what recipe/ measures, fits and calibrates; steps of ridge regression in the space of logits, a running
quantile as the cut that holds the budget. recipe=paper: arXiv 2410.13184, eq. 1-4 and 9-10 (zero routers, penalty).
--train=lora, routers+lora, full: OUT then holds an adapter in peft's format (recipe/lora.py), or a base of its own.
Both recipes end beside controls: the same share of places skipped for everyone (by greedy search, by Fisher cost, by
similarity), random routes, and the routers' own routes made constant.

Legend: B batch rows, T tokens, D width, R routers, n loss-carrying tokens, N units (sequences, or tokens).
A place is where a router stands (`RouterConfig.places`); an order lists the numbers of places, the first to skip first.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import runtime
from data.draw import Draw
from data.load import Data, Request, load
from data.portions import source_of
from data.records import Example, Form
from model import (
    Experts, ModelConfig, Transformer, fingerprint, kernels, load_config, routing_of, unpack_weights,
)
from recipe.adapter import save_adapter
from recipe.base import load_base, save_base
from recipe.calibrate import PASSES, calibrate
from recipe.controls import Controls
from recipe.cost import step_flops, trunk_flops
from recipe.experts import gate_start
from recipe.fit import RidgeDescent
from recipe.journal import Journal, discard
from recipe.lora import TARGETS, LoRAConfig, add_lora, changes, let_train
from recipe.measure import Measured, measure_costs
from recipe.needs import disk_needed, memory_needed, seconds_per_example, show_needs
from recipe.orders import search_orders
from recipe.passes import (
    EVAL_BATCH, Batch, Workload, collate, dense_states, evaluate, head_gradient, n_units, prompts_of, real_logits,
    states, under_budget,
)
from recipe.report import compare, show, show_step, verdict
from recipe.shard import average, even, everything, shared
from recipe.start import benefit_start, best_static, loss_at_budget, place_routers, router_starts
from recipe.trunk import TrunkCache
from router import (
    EXPERT_GRANULARITIES, GRANULARITIES, RouterConfig, RouterMeta, check_fingerprint, cuts_for, deep_layers,
    load_router_weights, official_layers, parse_layers, quantile_cut, read_router_file, save_routers, set_cuts,
    threshold_of, trainable,
)
from runtime import ALONE, Runtime, collect, generator, mine, permutation, print0, setting, sum_over_ranks, wait_for_all
from tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent
DEMO_MODEL = os.path.relpath(ROOT / "checkpoints" / "smollm2-135m-instruct")
DEMO_DATA = os.path.relpath(ROOT / "data" / "demo" / "instructions.jsonl")

NAMED = (*GRANULARITIES, *EXPERT_GRANULARITIES)

# What a setting left at `none` means under each recipe, and under each effort.
RECIPES = {
    "default": {"layers": "auto:16", "objective": "ce", "lambda_": 0.0},
    "paper": {"layers": "deep:16", "objective": "ce", "lambda_": 0.1, "lr": 2e-4},
}
EFFORTS = {
    "quick": dict(cost_samples=12, benefit_samples=40, select_samples=16, calibrate_samples=64, evaluations=1),
    "default": dict(cost_samples=24, benefit_samples=80, select_samples=32, calibrate_samples=128, evaluations=1),
    "thorough": dict(cost_samples=96, benefit_samples=320, select_samples=96, calibrate_samples=384, evaluations=4),
}
# Settings that may differ between a run and its continuation; what `effort` stands for is compared instead of its name.
FREE = ("out", "save_every", "overwrite", "trunk_gb", "effort", "skip_bad", "shard", "rank_timeout", "max_bad_steps")
LEAST = {  # least value of each number
    **dict.fromkeys(("batch_size", "micro_batch", "batch_tokens"), 1),
    **dict.fromkeys(("cost_samples", "select_samples", "calibrate_samples"), 1),
    **dict.fromkeys(("heldout_samples", "save_every", "max_bad_steps"), 1),
    **dict.fromkeys(("evaluations", "steps", "epochs", "lr", "lambda_", "trunk_gb", "benefit_samples", "lora_lr"), 0),
    "rank_timeout": 0,
    **dict.fromkeys(("max_samples", "max_length"), 2),
}

INPUT_SAMPLES = 512  # router inputs on which RidgeDescent measures its steps
SEARCH_SAMPLES = 96  # examples, at most, on which orders are searched
CUT_MEMORY = 0.5  # share of the running cut that a step keeps: more is steadier, but lags while all logits rise


@dataclass
class TrainConfig:
    """Every setting of a run; `none` leaves the choice to the recipe, or to the effort."""

    model: str = setting(DEMO_MODEL, "checkpoint folder written by convert_hf.py")
    data: tuple[str, ...] = setting(
        (DEMO_DATA,), "files of rows, in any form that data/records.py names; FILE:2.9 takes its rows 2.9 times"
    )
    out: str = setting("out/demo", "folder for routers.safetensors, log.jsonl, summary.json, checkpoint.safetensors")
    train: Literal["routers", "lora", "routers+lora", "full"] = setting(
        "routers", "what is trained; lora: on the dense model; full: all weights of the base, with routers"
    )
    recipe: Literal["default", "paper"] = setting("default", "default: measured start, ridge; paper: AdamW, penalty")
    effort: Literal["quick", "default", "thorough"] = setting("default", "examples that the recipe measures on")
    granularity: str = setting("attn_sequence", "what a gate skips, and for what: " + ", ".join(NAMED))
    layers: str | None = setting(None, "routed layers: auto:N (N cheapest places), deep:N (paper), all, or 3,5,8-12")
    budget: float = setting(0.5, "share of (place, unit) pairs that execute; both_*: of their compute")
    objective: Literal["ce", "distill"] | None = setting(
        None, "ce: cross-entropy of answers; distill: KL to the dense model"
    )
    pool: Literal["prompt", "all"] = setting("prompt", "what a sequence router averages over; all: as the paper does")
    renormalise: bool = setting(False, "experts: a token's remaining weights keep their sum; the paper: they stay")
    kv: Literal["routed", "all"] | None = setting(None, "keys and values of skipped tokens; none: all for attn_token")
    max_samples: int | None = setting(None, "training examples to use; none: all")
    max_length: int | None = setting(None, "longest example in tokens; none: the model's context")
    truncate: bool = setting(False, "cut longer examples instead of refusing them")
    skip_bad: bool = setting(False, "leave out rows that cannot be used, instead of stopping")
    heldout: float | str = setting(0.1, 'held-out share, or file; data with "split" fields decide themselves')
    heldout_samples: int = setting(64, "most held-out examples that are scored")
    chat: str | None = setting(None, "plain, chatml, llama3, mistral, or one of the model's templates; none: its own")
    loss_on: Literal["all", "last"] = setting("all", "answers of a conversation that carry the loss")
    batch_size: int = setting(16, "examples per step, over all ranks")
    micro_batch: int = setting(4, "most examples of a forward pass and rank; does not change the result")
    batch_tokens: int = setting(8192, "most tokens of a forward pass and rank, pads included; one example at least")
    epochs: float | None = setting(None, "passes over the training examples; none: 0.1 for routers alone, else 1")
    steps: int | None = setting(None, "optimizer steps; none: from epochs")
    lr: float | None = setting(
        None, "learning rate; default recipe: how far a step moves the logits (root mean square)"
    )
    lambda_: float | None = setting(None, "weight of the capacity penalty ReLU(capacity - budget)")
    warmup: float = setting(0.03, "share of the steps with rising learning rate")
    schedule: Literal["cosine", "constant"] = setting("cosine", "learning rate after the warm-up")
    lora_first: bool = setting(True, "routers+lora: LoRA first, then routers on the result; false: both in each step")
    lora_rank: int = setting(8, "rank of each projection's change")
    lora_alpha: float = setting(16.0, "changes are scaled by alpha / rank")
    lora_dropout: float = setting(0.0, "share of a change's inputs that a step leaves out")
    lora_targets: tuple[str, ...] = setting(TARGETS, "projections that are changed")
    lora_lr: float | None = setting(None, "learning rate of LoRA, none: 1e-3; with full of the base, none: 2e-5")
    adapter: str | None = setting(None, "adapter folder, ours or peft's: LoRA goes on from it, routers stand on it")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "greatest gradient norm")
    cost_samples: int | None = setting(None, "training examples that price places and (96 at most) search orders")
    benefit_samples: int | None = setting(None, "training examples scored with each place toggled; 0: none")
    select_samples: int | None = setting(None, "training examples set aside to choose the best router")
    calibrate_samples: int | None = setting(None, "examples whose prompts calibrate the cuts, those first")
    evaluations: int | None = setting(None, "times during tuning that the router is tried on those; the best is kept")
    report: tuple[float, ...] = setting(
        (0.75, 0.5, 0.25), "budgets at which the routers are compared with their controls, beside the run's own"
    )
    trunk_gb: float = setting(1.0, "most disk space (GB, in --out) for activations below the first routed layer")
    max_bad_steps: int = setting(10, "steps in a row without finite gradient after which the run stops")
    save_every: int = setting(5, "steps between checkpoints")
    rank_timeout: float = setting(runtime.RANK_TIMEOUT, "minutes that a rank waits for another before it gives up")
    overwrite: bool = setting(False, "begin anew in an --out that holds another run")
    init: str | None = setting(None, "router file of train.py whose routers begin this run, instead of fitted ones")
    import_official: str | None = setting(None, "router file of the official code: calibrate and write it as ours")
    recalibrate: str | None = setting(None, "router file of train.py: calibrate it on these data and write it again")
    seed: int = setting(1337, "seed of data order and label samples")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of the frozen model: auto, float32, bfloat16, float16; routers are float32")
    base_dtype: Literal["int8"] | None = setting(None, "int8: frozen weights rounded to a byte each; none: in dtype")
    compile: bool | None = setting(None, "torch.compile each block; none: on CUDA only")
    shard: bool = setting(False, "under torchrun, share each block's weights out over the ranks (FSDP2): less memory")
    checkpoint_activations: bool = setting(False, "compute each block again in the backward pass: less memory")

    def __post_init__(self):
        if self.layers is None and self.granularity in EXPERT_GRANULARITIES:
            self.layers = "all"
        for name, value in {**RECIPES[self.recipe], **EFFORTS[self.effort]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lr is None:  # many tokens vote on a token router's step, few sequences on a sequence router's
            self.lr = 0.1 if self.granularity.endswith("token") else 0.01
        if self.train == "lora":  # there is no capacity to hold
            self.lambda_ = 0.0
        if self.lora_lr is None:
            self.lora_lr = 2e-5 if self.train == "full" else 1e-3
        if self.kv is None:
            self.kv = "all" if self.granularity in ("attn_token", "both_token") else "routed"
        more = {"pool": self.pool, "kv": self.kv, "renormalise": self.renormalise}
        RouterConfig.of(self.granularity, (0,), n_experts=1, **more)  # raises for what cannot be
        self.check()

    @property
    def measures(self) -> bool:
        """Routers are tried, chosen and held to the budget by what is measured of them."""
        return self.recipe == "default" and self.train != "lora"

    def check(self) -> None:
        """Raise ValueError for a value that is out of range, or that contradicts another."""
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget is {self.budget}, expected a share between 0 and 1 (both excluded): tune at e.g. "
                             "--budget=0.5, and the router file then serves every budget from 0 to 1")
        for name, least in LEAST.items():
            value, shown = getattr(self, name), name.rstrip("_")
            if value is not None and not value >= least:
                raise ValueError(f"{shown} is {value}, expected {least} or more: change --{shown}")
        if not all(0.0 <= budget <= 1.0 for budget in self.report):
            raise ValueError(f"report is {self.report}, expected shares from 0 to 1: change --report")
        if isinstance(self.heldout, float) and not 0.0 < self.heldout < 1.0:
            raise ValueError(f"heldout is {self.heldout}, expected a share between 0 and 1, or a file: "
                             "change --heldout")
        LoRAConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)  # raises for what cannot be
        if self.train != "routers" and (self.objective == "distill" or self.import_official or self.recalibrate):
            raise ValueError(f"train is {self.train!r} with --objective=distill, --import_official or --recalibrate; "
                             "expected a model that stays as it is: leave that away, or use --train=routers")
        if self.train == "full" and (self.adapter or self.dtype not in ("auto", "float32")):
            raise ValueError(f"train is 'full' with dtype {self.dtype} and adapter {self.adapter}; expected float32, "
                             "since steps vanish in 16 bits, and no adapter: leave --dtype away, or merge the adapter "
                             "with convert_hf.py first")
        if self.shard and (self.train == "full" or self.base_dtype or self.compile):
            raise ValueError("--shard with --train=full, --base_dtype or --compile; expected a frozen base in dtype, "
                             "in eager code: leave these away")
        if sum(map(bool, (self.init, self.import_official, self.recalibrate))) > 1:
            raise ValueError("--init, --import_official and --recalibrate each name a router file, expected one: leave "
                             "the others away")
        if self.train == "full" and self.base_dtype is not None:
            raise ValueError("train is 'full' with --base_dtype=int8; expected weights that can move by less than a "
                             "step of int8: leave --base_dtype away, or use --train=lora")
        if self.import_official and self.granularity.startswith(("both", "expert")):
            raise ValueError(f"granularity is {self.granularity!r} with --import_official; the official code has one "
                             "router per layer: name what it gated")


# -----------------------------------------------------------------------------
# Data


def load_data(cfg: TrainConfig, tok: Tokenizer, context: int, rt: Runtime = ALONE) -> Data:
    """The examples of a run, tokenised once under --out. Every row is checked; only those in use are encoded.

    Held-out rows come from a file, from "split" fields, or from a seeded draw; the selection set is taken out of the
    training rows. Raises ValueError that lists rows that cannot be used.
    """
    limit = min(cfg.max_length or context, context)
    if (cfg.max_length or 0) > context:
        raise ValueError(f"max_length is {cfg.max_length:,}, expected at most the model's context of {context:,} "
                         "tokens: lower --max_length")
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
    return load(request, Form(tok, limit, cfg.chat, cfg.truncate, cfg.loss_on == "last"), rt)


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
# A run


class Student(nn.Module):
    """What DistributedDataParallel wraps: one routed pass that computes everything and multiplies by the gates."""

    def __init__(self, model: Transformer, first_layer: int, recompute: bool):
        super().__init__()
        self.model, self.how = model, {"first_layer": first_layer, "recompute": recompute}

    def forward(self, batch: Batch, x: Tensor):
        return states(self.model, batch, route="mask", x=x, **self.how)


@dataclass
class State:
    """What a checkpoint keeps beside tensors. The order of data is a function of (seed, step): no generator state."""

    routing: dict = field(default_factory=dict)  # RouterConfig, as a dict
    orders: dict[str, list[int]] = field(default_factory=dict)  # of the static lists
    dtype: str = ""  # of the frozen model, resolved
    step: int = 0
    cut: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the whole run so far
    step_seconds: float = 0.0  # of its optimizer steps
    trainable: int = 0  # parameters
    optimizer_bytes: int = 0
    bad_steps: int = 0  # skipped for want of finite gradients
    bad_in_row: int = 0
    last_bad: str = ""  # the last such step, in words


@dataclass
class Job:
    """What a router file is made from, whichever way."""

    cfg: TrainConfig
    rt: Runtime
    model: Transformer
    data: Data
    phases: runtime.Phases

    def workload(self) -> Workload:
        """The training examples, with a store for activations below the first routed layer where those stay: made once
        routers stand, and passed on."""
        if self.cfg.train != "routers":
            return Workload(self.model, self.data.train, self.passes, moving=True)
        path, limit = Path(self.cfg.out) / "trunk" / f"rank{self.rt.rank}.bin", self.cfg.trunk_gb * 1e9
        limit = 0.0 if self.shared else limit  # else one rank would read what another computes, and not run the blocks
        prompts = (prompt for example in self.data.all for prompt in prompts_of([example]))
        stored = itertools.chain(self.data.all, prompts)
        trunk = TrunkCache(path, self.model, stored, limit / self.rt.world_size)
        return Workload(self.model, self.data.train, self.passes, trunk)

    @property
    def shared(self) -> bool:
        """Blocks are shared out over the ranks."""
        return shared(self.cfg.shard, self.rt)

    @property
    def passes(self) -> Runtime:
        """Of passes that measure: shared out over the ranks, unless they hold the blocks together."""
        return everything(self.rt) if self.shared else self.rt

    def journal(self, name: str) -> contextlib.AbstractContextManager:
        """Where phases keep what they have computed, for a run that is killed within them."""
        if self.shared:  # ranks would go on at different places
            return contextlib.nullcontext()
        return Journal(Path(self.cfg.out) / "progress", name, identity(self), self.rt)

    def costed(self) -> Workload:
        """The training examples on which costs are measured: before routers stand, so there is nothing stored yet."""
        return Workload(self.model, self.data.train[: self.cfg.cost_samples], self.passes)


@dataclass
class Run(Job):
    """Everything that a step needs, complete at birth."""

    state: State
    inputs: Tensor | None  # (R,N,D) router inputs that RidgeDescent measures its steps on
    weights: dict[str, Tensor]  # all that is trained, by name
    counts: Tensor  # (R,) what each place counts
    work: Workload  # the training examples
    select: Workload
    teacher: dict[int, Tensor] | None  # dense states of the selection set, objective distill
    optimizers: list[torch.optim.Optimizer]
    student: nn.Module
    best: dict[str, Tensor]  # what lost least on the selection set

    @property
    def compiled(self) -> bool:
        return self.rt.device.type == "cuda" and not self.shared if self.cfg.compile is None else self.cfg.compile


def build(job: Job, work: Workload, state: State, inputs: Tensor | None) -> Run:
    """A run of a model whose routers stand where they are to be tuned. work: the training examples."""
    let_train(job.model, job.cfg.train)
    weights = trainable(job.model)
    counts = job.model.place_weights().float().to(job.rt.device)
    optimizers = optimizers_of(job.cfg, job.model, inputs, counts)
    state.trainable = sum(w.numel() for w in weights.values())
    state.optimizer_bytes = sum(map(size_of, optimizers))
    student = Student(job.model, work.first_layer, job.cfg.checkpoint_activations)
    if dist.is_initialized() and not job.shared:  # every rank read the same files: nothing but gradients is sent
        student = DistributedDataParallel(student, forward_sync_buffers=False, init_sync=False)
    select = work.of(job.data.select)
    return Run(
        **vars(job),
        state=state,
        inputs=inputs,
        weights=weights,
        counts=counts,
        work=work,
        select=select,
        teacher=dense_states(select) if job.cfg.objective == "distill" else None,
        optimizers=optimizers,
        student=student,
        best=copied(weights) if job.cfg.measures else {},
    )


def optimizers_of(cfg: TrainConfig, model: Transformer, inputs: Tensor | None, counts: Tensor) -> list:
    """Ridge steps for routers whose inputs were measured, AdamW for all else. Each group's `peak` is its highest lr."""
    rest, optimizers, groups = trainable(model), [], []
    routers = {name: w for name, w in rest.items() if any(w is router.weight for router in model.routers())}
    rest = [w for name, w in rest.items() if name not in routers]
    if routers and inputs is not None:
        optimizers.append(RidgeDescent(list(routers.values()), inputs, cfg.lr, counts))
        optimizers[0].param_groups[0]["peak"] = cfg.lr
    elif routers:
        groups.append({"params": list(routers.values()), "peak": cfg.lr})
    if rest:
        groups.append({"params": rest, "peak": cfg.lora_lr})
    if groups:
        optimizers.append(torch.optim.AdamW(groups, weight_decay=cfg.weight_decay))
    for w in (w for group in groups for w in group["params"]):  # as at AdamW's first step; resuming overwrites them
        zeros = {name: torch.zeros_like(w) for name in ("exp_avg", "exp_avg_sq")}
        optimizers[-1].state[w] = {"step": torch.zeros(()), **zeros}
    return optimizers


def size_of(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's tensors."""
    kept = [vars(optimizer), *optimizer.state.values()]
    return sum(value.nbytes for part in kept for value in part.values() if isinstance(value, Tensor))


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}


def put(weights: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give these weights these values; a router (1,D) takes a row (D,)."""
    for w, value in zip(weights, values, strict=True):
        w.data.copy_(value)


def begin(job: Job) -> Run:
    """A run before its first step: routed places chosen, orders of the static lists found, first routers set."""
    cfg, started, inputs = job.cfg, time.perf_counter(), None
    dtype = str(job.rt.dtype).removeprefix("torch.")
    if cfg.train == "lora":  # one router that stays open, so that the dense model takes the same steps
        job.model.add_routers(RouterConfig.of("mlp_sequence", (0,)))
        set_cuts(job.model, -math.inf)
        return build(job, job.workload(), State(asdict(job.model.routing), {}, dtype, cut=-math.inf), None)
    placed, first = candidates(cfg, job.model.config), None
    if cfg.init:
        first, meta = read_init(cfg, job.model.config)
        placed = meta.routing, None
    with job.phases("costs"):
        measured = place_routers(job.costed(), *placed, cfg.seed)
    work = job.workload()
    with job.phases("orders"):
        orders = orders_of(job, work, measured)
    if cfg.recipe == "default":
        inputs = measured.inputs[:, permutation(measured.inputs.shape[1], cfg.seed, "inputs")[:INPUT_SAMPLES]]
    run = build(job, work, State(asdict(job.model.routing), orders, dtype), inputs)
    if first is not None:
        model = job.model
        check_fingerprint(cfg.init, meta.base_fingerprint, model.fingerprint, model.exact_fingerprint, model.parent)
        load_router_weights(cfg.init, model, first, meta.routing)
    if cfg.recipe == "default":
        with job.phases("first routers"):
            if first is None:
                first_routers(run, measured)
            else:
                run.state.cut = try_out(run)[1]
                set_cuts(run.model, run.state.cut)
    run.state.seconds = time.perf_counter() - started
    return run


def read_init(cfg: TrainConfig, config: ModelConfig) -> tuple[dict[str, Tensor], RouterMeta]:
    """What the file of --init holds. Raises ValueError naming what these settings do not ask for."""
    tensors, meta = read_router_file(cfg.init)
    has, (wanted, kept) = meta.routing, candidates(cfg, config)
    pairs = {name: (getattr(has, name), getattr(wanted, name)) for name in ("granularity", "pool", "kv")}
    pairs["layers"] = (has.names, wanted.names) if kept is None else (len(has.places), kept)
    if differing := [f"{name} ({ours!r} there, {asked!r} now)" for name, (ours, asked) in pairs.items()
                     if ours != asked]:
        raise ValueError(f"{cfg.init} cannot begin this run: {', '.join(differing)}; expected the same routers: change "
                         "these settings, or give another --init")
    return tensors, meta


def candidates(cfg: TrainConfig, config: ModelConfig) -> tuple[RouterConfig, int | None]:
    """Places where routers may stand, and how many of them (of experts: layers) are kept: the cheapest; None: all."""
    kind, chosen = parse_layers(cfg.layers, config.n_layers)
    layers = {"auto": range(config.n_layers), "list": chosen}.get(kind) or deep_layers(chosen, config.n_layers)
    more = {"pool": cfg.pool, "kv": cfg.kv, "renormalise": cfg.renormalise}
    routing = routing_of(config, cfg.granularity, layers, **more)
    return routing, chosen if kind == "auto" else None


def orders_of(job: Job, work: Workload, measured: Measured) -> dict[str, list[int]]:
    """Orders of the static lists, as deep as the budgets in question go."""
    cfg = job.cfg
    examples = work.examples[: min(cfg.cost_samples, SEARCH_SAMPLES)]
    return search_orders(work.of(examples), measured, 1 - min((cfg.budget, *cfg.report)))


def first_routers(run: Run, measured: Measured) -> None:
    """Start from the best static order, as routers that say the same of everyone, or, where the selection set loses
    less, from routers fitted to what was measured."""
    cfg, state, routing = run.cfg, run.state, run.model.routing
    name, skipped = best_static(Controls(run.select), state.orders, cfg.budget)
    starts = router_starts(measured, name, state.orders[name], routing.unit)
    if routing.experts and routing.unit == "token":
        gate = gate_start(run.model, measured.inputs)
        starts |= {"gate": gate, "gate + fisher": gate + starts["fisher"]}
    if routing.unit == "sequence" and cfg.benefit_samples and not routing.experts:
        examples = run.data.train[: cfg.benefit_samples]
        starts["benefits"] = benefit_start(run.work.of(examples), skipped, cfg.objective == "distill")
    tried, cuts = {}, {}
    routers = [router.weight for router in run.model.routers()]
    for name, weights in starts.items():
        put(routers, weights)
        tried[name], cuts[name] = try_out(run)
    print0("selection loss of starts: " + ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items()))
    put(run.weights.values(), run.best.values())
    if not cfg.evaluations:
        state.best_loss = math.inf  # nothing is tried later: the last routers are taken
    state.cut = cuts[min(tried, key=tried.get)]
    set_cuts(run.model, state.cut)


def try_out(run: Run) -> tuple[float, float]:
    """Loss on the selection set at exactly the budget, and the cut there; keeps the weights if they are the best so
    far."""
    loss, cut = loss_at_budget(run.select, run.cfg.budget, run.teacher)
    set_cuts(run.model, run.state.cut)
    if loss < run.state.best_loss:
        run.state.best_loss, run.state.best_step, run.best = loss, run.state.step, copied(run.weights)
    return loss, cut


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
            discard(out / "progress")
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
            row |= {"select_loss": tried, **speed_of(run, row.pop("tokens"), row.pop("flops"), seconds)}
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


def what_is_bad(run: Run, loss: float, norm: float) -> str | None:
    """What is not finite in a step, in words; None: nothing."""
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    grads = {name: w.grad for name, w in run.weights.items() if w.grad is not None}
    names = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    return f"loss {loss}, gradient norm {norm}; not finite: {', '.join(names) or 'the loss alone'}"


def count_bad(state: State, bad: str | None, most: int) -> None:
    """Count a step that was skipped because something in it was not finite. Raises ValueError after `most` in a row."""
    state.bad_in_row = 0 if bad is None else state.bad_in_row + 1
    if bad is None:
        return
    state.bad_steps, state.last_bad = state.bad_steps + 1, f"step {state.step + 1}: {bad}"
    if state.bad_in_row >= most:
        raise ValueError(f"{most} steps in a row had no finite gradient ({state.last_bad}), and the last good "
                         "checkpoint stays; expected finite numbers: lower --lr, or use --dtype=float32 or "
                         "bfloat16, in another --out")


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


def speed_of(run: Run, tokens: int, flops: float, seconds: float) -> dict:
    """What a step's line says of its speed. mfu: share of the device's peak, None where that is unknown."""
    peak = runtime.peak_flops(runtime.device_name(run.rt.device))
    mfu = flops / seconds / (peak * run.rt.world_size) if peak else None
    return {"milliseconds": seconds * 1e3, "tokens_per_second": tokens / seconds, "mfu": mfu}


# -----------------------------------------------------------------------------
# Checkpoints


def identity(job: Job) -> dict:
    """What a continuation must agree on: settings, base model and data."""
    settings = {name: value for name, value in asdict(job.cfg).items() if name not in FREE}
    settings |= {"base fingerprint": job.model.exact_fingerprint, "data digest": job.data.digest}
    return json.loads(json.dumps(settings))


def refuse_other(out: Path, saved: dict, now: dict) -> None:
    """Raise ValueError naming every setting in which a run differs from the one that lies in its folder."""
    names = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    if names:
        differing = ", ".join(f"{name} ({saved.get(name)!r} there, {now.get(name)!r} now)" for name in names)
        raise ValueError(f"{out} holds a run with other settings: {differing}; expected the same ones to go on: give "
                         "another --out, or --overwrite to begin anew")


def tensors_of(run: Run) -> dict[str, Tensor]:
    """What a checkpoint keeps of a run, by name: trained weights, the best ones, the optimizers' moments, inputs."""
    kept = {**run.weights, **{f"best.{name}": w for name, w in run.best.items()}}
    for optimizer in run.optimizers:
        for name, w in run.weights.items():
            kept |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(w, {}).items()}
    return kept if run.inputs is None else {**kept, "inputs": run.inputs}


def save_checkpoint(run: Run, path: Path) -> None:
    """Write the checkpoint atomically: the run's tensors, and State as JSON."""
    about = {"state": asdict(run.state), "identity": identity(run)}
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_of(run).items()},
        metadata={name: json.dumps(value) for name, value in about.items()},
    )
    runtime.write_atomic(path, lambda p: p.write_bytes(data))


def read_checkpoint(path: Path) -> tuple[State, dict, dict[str, Tensor]]:
    """State, identity and tensors of a checkpoint. Raises ValueError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            about = {name: json.loads(file.metadata()[name]) for name in ("state", "identity")}
            # cloned: mapped tensors begin at any address, and the last bit of a product depends on it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return State(**about["state"]), about["identity"], tensors
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error!r}): delete it, or begin anew with "
                         "--overwrite") from None


def resume(job: Job, saved: tuple[State, dict]) -> Run:
    """The run whose state and tensors a checkpoint holds."""
    state, tensors = saved
    places = tuple(map(tuple, state.routing["places"]))
    job.model.add_routers(RouterConfig(**{**state.routing, "places": places}))
    run = build(job, job.workload(), state, tensors.get("inputs"))
    kept = tensors_of(run)
    put(kept.values(), [tensors[name] for name in kept])
    set_cuts(job.model, state.cut)
    print0(f"going on from step {state.step} of {job.cfg.steps}")
    return run


def clean_up(log: Path, step: int) -> None:
    """Remove what a killed run left of steps that are done again."""
    lines = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            done = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # torn by a kill
            done = False
        if done:
            lines.append(line + "\n")
    runtime.write_atomic(log, lambda p: p.write_text("".join(lines)))


# -----------------------------------------------------------------------------
# The end: calibrate, write, compare


def finish(job: Job, work: Workload, state: State) -> dict:
    """Calibrate the routers as they stand, write their file, compare on held-out examples, write the summary."""
    cfg, model, data, started = job.cfg, job.model, job.data, time.perf_counter()
    plain = cfg.recipe == "paper" or cfg.import_official is not None  # cuts of 0, and no static lists in the table
    path = Path(cfg.out) / "routers.safetensors"
    with job.phases("calibration"):
        examples = data.select + data.train[::-1]  # last first: the least fitted ones
        calibration = work.of(examples[: max(cfg.calibrate_samples, len(data.select))])
        table = calibrate(calibration, cfg.budget, Controls(work.of(data.select)), None if plain else state.orders)
        cuts = [0.0] * len(model.routing.places) if plain else cuts_for(cfg.budget, table)
    meta = router_meta(job, state, table, cuts)
    if job.rt.is_master:
        save_routers(path, model, meta)
    with job.phases("held out"):
        budgets = [budget for budget in cfg.report if budget != cfg.budget]
        by_budget = {budget: cuts_for(budget, table) for budget in budgets} | {cfg.budget: cuts}  # its own last
        held = work.of(data.held)
        rows = compare(held, by_budget, state.orders)
        summary = summarise(cfg, held, state, rows)
        meta.report = [losses_of(row) for row in rows]
    summary |= {"seconds": state.seconds + time.perf_counter() - started, "routers": str(path)}
    summary |= {"identity": identity(job), "data": data.report}
    if job.rt.is_master:
        save_routers(path, model, meta)  # with what the comparison found
        runtime.write_json(Path(cfg.out) / "summary.json", summary)
    return summary


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


def finish_lora(job: Job, work: Workload, state: State) -> dict:
    """Compare the dense model with its changes and without, and write the summary."""
    cfg, model, started = job.cfg, job.model, time.perf_counter()
    held = work.of(job.data.held)
    with job.phases("held out"):
        with_lora = evaluate(held)
        for lora in changes(model).values():
            lora.scale = 0.0
        base = evaluate(held)
    summary = {
        "heldout_loss_base": base["loss"],
        "heldout_loss_dense": with_lora["loss"],
        "heldout_tokens": with_lora["tokens"],
        "train": cfg.train,
        "steps": state.step,
        **training_costs(state),
        "peak_memory_bytes": runtime.peak_memory_bytes(job.rt.device),
        "device": runtime.device_name(job.rt.device),
        "kernels": kernels(model),
        "seconds": state.seconds + time.perf_counter() - started,
        "adapter": cfg.out,
        "identity": identity(job),
    }
    if job.rt.is_master:
        runtime.write_json(Path(cfg.out) / "summary.json", summary)
    print0(f"held-out loss of the dense model: {base['loss']:.4f} without LoRA, {with_lora['loss']:.4f} with it; the "
           f"adapter is in {cfg.out}")
    return summary


def training_costs(state: State) -> dict:
    """What training took, for a summary."""
    return {
        "trainable_parameters": state.trainable,
        "optimizer_bytes": state.optimizer_bytes,
        "seconds_per_step": state.step_seconds / state.step if state.step else 0.0,
        "tokens_per_second": state.tokens / state.step_seconds if state.step else 0.0,
    }


def losses_of(row: dict) -> dict:
    """A row of the comparison without times, which differ from run to run."""
    return {name: value for name, value in row.items() if not name.startswith("prefill")}


def router_meta(job: Job, state: State, table: dict, cuts: list[float]) -> RouterMeta:
    cfg, names = job.cfg, job.model.routing.names
    return RouterMeta(
        routing=job.model.routing,
        thresholds=[threshold_of(cut) for cut in cuts],
        base_fingerprint=job.model.fingerprint,
        calibration=table,
        recipe=cfg.recipe,
        step=state.best_step if cfg.recipe == "default" else state.step,
        config={name: value for name, value in asdict(cfg).items() if name not in FREE},
        orders={name: [names[place] for place in order] for name, order in state.orders.items()},
        loads=job.model.loads,
    )


def summarise(cfg: TrainConfig, held: Workload, state: State, rows: list[dict]) -> dict:
    """What summary.json holds; the cuts stand at the run's own budget, the last row's."""
    own, routing, device = rows[-1], held.model.routing, held.rt.device
    return {
        "heldout_loss_dense": own["dense"],
        "heldout_loss_routed": own["routed"],
        "heldout_loss_static": min(own[name] for name in state.orders),
        "heldout_tokens": sum(len(example.targets) for example in held.examples),
        "capacity": own["capacity"],
        "budget": cfg.budget,
        "capacity_per_layer": own["capacity_per_layer"],
        "granularity": routing.granularity,
        "layers": [name if "." in name else int(name) for name in routing.names],
        "kv": routing.kv,
        "recipe": cfg.recipe,
        "objective": cfg.objective,
        "steps": state.step,
        "best_step": state.best_step,
        "bad_steps": state.bad_steps,
        "last_bad_step": state.last_bad or None,
        "train": cfg.train,
        **training_costs(state),
        **{name: value for name, value in own.items() if name.startswith("prefill")},
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "device": runtime.device_name(device),
        "kernels": kernels(held.model),
        "report": sorted(rows, key=lambda row: row["budget"]),
    }


def next_command(cfg: TrainConfig, summary: dict) -> str:
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


# -----------------------------------------------------------------------------
# The three ways to a router file


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


def recalibrated(job: Job) -> tuple[Workload, State]:
    """Routers of our file, which the model came with, and the orders that it holds."""
    orders, names = read_router_file(job.cfg.recalibrate)[1].orders, job.model.routing.names
    if not orders:
        return searched(job)
    numbers = {name: [names.index(place) for place in order] for name, order in orders.items()}
    return job.workload(), State(orders=numbers)


def imported(job: Job, tensors: dict[str, Tensor]) -> tuple[Workload, State]:
    """Routers of a file of the official code, put into the model."""
    load_router_weights(job.cfg.import_official, job.model, tensors, job.model.routing)
    return searched(job)


def searched(job: Job) -> tuple[Workload, State]:
    """Orders of the static lists beside routers that stand already."""
    work, measured = job.workload(), measure_costs(job.costed(), job.cfg.seed)
    return work, State(orders=orders_of(job, work, measured))


def plan(cfg: TrainConfig, data: Data) -> runtime.Phases:
    """The phases of a run and roughly what each takes, in forward passes over an example."""
    if cfg.train == "lora":
        return runtime.Phases({"tuning": 4 * cfg.steps * cfg.batch_size, "held out": 2 * len(data.held)})
    n_places = 16  # as in the demo: the phases' shares depend little on it
    sequences = cfg.granularity.endswith("sequence")
    few = list(itertools.islice(data.all, 1000))  # enough to tell how much of an example is its prompt
    read = sum(example.prompt if sequences else len(example.tokens) for example in few)
    routes = read / sum(len(example.tokens) for example in few)  # of what a pass over the whole example takes
    trial, budgets = (1 + 2 * routes) * len(data.select), len({cfg.budget, *cfg.report})
    searched = (1 - min((cfg.budget, *cfg.report))) * n_places
    start = {"costs": 3 * cfg.cost_samples, "orders": (2 + 0.8 * searched) * min(cfg.cost_samples, SEARCH_SAMPLES)}
    if cfg.recipe == "default":
        toggled = 1 + 0.55 * n_places if sequences else 0  # layers below a toggled place are shared
        start["first routers"] = 2 * trial + 2 * len(data.select) + cfg.benefit_samples * toggled
    tuning = {"tuning": 2.2 * cfg.steps * cfg.batch_size + cfg.evaluations * trial}
    calibration = PASSES * routes * max(cfg.calibrate_samples, len(data.select)) + 10 * len(data.select)
    end = {"calibration": calibration, "held out": (1 + 6 * budgets) * len(data.held)}
    return runtime.Phases(end if cfg.recalibrate or cfg.import_official else {**start, **tuning, **end})


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


def train(cfg: TrainConfig) -> dict:
    """Run or continue what `cfg` says; returns the summary."""
    if cfg.train == "routers+lora" and cfg.lora_first:
        first = replace(cfg, train="lora", out=str(Path(cfg.out) / "lora"))
        train(first)
        return train(replace(cfg, train="routers", adapter=first.out))
    rt = runtime.setup(cfg.device, stored_dtype(cfg), cfg.seed, cfg.rank_timeout)
    fetch_demo(cfg, rt)
    config = load_config(cfg.model)
    tensors = read_router_file(cfg.import_official, official=True)[0] if cfg.import_official else None
    if not cfg.import_official and not cfg.recalibrate:
        candidates(cfg, config)  # a wrong setting is told before anything is loaded
    if cfg.init:
        read_init(cfg, config)
    if cfg.train == "full" and rt.world_size > 1:
        raise ValueError(f"train is 'full' on {rt.world_size} ranks, expected one, since the head's gradient is not "
                         "summed over ranks: use one process, or --train=routers+lora")
    if cfg.batch_size % rt.world_size:
        raise ValueError(f"batch_size is {cfg.batch_size} on {rt.world_size} ranks, expected a multiple: change "
                         "--batch_size or the number of ranks")
    data = load_data(cfg, load_tokenizer(cfg.model), config.max_seq_len, rt)
    epochs = cfg.epochs if cfg.epochs is not None else 0.1 if cfg.train == "routers" else 1.0
    steps = math.ceil(epochs * len(data.train) / cfg.batch_size) if cfg.steps is None else cfg.steps
    cfg = replace(cfg, steps=steps)
    model = prepared(cfg, rt)
    if tensors is not None:
        model.add_routers(RouterConfig.of(cfg.granularity, official_layers(tensors), pool=cfg.pool, kv=cfg.kv))
    job = Job(cfg, rt, model, data, plan(cfg, data))
    with runtime.alone_in(Path(cfg.out)) if rt.is_master else contextlib.nullcontext():
        return run_job(job, tensors)


def run_job(job: Job, tensors: dict[str, Tensor] | None) -> dict:
    """The same, with everything loaded. tensors: of --import_official."""
    cfg, rt = job.cfg, job.rt
    summary, saved = claim(job)
    if summary is not None:
        print0(f"{cfg.out} holds this run, finished: nothing to do (--overwrite begins anew)")
        if rt.is_master:
            discard(Path(cfg.out) / "progress")
        return summary
    announce(job, None if saved is None else saved[0].step / max(1, cfg.steps))
    if cfg.recalibrate or cfg.import_official:
        with job.journal("start"):
            work, state = recalibrated(job) if cfg.recalibrate else imported(job, tensors)
    else:
        work, state = tuned(job, saved)
    keep_changes(job, work, state)
    with job.journal("end"):
        summary = finish_lora(job, work, state) if cfg.train == "lora" else finish(job, work, state)
    wait_for_all(rt)
    if rt.is_master:
        discard(Path(cfg.out) / "progress")
    return summary


def prepared(cfg: TrainConfig, rt: Runtime) -> Transformer:
    """The model as it stands before its first step, with LoRA where that is trained or given."""
    model = load_base(cfg.model, rt, routers=cfg.recalibrate, base_dtype=cfg.base_dtype, shard=cfg.shard,
                      adapter=cfg.adapter)
    if cfg.adapter is None and "lora" in cfg.train:
        add_lora(model, LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets))
    if cfg.train == "full":  # weights are mapped from their file
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return model


def stored_dtype(cfg: TrainConfig) -> str:
    """The dtype that --dtype=auto stood for when the run began: a resumed one keeps it, whatever the processor."""
    if cfg.train == "full":
        return "float32"
    checkpoint = Path(cfg.out) / "checkpoint.safetensors"
    if cfg.dtype == "auto" and checkpoint.exists() and not cfg.overwrite:
        return read_checkpoint(checkpoint)[0].dtype
    return cfg.dtype


def fetch_demo(cfg: TrainConfig, rt: Runtime) -> None:
    """Get the demo's model, where it is asked for and not there."""
    if cfg.model == DEMO_MODEL and not (Path(DEMO_MODEL) / "config.json").exists():
        if rt.is_master:
            from data.demo.prepare import prepare

            prepare(DEMO_MODEL)
        wait_for_all(rt)


def claim(job: Job) -> tuple[dict | None, tuple | None]:
    """What --out holds of this very run: its summary if it is finished, state and tensors if it has begun.

    Raises ValueError, naming every setting that differs, when another run lies there, and where ranks see different
    folders.
    """
    out, now, saved = Path(job.cfg.out), identity(job), None
    checkpoint = out / "checkpoint.safetensors"
    for half_written in out.rglob(".*.tmp") if job.rt.is_master else ():
        half_written.unlink()
    if job.cfg.overwrite and job.rt.is_master:
        made = ("routers.safetensors", "adapter_model.safetensors", "summary.json")
        for name in ("checkpoint.safetensors", "log.jsonl", *made):
            (out / name).unlink(missing_ok=True)
        discard(out / "progress")
    wait_for_all(job.rt)
    summary = finished(out, "adapter_model" if job.cfg.train == "lora" else "routers")
    if summary is not None:
        refuse_other(out, summary.get("identity", {}), now)
    elif checkpoint.exists():
        state, theirs, tensors = read_checkpoint(checkpoint)
        refuse_other(out, theirs, now)
        saved = (state, tensors)
    seen = "a finished run" if summary else f"step {saved[0].step}" if saved else "nothing"
    everyone = collect([(job.rt.rank, seen)], job.rt)  # and from here on the master writes
    if len(set(everyone)) > 1:
        raise ValueError(f"the ranks find in {out}: {', '.join(everyone)}; expected the same: give an --out on a disk "
                         "that all machines share")
    return summary, saved


def finished(out: Path, made: str) -> dict | None:
    """The summary of a finished run; None where it is missing or damaged, or what the run made."""
    summary, made = out / "summary.json", out / f"{made}.safetensors"
    if not (summary.exists() and made.exists()):
        return None
    try:
        with safe_open(made, framework="pt"):  # reads where the file must end
            return dict(runtime.read_json(summary))
    except (SafetensorError, ValueError, TypeError) as error:
        print0(f"{out} holds a finished run that is damaged ({error}): its end is written again")
        return None


def describe(run: Run) -> None:
    """Print each decision that was derived from the settings, once."""
    cfg, rt, model, routing = run.cfg, run.rt, run.model, run.model.routing
    trainable, total = run.state.trainable, sum(p.numel() for p in model.parameters())
    dtype, per_rank = str(rt.dtype).removeprefix("torch."), cfg.batch_size // rt.world_size
    dtype = f"int8, computing in {dtype}" if cfg.base_dtype == "int8" else dtype
    print0(f"device: {runtime.device_name(rt.device)} x {rt.world_size}, base in {dtype}, compile {run.compiled}")
    print0(f"parameters: {trainable:,} trainable ({cfg.train}), {total - trainable:,} frozen, optimizer "
           f"{run.state.optimizer_bytes / 2**20:,.1f} MiB; base fingerprint {model.fingerprint}")
    if cfg.train == "lora":
        print0(f"LoRA: {len(changes(model))} projections, rank {cfg.lora_rank}, lr {cfg.lora_lr}; no routers")
        return
    print0(f"routed places: {', '.join(routing.names)} of {model.config.n_layers} layers; {routing.granularity}, pool "
           f"{routing.pool}, kv {routing.kv}; budget {cfg.budget}")
    print0(f"steps: {cfg.steps} of {cfg.batch_size} examples ({per_rank} a rank, {cfg.micro_batch} at a time); recipe "
           f"{cfg.recipe}, objective {cfg.objective}, lr {cfg.lr}, lambda {cfg.lambda_}")


def main() -> None:
    cfg = runtime.cli(TrainConfig)
    summary = train(cfg)
    if "prefill_speedup" in summary:  # the master's
        print0(show(summary))
        print0(f"next               {next_command(cfg, summary)}")
        print0("\n".join(verdict(row) for row in summary["report"]))
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
