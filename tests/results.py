"""The paper's tables, in kind, for any converted model: what is kept at which budget, beside controls, with errors.

Run: python tests/results.py --model=checkpoints/smollm2-135m-instruct --data=data/eval --out=docs --quick
     python tests/results.py --model=DIR --routers=out/token/routers.safetensors --tables=fidelity --skipped=0.25
     python tests/results.py --model=DIR --report                                      measures nothing, writes the page

Not part of the test command: the full run takes hours, and the figures need matplotlib. Every row is made by the
commands that a user would give to train.py, eval.py and bench.py, which stand in it with commit, seconds and processor.
A row that is done is not done again, nor is a command, so that the same call goes on with a killed run; a row whose
settings have changed is measured anew. Tables are measured in the order of --tables, rows by worth. OUT/figures gets
one JSON a table and the figures, OUT/RESULTS.md the tables between their markers (tests/results_page.py).
"""

import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import results_page  # noqa: E402
import runtime  # noqa: E402
from bench import PUBLISHED  # noqa: E402
from data.records import Form, encode, read_records  # noqa: E402
from data.tasks import NAMES, tasks_named  # noqa: E402
from model import ModelConfig, load_config, load_model  # noqa: E402
from recipe.cost import Executed, kv_bytes, prefill_flops  # noqa: E402
from recipe.places import skipped_shares  # noqa: E402
from recipe.results import GOLD_LOGPROB, compare_losses, compare_runs  # noqa: E402
from router import read_router_file  # noqa: E402
from runtime import setting  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

ORDER = ("ceilings", "kv", "fidelity", "speed", "drop", "granularity", "routes", "tuning", "layers", "samples",
         "sources", "seeds")
MAIN = ("attn_token", "attn_sequence")
GRANULAR = (*MAIN, "mlp_token", "mlp_sequence", "block_token", "block_sequence", "both_sequence")
PAPERS, PAPER = "attn_sequence", 0.25  # its main rows: 16 attentions of 32 are routed, half of them run
CONTROLS = ("greedy", "similarity", "random:0")
CONTROLS_BESIDE = ("greedy", "random:0")  # of the table of seeds
COMPARED = 2 + len(CONTROLS_BESIDE)  # there: dense, routed, and these
LAYERS = (16, 8, 24, 4, 12, 20)  # routed layers, as in the paper's figure 5
SAMPLES = (100, 400, 50, 200)
SEEDS = (1337, 1, 2)
SOURCES = ("alpaca", "evol_instruct", "vicuna_sharegpt", "slim_orca", "meta_math_qa", "evol_code_alpaca")
ENOUGH_ROWS = 400  # of a source
CONTEXTS_TO_CALIBRATE = 100  # of each task
SPEED_CONTEXT, CONTEXTS, KV_SHARES = 512, (512, 2048, 8192, 32768), (0.0, 0.125, 0.25, 0.5)
BINS, BIN = 16, 16  # token positions are told apart in so many groups of so many
# the paper's without MMLU, in whose place ARC-Easy stands, and GSM8K, of which a small model knows nothing
TASKS = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "boolq", "winogrande", "hellaswag", "rte")
QUICK = dict(effort="quick", tuned_by=("heldout_samples=32",), rows=16, items=100, fewshot=0, rounds=3, seconds=5400.0,
             tasks=TASKS[:5])
FULL = dict(effort="default", tuned_by=(), rows=88, rounds=5, tasks=TASKS)


