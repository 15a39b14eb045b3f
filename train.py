"""Router-Tuning: train the routers of a frozen model, and nothing else.

    python train.py                                        # demo: fetches a small model, tunes it, prints what came out
    python train.py --model=checkpoints/llama3 --data=sft.jsonl --granularity=attn_sequence --layers=auto:16 --budget=0.5 --out=out/llama3
    torchrun --nproc_per_node=8 train.py ...               # the same global batches, the same result up to rounding

Writes OUT/routers.safetensors, OUT/log.jsonl (a line per step) and OUT/summary.json. Killed at any step, the same command goes on where
the last checkpoint stands and ends in the same router file, bit for bit (on a GPU as far as its kernels are deterministic).
recipe=default: price every layer and unit by its Fisher cost, search the order in which layers are best dropped, measure what each layer is
worth to each sequence beside that order, start from routers in closed form, tune by steps of ridge regression in the space of logits, hold
the budget with a running quantile as the cut, keep the best router. recipe=paper: arXiv 2410.13184, eq. 1-4 and 9-10 (zero routers, penalty).
Both end beside their controls: the same share of layers dropped for everyone (by greedy search, by Fisher cost, by similarity), random
routes, and the routers' own routes made constant.

Legend: B batch rows, T tokens, D width, V vocabulary, R routers, n loss-carrying tokens, N units (sequences, or tokens) of a data set.
A place is where a router stands (`RouterConfig.places`); an order is a list of the R numbers of places, the one to drop first in front.
"""

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel

import runtime
from model import KVCache, Transformer, load_config, load_model
from recipe.calibrate import ANCHORS, calibrate, settle
from recipe.controls import Controls, routed_flops
from recipe.cost import prefill_flops, step_flops
from recipe.fit import RidgeDescent, benefit_prior, order_prior, ranks_of, token_prior
from recipe.measure import measure_benefits, measure_costs, typical_costs
from recipe.orders import greedy_order, similarity_order
from recipe.passes import (
    Batch,
    Example,
    collate,
    collect,
    dense_states,
    evaluate,
    head_gradient,
    n_units,
    permutation,
    real_logits,
    states,
    sum_over_ranks,
    wait_for_all,
)
from recipe.trunk import TrunkCache
from router import (
    GRANULARITIES,
    Place,
    RouterConfig,
    RouterMeta,
    capacity,
    cuts_for,
    deep_layers,
    freeze_all_but_routers,
    load_router_weights,
    official_layers,
    parse_layers,
    quantile_cut,
    read_router_file,
    save_routers,
    set_cuts,
    skipped_places,
    threshold_of,
)
from tokenizer import encode_chat, load_tokenizer

ROOT = Path(__file__).resolve().parent
DEMO_MODEL = os.path.relpath(ROOT / "checkpoints" / "smollm2-135m-instruct")
DEMO_DATA = os.path.relpath(ROOT / "data" / "demo" / "instructions.jsonl")

# What a setting left at `none` means under each recipe.
RECIPES = {
    "default": {"layers": "auto:16", "objective": "ce", "lr": None, "lambda_": 0.0},
    "paper": {"layers": "deep:16", "objective": "ce", "lr": 2e-4, "lambda_": 0.1},
}
FREE = ("out", "save_every", "overwrite", "trunk_gb")  # settings that may differ between a run and its continuation, and do not change the result

INPUT_SAMPLES = 512  # router inputs that stand for all in it
CUT_MEMORY = 0.5  # share of the running cut that a step keeps: more is steadier, but lags while all logits rise
SEARCH_SAMPLES = 96  # examples, at most, on which drop orders are searched
SPEED_CONTEXT = 512  # tokens of the prefill that the summary times


