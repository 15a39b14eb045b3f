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
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.parallel import DistributedDataParallel

import runtime
from model import KVCache, Transformer, load_config, load_model, pad
from recipe.cost import Executed, prefill_flops, step_flops
from router import (GRANULARITIES, Place, RouterConfig, RouterMeta, capacity, cuts_for, deep_layers, freeze_all_but_routers, load_router_weights,
                    mean_order, official_layers, parse_layers, quantile_cut, quantile_cuts, random_route, read_router_file, save_routers, set_cuts,
                    skipped_places, skipped_shares, threshold_of)
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

EVAL_BATCH = 8  # rows per forward pass where nothing is learnt
LOGITS_AT_ONCE = 2**22  # logits held at a time, 16 MiB in fp32 (on a GPU 16 times that): the head and its loss run over blocks of rows
COST_ROWS = 2  # rows per pass where costs are measured: its graph spans all routed layers
LABEL_SAMPLES = 2  # labels drawn from the model per token when costs are measured
COST_TOKENS = 2048  # tokens whose inputs and costs fit the token routers
STEP_RIDGE = 1.0  # strength of the ridge in the default recipe's steps, in mean eigenvalues of the inputs' covariance
PRIOR_RIDGE = 1.0  # and where routers are fitted in closed form, in variances of the inputs
MOMENTUM = 0.9  # of the same
INPUT_SAMPLES = 512  # router inputs that stand for all in it
CUT_MEMORY = 0.5  # share of the running cut that a step keeps: more is steadier, but lags while all logits rise
SEARCH_SAMPLES = 96  # examples, at most, on which drop orders are searched
TRIES = 3  # layers that a round of the greedy search measures at most (the first round twice as many)
BUDGETS = [round(i * 0.0125, 4) for i in range(81)]  # entries of the calibration table
PASSES = 9  # routes that calibration runs to fill it
ANCHORS = (0.25, 0.5, 0.75)  # budgets at which it compares the routers with the static order
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


@dataclass(frozen=True)
class Example:
    """One whole document. `prompt`: tokens before the first loss-carrying one; `targets`: positions whose token is predicted."""

    tokens: list[int]
    prompt: int
    targets: list[int]


@dataclass
class Batch:
    """Right-padded rows. `at` (n,) picks, from (B*T), the positions that predict `labels` (n,)."""

    tokens: torch.Tensor
    lengths: list[int]
    prompts: list[int]
    at: torch.Tensor
    labels: torch.Tensor


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


def generator(*key) -> torch.Generator:
    """A random generator that depends on the key alone: no state to save, the same on every rank."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def permutation(n: int, *key) -> list[int]:
    return torch.randperm(n, generator=generator(*key)).tolist()


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


def collate(examples: list[Example], device: torch.device, multiple: int = 1) -> Batch:
    """Pad on the right to the longest example, rounded up to `multiple` (few shapes for a compiled model)."""
    width = -(-max(len(e.tokens) for e in examples) // multiple) * multiple
    tokens = pad([e.tokens for e in examples], width=width)  # (B, T)
    at = torch.tensor([row * width + i - 1 for row, e in enumerate(examples) for i in e.targets])
    labels = torch.tensor([e.tokens[i] for e in examples for i in e.targets])
    return Batch(tokens.to(device), [len(e.tokens) for e in examples], [e.prompt for e in examples], at.to(device), labels.to(device))


def by_length(examples: list[Example], rows: int) -> list[list[Example]]:
    """Groups of at most `rows` examples of similar length: little padding. The same on every rank."""
    order = sorted(examples, key=lambda e: -len(e.tokens))
    return [order[i:i + rows] for i in range(0, len(order), rows)]


# ------------------------------------------------------------------------------------------------- loss, budget, schedule


def token_losses(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each token (n,), fp32: cross-entropy with labels (n,), or KL(teacher || model) of logits (n,V) where a teacher's are given."""
    if teacher is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)