@dataclass
class ResultsConfig:
    model: str = field(metadata={"help": "checkpoint folder"})
    data: str = setting("data/eval", "folder of the evaluation sets")
    out: str = setting("docs", "folder of RESULTS.md and figures/")
    work: str = setting("out/results", "folder of router files and of what the commands write")
    quick: bool = setting(False, "few items, a short tuning, an end after 90 minutes; every setting below may say else")
    report: bool = setting(False, "run no command: write page and figures from the tables' JSON")
    tables: tuple[str, ...] = setting(ORDER, "what is measured, in this order")
    granularities: tuple[str, ...] = setting(MAIN, "of the tables that have one or two of them")
    routers: tuple[str, ...] = setting((), "router files to use, in place of tuning one for their granularity")
    routed_by: tuple[str, ...] = setting((), "how routed runs of eval.py hold a budget; none: see at_budget")
    skipped: tuple[float, ...] = setting((PAPER, 0.125, 0.5), "shares of a model's attentions (MLPs, blocks) skipped")
    routed: int = setting(16, "layers that own a router")
    instructions: str = setting("data/demo/instructions.jsonl", "rows to tune on")
    texts: str = setting("data/demo/instructions.jsonl", "rows whose answers are compared with the dense model's")
    texts_split: str | None = setting("heldout", "of that file only the rows with this `split`; none: all")
    sources: str = setting("data/reformatted", "folder of the sources, as data/reformat.py fills it")
    tasks: tuple[str, ...] | None = setting(None, "of eval.py; none: eight of the paper's (quick: five of them)")
    items: int | None = setting(None, "items of a task; none: all (quick: 100)")
    rows: int | None = setting(None, "of the texts; none: 88 (quick: 16)")
    fewshot: int | None = setting(None, "examples before an item; none: the paper's (quick: 0)")
    effort: str | None = setting(None, "of train.py; none: default (quick: quick)")
    tuned_by: tuple[str, ...] | None = setting(None, "more settings of train.py (quick: heldout_samples=32)")
    steps: int | None = setting(None, "of tuning; none: train.py's")
    rounds: int | None = setting(None, "of bench.py; none: 5 (quick: 3)")
    seconds: float | None = setting(None, "stop after so many, also within a command; none: never (quick: 5400)")
    seed: int = setting(1337, "of tuning")
    dtype: str = setting("auto", "auto, float32, bfloat16, float16")
    threads: int | None = setting(None, "of every command on the CPU; none: all cores")
    jobs: int = setting(1, "commands that run beside each other, on a GPU that one leaves idle; timings run alone")

    def __post_init__(self):
        for name, value in (QUICK if self.quick else FULL).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, known in (("tables", ORDER), ("granularities", GRANULAR)):
            if unknown := [word for word in getattr(self, name) if word not in known]:
                raise ValueError(f"--{name} names {unknown[0]!r}; expected some of {', '.join(known)}")
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}; expected 1 or more")
        if not all(0 < share < 1 for share in self.skipped):
            raise ValueError(f"--skipped is {self.skipped}; expected shares between 0 and 1")


@dataclass(frozen=True)
class Step:
    """One command; what it writes lies at `result`."""

    name: str
    script: str
    settings: tuple[str, ...]
    result: Path

    @property
    def tells(self) -> tuple[str, ...]:
        """What its result depends on: all but where that is written."""
        return tuple(word for word in self.settings if not word.startswith("--out="))

    @property
    def noted(self) -> Path:
        """Where it stands how the command was run."""
        folder = self.result.parent if self.result.stem == self.name else self.result.parent.parent
        return folder / f"{self.name}.step.json"

    @property
    def log(self) -> Path:
        return self.noted.with_suffix("").with_suffix(".log")

    @property
    def command(self) -> str:
        return shlex.join(["python", self.script, *self.settings])


@dataclass(frozen=True)
class Row:
    """One row of a table: what is known of it before, its commands, and what their results say."""

    about: dict
    steps: tuple[Step, ...]
    read: Callable[[list[dict]], dict]
    lacks: str = ""  # why it cannot be measured here

    @property
    def key(self) -> list:
        """What tells a row that is done from one that is planned."""
        return [self.about, [step.command for step in self.steps]]


# -----------------------------------------------------------------------------
# Commands