@dataclass
class TrainConfig:
    """Every setting of a run; `none` leaves the choice to the recipe."""

    model: str = field(default=DEMO_MODEL, metadata={"help": "checkpoint folder written by convert_hf.py"})
    data: tuple[str, ...] = field(default=(DEMO_DATA,), metadata={"help": ".jsonl or .json files: messages, alpaca, prompt/response, query/response, conversations, text"})
    out: str = field(default="out/demo", metadata={"help": "folder for routers.safetensors, log.jsonl, summary.json, checkpoint.safetensors"})
    recipe: Literal["default", "paper"] = field(default="default", metadata={"help": "default: measured prior, ridge steps, quantile cut; paper: zero routers, AdamW, penalty"})
    granularity: str = field(default="attn_sequence", metadata={"help": "what a gate turns off, and for what: " + ", ".join(GRANULARITIES)})
    layers: str | None = field(default=None, metadata={"help": "routed layers: auto:N (N cheapest; both_sequence: N sublayers), deep:N (paper), all, or numbers like 3,5,8-12"})
    budget: float = field(default=0.5, metadata={"help": "share of routed (layer, unit) pairs that execute, between 0 and 1; both_sequence: of their compute"})
    objective: Literal["ce", "distill"] | None = field(default=None, metadata={"help": "ce: cross-entropy of the answers; distill: KL to the same model, dense"})
    pool: Literal["prompt", "all"] = field(default="prompt", metadata={"help": "what a sequence router averages over; all: also the answer, as the paper does"})
    kv: Literal["routed", "all"] | None = field(default=None, metadata={"help": "keys and values of skipped tokens; none: all for attn_token and both_token, routed else"})
    max_samples: int | None = field(default=None, metadata={"help": "training examples to use; none: all"})
    max_length: int | None = field(default=None, metadata={"help": "longest example in tokens; none: the model's context"})
    truncate: bool = field(default=False, metadata={"help": "cut longer examples instead of refusing them"})
    heldout: float | str = field(default=0.1, metadata={"help": "held-out share, or file; a file with \"split\" fields decides itself"})
    heldout_samples: int = field(default=64, metadata={"help": "most held-out examples that are scored"})
    chat: Literal["plain", "chatml", "llama3", "mistral"] | None = field(default=None, metadata={"help": "chat form; none: the model's own"})
    batch_size: int = field(default=16, metadata={"help": "examples per step, over all ranks"})
    micro_batch: int = field(default=4, metadata={"help": "examples per forward pass and rank; does not change the result"})
    epochs: float = field(default=0.1, metadata={"help": "passes over the training examples"})
    steps: int | None = field(default=None, metadata={"help": "optimizer steps; none: from epochs"})
    lr: float | None = field(default=None, metadata={"help": "learning rate; default recipe: root mean square of what a step changes in the logits"})
    lambda_: float | None = field(default=None, metadata={"help": "weight of the capacity penalty ReLU(capacity - budget)"})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps with rising learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's decoupled weight decay"})
    clip: float = field(default=1.0, metadata={"help": "greatest gradient norm"})
    cost_samples: int = field(default=24, metadata={"help": "training examples on which costs are measured and (96 at most) drop orders searched"})
    benefit_samples: int = field(default=80, metadata={"help": "training examples whose loss is measured with each layer toggled, unit sequence; 0: none"})
    select_samples: int = field(default=32, metadata={"help": "training examples set aside to choose the best router"})
    calibrate_samples: int = field(default=128, metadata={"help": "those and more training examples whose prompts calibrate the cuts; more: steadier capacity"})
    evaluations: int = field(default=1, metadata={"help": "times during tuning that the router is tried on those; the best is kept"})
    report: tuple[float, ...] = field(default=(), metadata={"help": "more budgets at which the finished routers are compared with their controls"})
    trunk_gb: float = field(default=1.0, metadata={"help": "most disk space (GB, in --out) for activations below the first routed layer, computed once per example; 0: none"})
    save_every: int = field(default=5, metadata={"help": "steps between checkpoints"})
    overwrite: bool = field(default=False, metadata={"help": "begin anew in an --out that holds another run"})
    import_official: str | None = field(default=None, metadata={"help": "router file of the official code: calibrate and write it as ours, without tuning"})
    recalibrate: str | None = field(default=None, metadata={"help": "router file of train.py: calibrate it on these data and write it again, without tuning"})
    seed: int = field(default=1337, metadata={"help": "seed of data order and label samples"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    dtype: str = field(default="auto", metadata={"help": "of the frozen model: auto, float32, bfloat16, float16; routers and losses are float32"})
    compile: bool | None = field(default=None, metadata={"help": "torch.compile each block; none: on CUDA only"})

    def __post_init__(self):
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget is {self.budget}, expected a share between 0 and 1 (both excluded): tune at e.g. --budget=0.5, and the router file "
                             "then serves every budget from 0 to 1")
        least = {"batch_size": 1, "micro_batch": 1, "cost_samples": 1, "select_samples": 1, "calibrate_samples": 1, "heldout_samples": 1, "save_every": 1, "evaluations": 0, "steps": 0,
                 "epochs": 0, "lr": 0, "lambda_": 0, "trunk_gb": 0, "benefit_samples": 0, "max_samples": 2, "max_length": 2}
        for name, bound in least.items():
            if getattr(self, name) is not None and getattr(self, name) < bound:
                raise ValueError(f"{name.rstrip('_')} is {getattr(self, name)}, expected {bound} or more: change --{name.rstrip('_')}")
        if not all(0.0 <= budget <= 1.0 for budget in self.report):
            raise ValueError(f"report is {self.report}, expected shares from 0 to 1: change --report")
        if isinstance(self.heldout, float) and not 0.0 < self.heldout < 1.0:
            raise ValueError(f"heldout is {self.heldout}, expected a share between 0 and 1, or a file: change --heldout")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lr is None:  # many tokens vote on a token router's step, few sequences on a sequence router's
            self.lr = 0.1 if self.granularity.endswith("token") else 0.01
        if self.kv is None:
            self.kv = "all" if self.granularity in ("attn_token", "both_token") else "routed"
        if self.import_official and self.recalibrate:
            raise ValueError("--import_official and --recalibrate each name a router file, expected one: leave one away")
        RouterConfig.of(self.granularity, (0,), pool=self.pool, kv=self.kv)  # raises for an unknown granularity and for kv that it cannot have


# ------------------------------------------------------------------------------------------------------------------- data


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system"}


def to_messages(record: dict, place: str) -> list[dict] | str:
    """A record of any known form as chat messages, or a plain text. Raises ValueError naming the place and what is missing."""
    if "messages" in record or "conversations" in record:
        turns = record.get("messages", record.get("conversations"))
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{place}: messages is not a list of turns; expected [{{\"role\": ..., \"content\": ...}}, ...]: mend the line")
        messages = [{"role": ROLES.get(str(turn.get("role", turn.get("from")))), "content": turn.get("content", turn.get("value"))} for turn in turns]
        for turn, message in zip(turns, messages):
            if message["role"] is None or not isinstance(message["content"], str):
                raise ValueError(f"{place}: a turn has role {turn.get('role', turn.get('from'))!r} and content of type {type(message['content']).__name__}; "
                                 f"expected a role of {', '.join(ROLES)} and a text: mend the line")
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{place}: no turn of the assistant, so there is nothing to predict: add the answer or delete the line")
        return messages
    for ask, answer in (("instruction", "output"), ("prompt", "response"), ("query", "response")):
        if isinstance(record.get(ask), str) and isinstance(record.get(answer), str):
            more = record.get("input") if ask == "instruction" else None
            return [{"role": "user", "content": record[ask] + (f"\n\n{more}" if more else "")}, {"role": "assistant", "content": record[answer]}]
    if isinstance(record.get("text"), str):
        return record["text"]
    raise ValueError(f"{place} has the keys {sorted(record)}; expected messages, conversations, instruction + output, prompt + response, "
                     "query + response, or text: convert the line")


def encode(record: dict, place: str, tok, *, chat: str | None, limit: int, truncate: bool) -> Example | None:
    """Tokens, prompt length and targets of one record; None when truncation leaves nothing to predict. Raises ValueError naming the place."""
    content = to_messages(record, place)
    if isinstance(content, str):  # text without a prompt: its first half is what the router may see, its second half is predicted
        ids = tok.encode(content, bos=tok.adds_bos)
        targets = list(range(max(1, len(ids) // 2), len(ids)))
    else:
        try:
            ids, mask = encode_chat(tok, content, form=chat)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        targets = [i for i, carries in enumerate(mask) if carries and i > 0]
    if not targets:
        raise ValueError(f"{place}: no loss-carrying token among {len(ids)}; expected an answer that is not empty: mend or delete the line")
    if len(ids) > limit:
        if not truncate:
            raise ValueError(f"{place}: {len(ids):,} tokens, expected at most {limit:,}: raise --max_length (up to the model's context), cut examples "
                             "with --truncate, or delete the line")
        ids, targets = ids[:limit], [i for i in targets if i < limit]
        if not targets:
            return None
    return Example(ids, targets[0], targets)


def load_data(cfg: TrainConfig, tok, context: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Training, selection and held-out examples. Held-out ones come from a file, from "split" fields, or from a seeded draw; the
    selection set is taken out of the training examples. Every record is checked; only those in use are encoded."""
    limit = min(cfg.max_length or context, context)
    if (cfg.max_length or 0) > context:
        raise ValueError(f"max_length is {cfg.max_length:,}, expected at most the model's context of {context:,} tokens: lower --max_length")
    records = [pair for path in cfg.data for pair in runtime.read_records(path)]
    for place, record in records:
        to_messages(record, place)
    shuffled = [records[i] for i in permutation(len(records), cfg.seed, "split")]
    if isinstance(cfg.heldout, str):
        train, held = shuffled, runtime.read_records(cfg.heldout)
    elif any("split" in record for _, record in records):
        train, held = ([p for p in shuffled if (p[1].get("split") == "heldout") == side] for side in (False, True))
    else:
        n_held = max(1, round(cfg.heldout * len(records)))
        train, held = shuffled[n_held:], shuffled[:n_held]
    train, held = train[:cfg.max_samples], held[:cfg.heldout_samples]
    if len(train) < 2 or not held:
        raise ValueError(f"{len(train)} training and {len(held)} held-out examples, expected at least 2 and 1: add data or change --heldout, --max_samples")
    n_select = min(cfg.select_samples, max(1, len(train) // 4))
    sets = [[encode(record, place, tok, chat=cfg.chat, limit=limit, truncate=cfg.truncate) for place, record in part]
            for part in (train[n_select:], train[:n_select], held)]
    dropped = sum(example is None for part in sets for example in part)
    cut = sum(example is not None and len(example.tokens) == limit for part in sets for example in part)
    train, select, held = ([example for example in part if example is not None] for part in sets)
    if not (train and select and held):
        raise ValueError(f"--max_length={limit} leaves no answer in the training, selection or held-out examples: raise it")
    tokens = sum(len(example.tokens) for example in train)
    runtime.print0(f"data: {len(train)} examples to tune on ({tokens:,} tokens), {len(select)} to select, {len(held)} held out; "
                   f"{cut} at the limit of {limit:,} tokens, {dropped} dropped because no answer was left")
    return train, select, held


def global_batch(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Examples of one step, over all ranks: a stream of seeded permutations, so a pure function of its arguments."""
    epochs = {}
    rows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch = place // n
        if epoch not in epochs:
            epochs[epoch] = permutation(n, seed, "epoch", epoch)
        rows.append(epochs[epoch][place % n])
    return rows


# ------------------------------------------------------------------------------------------------- loss, budget, schedule


def lr_at(step: int, steps: int, lr: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return lr * (step + 1) / rising
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ----------------------------------------------------------------------------------------------------------------- tuning


class Student(nn.Module):
    """What DistributedDataParallel wraps: one routed pass that computes everything and multiplies by the gates."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, x: torch.Tensor):
        return states(self.model, batch, route="mask", x=x, first_layer=self.model.routing.places[0].layer)


@dataclass
class State:
    """What a checkpoint keeps beside tensors. The order of data is a function of (seed, step), so there is no generator state."""

    step: int = 0
    cut: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the whole run so far
    step_seconds: float = 0.0  # of its optimizer steps
    places: list[list] = field(default_factory=list)  # where routers stand: (layer, target, expert)
    orders: dict[str, list[int]] = field(default_factory=dict)  # orders of the static lists, as numbers of places


class Tuner:
    """Model, data, optimizer and state of one run."""

    def __init__(self, cfg: TrainConfig, rt: runtime.Runtime, model: Transformer, train: list[Example], select: list[Example], held: list[Example] = ()):
        self.cfg, self.rt, self.model, self.train, self.select, self.held = cfg, rt, model, train, select, list(held)
        self.steps = 0 if cfg.import_official or cfg.recalibrate else cfg.steps if cfg.steps is not None else math.ceil(cfg.epochs * len(train) / cfg.batch_size)
        self.state, self.begun = State(), time.perf_counter()
        self.inputs: torch.Tensor | None = None  # (R,N,D) router inputs that RidgeDescent measures its steps on

    # ------------------------------------------------------------------------------------------------------- beginnings

    def begin(self) -> None:
        """Choose the routed layers, find the orders of the static controls, and set the routers' first weights."""
        cfg, model, state = self.cfg, self.model, self.state
        if cfg.import_official:
            if cfg.granularity.startswith("both"):
                raise ValueError(f"granularity is {cfg.granularity!r} with --import_official; the official code has one router per layer: name what it gated")
            tensors = read_router_file(cfg.import_official, official=True)[0]
            self.route(RouterConfig.of(cfg.granularity, official_layers(tensors)).places)
            load_router_weights(cfg.import_official, model, tensors, model.routing)
            self.ready()
            self.search_orders(self.measure()[0])
            return
        if cfg.recalibrate:  # the model came with its routers
            freeze_all_but_routers(model)
            state.places, names = list(map(list, model.routing.places)), model.routing.names
            orders = read_router_file(cfg.recalibrate)[1].orders
            state.orders = {name: [names.index(place) for place in order] for name, order in orders.items()}
            self.ready()
            if not orders:
                self.search_orders(self.measure()[0])
            return
        kind, chosen = parse_layers(cfg.layers, model.config.n_layers)
        layers = list(range(model.config.n_layers)) if kind == "auto" else list(deep_layers(chosen, model.config.n_layers) if kind == "deep" else chosen)
        self.route(RouterConfig.of(cfg.granularity, layers).places)
        costs, inputs = self.measure()
        if kind == "auto":
            kept = sorted((typical_costs(costs) / model.place_weights()).argsort()[:chosen].tolist())
            costs, inputs = costs[kept], inputs[kept]
            self.route(model.routing.at(kept).places)
        if cfg.recipe == "default":
            self.inputs = inputs[:, permutation(inputs.shape[1], cfg.seed, "inputs")[:INPUT_SAMPLES]]
        self.ready()
        self.search_orders(costs)
        if cfg.recipe == "default":
            self.first_routers(costs, inputs)

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fisher costs (R,N) and router inputs (R,N,D) of the first training examples."""
        costs, inputs = measure_costs(self.model, self.train[:self.cfg.cost_samples], self.rt, self.cfg.seed)
        runtime.print0("cost of skipping, in nats: " + ", ".join(f"{place}: {cost:.3g}" for place, cost in zip(self.model.routing.names, typical_costs(costs).tolist())))
        return costs, inputs

    def search_orders(self, costs: torch.Tensor) -> None:
        """Find the drop orders of the static controls, as deep as the budgets in question go."""
        cfg, model, rt = self.cfg, self.model, self.rt
        prices = typical_costs(costs) / model.place_weights()
        examples = self.train[:min(cfg.cost_samples, SEARCH_SAMPLES)]
        depth = 1 - min((cfg.budget, *cfg.report))
        self.state.orders = {"greedy": greedy_order(model, examples, rt, prices.tolist(), depth, self.trunk), "fisher": prices.argsort().tolist(),
                             "similarity": similarity_order(model, examples, rt)}
        for name, order in self.state.orders.items():
            runtime.print0(f"first to skip, {name}: " + ", ".join(model.routing.names[place] for place in order))

    def first_routers(self, costs: torch.Tensor, inputs: torch.Tensor) -> None:
        """Start from the best static order, as routers that say the same of everyone, or, where the selection set loses less, from routers fitted
        to what each layer is worth to each sequence beside that order; unit token: to each token's Fisher cost, alone or mixed with the order."""
        cfg, model, rt, state = self.cfg, self.model, self.rt, self.state
        sets = {name: skipped_places(order, model.place_weights(), 1 - cfg.budget) for name, order in state.orders.items()}
        losses = {name: self.controls.loss(skipped) for name, skipped in sets.items()}
        best = min(losses, key=losses.get)
        runtime.print0("selection loss of static orders: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        static = ranks_of(state.orders[best])[:, None].expand(-1, inputs.shape[1])  # (R,N)
        starts = {f"static ({best})": order_prior(static, inputs)}
        if model.routing.unit == "token":
            fisher = token_prior(costs, inputs)
            starts |= {"fisher": fisher, "fisher + static": fisher + 0.3 * starts[f"static ({best})"]}
        elif cfg.benefit_samples:
            benefits, seen = measure_benefits(model, self.train[:cfg.benefit_samples], rt, sets[best], self.trunk, cfg.objective == "distill")
            starts["benefits"] = benefit_prior(benefits, seen, model.place_weights())
        tried = {}
        for name, weights in starts.items():
            self.put(weights)
            tried[name] = self.try_out()
        runtime.print0("selection loss of starts: " + ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items()))
        self.put(self.best)
        if not cfg.evaluations:
            state.best_loss = math.inf  # nothing is tried later: the last routers are taken
        state.cut = settle(model, self.select, rt, cfg.budget)

    def route(self, places) -> None:
        """Put a fresh router at exactly these places."""
        unit = self.cfg.granularity.split("_")[1]
        self.model.add_routers(RouterConfig(tuple(Place(*place) for place in places), unit, self.cfg.pool, self.cfg.kv))
        freeze_all_but_routers(self.model)
        self.state.places = list(map(list, self.model.routing.places))

    def ready(self) -> None:
        """Build what stands on the routers: optimizer, distributed wrapper, activations cache."""
        self.weights = [router.weight for router in self.model.routers()]
        self.best = self.stacked()
        self.counts = self.model.place_weights().float().to(self.rt.device)  # (R,)
        self.trunk = TrunkCache(Path(self.cfg.out) / "trunk" / f"rank{self.rt.rank}.bin", self.model, self.train + self.select + self.held,
                                self.cfg.trunk_gb * 1e9 / self.rt.world_size)
        self.controls = Controls(self.model, self.select, self.rt, self.trunk)
        if self.inputs is not None:
            self.optimizer = RidgeDescent(self.weights, self.inputs, self.cfg.lr, self.counts)
        else:
            self.optimizer = torch.optim.AdamW(self.weights, weight_decay=self.cfg.weight_decay)
            for w in self.weights:  # as AdamW makes them at its first step; a resumed run overwrites them
                self.optimizer.state[w] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        self.student = Student(self.model)
        if dist.is_initialized():  # every rank read the same files, so nothing is sent but the routers' gradients
            self.student = DistributedDataParallel(self.student, broadcast_buffers=False, init_sync=False)

    def compiled(self) -> bool:
        return self.rt.device.type == "cuda" if self.cfg.compile is None else self.cfg.compile

    def stacked(self) -> torch.Tensor:
        return torch.cat([w.detach() for w in self.weights]).clone()  # R x (1,D) -> (R,D)

    def put(self, weights: torch.Tensor) -> None:
        for w, values in zip(self.weights, weights):
            w.data.copy_(values[None])

    # -------------------------------------------------------------------------------------------------------- one step

    def step(self) -> dict:
        """One optimizer step on one global batch. Its result depends neither on the number of ranks nor on micro_batch, but for rounding."""
        cfg, rt, model, state = self.cfg, self.rt, self.model, self.state
        whole = sorted((self.train[i] for i in global_batch(len(self.train), cfg.batch_size, cfg.seed, state.step)), key=lambda e: -len(e.tokens))
        places = list(range(len(whole)))[rt.rank::rt.world_size]
        micros = [places[i:i + cfg.micro_batch] for i in range(0, len(places), cfg.micro_batch)]
        n_targets = sum(len(e.targets) for e in whole)
        units = n_units(model.routing, [len(e.tokens) for e in whole])
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(state.step, self.steps, cfg.lr, cfg.warmup)

        # The penalty's gradient is lambda * d capacity where the capacity of the whole global batch exceeds the budget, else nothing. One
        # forward pass knows that capacity before its backward pass; several need a pass of their own that only counts.
        over = self.capacity(whole, micros, units) > cfg.budget if cfg.lambda_ and len(micros) > 1 else None
        loss, opened, logits = torch.zeros((), device=rt.device), torch.zeros((), device=rt.device), []
        for micro in micros:
            last = micro is micros[-1]
            with contextlib.nullcontext() if last or rt.world_size == 1 else self.student.no_sync():
                batch = collate([whole[i] for i in micro], rt.device, 64 if self.compiled() else 1)
                x = self.trunk(model, [whole[i] for i in micro], batch)
                h, gates, z = self.student(batch, x)
                teacher = None
                if cfg.objective == "distill":
                    with torch.no_grad():
                        teacher = states(model, batch, route="off", x=x, first_layer=model.routing.places[0].layer)[0]
                # gradients are averaged over ranks by the wrapper, hence the factor world_size on what is a sum
                part, gradient = head_gradient(model, h, batch.labels, teacher, scale=rt.world_size / n_targets)
                roots, gradients = [h], [gradient]
                if cfg.lambda_:
                    if over is None:
                        over = sum_over_ranks(self.opened(gates), rt).item() / units > cfg.budget
                    roots.append(gates)
                    gradients.append((cfg.lambda_ * over * rt.world_size / units * self.counts).view(-1, *[1] * (gates.dim() - 1)).expand_as(gates))
                torch.autograd.backward(roots, gradients)
            loss += part
            opened += self.opened(gates)
            logits.append((micro[0], real_logits(z, batch.lengths)))
        norm = torch.nn.utils.clip_grad_norm_(self.weights, cfg.clip)
        loss, opened = sum_over_ranks(torch.stack([loss, opened]), rt).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise ValueError(f"step {state.step}: loss {loss}, gradient norm {norm.item()}; expected finite numbers: lower --lr, or use --dtype=float32")
        rise = self.optimizer.step()
        self.optimizer.zero_grad()
        if cfg.recipe == "default":
            cut = quantile_cut(torch.cat(collect(logits, rt), dim=1), cfg.budget, self.counts.cpu())
            state.cut = (CUT_MEMORY * state.cut + (1 - CUT_MEMORY) * cut if math.isfinite(cut) else state.cut) + rise
            set_cuts(model, state.cut)
        state.step += 1
        state.tokens += sum(len(e.tokens) for e in whole)
        lengths = [len(e.tokens) for e in whole]
        return {"loss": loss / n_targets, "capacity": opened / units, "lr": lr_at(state.step - 1, self.steps, cfg.lr, cfg.warmup), "grad_norm": norm.item(),
                "tokens": sum(lengths), "flops": step_flops(model.config, model.routing.places[0].layer, lengths, n_targets, cfg.objective == "distill")}

    def opened(self, gates: torch.Tensor) -> torch.Tensor:
        """How many units of gates (R,B) or (R,B,T) execute, on average over places by what they count."""
        return (gates.detach().flatten(1).sum(dim=1) * self.counts).sum()

    @torch.no_grad()
    def capacity(self, whole: list[Example], micros: list[list[int]], units: int) -> float:
        """Capacity of the whole global batch, over all accumulation steps and ranks, before any gradient."""
        opened = torch.zeros((), device=self.rt.device)
        for micro in micros:
            batch = collate([whole[i] for i in micro], self.rt.device, 64 if self.compiled() else 1)
            opened += self.opened(states(self.model, batch, route="mask")[1])
        return sum_over_ranks(opened, self.rt).item() / units

    # ------------------------------------------------------------------------------------------- selection and checkpoint

    def try_out(self) -> float:
        """Loss on the selection set at exactly the budget; keeps the weights if they are the best so far."""
        if not hasattr(self, "teacher"):
            self.teacher = dense_states(self.model, self.select, self.rt) if self.cfg.objective == "distill" else None
        settle(self.model, self.select, self.rt, self.cfg.budget)
        loss = evaluate(self.model, self.select, self.rt, route="gather", teacher=self.teacher, trunk=self.trunk)["loss"]
        set_cuts(self.model, self.state.cut)
        if loss < self.state.best_loss:
            self.state.best_loss, self.state.best_step, self.best = loss, self.state.step, self.stacked()
        return loss

    def identity(self) -> dict:
        """What a continuation must agree on: settings, base model and data."""
        settings = {k: v for k, v in asdict(self.cfg).items() if k not in FREE}
        digest = hashlib.sha256(json.dumps([[e.tokens, e.targets] for e in self.train + self.select]).encode()).hexdigest()[:16]
        return json.loads(json.dumps({**settings, "base fingerprint": self.model.fingerprint, "data digest": digest}))

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically: routers, best routers, the optimizer's moments, and State as JSON."""
        moments = [self.optimizer.state[w] for w in self.weights]
        tensors = {"weights": self.stacked(), "best": self.best, **{name: torch.stack([m[name] for m in moments]) for name in moments[0]}}
        if self.inputs is not None:
            tensors["inputs"] = self.inputs
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                    metadata={"state": json.dumps(asdict(self.state)), "identity": json.dumps(self.identity())})
        runtime.write_atomic(path, lambda p: p.write_bytes(data))

    def restore(self, path: Path) -> None:
        """Take up a checkpoint; refused, naming every setting that differs, when it belongs to another run."""
        try:
            with safe_open(path, framework="pt") as file:
                saved = {key: json.loads(file.metadata()[key]) for key in ("state", "identity")}
                state = State(**saved["state"])
                # cloned: mapped tensors begin at any address, and the last bit of a product depends on it
                tensors = {name: file.get_tensor(name).clone().to(self.rt.device) for name in file.keys()}
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as a checkpoint ({error!r}): delete it, or begin anew with --overwrite") from None
        refuse_other(path.parent, saved["identity"], self.identity())
        self.state = state
        self.begun = time.perf_counter() - self.state.seconds
        self.route(self.state.places)
        self.inputs = tensors.get("inputs")
        self.ready()
        self.put(tensors["weights"])
        self.best = tensors["best"]
        for i, w in enumerate(self.weights):
            for name, moment in self.optimizer.state[w].items():
                moment.copy_(tensors[name][i])
        set_cuts(self.model, self.state.cut)


def refuse_other(out: Path, saved: dict, now: dict) -> None:
    """Raise ValueError naming every setting in which a run differs from the one that lies in its folder."""
    differing = [f"{name} ({saved.get(name)!r} there, {now.get(name)!r} now)" for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    if differing:
        raise ValueError(f"{out} holds a run with other settings: {', '.join(differing)}; expected the same ones to go on: give another --out, "
                         "or --overwrite to begin anew")


def tune(tuner: Tuner, out: Path) -> None:
    """All steps that are left, each with a line in OUT/log.jsonl, and checkpoints between them."""
    cfg, rt, state = tuner.cfg, tuner.rt, tuner.state
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    tries = {round(tuner.steps * i / cfg.evaluations) for i in range(cfg.evaluations + 1)} if cfg.recipe == "default" and cfg.evaluations else set()
    if rt.is_master:  # what a killed run left: half-written files, and lines after the checkpoint, whose steps are done again
        for path in out.glob(".*.tmp"):
            path.unlink()
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= state.step] if log.exists() else []
        runtime.write_atomic(log, lambda p: p.write_text("".join(line + "\n" for line in lines)))
    if state.step == 0 and 0 in tries and state.best_loss == math.inf:
        runtime.print0(f"before tuning: selection loss {tuner.try_out():.4f}")
    if state.step == 0 and rt.is_master:
        tuner.save(checkpoint)
    if tuner.compiled():  # only steps run compiled: what is measured before them looks into the blocks
        for block in tuner.model.layers:
            block.compile(fullgraph=True)
    peak = runtime.peak_flops(runtime.device_name(rt.device))
    peak = peak * rt.world_size if peak else None
    loop_started, first_step = time.perf_counter(), state.step
    while state.step < tuner.steps:
        started = time.perf_counter()
        row = tuner.step()
        seconds = time.perf_counter() - started
        state.step_seconds += seconds
        tried = tuner.try_out() if state.step in tries else None
        state.seconds = time.perf_counter() - tuner.begun
        rate, flops = row.pop("tokens") / seconds, row.pop("flops") / seconds
        mfu = flops / peak if peak else None
        left = (time.perf_counter() - loop_started) / (state.step - first_step) * (tuner.steps - state.step)
        row = {"step": state.step, **row, "budget": cfg.budget, "cut": state.cut, "select_loss": tried, "milliseconds": seconds * 1e3, "tokens_per_second": rate,
               "mfu": mfu}
        runtime.print0(f"iter {state.step}/{tuner.steps} | loss {row['loss']:.4f} | kept {row['capacity']:.3f} (budget {cfg.budget:.3f}) | lr {row['lr']:.1e} | "
                       f"gnorm {row['grad_norm']:.2e} | {seconds * 1e3:,.0f} ms | {rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | "
                       f"eta {left / 60:.1f}m"
                       + (f" | selection loss {tried:.4f}{' (best)' if state.best_step == state.step else ''}" if tried is not None else ""))
        if rt.is_master:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            if state.step % cfg.save_every == 0 or state.step == tuner.steps:
                tuner.save(checkpoint)


# ---------------------------------------------------------------------------------------------------------------- summary


@torch.no_grad()
def measure_prefill(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> dict:
    """Measured and possible speed-up of prompts that were not seen before, `gather` against `off`, each timed in turn: kernels meet new shapes, as they
    do in use. The ceiling is the ratio of FLOPs for the routes taken."""
    stream = [token for example in examples for token in example.tokens]
    length, trials = min(SPEED_CONTEXT, model.config.max_seq_len), 6
    stream *= length * trials // len(stream) + 1
    seconds, shares = {"off": [], "gather": []}, []
    for trial in range(trials):
        tokens = torch.tensor([stream[trial * length:(trial + 1) * length]], device=rt.device)  # (1, T)
        for route, times in seconds.items():
            runtime.synchronize(rt.device)
            started = time.perf_counter()
            h, gates = model.hidden(tokens, route=route, cache=KVCache(model, 1, length))
            model.head(h[:, -1:])
            runtime.synchronize(rt.device)
            if trial:  # the first one warms up
                times.append(time.perf_counter() - started)
        if trial:
            shares.append(gates.flatten(1).mean(1))  # (R,1) or (R,1,T) -> (R,)
    shares = torch.stack(shares).mean(0)  # (R,)
    speedup = statistics.median(off / gather for off, gather in zip(seconds["off"], seconds["gather"]))
    ceiling = prefill_flops(model.config, length) / routed_flops(model.config, model.routing, shares.tolist(), length, logits=1)
    return {"prefill_speedup": speedup, "prefill_ceiling": ceiling, "prefill_context": length,
            "prefill_capacity": capacity(shares[:, None], weights=model.place_weights()).item()}


def finish(tuner: Tuner, out: Path) -> dict:
    """Calibrate, write the router file, measure on held-out examples, write the summary and return it."""
    cfg, rt, model, state = tuner.cfg, tuner.rt, tuner.model, tuner.state
    if cfg.recipe == "default" and state.best_loss < math.inf:
        tuner.put(tuner.best)
    calibration = [*tuner.select, *reversed(tuner.train)][:max(cfg.calibrate_samples, len(tuner.select))]  # last first: the least fitted ones
    table = calibrate(model, calibration, rt, cfg.budget, tuner.controls, state.orders if cfg.recipe == "default" and not cfg.import_official else None)
    for anchor, name in table["static"].items():
        if anchor in ANCHORS:
            runtime.print0(f"calibration: around budget {anchor:g} the static order {name} loses less on the selection set than the routers, and stands in the table")
    cuts = [0.0] * len(tuner.weights) if cfg.recipe == "paper" or cfg.import_official else cuts_for(cfg.budget, table)
    path = out / "routers.safetensors"
    if rt.is_master:
        settings = {k: v for k, v in asdict(cfg).items() if k not in FREE}
        names = model.routing.names
        save_routers(path, model, RouterMeta(
            model.routing, [threshold_of(cut) for cut in cuts], model.fingerprint, table, cfg.recipe,
            state.best_step if cfg.recipe == "default" else state.step, settings,
            {name: [names[place] for place in order] for name, order in state.orders.items()}))
    controls, rows = Controls(model, tuner.held, rt, tuner.trunk), []
    for budget in (*(b for b in cfg.report if b != cfg.budget), cfg.budget):  # its own last: the speed below is of that route
        set_cuts(model, cuts if budget == cfg.budget else cuts_for(budget, table))
        rows.append(controls.row(budget, state.orders))
        runtime.print0(f"held out at budget {budget:.3f}: capacity {rows[-1]['capacity']:.3f}, loss {rows[-1]['routed']:.4f}")
    own = rows[-1]
    speed = measure_prefill(model, tuner.held, rt) if rt.is_master else {}
    summary = {
        "heldout_loss_dense": own["dense"], "heldout_loss_routed": own["routed"], "heldout_loss_static": min(own[name] for name in state.orders),
        "heldout_tokens": sum(len(e.targets) for e in tuner.held), "capacity": own["capacity"], "budget": cfg.budget, "capacity_per_layer": own["capacity_per_layer"],
        "granularity": cfg.granularity, "layers": [name if "." in name else int(name) for name in model.routing.names], "kv": cfg.kv, "recipe": cfg.recipe,
        "objective": cfg.objective,
        "steps": state.step, "best_step": state.best_step, "tokens_per_second": state.tokens / state.step_seconds if state.step else 0.0,
        **speed, "peak_memory_bytes": runtime.peak_memory_bytes(rt.device), "device": runtime.device_name(rt.device), "routers": str(path),
        "seconds": time.perf_counter() - tuner.begun, "report": sorted(rows, key=lambda row: row["budget"]), "identity": tuner.identity(),
    }
    if rt.is_master:
        runtime.write_json(out / "summary.json", summary)
    return summary


def show(summary: dict) -> str:
    """The summary in words."""
    s = summary
    layers = ", ".join(f"{layer}: {share:.2f}" for layer, share in zip(s["layers"], s["capacity_per_layer"]))
    columns = ("dense", "routed", "greedy", "fisher", "similarity", "mean_route", "random")
    lines = [f"{row['budget']:6.3f} {row['capacity']:8.3f} {row['ceiling']:8.3f} " + " ".join(f"{row[name]:10.4f}" for name in columns)
             + f"{'n/a' if row['gap_closed'] is None else format(row['gap_closed'], '.0%'):>11}" for row in s["report"]]
    head = f"{'budget':>6} {'capacity':>8} {'ceiling':>8} " + " ".join(f"{name.replace('_', ' '):>10}" for name in columns) + " gap closed"
    return f"""
{s["granularity"]}, recipe {s["recipe"]}, {s["steps"]} steps, {s["tokens_per_second"]:,.0f} tok/s, {s["seconds"]:,.0f} s in all, peak {s["peak_memory_bytes"] / 2**20:,.0f} MiB on {s["device"]}
held-out loss on {s["heldout_tokens"]:,} answer tokens, routers beside their controls at equal capacity (greedy, fisher, similarity: layers dropped for everyone)
{head}
{chr(10).join(lines)}
capacity by layer  {layers}
prefill            {s["prefill_speedup"]:.3f}x of dense at {s["prefill_context"]} tokens, batch 1, capacity {s["prefill_capacity"]:.2f} there; FLOPs allow {s["prefill_ceiling"]:.3f}x
routers            {s["routers"]}"""


def finished(out: Path, identity: dict) -> dict | None:
    """The summary of a finished run of these settings in `out`; None when there is none. Refuses the summary of another run."""
    if not (out / "summary.json").exists() or not (out / "routers.safetensors").exists():
        return None
    summary = runtime.read_json(out / "summary.json")
    refuse_other(out, summary.get("identity", {}), identity)
    return summary


def train(cfg: TrainConfig) -> dict:
    """Run or continue what `cfg` says; returns the summary."""
    rt, out = runtime.setup(cfg.device, cfg.dtype, cfg.seed), Path(cfg.out)
    if cfg.model == DEMO_MODEL and not (Path(DEMO_MODEL) / "config.json").exists():
        if rt.is_master:
            from data.demo.prepare import prepare
            prepare(DEMO_MODEL)
        wait_for_all(rt)
    config = load_config(cfg.model)
    if not cfg.import_official:
        parse_layers(cfg.layers, config.n_layers)  # a wrong setting is told before anything is loaded
    if cfg.batch_size % rt.world_size:
        raise ValueError(f"batch_size is {cfg.batch_size} on {rt.world_size} ranks, expected a multiple: change --batch_size or the number of ranks")
    train_set, select, held = load_data(cfg, load_tokenizer(cfg.model), config.max_seq_len)
    model = load_model(cfg.model, routers=cfg.recalibrate, device=rt.device, dtype=rt.dtype)
    if cfg.recalibrate:
        routing = model.routing
        cfg = replace(cfg, granularity=routing.granularity, layers=",".join(map(str, routing.layers)), pool=routing.pool, kv=routing.kv)
    tuner = Tuner(cfg, rt, model, train_set, select, held)
    checkpoint = out / "checkpoint.safetensors"
    if cfg.overwrite and rt.is_master:
        for name in ("checkpoint.safetensors", "routers.safetensors", "summary.json", "log.jsonl"):
            (out / name).unlink(missing_ok=True)
    wait_for_all(rt)
    summary, begun = finished(out, tuner.identity()), checkpoint.exists()
    wait_for_all(rt)  # from here on the master writes
    if summary:
        runtime.print0(f"{out} holds this run, finished: nothing to do (--overwrite begins anew)")
        return summary
    if begun:
        tuner.restore(checkpoint)
        runtime.print0(f"going on from step {tuner.state.step} of {tuner.steps} in {checkpoint}")
    else:
        tuner.begin()
    describe(tuner)
    tune(tuner, out)
    return finish(tuner, out)


def describe(tuner: Tuner) -> None:
    """Print each decision that was derived from the settings, once."""
    cfg, rt, model = tuner.cfg, tuner.rt, tuner.model
    trainable, total = sum(w.numel() for w in tuner.weights), sum(p.numel() for p in model.parameters())
    runtime.print0(f"device: {runtime.device_name(rt.device)} x {rt.world_size}, base in {str(rt.dtype).removeprefix('torch.')}, compile {tuner.compiled()}")
    runtime.print0(f"parameters: {trainable:,} trainable (routers, float32), {total - trainable:,} frozen; base fingerprint {model.fingerprint}")
    runtime.print0(f"routed layers: {', '.join(model.routing.names)} of {model.config.n_layers}; {cfg.granularity}, pool {cfg.pool}, kv {cfg.kv}; "
                   f"budget {cfg.budget}")
    runtime.print0(f"steps: {tuner.steps} of {cfg.batch_size} examples ({cfg.batch_size // rt.world_size} a rank, {cfg.micro_batch} at a time); "
                   f"recipe {cfg.recipe}, objective {cfg.objective}, lr {cfg.lr}, lambda {cfg.lambda_}")


def main() -> None:
    cfg = runtime.cli(TrainConfig)
    summary = train(cfg)
    if "prefill_speedup" in summary:  # the master's
        print(show(summary))
        if isinstance(cfg.heldout, str):
            held = f"--perplexity={cfg.heldout}"
        elif any("split" in record for _, record in runtime.read_records(cfg.data[0])):
            held = f"--perplexity={cfg.data[0]} --perplexity_split=heldout"
        else:
            held = "--tasks=arc_easy --data=data/eval"
        print(f"next               python eval.py --model={cfg.model} --routers={summary['routers']} {held}")
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
