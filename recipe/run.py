"""What tuning works on: a Job, from which a router file is made whichever way, and a Run, all that its steps need."""

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import runtime
from data.load import Data
from model import Transformer
from recipe.fit import RidgeDescent
from recipe.journal import Journal
from recipe.lora import let_train, trainable
from recipe.passes import Batch, Workload, dense_states, prompts_of, states
from recipe.shard import everything, shared
from recipe.trunk import TrunkCache
from runtime import Runtime


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

    cfg: Any  # TrainConfig, whose checks know this module
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
        return Journal(Path(self.cfg.out) / "progress", name, self.identity, self.rt)

    def end_journals(self) -> None:
        """Remove them: a checkpoint or the summary stands."""
        if self.rt.is_master:
            shutil.rmtree(Path(self.cfg.out) / "progress", ignore_errors=True)

    def costed(self) -> Workload:
        """The training examples on which costs are measured: before routers stand, so there is nothing stored yet."""
        return Workload(self.model, self.data.train[: self.cfg.cost_samples], self.passes)

    @property
    def identity(self) -> dict:
        """What a continuation must agree on: settings, base model and data."""
        settings = {**self.cfg.decisive, "base fingerprint": self.model.exact_fingerprint}
        return json.loads(json.dumps({**settings, "data digest": self.data.digest}))


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


class Student(nn.Module):
    """What DistributedDataParallel wraps: one routed pass that computes everything and multiplies by the gates."""

    def __init__(self, model: Transformer, first_layer: int, recompute: bool):
        super().__init__()
        self.model, self.how = model, {"first_layer": first_layer, "recompute": recompute}

    def forward(self, batch: Batch, x: Tensor):
        return states(self.model, batch, route="mask", x=x, **self.how)


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


def optimizers_of(cfg, model: Transformer, inputs: Tensor | None, counts: Tensor) -> list:
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