class Commands:
    """The commands that a row is made of, for one model and one set of settings."""

    def __init__(self, cfg: ResultsConfig):
        self.cfg, self.work = cfg, Path(cfg.work)
        self.config = load_config(cfg.model)
        self.dtype = str(runtime.setup(dtype=cfg.dtype).dtype).removeprefix("torch.")
        self.given = {read_router_file(path)[1].routing.granularity: path for path in cfg.routers}

    def step(self, name: str, script: str, *settings: str | None, result: str = "") -> Step:
        out = self.work / (result and name or f"{name}.json")
        threads = f"--threads={self.cfg.threads}" if self.cfg.threads and script != "train.py" else None
        common = (f"--model={self.cfg.model}", *settings, f"--dtype={self.dtype}", threads, f"--out={out}")
        return Step(name, script, tuple(word for word in common if word), out / result if result else out)

    def tune(self, name: str, granularity: str, layers: int, budget: float, *more: str) -> Step:
        cfg = self.cfg
        places = layers * 2 if granularity.startswith("both") else layers
        steps = None if cfg.steps is None else f"--steps={cfg.steps}"
        data = () if any(word.startswith("--data=") for word in more) else (f"--data={cfg.instructions}",)
        return self.step(name, "train.py", *data, *more, f"--granularity={granularity}", f"--layers=auto:{places}",
                         f"--budget={budget:g}", f"--effort={cfg.effort}", *(f"--{word}" for word in cfg.tuned_by),
                         steps, "--report=", f"--seed={cfg.seed}", result="summary.json")

    def routers(self, granularity: str) -> tuple[str, tuple[Step, ...]]:
        """A router file, and the command that makes it where none was given."""
        if granularity in self.given:
            return self.given[granularity], ()
        step = self.tune(granularity, granularity, self.cfg.routed, self.budget(granularity, PAPER))
        return str(step.result.with_name("routers.safetensors")), (step,)

    def budget(self, granularity: str, skipped: float) -> float:
        """The capacity of the routed places at which so much of all the model's places is skipped, in whole places."""
        both = 2 if granularity.startswith("both") else 1
        places = self.cfg.routed * both
        if granularity in self.given:
            places = len(read_router_file(self.given[granularity])[1].routing.places)
        budget = 1 - skipped * self.config.n_layers * both / places
        if budget < 0:
            raise ValueError(f"--skipped={skipped:g} of {self.config.n_layers} layers needs more than the {places} "
                             f"places that {granularity} routes: lower it, or raise --routed")
        return round(math.floor(round(budget * places, 6)) / places, 6)  # neither lists nor sequences run half a place

    def routed(self, granularity: str, skipped: float, control: str | None = None) -> tuple[str, ...]:
        """Settings of a routed run of eval.py."""
        by = self.cfg.routed_by if control is None else (f"control={control}",)
        found = (f"--routers={self.routers(granularity)[0]}", f"--budget={self.budget(granularity, skipped):g}")
        return (*found, *(f"--{word}" for word in by))

    def words(self, granularity: str, skipped: float, yardstick: bool) -> Step:
        """Fidelity and loss of the texts."""
        cfg, files = self.cfg, []
        for name in ("fidelity", "perplexity"):
            files += [f"--{name}={cfg.texts}"] + ([f"--{name}_split={cfg.texts_split}"] if cfg.texts_split else [])
        return self.step(f"words-{granularity}-{skipped:g}", "eval.py", *self.routed(granularity, skipped), *files,
                         f"--limit={cfg.rows}", "--yardstick" if yardstick else None)

    def speed(self, granularity: str) -> Step:
        """Times of forced routes: as many layers as are routed, the deepest."""
        context = min(SPEED_CONTEXT, self.config.max_seq_len // 2)
        layers = min(self.cfg.routed, self.config.n_layers - 1)
        budgets = [self.forced(skipped) for skipped in sorted({*self.cfg.skipped, PAPER})]
        budgets = ",".join(f"{budget:g}" for budget in budgets if budget >= 0)
        kv = "--kv=all" if granularity in ("attn_token", "both_token") else None
        return self.step(f"speed-{granularity}", "bench.py", f"--granularity={granularity}", f"--layers=deep:{layers}",
                         f"--budget={budgets}", kv, f"--prefill={context}", f"--decode={context}",
                         f"--rounds={self.cfg.rounds}")

    def forced(self, skipped: float) -> float:
        """The budget of forced routes at which so much of the model is skipped."""
        layers = min(self.cfg.routed, self.config.n_layers - 1)
        return round(1 - skipped * self.config.n_layers / layers, 6)

    def tasks(self, name: str = "tasks-dense", *more: str) -> Step:
        """Tasks, dense or as `more` says; then paired with dense."""
        cfg, limits = self.cfg, {"limit": self.cfg.items, "fewshot": self.cfg.fewshot}
        limits = [f"--{key}={value}" for key, value in limits.items() if value is not None]
        against = (f"--against={self.tasks().result}",) if more else ()
        return self.step(name, "eval.py", *more, *against, f"--tasks={','.join(cfg.tasks)}", f"--data={cfg.data}",
                         *limits, f"--samples={self.work / name}.jsonl")

    def accuracy(self, granularity: str, skipped: float, control: str | None = None) -> tuple[Step, ...]:
        """Tasks of routers or of a control, behind all that they need."""
        name = f"tasks-{granularity}-{skipped:g}-{(control or 'routed').replace(':', '')}"
        each = () if control or self.cfg.routed_by else at_budget(granularity, self.given.get(granularity))
        own = self.tasks(name, *self.routed(granularity, skipped, control), *each)
        return (*self.routers(granularity)[1], self.tasks(), own)

    def beside(self, granularity: str, skipped: float) -> tuple[Step, ...]:
        """Tasks of routers and of controls, behind all that they need; the last ones: dense, routed, each control."""
        lists = [self.accuracy(granularity, skipped, control)[-1] for control in CONTROLS_BESIDE]
        return (*self.accuracy(granularity, skipped), *lists)

    def reseeded(self, seed: int) -> "Commands":
        """The same with another seed, in a folder of its own."""
        return Commands(replace(self.cfg, seed=seed, work=str(self.work / f"seed-{seed}"), routers=()))


def at_budget(granularity: str, given: str | None = None) -> tuple[str, ...]:
    """Settings of eval.py under which routers run the budget on tasks, which are text that they were not calibrated on.

    Each sequence holds it by itself; tokens over all tasks together, by contexts without answers.
    """
    if not granularity.endswith("_sequence"):
        return (f"--calibrate={CONTEXTS_TO_CALIBRATE}",)
    own = given is not None and read_router_file(given)[1].routing.reads == "own"
    return () if own else ("--budget_per=sequence",)


# -----------------------------------------------------------------------------
# The rows of each table, those of most worth first


def ceilings_rows(c: Commands) -> Iterator[Row]:
    out = c.work / "ceilings.json"
    step = Step("ceilings", "bench.py", ("--analytic", f"--out={out}"), out)
    yield Row({"what": "published models"}, (step,), lambda results: results[0])


def kv_rows(c: Commands) -> Iterator[Row]:
    """Bytes of keys and values of one sequence, by sizes alone."""
    shapes = {Path(c.cfg.model).name: (c.config, getattr(torch, c.dtype).itemsize)}
    shapes |= {name: (config, 2) for name, config in PUBLISHED.items()}
    for name, (config, size) in shapes.items():
        for context in [context for context in CONTEXTS if context <= config.max_seq_len] or [config.max_seq_len]:
            held = [kv_bytes(config, size, context, context * config.n_layers * share) for share in KV_SHARES]
            found = {"shares": list(KV_SHARES), "bytes": held, "bytes_per_number": size}
            yield Row({"model": name, "context": context}, (), lambda _, found=found: found)


def fidelity_rows(c: Commands) -> Iterator[Row]:
    first = (c.cfg.skipped[0], c.cfg.granularities[0])
    for skipped in c.cfg.skipped:
        for granularity in c.cfg.granularities:
            routers, before = c.routers(granularity)
            step = c.words(granularity, skipped, yardstick=(skipped, granularity) == first)

            def read(results: list[dict], path: str = routers) -> dict:
                return words_values(results[-1], c.config, path)

            yield Row({"granularity": granularity, "skipped": skipped}, (*before, step), read)


def words_values(report: dict, config: ModelConfig, routers: str) -> dict:
    """Loss, fidelity and ceiling of one run of eval.py on the texts."""
    routed, dense = (report["items"][name] for name in NAMES)
    shares = report["results"][NAMES[0]]["capacity_per_layer"]
    executed = Executed.of(config, read_router_file(routers)[1].routing, shares)
    context = min(SPEED_CONTEXT, config.max_seq_len)
    change = [own - other for own, other in zip(routed["nll"], dense["nll"])]
    return {
        "routers": routers,
        "items": report["fidelity"]["items"],
        "tokens": report["results"][NAMES[0]]["tokens"],
        "capacity": report["results"][NAMES[0]]["capacity"],
        "ceiling": prefill_flops(config, context) / prefill_flops(config, context, executed),
        "ceiling_context": context,
        "loss_dense": report["results"][NAMES[1]]["loss"],
        "loss_routed": report["results"][NAMES[0]]["loss"],
        "loss_change": compare_losses(change, routed["tokens"]),
        "variants": report["fidelity"]["variants"],
    }


def speed_rows(c: Commands) -> Iterator[Row]:
    for granularity in GRANULAR:
        step = c.speed(granularity)
        yield Row({"granularity": granularity}, (step,), lambda results: {"rows": results[0]["rows"]})


def drop_rows(c: Commands) -> Iterator[Row]:
    """Routers against lists that skip the same attentions for everyone, as Attention Drop does."""
    yield Row({"what": "dense", "skipped": 0.0}, (c.tasks(),), lambda results: task_values(results[0], c.cfg.tasks))
    for skipped in (PAPER, PAPER / 2):
        runs = [(granularity, None) for granularity in c.cfg.granularities]
        runs += [(c.cfg.granularities[-1], control) for control in CONTROLS]
        for granularity, control in runs:
            about = {"what": control or granularity, "skipped": skipped}
            yield Row(about, c.accuracy(granularity, skipped, control), tasks_reader(c))


def tasks_reader(c: Commands) -> Callable[[list[dict]], dict]:
    return lambda results: task_values(results[-1], c.cfg.tasks)


def task_values(report: dict, names: tuple[str, ...]) -> dict:
    """The paper's metric of each task, and their mean, with standard errors; beside dense where it was compared."""
    metrics = {task.name: task.metrics[0] for task in tasks_named(names)}
    found, paired = {}, report.get("against", {}).get("tasks", {})
    for name in names:
        metric, r = metrics.get(name, "acc"), report["results"][name]
        found[name] = {"metric": metric, "value": r[metric], "stderr": r[f"{metric}_stderr"], "n": r["n"]}
        found[name] |= {"shots": r["shots"], "capacity": r["capacity"]}
        if name in paired:
            pair = paired[name][metric]
            found[name] |= {"change": pair["difference"], "change_stderr": pair["stderr"]}
            if GOLD_LOGPROB in paired[name]:
                gold = paired[name][GOLD_LOGPROB]
                found[name] |= {"gold": gold["difference"], "gold_stderr": gold["stderr"]}
    values = {"tasks": found, "capacity": mean([entry["capacity"] for entry in found.values()])}
    for name, error in (("value", "stderr"), ("change", "change_stderr"), ("gold", "gold_stderr")):
        if all(entry.get(error) is not None for entry in found.values()):
            values[f"mean_{name}"], values[f"mean_{error}"] = over_tasks(list(found.values()), name, error)
    return values


def granularity_rows(c: Commands) -> Iterator[Row]:
    yield Row({"granularity": "dense"}, (c.tasks(),), tasks_reader(c))
    for granularity in GRANULAR:

        def read(results: list[dict], tuned: bool = bool(c.routers(granularity)[1])) -> dict:
            values = {"speed": [row for row in results[-1]["rows"] if row["budget"] == c.forced(PAPER)]}
            values |= {"tuning": tuning_values(results[0])} if tuned else {}
            return values | task_values(results[-2], c.cfg.tasks)

        yield Row({"granularity": granularity}, (*c.accuracy(granularity, PAPER), c.speed(granularity)), read)


def routes_rows(c: Commands) -> Iterator[Row]:
    """Which places run: by task, by position of a token, and under the greedy list."""
    for granularity in c.cfg.granularities:

        def read(results: list[dict], granularity: str = granularity) -> dict:
            shares = {name: results[-1]["results"][name]["capacity_per_layer"] for name in c.cfg.tasks}
            return {"tasks": shares, "routes": results[-1]["routes"]} | position_shares(c, granularity)

        yield Row({"granularity": granularity, "skipped": PAPER}, c.accuracy(granularity, PAPER), read)


@torch.inference_mode()
def position_shares(c: Commands, granularity: str) -> dict:
    """Share of tokens that run each place by their position in the texts, and what the greedy list runs."""
    cfg, (routers, _) = c.cfg, c.routers(granularity)
    budget = c.budget(granularity, PAPER)
    model, tok = load_model(cfg.model, routers, budget, dtype=getattr(torch, c.dtype)), load_tokenizer(cfg.model)
    form, names = Form(tok, model.config.max_seq_len, None, True), model.routing.names
    orders = read_router_file(routers)[1].orders
    rows = [pair for pair in read_records(cfg.texts) if cfg.texts_split in (None, pair[1].get("split"))][: cfg.rows]
    ran, seen = torch.zeros(len(names), BINS), torch.zeros(BINS)
    for place, row in rows if model.routing.unit == "token" else ():
        example = encode(row, place, form)
        gates = model.hidden(torch.tensor([example.tokens[: BINS * BIN]]), route="mask")[1][:, 0]  # (R,T)
        at = torch.arange(gates.shape[1]) // BIN
        ran, seen = ran.index_add(1, at, gates.float()), seen.index_add(0, at, torch.ones(len(at)))
    kept = int((seen > 0).sum())
    found = {"places": names, "tokens_per_bin": BIN, "positions": (ran / seen)[:, :kept].tolist()}
    if "greedy" in orders:
        order = [names.index(name) for name in orders["greedy"]]
        found["greedy"] = skipped_shares(order, model.place_shares(), 1 - budget)
    return found


def tuning_rows(c: Commands) -> Iterator[Row]:
    for granularity in c.cfg.granularities:
        _, steps = c.routers(granularity)
        lacks = "" if steps else "its router file was given, and what it took is not known"
        yield Row({"granularity": granularity}, steps, lambda results: tuning_values(results[0]), lacks)


def tuning_values(summary: dict) -> dict:
    names = ("seconds", "tokens_per_second", "steps", "peak_memory_bytes", "trainable_parameters", "optimizer_bytes")
    kept = {name: summary[name] for name in names} | {"examples": summary["data"]["used"]}
    row = next(row for row in summary["report"] if row["budget"] == summary["budget"])
    lists = [row[name] for name in ("greedy", "fisher", "similarity") if name in row]
    kept |= {name: row[name] for name in ("capacity", "ceiling", "dense", "routed", "random", "gap_closed")}
    return kept | {"list": min(lists), "tokens": summary["heldout_tokens"]}


def tuned_rows(c: Commands, about: dict, step: Step, budget: float, lacks: str = "") -> Row:
    """One tuning run, the tasks with its routers, and what both say."""
    routers = step.result.with_name("routers.safetensors")
    by = [f"--{word}" for word in c.cfg.routed_by] or at_budget(PAPERS)
    own = c.tasks(f"tasks-{step.name}", f"--routers={routers}", f"--budget={budget:g}", *by)

    def read(results: list[dict]) -> dict:
        return tuning_values(results[0]) | task_values(results[-1], c.cfg.tasks)

    return Row(about, (step, c.tasks(), own), read, lacks)


def layers_rows(c: Commands) -> Iterator[Row]:
    for layers in [layers for layers in LAYERS if layers <= c.config.n_layers]:
        own, usual = c.tune(f"layers-{layers}", PAPERS, layers, 0.5), c.routers(PAPERS)[1]
        step = next((step for step in usual if step.tells == own.tells), own)
        yield tuned_rows(c, {"layers": layers}, step, 0.5)


def samples_rows(c: Commands) -> Iterator[Row]:
    for samples in SAMPLES:
        step = c.tune(f"samples-{samples}", PAPERS, c.cfg.routed, 0.5, f"--max_samples={samples}")
        yield tuned_rows(c, {"samples": samples}, step, 0.5)


def sources_rows(c: Commands) -> Iterator[Row]:
    for name in SOURCES:
        path = Path(c.cfg.sources) / f"{name}.jsonl"
        found = sum(1 for _ in path.open("rb")) if path.is_file() else 0
        more = (f"--data={path}", f"--max_samples={ENOUGH_ROWS}", "--max_length=512", "--truncate")
        lacks = "" if found >= ENOUGH_ROWS else f"{found} rows at hand, {ENOUGH_ROWS} are needed"
        yield tuned_rows(c, {"source": name}, c.tune(f"source-{name}", PAPERS, c.cfg.routed, 0.5, *more), 0.5, lacks)


def seeds_rows(c: Commands) -> Iterator[Row]:
    """Routers of several seeds beside dense, the greedy list and random routes of the same run, each and pooled."""
    own = [c if seed == c.cfg.seed else c.reseeded(seed) for seed in SEEDS]
    for granularity in c.cfg.granularities:
        for skipped in (PAPER, PAPER / 2):
            runs = [commands.beside(granularity, skipped) for commands in own]
            for seed, chosen in (*((seed, [steps]) for seed, steps in zip(SEEDS, runs)), ("pooled", runs)):
                about = {"granularity": granularity, "skipped": skipped, "seed": seed}
                yield Row(about, tuple(chain(*chosen)), seeds_reader([len(steps) for steps in chosen], c.cfg.tasks))


def seeds_reader(sizes: list[int], names: tuple[str, ...]) -> Callable[[list[dict]], dict]:
    """Reads the results of one run or of several, one behind the other, which took so many steps each."""

    def read(results: list[dict]) -> dict:
        rest = iter(results)
        return seeds_values([list(islice(rest, size))[-COMPARED:] for size in sizes], names)

    return read


def seeds_values(runs: list[list[dict]], names: tuple[str, ...]) -> dict:
    """Routed minus dense, greedy and random (in the reports of each run in this order: dense, routed, greedy, random),
    the mean over tasks; of several runs item by item the mean over them."""
    dense, routed, *lists = (pooled_items(reports, names) for reports in zip(*runs))
    shares = [run[1]["results"][name]["capacity"] for run in runs for name in names]
    values = {"capacity": mean(shares), "items": sum(len(items[GOLD_LOGPROB]) for items in routed.values())}
    for title, other in zip(("dense", *CONTROLS_BESIDE), (dense, *lists)):
        paired = compare_runs(routed, other)
        for metric in ("acc", GOLD_LOGPROB):
            found = [paired[name][metric] for name in names]
            values[f"{metric} - {title}"] = over_tasks(found, "difference", "stderr")
    return values


def pooled_items(reports: list[dict], names: tuple[str, ...]) -> dict:
    """Of each task and metric the values of its items, the mean over the reports."""

    def over_reports(name: str, metric: str) -> list[float]:
        values = zip(*(report["items"][name][metric] for report in reports))
        return [mean([float(value) for value in of_item]) for of_item in values]

    return {name: {metric: over_reports(name, metric) for metric in ("acc", GOLD_LOGPROB)} for name in names}


ROWS = {name: globals()[f"{name}_rows"] for name in ORDER}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def over_tasks(found: list[dict], value: str, error: str) -> list[float]:
    """The mean over tasks of what each has under `value`, and its standard error from theirs under `error`."""
    variances = [entry[error] ** 2 for entry in found]
    return [mean([entry[value] for entry in found]), mean(variances) ** 0.5 / len(found) ** 0.5]


# -----------------------------------------------------------------------------
# Measuring


class Stopped(Exception):
    """The time is over."""


class Failed(Exception):
    """A command did not end well."""


class Turns:
    """So many commands at once; of those that wait, the one of the first row comes next. A timing runs alone."""

    def __init__(self, most: int):
        self.most, self.running, self.waiting, self.changed = most, 0, [], threading.Condition()

    @contextmanager
    def turn(self, row: int, alone: bool) -> Iterator[None]:
        size = self.most if alone else 1
        with self.changed:
            self.waiting.append(row)
            self.changed.wait_for(lambda: row == min(self.waiting) and self.running + size <= self.most)
            self.waiting.remove(row)
            self.running += size
            self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.running -= size
                self.changed.notify_all()


class Run:
    """Runs commands, remembers them, and writes a table whenever one of its rows is done."""

    def __init__(self, cfg: ResultsConfig):
        self.cfg, self.commands, self.failed, self.broken = cfg, Commands(cfg), 0, {}
        self.end = math.inf if cfg.seconds is None else time.monotonic() + cfg.seconds
        self.code, self.processor = commit(), processor()
        self.rows = {name: list(ROWS[name](self.commands)) for name in cfg.tables}
        self.turns, self.writing, self.asked = Turns(cfg.jobs), threading.Lock(), {}

    def measure(self) -> None:
        """Measure what the tables lack, by rows: one after the other, or (--jobs) as many commands at once."""
        for name in self.rows:
            self.write(name)
        work = [(name, row) for name, rows in self.rows.items() for row in rows if not row.lacks]
        if self.cfg.jobs == 1:
            for number, (name, row) in enumerate(work):
                self.row(number, name, row)
            return
        with ThreadPoolExecutor(max(1, len(work))) as pool:
            try:
                list(pool.map(self.row, range(len(work)), *zip(*work)))
            finally:
                self.end = 0.0  # where one row was stopped, all are

    def row(self, number: int, name: str, row: Row) -> None:
        """Measure one row, unless its table has it."""
        if any(key_of(old) == row.key for old in self.done(name)):
            return
        try:
            records = [self.command(step, number) for step in row.steps]
            values = row.read([runtime.read_json(step.result) for step in row.steps])
        except Failed as failure:
            print(f"{name}, {words(row.about)}: {failure}", file=sys.stderr, flush=True)
            with self.writing:
                self.failed += 1
            return
        self.write(name, {"about": row.about, "values": values, "steps": records})
        if row.steps:
            print(f"{name}, {words(row.about)}: done", flush=True)

    def path(self, name: str) -> Path:
        return Path(self.cfg.out) / "figures" / f"{name}.json"

    def done(self, name: str) -> list[dict]:
        return runtime.read_json(self.path(name))["rows"] if self.path(name).exists() else []

    def write(self, name: str, new: dict | None = None) -> None:
        """Write a table: what is done of it and a new row, in their order, and what lacks."""
        with self.writing:
            rows = self.rows[name]
            done = [old for old in self.done(name) if new is None or old["about"] != new["about"]]
            done += [] if new is None else [new]
            order = [row.about for row in rows]
            done.sort(key=lambda old: order.index(old["about"]) if old["about"] in order else len(order))
            left = [row for row in rows if not any(old["about"] == row.about for old in done)]
            missing = [{"about": row.about, "lacks": row.lacks, "commands": row.key[1]} for row in left]
            found = {"table": name, "model": Path(self.cfg.model).name, "rows": done, "missing": missing}
            runtime.write_json(self.path(name), found)

    def command(self, step: Step, row: int) -> dict:
        """Run a command that was not run yet, for the row of this number, and note how; rows that share it wait."""
        with self.asked.setdefault(step.result, threading.Lock()):
            note = step.noted
            if note.exists() and step.result.exists() and runtime.read_json(note)["command"] == step.command:
                return runtime.read_json(note)
            if step.command in self.broken:  # by a row before
                raise self.broken[step.command]
            record = self.measured(step, row)
            runtime.write_json(note, record)
            return record

    def measured(self, step: Step, row: int) -> dict:
        """Run a command when its turn comes; how it was run."""
        found = step.script == "train.py" and step.result.exists()
        try:
            with self.turns.turn(row, alone=step.script == "bench.py"):
                started = time.monotonic()
                self.call(step)
        except Failed as failure:
            self.broken[step.command] = failure
            raise
        record = self.record(step.command, time.monotonic() - started)
        if step.script == "train.py":
            seeds = [int(word.removeprefix("--seed=")) for word in step.settings if word.startswith("--seed=")]
            record |= {"seconds": runtime.read_json(step.result)["seconds"], "seed": seeds[0]}
            record |= {"commit": None} if found else {}  # it was tuned before, nobody knows by which code
        return record

    def record(self, command: str, seconds: float) -> dict:
        about = {"commit": self.code, "processor": self.processor, "dtype": self.commands.dtype}
        threads = self.cfg.threads or len(os.sched_getaffinity(0))
        return {"command": command, "seconds": round(seconds, 1), **about, "threads": threads}

    def call(self, step: Step) -> None:
        """Run a command to its end. Raises Failed, or Stopped where the time ends before."""
        step.result.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.cfg.threads:
            environment["OMP_NUM_THREADS"] = str(self.cfg.threads)
        if self.end <= time.monotonic():
            raise Stopped
        print(f"$ {step.command}", flush=True)
        words = [sys.executable, str(ROOT / step.script), *step.settings]
        with begun(step).open("a") as out:
            process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    if self.end <= time.monotonic():
                        raise Stopped
                    time.sleep(0.1)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if status := process.returncode:
            last = step.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"{step.script} ended with status {status}: {' '.join(last)} ({step.log})")