def head_blocks(model: Transformer, h: torch.Tensor) -> list[slice]:
    """The rows of final states h (n,D), so many at a time that no more than LOGITS_AT_ONCE logits exist; none should outlive its block."""
    size = max(1, LOGITS_AT_ONCE * (1 if h.device.type == "cpu" else 16) // model.config.vocab_size)
    return [slice(a, a + size) for a in range(0, len(h), size)]


@torch.no_grad()
def head_losses(model: Transformer, h: torch.Tensor, labels: torch.Tensor, teacher_h: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of each token (n,) of final states h (n,D)."""
    return torch.cat([token_losses(model.head(h[part]), labels[part], None if teacher_h is None else model.head(teacher_h[part]))
                      for part in head_blocks(model, h)])


def head_gradient(model: Transformer, h: torch.Tensor, labels: torch.Tensor, teacher_h: torch.Tensor | None = None, *,
                  scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of final states h (n,D), and the gradient (n,D) of scale * loss with respect to them."""
    total, gradients = h.new_zeros((), dtype=torch.float32), []
    for part in head_blocks(model, h):
        own = h[part].detach().requires_grad_()
        teacher = None if teacher_h is None else model.head(teacher_h[part]).detach()
        loss = token_losses(model.head(own), labels[part], teacher).sum()
        total += loss.detach()
        gradients.append(torch.autograd.grad(loss * scale, own)[0])
    return total, torch.cat(gradients)


def lr_at(step: int, steps: int, lr: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return lr * (step + 1) / rising
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def ridge(features: torch.Tensor, target: torch.Tensor, strength: float = PRIOR_RIDGE) -> torch.Tensor:
    """Weights w (D,) that minimise |features w - target|^2 + strength * N * variance * |w|^2, in the dual. features (N,D), target (N,).

    variance is the features' mean square about their mean. Along that mean w costs almost nothing, so that it serves as the intercept that a router lacks.
    """
    features = features.double()
    mean = features.mean(dim=0)
    variance = (features - mean).square().sum(dim=1).mean()
    pull = 100.0 ** 0.5 * F.normalize(mean, dim=0)  # (D,): weight along the mean's direction costs a hundredth
    along = features @ pull  # (N,)
    kernel = features @ features.T + along[:, None] * along  # (N, N)
    kernel.diagonal().add_(strength * variance + 1e-9 * kernel.diagonal().mean())
    dual = torch.linalg.solve(kernel, target.double())  # (N,)
    return (features.T @ dual + (along @ dual) * pull).float()


# ------------------------------------------------------------------------------------------------ passes over a data set


def states(model: Transformer, batch: Batch, **kwargs):
    """Final states (n,D) at the positions that predict, gates and logits of one batch. Everything else is left to Transformer.hidden."""
    h, gates, z = model.hidden(batch.tokens, lengths=batch.lengths, prompt_lengths=batch.prompts, return_scores=True, **kwargs)
    return h.flatten(0, 1)[batch.at], gates, z  # (B,T,D) -> (B*T,D) -> (n,D)


def mine(groups: list, rt: runtime.Runtime) -> list[tuple[int, list]]:
    """This rank's share of the groups, numbered. Groups never depend on the number of ranks, only who works on them does."""
    return list(enumerate(groups))[rt.rank::rt.world_size]


def sum_over_ranks(values: torch.Tensor, rt: runtime.Runtime) -> torch.Tensor:
    if rt.world_size > 1:
        dist.all_reduce(values)
    return values


def wait_for_all(rt: runtime.Runtime) -> None:
    if rt.world_size > 1:
        dist.barrier()


def collect(parts: list, rt: runtime.Runtime) -> list:
    """Numbered parts of all ranks, in order of their numbers."""
    if rt.world_size > 1:
        everyone = [None] * rt.world_size
        dist.all_gather_object(everyone, parts)
        parts = [part for rank_parts in everyone for part in rank_parts]
    return [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]


@torch.no_grad()
def evaluate(model: Transformer, examples: list[Example], rt: runtime.Runtime, *, route: str, skipped: tuple[int, ...] | None = None,
             random_at: float | None = None, teacher: dict[int, torch.Tensor] | None = None, trunk: "TrunkCache | None" = None) -> dict:
    """Mean loss per loss-carrying token, and realised capacity in all and by place.

    Instead of the routers: skipped, places that everyone skips (a static list); random_at, the random control at this budget.
    teacher: dense final states by group, as `dense_states` gives them: the loss is then the KL to the dense model.
    """
    n_routed = 0 if model.routing is None or route == "off" else len(model.routing.places)
    sums = torch.zeros(3 + n_routed, dtype=torch.float64, device=rt.device)  # loss, tokens, units, executed units by place
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch, gates = collate(group, rt.device), None
        if skipped is not None:  # (R,B) whatever the unit: a place that everyone skips costs nothing, first tokens and keys included
            gates = torch.ones(n_routed, len(group), device=rt.device)
            gates[list(skipped)] = 0.0
        elif random_at is not None:
            gates = random_gates(model, batch, random_at, number).to(rt.device)
        start = {} if trunk is None or not n_routed else {"x": trunk(model, group, batch), "first_layer": model.routing.places[0].layer}
        h, gates, _ = states(model, batch, route=route, gates=gates, **start)
        sums[0] += head_losses(model, h, batch.labels, None if teacher is None else teacher[number]).sum()
        sums[1] += len(batch.labels)
        if n_routed:
            sums[2] += len(group) if gates.dim() == 2 else sum(batch.lengths)
            sums[3:] += gates.flatten(1).sum(1)  # (R,B) or (R,B,T) -> (R,)
    loss, tokens, units, *executed = sum_over_ranks(sums, rt).tolist()
    shares = [n / units for n in executed]
    return {"loss": loss / tokens, "tokens": int(tokens), "capacity_per_layer": shares,
            "capacity": capacity(torch.tensor(shares)[:, None], weights=model.place_weights()).item() if n_routed else 1.0}


def random_gates(model: Transformer, batch: Batch, budget: float, number: int) -> torch.Tensor:
    """Gates (R,B) or (R,B,T) of the random control for a numbered group of examples."""
    width = batch.tokens.shape[1] if model.routing.unit == "token" else None
    weights = model.place_weights()
    routes = [random_route(weights, budget, generator("random routes", number, row), width) for row in range(len(batch.lengths))]
    return torch.stack(routes, dim=1)


class TrunkCache:
    """Activations (T,D) that enter the first routed layer, by example, in a file of bounded size: they depend on no router, so later epochs,
    trials and runs in the same folder read them instead of computing them. A file of another base, layer, dtype or data set is written anew;
    where the disk has no room nothing is stored."""

    def __init__(self, path: Path, model: Transformer, examples: list[Example], limit: float):
        """limit: bytes; examples beyond it are computed every time. Nothing is stored where no layer stands below the first routed one."""
        weight, first = model.tok_embeddings.weight, model.routing.places[0].layer
        self.place, size = {}, 0  # tokens of an example -> (number, first element)
        for example in examples if first else []:
            key, elements = tuple(example.tokens), len(example.tokens) * model.config.dim
            if key not in self.place and (size + elements) * weight.element_size() <= limit:
                self.place[key] = (len(self.place), size)
                size += elements
        if size:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * size * weight.element_size():  # a mapped file that does not fit kills the process
                self.place, size = {}, 0
        if not size:
            return
        header, done = path.with_suffix(".json"), path.with_suffix(".done")
        digest = hashlib.sha256(json.dumps(list(self.place)).encode()).hexdigest()
        about = {"fingerprint": model.fingerprint, "first_layer": first, "dtype": str(weight.dtype), "tokens": digest}
        if not (header.exists() and path.exists() and done.exists() and runtime.read_json(header) == about):
            for old in (header, path, done):
                old.unlink(missing_ok=True)
            runtime.write_json(header, about)
        self.data = torch.from_file(str(path), shared=True, size=size, dtype=weight.dtype)
        self.done = torch.from_file(str(done), shared=True, size=len(self.place), dtype=torch.uint8)  # set when an example is complete

    @torch.no_grad()
    def __call__(self, model: Transformer, group: list[Example], batch: Batch) -> torch.Tensor:
        """Activations (B,T,D) of a batch, read where all its examples are stored, else computed and stored. Pads hold zeros when read."""
        places = [self.place.get(tuple(example.tokens)) for example in group]
        if any(place is None for place in places):
            return model.trunk(batch.tokens)
        width = model.config.dim
        if all(self.done[number] for number, _ in places):
            x = torch.zeros(*batch.tokens.shape, width, dtype=self.data.dtype)
            for row, ((_, start), length) in enumerate(zip(places, batch.lengths)):
                x[row, :length] = self.data[start:start + length * width].view(length, width)
            return x.to(batch.tokens.device)
        x = model.trunk(batch.tokens)
        for row, ((number, start), length) in enumerate(zip(places, batch.lengths)):
            self.data[start:start + length * width] = x[row, :length].flatten().cpu()
            self.done[number] = 1
        return x


def n_units(routing: RouterConfig, lengths: list[int]) -> int:
    """What one layer decides about: sequences, or their real tokens."""
    return len(lengths) if routing.unit == "sequence" else sum(lengths)


@torch.no_grad()
def dense_states(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> dict[int, torch.Tensor]:
    """Final states (n,D) of the dense model, by group of `evaluate`, for this rank's groups."""
    groups = mine(by_length(examples, EVAL_BATCH), rt)
    return {number: states(model, collate(group, rt.device), route="off")[0] for number, group in groups}


def real_logits(z: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits (R,B) or (R,B,T) of real units as (R,N) on the CPU. A first token's is +inf, since it always executes."""
    if z.dim() == 3:
        z = torch.cat([F.pad(z[:, row, 1:length], (1, 0), value=math.inf) for row, length in enumerate(lengths)], dim=1)  # (R,B,T) -> (R,N)
    return z.detach().cpu()


@torch.no_grad()
def route_logits(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> torch.Tensor:
    """Logits (R,N) of every unit under the current cuts. A sequence decides on its prompt, so only that is run."""
    if model.routing.unit == "sequence" and model.routing.pool == "prompt":
        examples = [Example(e.tokens[:e.prompt], e.prompt, []) for e in examples]
    parts = []
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        tokens = pad([e.tokens for e in group], rt.device)
        lengths = [len(e.tokens) for e in group]
        z = model.hidden(tokens, lengths=lengths, route="gather", return_scores=True)[2]
        parts.append((number, real_logits(z, lengths)))
    return torch.cat(collect(parts, rt), dim=1)


def settle(model: Transformer, examples: list[Example], rt: runtime.Runtime, budget: float, rounds: int = 2) -> float:
    """Set and return the global cut that realises `budget`. Routes change what deeper routers see, hence more than one round."""
    for _ in range(rounds):
        cut = quantile_cut(route_logits(model, examples, rt), budget, model.place_weights())
        set_cuts(model, cut)
    return cut


def calibrate(model: Transformer, examples: list[Example], rt: runtime.Runtime, own: float, controls: "Controls | None" = None,
              orders: dict[str, list[int]] | None = None) -> dict:
    """Table of cuts for every budget in BUDGETS, one for all layers. Deeper logits depend on the route, so the routers run at PASSES cuts: twice
    for the budget `own`, else for the middle of the widest gap between the capacities realised so far; between two of those routes the cuts blend.
    With drop orders, budgets near one of ANCHORS where one loses less than the routers on the controls' examples get its cuts instead (`static`: budget -> its name)."""
    routes = {}  # capacity realised -> the cut for each budget, by the logits of that route
    weights = model.place_weights()

    def blended(budget: float) -> float:
        low = max((realised for realised in routes if realised <= budget), default=min(routes))
        high = min((realised for realised in routes if realised >= budget), default=max(routes))
        a, b = routes[low][budget], routes[high][budget]
        return a if low == high or math.isinf(a) or math.isinf(b) else a + (budget - low) / (high - low) * (b - a)

    for i in range(PASSES):
        if i < 2:
            cut = (-math.inf, math.inf)[i]
        else:
            ends = sorted(routes)
            low, high = max(zip(ends, ends[1:]), key=lambda gap: gap[1] - gap[0])
            wanted = own if i in (2, PASSES - 1) else (low + high) / 2
            cut = blended(min(BUDGETS, key=lambda budget: abs(budget - wanted)))
        set_cuts(model, cut)
        z = route_logits(model, examples, rt)
        dense = z if i == 0 else dense
        routes[capacity((z >= cut).double(), weights=weights).item()] = dict(zip(BUDGETS, quantile_cuts(z, BUDGETS, weights)))
    cuts, cut = {1.0: -math.inf, 0.0: math.inf}, -math.inf
    for budget in reversed(BUDGETS[1:-1]):
        cut = max(cut, blended(budget))  # a smaller budget never has a lower cut
        cuts[budget] = cut
    rows = {budget: [cut] * len(weights) for budget, cut in cuts.items()}
    static = {}
    for anchor in ANCHORS if orders else ():
        set_cuts(model, rows[anchor])
        settle(model, controls.examples, rt, anchor, rounds=1)  # compared at exactly this capacity
        routed = evaluate(model, controls.examples, rt, route="gather", trunk=controls.trunk)["loss"]
        losses = {name: controls.static(order, 1 - anchor) for name, order in orders.items()}
        best = min(losses, key=losses.get)
        if losses[best] < routed:
            static |= {budget: best for budget in rows if min(ANCHORS, key=lambda a: abs(a - budget)) == anchor}
    rows |= {budget: static_cuts(dense, orders[name], budget, weights) for budget, name in static.items()}
    budgets = sorted(rows)
    return {"budgets": budgets, "thresholds": [[threshold_of(cut) for cut in rows[budget]] for budget in budgets], "static": static}


def static_cuts(z: torch.Tensor, order: list[int], budget: float, weights: torch.Tensor) -> list[float]:
    """Cuts (R) that skip the first places of an order for everyone and run the others; a fraction of a place goes by its logits z (R,N)."""
    return [quantile_cut(z[place], 1 - share) for place, share in enumerate(skipped_shares(order, weights, 1 - budget))]


# --------------------------------------------------------------------------------------------------------- measured prior


@contextlib.contextmanager
def inputs_of(modules: list[nn.Module]):
    """A list that collects, for a while, what each of these modules is given, in the order in which they run."""
    given = []
    hooks = [module.register_forward_pre_hook(lambda _, args: given.append(args[0].detach())) for module in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def draw_labels(model: Transformer, h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One label (n,) per final state (n,D), drawn from the model's own distribution by uniform numbers u (n,)."""
    drawn = []
    for part in head_blocks(model, h):
        rising = model.head(h[part].detach()).softmax(-1).cumsum(-1)  # (n', V)
        drawn.append(torch.searchsorted(rising, u[part, None] * rising[:, -1:]).squeeze(1).clamp(max=model.config.vocab_size - 1))
    return torch.cat(drawn)


def measure_costs(model: Transformer, examples: list[Example], rt: runtime.Runtime, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fisher cost (R,N) of skipping each unit, in nats summed over what it predicts, and the router inputs (R,N,D) beside it.

    With labels drawn from the model itself and every gate at 1, E[(d loss / d gate)^2] / 2 is the second-order KL between the model with
    and without that unit. Unit token: a seeded sample of at most COST_TOKENS tokens; first tokens, which always execute, are left out.
    """
    share = -(-COST_TOKENS // len(examples))
    parts, token = [], model.routing.unit == "token"
    for number, group in mine(by_length(examples, 4), rt):
        n_targets = sum(len(e.targets) for e in group)
        draws = [torch.rand(n_targets, generator=generator(seed, "labels", number, sample)).to(rt.device) for sample in range(LABEL_SAMPLES)]
        for first in range(0, len(group), COST_ROWS):
            batch = collate(group[first:first + COST_ROWS], rt.device)
            gates = torch.ones(len(model.routers()), *(batch.tokens.shape if token else batch.tokens.shape[:1]), device=rt.device, requires_grad=True)
            with inputs_of(model.routers()) as inputs:
                h = states(model, batch, route="mask", gates=gates)[0]
            costs, begin = torch.zeros_like(gates), sum(len(e.targets) for e in group[:first])
            for u in draws:
                labels = draw_labels(model, h, u[begin:begin + len(h)])
                gradient = head_gradient(model, h, labels, scale=1.0)[1]
                costs += torch.autograd.grad(h, gates, gradient, retain_graph=True)[0] ** 2 / (2 * LABEL_SAMPLES)
            costs, inputs = costs.detach().cpu(), torch.stack(inputs).float().cpu()
            if token:
                picks = [[1 + i for i in permutation(length - 1, seed, "tokens", number, first + row)[:share]] for row, length in enumerate(batch.lengths)]
                rows = [row for row, columns in enumerate(picks) for _ in columns]
                columns = [column for columns in picks for column in columns]
                costs, inputs = costs[:, rows, columns], inputs[:, rows, columns]  # (R,B,T) -> (R,N), (R,B,T,D) -> (R,N,D)
            parts.append(((number, first), (costs, inputs)))
    parts = collect(parts, rt)
    return torch.cat([costs for costs, _ in parts], dim=1), torch.cat([inputs for _, inputs in parts], dim=1)


@torch.no_grad()
def measure_benefits(model: Transformer, examples: list[Example], rt: runtime.Runtime, skipped: tuple[int, ...], trunk: "TrunkCache | None" = None,
                     distill: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What running each place is worth to each sequence (R,N) where everyone skips the `skipped` ones, and the router inputs (R,N,D) there.

    Benefit: the answer's loss without the layer minus its loss with it, each measured, in nats over the square root of the answer's tokens: a sum
    over n tokens is as noisy as sqrt(n), and short answers should not drown. Only what stands above the toggled layer is computed again.
    """
    parts, layers = [], [place.layer for place in model.routing.places]
    assert model.routing.unit == "sequence"
    for number, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch = collate(group, rt.device)
        x = model.trunk(batch.tokens) if trunk is None else trunk(model, group, batch)
        teacher = states(model, batch, route="off", x=x, first_layer=layers[0])[0] if distill else None
        gates = torch.ones(len(layers), len(group), device=rt.device)
        gates[list(skipped)] = 0.0
        distinct = list(dict.fromkeys(layers))
        with inputs_of(model.routers()) as inputs, inputs_of([model.layers[layer] for layer in distinct]) as entered:
            h = states(model, batch, route="mask", gates=gates, x=x, first_layer=layers[0])[0]
        entered = dict(zip(distinct, entered))  # layer -> (B,T,D)

        def by_row(h: torch.Tensor) -> torch.Tensor:  # (n,D) -> (B,) loss of each answer
            losses = head_losses(model, h, batch.labels, teacher)
            return losses.new_zeros(len(group)).index_add_(0, batch.at // batch.tokens.shape[1], losses)

        now, benefits = by_row(h), []
        for place, layer in enumerate(layers):
            first = layers.index(layer)  # of the routers in this layer
            toggled = gates[first:].clone()
            toggled[place - first] = 1 - gates[place]
            h = states(model, batch, route="gather", gates=toggled, x=entered[layer], first_layer=layer)[0]
            benefits.append((by_row(h) - now) * (2 * gates[place] - 1))  # a skipped place's loss falls by what it is worth
        weight = torch.tensor([len(e.targets) for e in group], device=rt.device) ** -0.5
        parts.append((number, ((torch.stack(benefits) * weight).cpu(), torch.stack(inputs).cpu())))
    parts = collect(parts, rt)
    return torch.cat([benefits for benefits, _ in parts], dim=1), torch.cat([inputs for _, inputs in parts], dim=1)


def benefit_prior(benefits: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sequence routers (R,D) in closed form: the logit is what running the place is worth to the sequence, by what it counts in the budget.
    benefits (R,N), inputs (R,N,D), weights (R,)."""
    return unit_spread(torch.stack([ridge(x, y) for x, y in zip(inputs, benefits / weights[:, None])]), inputs)


def log_costs(costs: torch.Tensor) -> torch.Tensor:
    """Log of Fisher costs (R,N). A cost estimated from few labels is often near zero by chance: a tenth of the place's mean keeps its log in bounds."""
    return (costs + 0.1 * costs.mean(dim=1, keepdim=True)).log()


def typical_costs(costs: torch.Tensor) -> torch.Tensor:
    """(R,) geometric mean of Fisher costs (R,N). An arithmetic one follows the few units that cost the most: the ranking by it changes with the sample."""
    return log_costs(costs).mean(dim=1).exp()


def token_prior(costs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Token routers (R,D) in closed form: the logit is a token's log Fisher cost. costs (R,N), inputs (R,N,D)."""
    return unit_spread(torch.stack([ridge(x, y) for x, y in zip(inputs, log_costs(costs))]), inputs)


def order_prior(ranks: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Routers (R,D) whose logit is the rank at which the layer falls in a drop order. ranks (R,N), inputs (R,N,D).

    With the same ranks for everyone this is the static order itself, to within the fit: the normalised inputs share a strong mean, which
    serves as the intercept.
    """
    return unit_spread(torch.stack([ridge(x, y, 0.1 * PRIOR_RIDGE) for x, y in zip(inputs, ranks)]), inputs)


def unit_spread(weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Routers (R,D) scaled so that all their logits on inputs (R,N,D) have mean square 1 about their mean."""
    return weights / torch.einsum("rnd,rd->rn", inputs, weights).std().clamp(min=1e-12)


def ranks_of(order: list[int]) -> torch.Tensor:
    """(R,) rank of each place in an order; 0 is dropped first."""
    return torch.tensor(order).argsort().float()


# ------------------------------------------------------------------------------------------------------------ drop orders


def greedy_order(model: Transformer, examples: list[Example], rt: runtime.Runtime, guess: list[float], depth: float, trunk: "TrunkCache | None" = None) -> list[int]:
    """Drop places one after another until a share `depth` of all they count is off, each time the one whose loss on the examples rises least by what it
    counts; the rest follow by estimate.

    guess: price of each place by what it counts, in any unit. Lazy (Minoux 1978): a place's last measured rise stands until a round finds it cheapest,
    and what was never measured counts with its guess at the rate of those that were; a round measures at most TRIES places.
    """
    loss = Controls(model, examples, rt, trunk).loss
    path, now, measured = [], loss(()), {}
    rest, weights = set(range(len(guess))), (model.place_weights() * len(guess)).tolist()

    def rise(place: int) -> float:
        return (loss((*path, place)) - now) / weights[place]

    while sum(weights[place] for place in path) < depth * len(guess) - 1e-6:
        fresh = {}
        if not path:  # no measured rise to go by yet: more of them, by their guesses
            for place in sorted(rest, key=lambda place: guess[place])[:2 * TRIES]:
                fresh[place] = rise(place)
        else:
            rate = sum(max(risen, 0.0) for risen in measured.values()) / max(sum(guess[place] for place in measured), 1e-12)
            while len(fresh) < TRIES:
                cheapest = min(rest, key=lambda place: (measured.get(place, rate * guess[place]), guess[place]))
                if cheapest in fresh:
                    break
                fresh[cheapest] = measured[cheapest] = rise(cheapest)
        measured |= fresh
        path.append(min(fresh, key=fresh.get))
        now += fresh[path[-1]] * weights[path[-1]]
        rest.discard(path[-1])
    return path + sorted(rest, key=lambda place: (measured.get(place, math.inf), guess[place]))


@contextlib.contextmanager
def sublayers_of(model: Transformer):
    """A list that collects, for a while and by layer, what enters the layer, and what its attention and feed-forward add (B,T,D)."""
    seen: list[dict[str, torch.Tensor]] = []
    hooks = []
    for block in model.layers:
        hooks.append(block.register_forward_pre_hook(lambda _, args: seen.append({"x": args[0].detach()})))
        for name in ("attention", "feed_forward"):
            part = getattr(block, name)
            hooks.append(part.register_forward_hook(lambda _, args, out, name=name: seen[-1].update({name: out.detach().clone()})))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def similarity_order(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> list[int]:
    """Places by 1 - cos(x, y), x what enters the target and y that plus its output (What Matters in Transformers, arXiv 2406.15786), by what they count."""
    places = model.routing.places
    total = torch.zeros(len(places), dtype=torch.float64, device=rt.device)
    for _, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch = collate(group, rt.device)
        real = torch.arange(batch.tokens.shape[1], device=rt.device) < torch.tensor(batch.lengths, device=rt.device)[:, None]  # (B,T)
        with sublayers_of(model) as seen:
            model.hidden(batch.tokens, route="off")
        for number, place in enumerate(places):
            x = seen[place.layer]["x"]
            middle = x + seen[place.layer]["attention"].view_as(x)
            after = middle + seen[place.layer]["feed_forward"].view_as(x)
            before, changed = {"attn": (x, middle), "mlp": (middle, after), "block": (x, after)}[place.target]
            total[number] += (1 - F.cosine_similarity(before[real].float(), changed[real].float(), dim=-1)).sum()
    return (sum_over_ranks(total, rt).cpu() / model.place_weights()).argsort().tolist()


class RidgeDescent(torch.optim.Optimizer):
    """Steps in the space of logits: each router moves by the ridge regression of its units' prices on their inputs, not along the raw gradient.

    With prices p = -d loss / d logit of units with inputs X, the gradient is -X^T p and ridge regression gives (X^T X + e I)^-1 X^T p. So the
    gradient (with momentum) is multiplied by (C + e I)^-1, C = X^T X / N of a fixed sample of inputs and e = STRENGTH times its mean
    eigenvalue: a few massive dimensions of the residual stream no longer decide alone. A step is scaled so that the logits of that sample
    move by `lr` (root mean square, over all routers together); the scale of the loss does not matter. inputs (R,N,D); weights R x (1,D);
    counts (R,): what each router's units count in the budget; prices are taken by it.
    """

    def __init__(self, weights: list[torch.Tensor], inputs: torch.Tensor, lr: float, counts: torch.Tensor):
        super().__init__(weights, {"lr": lr})
        self.inputs, self.counts = inputs.to(weights[0].device), counts
        kernel = self.inputs @ self.inputs.transpose(1, 2)  # (R, N, N)
        self.ridge = STEP_RIDGE * kernel.diagonal(dim1=1, dim2=2).sum(1) / inputs.shape[2]  # (R,) N e: the trace of X^T X is that of X X^T
        self.factor = torch.linalg.cholesky(kernel + torch.diag_embed(self.ridge[:, None].expand(-1, inputs.shape[1])))
        for w in weights:
            self.state[w] = {"exp_avg": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self) -> float:
        """Move the weights; returns by how much the sample's logits rose on average, which a cut should follow."""
        weights = self.param_groups[0]["params"]
        for w in weights:
            self.state[w]["exp_avg"].lerp_(w.grad, 1 - MOMENTUM)
        mean = (torch.cat([self.state[w]["exp_avg"] for w in weights]) / self.counts[:, None])[..., None]  # (R, D, 1)
        inner = torch.cholesky_solve(self.inputs @ mean, self.factor)  # (R, N, 1)
        move = (mean - self.inputs.transpose(1, 2) @ inner) / self.ridge[:, None, None]  # (R, D, 1), by Woodbury's identity
        change = self.inputs @ move  # (R, N, 1)
        scale = self.param_groups[0]["lr"] / change.square().mean().sqrt().clamp(min=1e-20)
        for w, m in zip(weights, move):
            w -= scale * m.T
        return -(scale * change.mean()).item()



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


def routed_flops(config, routing: RouterConfig, shares: list[float], tokens: int, logits: int = 0) -> float:
    """FLOPs of a prompt of `tokens` tokens when the places (R) execute these shares of their units."""
    return prefill_flops(config, tokens, Executed.of(config, routing, shares), logits)


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


class Controls:
    """What simple alternatives reach on the same examples at the capacity that a router realised. Each set of dropped layers is measured once."""

    def __init__(self, model: Transformer, examples: list[Example], rt: runtime.Runtime, trunk: TrunkCache | None = None):
        self.model, self.examples, self.rt, self.trunk, self.known = model, examples, rt, trunk, {}

    def loss(self, skipped: tuple[int, ...]) -> float:
        """Loss where everyone skips these places, given in any order."""
        skipped = tuple(sorted(skipped))
        if skipped not in self.known:
            self.known[skipped] = evaluate(self.model, self.examples, self.rt, route="gather", skipped=skipped, trunk=self.trunk)["loss"]
        return self.known[skipped]

    def static(self, order: list[int], share: float) -> float:
        """Loss where everyone skips the first places of an order, `share` of all they count; where that ends within a place it is interpolated."""
        shares = skipped_shares(order, self.model.place_weights(), share)
        part = next((value for value in shares if 0.0 < value < 1.0), 0.0)
        loss = self.loss(tuple(place for place, value in enumerate(shares) if value == 1.0))
        if part == 0.0:
            return loss
        more = self.loss(tuple(place for place, value in enumerate(shares) if value >= part))
        return loss + part * (more - loss)

    def share_saved(self, shares: list[float]) -> tuple[float, float]:
        """What share of whole layers one must drop to save as many prefill FLOPs as routes with these shares do, and the ceiling of those routes."""
        routing = self.model.routing

        def flops(routing: RouterConfig, shares: list[float]) -> float:
            return sum(routed_flops(self.model.config, routing, shares, len(example.tokens)) for example in self.examples)

        plain = replace(routing, unit="sequence", kv="routed")  # whole sequences: a skipped place leaves nothing behind
        dense, routed, none = flops(plain, [1.0] * len(shares)), flops(routing, shares), flops(plain, [0.0] * len(shares))
        return (dense - routed) / (dense - none), dense / routed

    def row(self, budget: float, orders: dict[str, list[int]]) -> dict:
        """Losses of the routers, as their thresholds stand, and of all controls at equal capacity and (static orders) at equal ceiling."""
        routed = evaluate(self.model, self.examples, self.rt, route="gather", trunk=self.trunk)
        shares, skipped = routed["capacity_per_layer"], 1 - routed["capacity"]
        saved, ceiling = self.share_saved(shares)
        losses = {name: self.static(order, skipped) for name, order in orders.items()}
        cheap = {name: self.static(order, saved) for name, order in orders.items()}
        best, best_cheap, dense = min(losses.values()), min(cheap.values()), self.loss(())

        def gap_closed(static: float) -> float | None:
            """Share of the gap between static and dense that routing closes; None where skipping for everyone costs nothing."""
            return (static - routed["loss"]) / (static - dense) if static > dense else None

        return {"budget": budget, "capacity": routed["capacity"], "capacity_per_layer": shares, "dense": dense, "routed": routed["loss"], **losses,
                "mean_route": self.static(mean_order(shares), skipped),
                "random": evaluate(self.model, self.examples, self.rt, route="gather", random_at=routed["capacity"], trunk=self.trunk)["loss"],
                "gap_closed": gap_closed(best), "ceiling": ceiling, "static_at_equal_ceiling": best_cheap, "gap_closed_at_equal_ceiling": gap_closed(best_cheap)}


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