def begun(step: Step) -> Path:
    """The log of a command that begins, its first line the command. What another one of this name left of its items
    is no beginning of this one's."""
    first = f"$ {step.command}\n"
    if step.log.exists() and not step.log.read_text(errors="replace").startswith(first):
        for word in step.settings:
            if word.startswith("--samples="):
                Path(word.removeprefix("--samples=")).unlink(missing_ok=True)
    step.log.write_text(first)
    return step.log


def key_of(old: dict) -> list:
    """Of a row in a table's JSON what `Row.key` is of a planned one."""
    return [old["about"], [record["command"] for record in old["steps"]]]


def words(about: dict) -> str:
    return ", ".join(str(value) for value in about.values())


def commit() -> str:
    """The code's commit, with a note where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!README.md")
    return (git("rev-parse", "--short=7", "HEAD") or "unknown") + (" with changes" if changed else "")


def processor() -> str:
    """The GPU's name, or the CPU's."""
    rt = runtime.setup()
    if rt.device.type == "cuda":
        return runtime.device_name(rt.device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def main() -> None:
    cfg = runtime.cli(ResultsConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the command that runs ends too
    run = None if cfg.report else Run(cfg)
    try:
        if run is not None:
            run.measure()
    except Stopped:
        print("the time is over; the same command goes on")
    finally:
        results_page.write(Path(cfg.out))
    if run is not None and run.failed:
        print(f"{run.failed} rows failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    runtime.run_main(main)
