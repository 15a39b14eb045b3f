"""Score a model, dense or routed, on tasks and on text, with the definitions of lm-evaluation-harness.

    python eval.py --model=DIR --tasks=arc_easy,mmlu --data=data/eval --limit=100 --out=dense.json
    python eval.py --model=DIR --routers=FILE --budget=0.7 --tasks=arc_easy --against=dense.json --samples=F.jsonl
    python eval.py --model=DIR --perplexity=FILE.jsonl [--rolling]
    python eval.py --model=DIR --routers=FILE --fidelity=FILE.jsonl [--yardstick]   # how far from the dense model
    torchrun --nproc_per_node=8 eval.py ...         # the same batches shared out, hence the same numbers

Tasks: boolq rte openbookqa piqa mmlu mmlu_SUBJECT winogrande gsm8k hellaswag arc_challenge arc_easy lambada_openai
(data/tasks.py; the publishers' files, which data/fetch.py gets), probe_arithmetic probe_brackets (made up), and any
file of questions by --custom. A run that was killed goes on from --samples. Every question becomes rows (item, choice,
context, target), and what is scored is log P(target | context): a context is computed once for all its choices, and a
few-shot prefix once for all items that share it (where routes do not depend on what follows: dense, unit token); logits
exist only where they count.

Legend: B rows, T tokens, D width, V vocabulary, R routers, n scored positions.
"""

import hashlib
import json
import os
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

import runtime
from data.records import Example, Form, encode, read_records, settle_bad
from data.rows import (
    NEW_TOKENS,
    Item,
    Row,
    answer_item,
    chat_context,
    common_prefix,
    encode_prompt,
    encode_pairs,
    rows_of,
    window_items,
)
from data.tasks import (
    GROUPS,
    LOSS,
    NAMES,
    Question,
    Task,
    chat_prompt,
    draw_shots,
    locate,
    mmlu,
    plain_prompt,
    read_questions,
    tasks_named,
)
from model import KVCache, Transformer, decode, load_routers, pad
from recipe.adapter import lacks_adapter
from recipe.base import load_base
from recipe.cost import kv_bytes
from recipe.fidelity import ANSWER_TOKENS, GROUP, TASK, Variant, fidelity, fidelity_lines, rounded, with_controls
from recipe.forced import SMALLEST_GATE, Control, make_control
from recipe.hold import hold
from recipe.passes import Workload, finite, settle
from recipe.shard import everything
from recipe.results import (
    GOLD_LOGPROB,
    chosen,
    compare_runs,
    gold_logprobs,
    group_result,
    report_lines,
    result_of,
    routes_of,
)
from router import read_router_file
from runtime import Progress, collect, setting
from tokenizer import Tokenizer, load_tokenizer

HEAD_ROWS = 512  # positions whose logits exist at once: 512 x 128k x 4 bytes = 256 MiB
MIN_PREFIX = 16  # tokens that must be common to all items before computing them apart pays
MIN_BATCH, MIN_BATCHES = 4096, 8  # small tasks are cut too, to give every rank a batch, but not below so many tokens
MIN_TOKENS, FULL = 512, 0.8  # from so many tokens on, a batch ends before an item of which a fifth would be pads
CALIBRATION_ROUNDS = 4  # how often routes and cuts follow each other
MISSED = 0.05  # capacity this far from --budget is told
STOPS = ("Question:", "</s>", "<|im_end|>")  # lm-eval tasks/gsm8k/gsm8k.yaml
STOP_TAIL = 16  # last tokens of an answer that are searched for a stop text
STRICT, FLEXIBLE = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the same file
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # the same file: deleted before answers are compared


@dataclass
class EvalConfig:
    """Settings of eval.py."""

    model: str = field(metadata={"help": "checkpoint folder"})
    tasks: tuple[str, ...] = setting((), "names as above, by comma")
    data: str = setting("data/eval", "folder of the data sets, as data/fetch.py fills it")
    custom: tuple[str, ...] = setting(
        (),
        "more tasks: .jsonl, .json or .csv files of question, choices, answer; answer is a 0-based number or a choice",
    )
    perplexity: str | None = setting(
        None, "file whose answers are scored: rows of any form that train.py reads, or .txt"
    )
    perplexity_split: str | None = setting(None, "of that file only the rows with this `split`")
    rolling: bool = setting(False, "score all of each text in windows: word and byte perplexity (always so for .txt)")
    skip_bad: bool = setting(False, "leave out rows that cannot be used, and say which, instead of refusing the file")
    truncate: bool = setting(False, "cut longer rows of --perplexity and --fidelity instead of refusing them")
    fidelity: str | None = setting(
        None, "file of rows: how far the routed model's words are from the dense model's, beside controls"
    )
    fidelity_split: str | None = setting(None, "of that file only the rows with this `split`")
    yardstick: bool = setting(False, "beside --fidelity, the dense model with weights rounded to 8 and to 4 bits")
    routers: str | None = setting(None, "router file")
    adapter: str | None = setting(None, "LoRA adapter folder, of train.py or peft, on which the model stands")
    route: Literal["auto", "off", "mask", "gather"] = setting("auto", "auto: gather with --routers, else off")
    budget: float | None = setting(None, "capacity from 0 to 1; none: the router file's own")
    hold_budget: bool = setting(False, "token routers hold --budget within each sequence, on any source")
    budget_per: Literal["workload", "sequence"] = setting(
        "workload", "workload: sequences run --budget on average; sequence: each of them as much of it as fits"
    )
    calibrate: int | None = setting(
        None, "first move the cuts until the contexts of all tasks' first N items, without labels, realise --budget"
    )
    control: str = setting(
        "none",
        "forced routes: greedy, fisher or similarity (lists of the router file) or gate_norm (of weights alone) at "
        "--budget, static:LAYERS to skip (both_sequence: 5.attn,7.mlp), random:SEED at --budget, mean:FILE.json of a "
        "routed run; of experts smallest_gate: the pairs of least weight are skipped, down to --budget",
    )
    fewshot: int | None = setting(None, "examples before each item; none: the paper's number per task")
    fewshot_by: Literal["index", "first", "harness"] = setting(
        "index", "by seed and item, in file order, or as lm-eval draws them"
    )
    apply_chat_template: bool = setting(False, "put each prompt into the model's chat template, as lm-eval does")
    system_instruction: str = setting("", "stands before the task's own description")
    fewshot_as_multiturn: bool = setting(True, "with a chat template each shot is a turn; false: all in one message")
    chat: str | None = setting(None, "chat form in place of the model's own, for tasks and files of rows")
    seed: int = setting(1234, "of the few-shot draw, 1234 is lm-eval's, and of what probes ask")
    limit: int | None = setting(None, "first N items of each task only")
    max_length: int | None = setting(None, "context length; longer items lose their beginning; none: the model's")
    max_batch_tokens: int = setting(16384, "tokens in a batch, and in its cache")
    samples: str | None = setting(None, "write a line per item here, and go on from it after a kill")
    out: str | None = setting(None, "write all results here as JSON")
    against: str | None = setting(None, "--out of another run on the same items, to compare with")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = setting("auto", "auto, float32, bfloat16, float16")
    base_dtype: Literal["int8"] | None = setting(None, "int8: weights rounded to a byte each; none: in dtype")
    shard: bool = setting(False, "under torchrun, share each block's weights out over the ranks: less memory")
    threads: int | None = setting(
        None, "of a process on the CPU; none: all cores, also under torchrun: their number moves last bits"
    )


# -----------------------------------------------------------------------------
# Tasks in rows


@dataclass
class ReadyTask:
    """A task in rows, ready to be scored."""

    task: Task
    source: str
    shots: int = 0
    items: list[Item] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # numbers of items that cannot be scored
    sha: str = ""  # of every context and choice in tokens: with the same sha the same thing was scored
    stamp: str = ""  # of all that decides its records
    resumed: int = 0  # records that an earlier run left
    mute: bool = False  # the chat template has no place for a system message
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.task.name


def prompt(ready: ReadyTask, context: str, shots: Sequence[Question], tok: Tokenizer, cfg: EvalConfig) -> str:
    """The whole text before a choice."""
    if not cfg.apply_chat_template:
        return plain_prompt(ready.task, shots, context, cfg.system_instruction)
    messages = chat_prompt(ready.task, shots, context, cfg.system_instruction, cfg.fewshot_as_multiturn)
    try:
        return chat_context(tok, messages, cfg.chat)
    except ValueError:
        if messages[0]["role"] != "system":
            raise
    ready.mute = True  # as lm-eval does: many templates have no place for a system message
    return chat_context(tok, messages[1:], cfg.chat)


def pairs_of(task: Task, question: Question, texts: dict[str, str], tok: Tokenizer, space: str) -> tuple[list, bool]:
    """Tokens (context, choice), and whether a token spans both. texts: the whole text before a choice, by context."""
    contexts = [texts[context] for context in question.contexts]
    if task.generates:
        return [(encode_prompt(tok, contexts[0]), [])], False
    space = "" if task.continues else space
    return encode_pairs(tok, contexts, [space + choice for choice in question.choices])


def prepare_task(task: Task, paths: tuple[Path, Path | None], run: "Scorer", cfg: EvalConfig, limit: int) -> ReadyTask:
    """Read a task and turn its items into rows. limit: context length."""
    source = "made up" if task.make else str(paths[0])
    ready = ReadyTask(task, source, task.shots if cfg.fewshot is None else cfg.fewshot)
    start, digest, space = time.perf_counter(), hashlib.sha256(), "" if cfg.apply_chat_template else " "
    questions = read_questions(paths[0], task, cfg.skip_bad, cfg.seed)[: cfg.limit]
    pool = read_questions(paths[1], task, cfg.skip_bad, cfg.seed) if ready.shots else []
    drawn = draw_shots(task, questions, pool, ready.shots, cfg.fewshot_by, cfg.seed)
    for index, (question, shots) in enumerate(zip(questions, drawn)):
        texts = {context: prompt(ready, context, shots, run.tok, cfg) for context in dict.fromkeys(question.contexts)}
        pairs, spanning = pairs_of(task, question, texts, run.tok, space)
        longest = max(len(target) for _, target in pairs)
        if longest > limit:
            raise ValueError(
                f"{source}, item {index}: a choice has {longest} tokens; expected at most {limit}, the "
                "context: raise --max_length or delete the item"
            )
        gold = question.choices[0] if task.generates else question.gold
        tokens = b"".join(array("i", [*context, -1, *target, -2]).tobytes() for context, target in pairs)
        digest.update(tokens + str(gold).encode())
        if not all(context and (target or task.generates) for context, target in pairs):
            ready.skipped.append(index)
            continue
        room = limit - NEW_TOKENS - 1 if task.generates else limit
        rows, truncated = rows_of(index, pairs, room, run.shares and not task.generates)
        ready.items.append(Item(index, rows, gold, list(map(len, question.choices)), truncated, spanning))
    if not ready.items:
        raise ValueError(
            f"{source}: no item can be scored, since their choices have no tokens; use another tokenizer"
        )
    ready.sha, ready.seconds = digest.hexdigest()[:16], time.perf_counter() - start
    return ready


def texts_of(path: Path, split: str | None, bad: list[str]) -> list[tuple[str, dict]]:
    """Rows of a file of texts, of one split where one is named; a .txt file is one text."""
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"--perplexity={path} was not found; expected a file: check the path")
        try:
            return [(str(path), {"text": path.read_bytes().decode("utf-8")})]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (byte {error.start}); expected plain text: save it as UTF-8"
            ) from None
    rows = [(place, row) for place, row in read_records(path, bad) if split is None or row.get("split") == split]
    if not rows and not bad:
        raise ValueError(f"{path} holds no row whose split is {split!r}; name another split, or none")
    return rows


def row_items(index: int, place: str, row: dict, form: Form) -> list[Item]:
    """The item of a row whose answers are scored; none where truncation leaves no answer."""
    example = encode(row, place, form)
    if example is None:
        return []
    item = answer_item(index, example)
    item.truncated = example.cut
    return [item]


def prepare_texts(cfg: EvalConfig, tok: Tokenizer, limit: int) -> ReadyTask:
    """The file of --perplexity in rows, at most --limit of its rows."""
    start, path, bad = time.perf_counter(), Path(cfg.perplexity), []
    ready = ReadyTask(Task(NAMES[0], None, (), (), 0, LOSS, ""), cfg.perplexity)
    rolling, form = cfg.rolling or path.suffix.lower() == ".txt", Form(tok, limit, cfg.chat, cfg.truncate)
    for index, (place, row) in enumerate(texts_of(path, cfg.perplexity_split, bad)[: cfg.limit]):
        try:
            if not rolling:
                found = row_items(index, place, row, form)
                ready.items += found
                ready.skipped += [] if found else [index]
            elif isinstance(row.get("text"), str):
                ready.items += window_items(row["text"], tok, limit, row.get("domain"), len(ready.items))
            else:
                raise ValueError("there is no field 'text', which --rolling scores: leave --rolling away")
        except ValueError as error:
            bad.append(str(error) if str(error).startswith(place) else f"{place}: {error}")
    settle_bad(bad, cfg.skip_bad, say)
    if not ready.items:
        raise ValueError(f"{path}: no row has an answer within {limit} tokens; raise --max_length")
    digest = hashlib.sha256()
    for item in ready.items:
        context, target, _ = item.rows[0][2:]
        digest.update(array("i", [*context, *target, -len(context)]).tobytes())
    ready.sha, ready.seconds = digest.hexdigest()[:16], time.perf_counter() - start
    return ready


def fidelity_examples(cfg: EvalConfig, tok: Tokenizer, limit: int) -> list[Example]:
    """Rows of --fidelity, at most --limit of them, whose prompts leave room for an answer within the context."""
    bad, examples, form = [], [], Form(tok, limit, cfg.chat, cfg.truncate)
    rows = texts_of(Path(cfg.fidelity), cfg.fidelity_split, bad)[: cfg.limit]
    for place, row in rows:
        try:
            example = encode(row, place, form)
            if example is not None and example.prompt > limit - ANSWER_TOKENS:
                raise ValueError(
                    f"{place}: a prompt of {example.prompt:,} tokens; expected at most {limit - ANSWER_TOKENS:,}, the "
                    "context less the answer: raise --max_length or delete the row"
                )
            examples += [] if example is None else [example]
        except ValueError as error:
            bad.append(str(error))
    settle_bad(bad, cfg.skip_bad, say)
    if not examples:
        raise ValueError(f"{cfg.fidelity}: no row has an answer within {limit} tokens; raise --max_length")
    if len(examples) + len(bad) < len(rows):
        say(f"note: {len(rows) - len(examples) - len(bad)} rows have no answer within {limit} tokens and are left out")
    return examples


# -----------------------------------------------------------------------------
# From items to batches


def grouped(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """A row for each context of each item, and for each row the number of its own: a context is computed once."""
    firsts, number, of = [], {}, []
    for row in rows:
        key = (row.item, row.context.tobytes())
        if key not in number:
            number[key] = len(firsts)
            firsts.append(row)
        of.append(number[key])
    return firsts, of


def shape(rows: Sequence[Row]) -> tuple[int, int]:
    """Rows and columns of the cache in which these are scored: a row for each context, or for each longer choice."""
    firsts, of = grouped(rows)
    longer = Counter(context for context, row in zip(of, rows) if len(row.target) > 1)
    return sum(max(1, longer[number]) for number in range(len(firsts))), max(row.width for row in rows)


def n_tokens(items: Sequence[Item]) -> int:
    """Tokens that scoring these computes."""
    rows = [row for item in items for row in item.rows]
    return sum(len(row.context) for row in grouped(rows)[0]) + sum(len(row.target) for row in rows)


def plan_batches(items: Sequence[Item], budget: int) -> list[list[Item]]:
    """Batches of items of like width, rows x width <= budget (a wider item alone). They depend neither on ranks nor on
    what is done."""
    generate = bool(items) and not items[0].rows[0].target
    shapes = {item.index: shape(item.rows) for item in items}
    if not generate:
        budget = min(budget, max(MIN_BATCH, sum(rows * width for rows, width in shapes.values()) // MIN_BATCHES))
    batches: list[list[Item]] = []
    height = widest = 0
    for item in sorted(items, key=lambda item: (-shapes[item.index][1], item.index)):
        rows, width = shapes[item.index]
        # generation gains from every row more than pads cost
        padding = not generate and width < FULL * widest and height * widest >= MIN_TOKENS
        if batches and not padding and (height + rows) * widest <= budget:
            batches[-1].append(item)
            height += rows
        else:
            batches.append([item])
            height, widest = rows, width
    return batches


# -----------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True)
class Scorer:
    """What is being scored, and how."""

    model: Transformer
    tok: Tokenizer
    route: str = "off"
    control: Control | None = None
    max_batch_tokens: int = 16384
    task: str = ""

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @property
    def sequence(self) -> bool:
        """One decision per sequence, made with its context: by sequence routers, or by a list, whatever the unit."""
        if self.route == "off":
            return False
        return self.model.routing.unit == "sequence" or (self.control is not None and self.control.whole)

    @property
    def whole(self) -> bool:
        """Gates come one for each sequence; a list of experts is told pair by pair all the same."""
        return self.sequence and not (self.model.routing.experts and self.model.routing.unit == "token")

    @property
    def shares(self) -> bool:
        """A token's computation depends on the tokens before it alone: one prefix may serve several contexts."""
        return self.route == "off" or (self.route == "gather" and not self.sequence and self.control is None)

    @property
    def caches(self) -> bool:
        """A context may be computed apart from its choices: not by route mask, nor where routers average over both."""
        return self.route != "mask" and not (self.sequence and self.model.routing.pool == "all")


@dataclass
class Usage:
    """What a context and its choices needed: units that executed, by place (R), of how many; the context's cache."""

    item: int
    executed: list[int] = field(default_factory=list)
    units: int = 0
    kv_bytes: int = 0

    def add(self, executed: list[int], units: int) -> None:
        """Count `units` more; executed is empty where nothing is routed."""
        if executed:
            self.executed = [a + b for a, b in zip(self.executed, executed)] if self.executed else executed
            self.units += units


@dataclass
class Contexts:
    """Contexts that were computed: their cache, the states (B,D) of their last tokens, what each needed."""

    cache: KVCache
    last: Tensor
    usage: list[Usage]


def units_run(gates: Tensor | None, batch: int) -> list[list[int]]:
    """Units that executed, by row and place: gates (R,B) or (R,B,T) -> B lists of R."""
    if gates is None:
        return [[] for _ in range(batch)]
    return (gates.sum(-1) if gates.dim() == 3 else gates).T.int().tolist()


def token_scores(model: Transformer, h: Tensor, wanted: Sequence[int]) -> list[tuple[float, bool]]:
    """Log-probability of one wanted token at each state h (n,D), fp32, and whether another one is likelier."""
    scores = []
    for part, tokens in zip(h.split(HEAD_ROWS), torch.tensor(wanted, device=h.device).split(HEAD_ROWS)):
        # log_softmax as lm-eval: on a CPU its fp32 sums are off by about 1e-5 a token, which logsumexp would not share
        logits = model.head(part)  # (n,D) -> (n,V)
        finite(logits.sum(-1), model, "scoring")  # one NaN or infinity makes the sum one, and a sum is cheap
        values = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        scores += zip(values.tolist(), (logits.argmax(-1) != tokens).tolist())
    return scores


def cache_bytes(run: Scorer, length: int, executed: list[int]) -> int:
    """Bytes of keys and values that `length` tokens leave: none where they were skipped, but for MLPs and kv=all."""
    model, skipped = run.model, 0
    if run.route != "off" and (run.sequence or model.routing.kv == "routed"):
        counts = [count for place, count in zip(model.routing.places, executed) if place.target in ("attn", "block")]
        skipped = sum(length * (1 - count) if run.sequence else length - count for count in counts)
    return kv_bytes(model.config, model.dtype.itemsize, length, skipped)


def forced(run: Scorer, rows: Sequence[Row], starts: Sequence[int], width: int) -> Tensor | None:
    """Gates of the control, (R,B) or (R,B,T), for `width` columns of rows that begin at `starts`; None without one, and
    where a decision for whole sequences was made with the context."""
    gates = None if run.control is None else run.control.batch([(run.task, row.item) for row in rows], starts, width)
    return None if gates is None else gates.to(run.device)


def read_contexts(run: Scorer, contexts: Sequence[Row], width: int, prefix: Contexts | None = None) -> Contexts:
    """Compute contexts, beyond a prefix that was computed already, into a cache with room for `width` tokens.

    A single context wider than the token budget goes in pieces, but where a sequence router must see it whole.
    """
    start, usage = 0, [Usage(row.item) for row in contexts]
    if prefix is None:
        cache = KVCache(run.model, len(contexts), max_len=width)
    else:
        cache, start = prefix.cache.clone(), prefix.cache.lengths[0]
        cache.select([0] * len(contexts))
        usage = [replace(prefix.usage[0], item=row.item) for row in contexts]
    rows = [row.context[start:] for row in contexts]
    tokens, lengths = pad(rows, run.device), [len(row) for row in rows]
    step = tokens.shape[1] if run.sequence or len(rows) > 1 else run.max_batch_tokens
    for a in range(0, tokens.shape[1], step):
        piece, real = tokens[:, a : a + step], [min(length - a, step) for length in lengths]
        gates = forced(run, contexts, cache.lengths, piece.shape[1])
        h, gates = run.model.hidden(piece, lengths=real, cache=cache, route=run.route, gates=gates)
        for own, counts, length in zip(usage, units_run(gates, len(rows)), real):
            own.add(counts, 1 if run.whole else length)
    for row, own in zip(contexts, usage):
        own.kv_bytes = cache_bytes(run, len(row.context), own.executed)
    at = torch.tensor(lengths, device=run.device) - 1 - a
    return Contexts(cache, h[torch.arange(len(rows), device=run.device), at], usage)  # (B,T,D) -> (B,D)


def add_scores(run: Scorer, states: Tensor, rows: Sequence[Row], picks: list[tuple[int, int]], sums: list) -> None:
    """Add to sums[row] the log-probability of its target's token at `place`, and 1 where another one is likelier, for
    each (row, place) of states (n,D)."""
    scores = token_scores(run.model, states, [rows[row].target[place] for row, place in picks]) if picks else []
    for (row, _), (value, missed) in zip(picks, scores):
        sums[row] = (sums[row][0] + value, sums[row][1] + missed)


def score_cached(run: Scorer, rows: Sequence[Row], prefix: Contexts | None = None) -> tuple[list, list[Usage]]:
    """Of each row the log-probability and the number of tokens that greedy decoding would not say, and what each
    context needed: contexts once, then the targets on copies of them."""
    firsts, of = grouped(rows)
    width = max(row.width for row in rows)
    read, sums = read_contexts(run, firsts, width, prefix), [(0.0, 0)] * len(rows)
    # a target's first token is predicted by its context's last
    picks = [(number, 0) for number, row in enumerate(rows) if row.at[0] == 0]
    add_scores(run, read.last[[of[number] for number, _ in picks]], rows, picks, sums)

    longer = [number for number, row in enumerate(rows) if len(row.target) > 1]
    longer.sort(key=lambda number: -len(rows[number].target))
    # a batch of several contexts was planned to fit
    size = max(1, run.max_batch_tokens // width) if len(firsts) == 1 else max(1, len(longer))
    for a in range(0, len(longer), size):
        group = longer[a : a + size]
        cache = read.cache.clone() if a + size < len(longer) else read.cache
        cache.select([of[number] for number in group])
        h, counted = read_targets(run, [rows[number] for number in group], cache)
        picks = [(number, place) for number in group for place in rows[number].at if place]
        line = {number: line for line, number in enumerate(group)}
        at = [line[number] for number, _ in picks], [place - 1 for _, place in picks]
        add_scores(run, h[at], rows, picks, sums)  # (B,T,D) -> (n,D)
        for number, counts in zip(group, counted):
            read.usage[of[number]].add(counts, len(rows[number].target) - 1)
    return sums, read.usage


def read_targets(run: Scorer, rows: Sequence[Row], cache: KVCache) -> tuple[Tensor, list[list[int]]]:
    """States (B,T,D) of all but the last token of each target, after the contexts in the cache; and what executed."""
    tokens = pad([row.target[:-1] for row in rows], run.device)
    lengths, gates = [len(row.target) - 1 for row in rows], forced(run, rows, cache.lengths, tokens.shape[1])
    h, gates = run.model.hidden(tokens, lengths=lengths, cache=cache, route=run.route, gates=gates)
    return h, units_run(None if run.whole else gates, len(rows))


def score_plain(run: Scorer, rows: Sequence[Row]) -> tuple[list, list[Usage]]:
    """The same without a cache, each target after a context of its own: for route mask and pool=all, and what
    score_cached must equal. A context's units count once, though they are computed for every choice (with pool=all
    each choice has a route of its own)."""
    firsts, of = grouped(rows)
    usage, sums = [Usage(row.item) for row in firsts], [(0.0, 0)] * len(rows)
    size = max(1, run.max_batch_tokens // max(row.width for row in rows))
    for a in range(0, len(rows), size):
        group = rows[a : a + size]
        whole, prompts = [row.context + row.target[:-1] for row in group], [len(row.context) for row in group]
        tokens = pad(whole, run.device)
        gates = forced(run, group, [0] * len(group), tokens.shape[1])
        h, gates = run.model.hidden(
            tokens, lengths=list(map(len, whole)), prompt_lengths=prompts, route=run.route, gates=gates
        )
        picks = [(number, place) for number, row in enumerate(group, a) for place in row.at]
        at = [number - a for number, _ in picks], [prompts[number - a] + place - 1 for number, place in picks]
        add_scores(run, h[at], rows, picks, sums)  # (B,T,D) -> (n,D)
        for number, row in enumerate(group, a):
            own = None if gates is None else gates[:, number - a]
            count_plain(run, usage[of[number]], row, own, row is firsts[of[number]])
    return sums, usage


def count_plain(run: Scorer, usage: Usage, row: Row, gates: Tensor | None, first: bool) -> None:
    """Count what one row ran, gates (R) or (R,T); of all but the first row of a context the target alone."""
    prompt, end = len(row.context), len(row.context) + len(row.target) - 1

    def counts(start: int, stop: int) -> list[int]:
        if gates is None:
            return []
        return (gates if gates.dim() == 1 else gates[:, start:stop].sum(1)).int().tolist()

    if first:
        usage.add(counts(0, end), 1 if run.whole else end)
        usage.kv_bytes = cache_bytes(run, prompt, counts(0, prompt))
    elif not run.whole or run.model.routing.pool == "all":
        usage.add(counts(prompt, end), 1 if run.whole else end - prompt)


def generate_answers(run: Scorer, rows: Sequence[Row], prefix: Contexts | None) -> tuple[list[list[int]], list[Usage]]:
    """Greedy continuations up to a stop token or a stop text; a finished row leaves the batch."""
    read, answers = read_contexts(run, rows, max(row.width for row in rows), prefix), [[] for _ in rows]

    def choose(logits: Tensor, going: list[int]) -> Tensor:
        finite(logits.sum(-1), run.model, "scoring")
        return logits.argmax(-1)

    def ends(answer: list[int]) -> bool:
        tail = run.tok.decode(answer[-STOP_TAIL:])
        return len(answer) == NEW_TOKENS or answer[-1] in run.tok.stop_ids or any(stop in tail for stop in STOPS)

    def gates_of(going: list[int], starts: list[int], width: int) -> Tensor | None:
        return forced(run, [rows[number] for number in going], starts, width)

    how = {"route": run.route, "gates": gates_of}
    for step in decode(run.model, read.cache, read.last, None, choose, ends, **how):
        counted = units_run(None if run.whole else step.gates, len(step.rows))
        for number, token, counts in zip(step.rows, step.tokens, counted):
            read.usage[number].add(counts, 1)
            answers[number].append(token)
    for row, answer, usage in zip(rows, answers, read.usage):
        usage.kv_bytes = cache_bytes(run, len(row.context) + len(answer) - 1, usage.executed)
    return answers, read.usage


def score_rows(run: Scorer, rows: Sequence[Row], prefix: Contexts | None) -> tuple[list, list[Usage]]:
    """Log-probability and misses, or new tokens, of each row, and what each context needed."""
    if not rows[0].target:
        return generate_answers(run, rows, prefix)
    return score_cached(run, rows, prefix) if run.caches else score_plain(run, rows)


def score_batch(run: Scorer, batch: Sequence[Item], prefix: Contexts | None = None) -> list[dict]:
    """Records of a batch's items, one sample line each."""
    rows = [row for item in batch for row in item.rows]
    height, width = shape(rows)
    parts = [rows]
    if height * width > run.max_batch_tokens:  # a lone item of several wide contexts goes one by one
        firsts, of = grouped(rows)
        parts = [[row for row, own in zip(rows, of) if own == number] for number in range(len(firsts))]
    values, usage = {}, {item.index: [] for item in batch}
    for part in parts:
        found, needed = score_rows(run, part, prefix)
        values |= {(row.item, row.choice): value for row, value in zip(part, found)}
        for own in needed:
            usage[own.item].append(own)
    return [
        record(run, item, [values[item.index, row.choice] for row in item.rows], usage[item.index]) for item in batch
    ]


# -----------------------------------------------------------------------------
# Records: a line of --samples for each item


def record(run: Scorer, item: Item, values: list, usage: Sequence[Usage]) -> dict:
    """Sample line of one item. The first five fields are what everybody reads; results are summed from the rest."""
    total = Usage(item.index)
    for own in usage:
        total.add(own.executed, own.units)
    generated = not item.rows[0].target
    logprobs = [] if generated else [logprob for logprob, _ in values]
    line = {"task": run.task, "index": item.index, "logprobs": logprobs}
    if generated:
        line |= answer_fields(run.tok, values[0], item.gold)
    elif item.gold is None:
        line |= {"prediction": None, "gold": None, "tokens": sum(len(row.at) for row in item.rows), **item.counts}
    elif len(values) == 1:
        greedy = values[0][1] == 0
        line |= {"prediction": greedy, "gold": True, "acc": int(greedy)}
    else:
        line |= choice_fields(logprobs, item)
    line |= {"executed": total.executed, "units": total.units, "truncated": item.truncated}
    line |= {"kv_bytes": sum(own.kv_bytes for own in usage) // len(usage)}
    return line | ({"spanning": True} if item.spanning else {})


def choice_fields(logprobs: Sequence[float], item: Item) -> dict:
    """acc takes the likeliest choice, acc_norm the likeliest per character; of equals the first, as numpy's argmax."""
    norms = [value / size for value, size in zip(logprobs, item.sizes)]
    best, best_norm = logprobs.index(max(logprobs)), norms.index(max(norms))
    return {
        "prediction": best,
        "gold": item.gold,
        "prediction_norm": best_norm,
        "acc": int(best == item.gold),
        "acc_norm": int(best_norm == item.gold),
    }


def answer_fields(tok: Tokenizer, tokens: list[int], answer: str) -> dict:
    """GSM8K's strict and flexible match of a generated answer."""
    end = "" if tok.eos_id is None else tok.decode([tok.eos_id])
    text = cut_at_stop(tok.decode(tokens, skip_special=True), (*STOPS, end))
    gold, strict, flexible = normal(answer), extract(text, STRICT, 0), extract(text, FLEXIBLE, -1)
    return {
        "prediction": strict,
        "gold": gold,
        "prediction_flexible": flexible,
        "text": text,
        "exact_match_strict": int(normal(strict) == gold),
        "exact_match_flexible": int(normal(flexible) == gold),
    }


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def extract(text: str, pattern: re.Pattern, which: int) -> str:
    """lm-eval's regex filter: one of the matches (of a tuple its first group that is not empty), or [invalid]."""
    found = pattern.findall(text)
    match = found[which] if found else "[invalid]"
    return (match if isinstance(match, str) else next(group for group in match if group)).strip()


def normal(answer: str) -> str:
    """lm-eval's exact_match with the task's regexes_to_ignore and ignore_case."""
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


# -----------------------------------------------------------------------------
# Cuts that realise a budget on the tasks


def calibrate_cuts(run: Scorer, ready: Sequence[ReadyTask], cfg: EvalConfig, rt: runtime.Runtime) -> None:
    """Move all cuts by one amount, in logits, until the contexts of the tasks' first items, together, realise --budget.

    No answer is looked at. A router that learned where layers matter runs more of them on one source than on another:
    the average over the tasks is held, and each of them keeps what it is worth.
    """
    cuts = [router.cut.item() for router in run.model.routers()]
    if ready and 0.0 < cfg.budget < 1.0:
        firsts = [row for own in ready for item in own.items[: cfg.calibrate] for row in grouped(item.rows)[0]]
        contexts = [Example(row.context.tolist(), len(row.context), []) for row in firsts]
        settle(Workload(run.model, contexts, rt), cfg.budget, CALIBRATION_ROUNDS, base=cuts, memory=0.5)


# -----------------------------------------------------------------------------
# From records to results


def outcomes(ready: ReadyTask, records: Sequence[dict]) -> dict:
    """What --against compares of a task: its sha, and each item's outcome by metric."""
    found, metrics = {"sha": ready.sha}, ready.task.metrics
    if metrics == LOSS or ready.task.continues:  # of a continuation the whole target is what is counted
        tokens, metrics = [r.get("tokens", 1) for r in records], metrics[:-1]
        found |= {"nll": [-sum(r["logprobs"]) for r in records], "tokens": tokens}
    if chosen(records):
        found[GOLD_LOGPROB] = gold_logprobs(records)
    return found | {metric: "".join(str(r[metric]) for r in records) for metric in metrics}


def read_other(path: str, ready: Sequence[ReadyTask]) -> dict:
    """Outcomes by item in another run's --out, which must have scored the same items."""
    other = runtime.read_json(path)
    other = other.get("items") if isinstance(other, dict) else None
    if not isinstance(other, dict):
        raise ValueError(f"--against={path} has no field 'items'; expected a file that eval.py wrote with --out")
    common = [own for own in ready if own.name in other]
    if not common:
        raise ValueError(
            f"--against={path} has none of the tasks scored here; it has {', '.join(other)}: score the same tasks"
        )
    found = {name: entry.get("sha") for name, entry in other.items() if isinstance(entry, dict)}
    unlike = [own.name for own in common if found.get(own.name) != own.sha]
    if unlike:
        raise ValueError(
            f"--against={path} scored other items or prompts of {', '.join(unlike)}; give both runs the "
            "same --data, --limit, --fewshot, --fewshot_by and --seed"
        )
    return other


# -----------------------------------------------------------------------------
# What a reader of the numbers must know


def say(text: str) -> None:
    """A note, beside the results, on the master alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)


def some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def say_notes(ready: Sequence[ReadyTask], limit: int, data: str) -> None:
    """Items that were cut, scored otherwise, or not at all."""
    for own in ready:
        n = len(own.items) + len(own.skipped)
        cut = [item.index for item in own.items if item.truncated]
        spanning = [item.index for item in own.items if item.spanning]
        if cut:
            lost = f"their {'end' if own.task.metrics == LOSS else 'beginning'} ({some(cut)})"
            say(f"note: {own.name}: {len(cut)} of {n} items are longer than {limit} tokens and lost {lost}")
        if spanning:
            say(
                f"note: {own.name}: {len(spanning)} of {n} items have a choice without a token of its own, since one "
                f"spans it and the context; what the longer encoding adds is scored ({some(spanning)})"
            )
        if own.mute:
            say(f"note: {own.name}: the chat template refuses a system message, so it is left out, as lm-eval does")
        if own.skipped:
            say(
                f"note: {own.name}: {len(own.skipped)} of {n} items are skipped, nothing of them can be scored "
                f"({some(own.skipped)})"
            )
    val = [own for own in ready if own.task.read is mmlu and Path(own.source).parent.name == "val"]
    if val:
        say(
            f"note: {len(val)} MMLU subjects have no test file in {data}, so their val files are scored, unlike "
            "published numbers"
        )


def say_missed(cfg: EvalConfig, run: Scorer, results: dict) -> None:
    """Tasks whose routers ran another share than --budget, and how to hold it: cuts come from other texts."""
    held = cfg.budget_per == "sequence" or cfg.calibrate  # the latter on average over the tasks, not in each of them
    if cfg.budget is None or cfg.control != "none" or run.route == "off" or held:
        return
    far = [(name, r["capacity"]) for name, r in results.items() if name != NAMES[1]]
    far = [f"{name} {capacity:.3f}" for name, capacity in far if abs(capacity - cfg.budget) > MISSED]
    if not far:
        return
    routing, ways = run.model.routing, []
    if routing.reads == "first":
        ways.append("--budget_per=sequence")
    elif routing.unit == "token" and not routing.experts and not cfg.hold_budget:
        ways.append("--hold_budget")
    say(f"note: the capacity is not the --budget={cfg.budget:g} that was asked for ({', '.join(far)}), since the cuts "
        f"were calibrated on other texts; to hold it: {' or '.join([*ways, '--calibrate=N'])}")


# -----------------------------------------------------------------------------
# Running


class Samples:
    """The samples file: a line per item, appended as batches end, sorted at the end. Lines carry `run`, a hash of all
    that decides them."""

    def __init__(self, path: str | None, rt: runtime.Runtime):
        self.path, self.rt = Path(path) if path else None, rt

    def resume(self, stamps: dict[str, str]) -> dict[str, dict[int, dict]]:
        """Records that a killed run left, by task and index; the master reads them for all ranks."""
        outcome: list = [None]
        if self.rt.is_master:
            try:
                outcome = [self.read(stamps)]
            except ValueError as error:
                outcome = [str(error)]
        if self.rt.world_size > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], str):
            raise ValueError(outcome[0])
        return outcome[0]

    def read(self, stamps: dict[str, str]) -> dict[str, dict[int, dict]]:
        """The same from the file; a torn last line is cut off."""
        done: dict[str, dict[int, dict]] = {name: {} for name in stamps}
        if self.path is None or not self.path.exists():
            return done
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                same = stamps.get(record["task"]) == record["run"]
                done.get(record["task"], {})[record["index"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number} is not a sample line; expected what --samples writes: name another"
                ) from None
            if not same:
                raise ValueError(
                    f"{self.path}, line {number} ({record['task']}) comes from a run with another model, "
                    "route, data, prompt, limit, dtype or batch size; repeat that command to go on, or give "
                    "another --samples"
                )
        if whole != data:
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return done

    def append(self, records: Sequence[dict]) -> None:
        if self.path is not None and self.rt.is_master and records:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(sample_lines(records))

    def finish(self, records: Sequence[dict]) -> None:
        if self.path is not None and self.rt.is_master:
            runtime.write_atomic(self.path, lambda path: path.write_text(sample_lines(records), encoding="utf-8"))


def sample_lines(records: Sequence[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def prefix_row(run: Scorer, items: Sequence[Item]) -> Row | None:
    """The beginning that all contexts share, as a context of its own, where computing it once pays."""
    if not run.shares or len(items) < 2:
        return None
    contexts = [row.context for item in items for row in item.rows]
    length = min(common_prefix(contexts), min(map(len, contexts)) - 1)
    return Row(0, 0, contexts[0][:length], array("i"), ()) if length >= MIN_PREFIX else None


def score_task(
    run: Scorer,
    ready: ReadyTask,
    done: dict[int, dict],
    save: Callable,
    progress: Progress,
    rt: runtime.Runtime,
) -> list[dict]:
    """Records of all items, in order; those in `done` are there already. save(records) is called as batches end.

    Ranks take whole batches in turn, so that a record does not depend on how many there are.
    """
    start, whole = time.perf_counter(), [item for item in ready.items if not item.truncated]
    cut = [item for item in ready.items if item.truncated]  # these have lost the common beginning
    first, prefix = prefix_row(run, whole), None
    batches = [(batch, first) for batch in plan_batches(whole, run.max_batch_tokens)]
    batches += [(batch, None) for batch in plan_batches(cut, run.max_batch_tokens)]
    todo = [pair for pair in batches if any(item.index not in done for item in pair[0])]
    ready.resumed = len(done)
    progress.total -= n_tokens(ready.items) - sum(n_tokens(batch) for batch, _ in todo)
    for a in range(0, len(todo), rt.world_size):
        turn, records = todo[a : a + rt.world_size], []
        if rt.rank < len(turn):
            batch, begin = turn[rt.rank]
            if begin is not None and prefix is None:
                prefix = read_contexts(run, [begin], begin.width)
            records = score_batch(run, batch, None if begin is None else prefix)
        records = [r | {"run": ready.stamp} for part in collect([(rt.rank, records)], rt) for r in part]
        save([record for record in records if record["index"] not in done])
        done |= {record["index"]: record for record in records}
        progress.step(sum(n_tokens(batch) for batch, _ in turn), note=ready.name)
    runtime.synchronize(run.device)
    ready.seconds += time.perf_counter() - start
    return [done[item.index] for item in ready.items]


def check_settings(cfg: EvalConfig) -> None:
    """Refuse settings that contradict each other before anything is loaded."""
    if not cfg.tasks and not cfg.custom and cfg.perplexity is None and cfg.fidelity is None:
        raise ValueError(
            "there is nothing to score; give --tasks=NAME,..., --custom=FILE.jsonl, --perplexity=FILE.jsonl or "
            "--fidelity=FILE.jsonl"
        )
    forced = cfg.route in ("mask", "gather") or cfg.control != "none" or cfg.budget is not None
    if cfg.routers is None and forced:
        raise ValueError(
            f"--route={cfg.route} --control={cfg.control} --budget={cfg.budget} needs routed layers, and no "
            "router file was given: give --routers"
        )
    moves = cfg.routers is not None and cfg.budget is not None and cfg.control == "none" and cfg.route != "off"
    if cfg.calibrate is not None and not moves:
        raise ValueError(
            f"--calibrate={cfg.calibrate} moves the routers' cuts to a budget, and there is no router file, "
            "no budget, or a control in its place; give --routers and --budget, and neither --control nor "
            "--route=off"
        )
    holds = cfg.hold_budget or cfg.budget_per == "sequence"
    if holds and (not moves or cfg.calibrate is not None):
        raise ValueError(
            "--hold_budget and --budget_per=sequence hold a budget by the routers themselves, with "
            f"--routers={cfg.routers} --budget={cfg.budget} --control={cfg.control} --route={cfg.route} "
            f"--calibrate={cfg.calibrate}; give --routers and --budget, and neither --control, --calibrate nor "
            "--route=off"
        )
    if cfg.shard and (cfg.base_dtype or cfg.fidelity):
        raise ValueError("--shard with --base_dtype or --fidelity; expected a base in dtype, and no rounded copy of "
                         "it: leave these away")
    if cfg.route == "off" and cfg.control != "none":
        raise ValueError(f"--control={cfg.control} forces routes and --route=off has none; leave --route away")
    check_row_settings(cfg)
    if not cfg.fewshot_as_multiturn and not cfg.apply_chat_template:
        raise ValueError("--fewshot_as_multiturn=false says how shots stand in a chat; give --apply_chat_template too")
    rows = cfg.perplexity is not None or cfg.fidelity is not None
    if cfg.chat is not None and not cfg.apply_chat_template and not rows:
        raise ValueError(f"--chat={cfg.chat} names a chat form, and prompts are plain; give --apply_chat_template too")
    lowest = {"fewshot": 0, "limit": 1, "max_length": 2, "max_batch_tokens": 1, "threads": 1, "calibrate": 1}
    for name, low in lowest.items():
        if getattr(cfg, name) is not None and getattr(cfg, name) < low:
            raise ValueError(f"--{name} is {getattr(cfg, name)}; expected {low} or more")
    check_writable(cfg)


def check_row_settings(cfg: EvalConfig) -> None:
    """The same of --perplexity and --fidelity."""
    for name in ("rolling", "perplexity_split"):
        if getattr(cfg, name) and cfg.perplexity is None:
            raise ValueError(f"--{name} says how --perplexity is read, and there is none; give --perplexity=FILE")
    for name in ("yardstick", "fidelity_split"):
        if getattr(cfg, name) and cfg.fidelity is None:
            raise ValueError(f"--{name} belongs to --fidelity, and there is none; give --fidelity=FILE")
    if cfg.truncate and cfg.perplexity is None and cfg.fidelity is None:
        raise ValueError("--truncate says how a file of rows is read, and there is none; give --perplexity=FILE")
    if cfg.fidelity is not None and (cfg.routers is None or cfg.route not in ("auto", "gather")):
        raise ValueError(
            f"--fidelity={cfg.fidelity} compares routed answers with dense ones, with --routers={cfg.routers} and "
            f"--route={cfg.route}; give --routers, and no --route"
        )


def check_writable(cfg: EvalConfig) -> None:
    """Refuse --out and --samples where no file can be written."""
    for path in [Path(path).resolve() for path in (cfg.out, cfg.samples) if path]:
        folder = next(parent for parent in path.parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(
                f"{path} cannot be written, {path if path.is_dir() else folder} is in the way; name a file "
                "in your own folder"
            )


def context_limit(cfg: EvalConfig, run: Scorer, tasks: Sequence[Task]) -> int:
    """Tokens of context to use. Raises ValueError for what the model or a task cannot have."""
    longest = run.model.config.max_seq_len
    limit = cfg.max_length or longest
    if limit > longest:
        raise ValueError(f"--max_length is {limit}; this model's context is {longest}")
    if any(task.generates for task in tasks) and (limit <= NEW_TOKENS or run.route == "mask"):
        raise ValueError(
            f"gsm8k generates {NEW_TOKENS} tokens; it needs a context beyond {limit} and a cache: --route=off or gather"
        )
    if cfg.apply_chat_template and cfg.chat is None and not run.tok.templates:
        raise ValueError(
            "--apply_chat_template, but this model has no chat template; name a form with --chat, or leave it away"
        )
    return limit


def prepare_all(cfg: EvalConfig, rt: runtime.Runtime) -> tuple[Scorer, list[ReadyTask]]:
    """The model, and all tasks in rows: whatever is wrong with any of them shows before anything is computed."""
    tasks = tasks_named(cfg.tasks, cfg.custom)
    shots = {task.name: task.shots if cfg.fewshot is None else cfg.fewshot for task in tasks}
    paths = locate(tasks, Path(cfg.data), shots)
    model = load_base(cfg.model, rt, base_dtype=cfg.base_dtype, shard=cfg.shard, adapter=cfg.adapter)
    tok = load_tokenizer(cfg.model)
    needless = cfg.control.startswith("random:") or cfg.control == SMALLEST_GATE  # of a table of cuts
    budget = None if needless else cfg.budget
    meta = load_routers(model, cfg.routers, budget, cfg.budget_per) if cfg.routers else None
    if meta is not None and cfg.hold_budget:
        hold(model, meta, budget)
    if meta is not None and lacks_adapter(model, meta):
        say(f"note: {cfg.routers} was tuned on LoRA that this model lacks: give the --adapter beside it")
    orders = meta.orders if meta is not None else {}
    route = "off" if cfg.routers is None else "gather"
    run = Scorer(model, tok, route if cfg.route == "auto" else cfg.route, max_batch_tokens=cfg.max_batch_tokens)
    names = [task.name for task in tasks] + ([NAMES[0]] if cfg.perplexity else []) + ([TASK] if cfg.fidelity else [])
    run = replace(run, control=make_control(cfg.control, model, cfg.budget, orders, names))
    limit = context_limit(cfg, run, tasks)
    ready = [prepare_task(task, paths[task.name], run, cfg, limit) for task in tasks]
    if cfg.perplexity:
        ready.append(prepare_texts(cfg, tok, limit))
    if cfg.perplexity and run.route != "off":  # the dense result stands beside every routed one
        ready.append(replace(ready[-1], task=replace(ready[-1].task, name=NAMES[1])))
    stamp_tasks(cfg, run, rt, ready)
    say_notes(ready, limit, cfg.data)
    if run.sequence and ready and any(item.counts for item in ready[-1].items):
        say("note: with --rolling a sequence router decides from what stands before each window, mostly one token")
    return run, ready


def stamp_tasks(cfg: EvalConfig, run: Scorer, rt: runtime.Runtime, ready: Sequence[ReadyTask]) -> None:
    """Mark each task with a hash of all that decides its records."""
    routers = hashlib.sha256(Path(cfg.routers).read_bytes()).hexdigest() if cfg.routers else None
    decides = [
        run.model.exact_fingerprint,
        routers,
        run.route,
        cfg.budget,
        cfg.hold_budget,
        cfg.budget_per,
        cfg.control,
        (cfg.calibrate or cfg.control == SMALLEST_GATE) and (cfg.calibrate, [own.sha for own in ready]),  # moved by all
        str(rt.dtype),
        cfg.base_dtype,
        rt.device.type,
        cfg.max_batch_tokens,
    ]
    for own in ready:
        own.stamp = hashlib.sha256(repr([*decides, own.sha, own.name]).encode()).hexdigest()[:16]


def domain_results(ready: ReadyTask, records: Sequence[dict], weights: Sequence[float]) -> dict:
    """Results of each domain that a file of texts names, by NAME/DOMAIN."""
    domains = {item.index: item.domain for item in ready.items}
    found = {}
    for domain in sorted({domain for domain in domains.values() if domain is not None}):
        found[f"{ready.name}/{domain}"] = result_of(
            [r for r in records if domains[r["index"]] == domain], LOSS, weights
        )
    return found


def route_report(results: dict, domains: dict) -> dict:
    """Variance of routes within and between tasks, and domains in place of their file; {} for less than two."""
    parts = {name: r for name, r in results.items() if name not in GROUPS and not (domains and name in NAMES)} | domains
    routed = [r for r in parts.values() if "capacity_per_layer" in r]
    if len(routed) < 2:
        return {}
    return {"routes": routes_of([r["capacity_per_layer"] for r in routed], [r["route_variance"] for r in routed])}


def results_by_task(cfg: EvalConfig, ready: Sequence[ReadyTask], records: dict, weights: Sequence[float]) -> dict:
    """Results by task, and of the groups that were asked for."""
    results = {}
    for own in ready:
        results[own.name] = result_of(records[own.name], own.task.metrics, weights)
        results[own.name] |= {"shots": own.shots, "seconds": own.seconds, "file": own.source}
        results[own.name] |= {"resumed": own.resumed, "skipped": len(own.skipped)}
    for group in [group for group in GROUPS if group in cfg.tasks or "mmlu" in cfg.tasks]:
        results[group] = group_result(GROUPS[group], results, records, weights)
    return results


def measure_fidelity(cfg: EvalConfig, run: Scorer, rt: runtime.Runtime) -> dict:
    """What --fidelity asks for: the routed model and its controls, beside the dense model."""
    examples, model = fidelity_examples(cfg, run.tok, context_limit(cfg, run, ())), run.model
    name = "routed" if cfg.control == "none" else cfg.control
    if cfg.control == SMALLEST_GATE:
        settle(Workload(model, examples, rt), cfg.budget, CALIBRATION_ROUNDS)
    orders = read_router_file(cfg.routers)[1].orders
    variants = with_controls(Variant(name, model, run.route, run.control), orders, Workload(model, examples, rt))
    variants.insert(0, Variant("dense", model))
    if cfg.yardstick:
        variants += [Variant(f"int{bits}", rounded(model, bits, group)) for bits, group in ((8, None), (4, GROUP))]
    return fidelity(variants, examples, run.tok.stop_ids, rt) | {"file": cfg.fidelity}


@torch.inference_mode()
def evaluate(cfg: EvalConfig, rt: runtime.Runtime) -> dict:
    """Everything that --out holds."""
    check_settings(cfg)
    run, ready = prepare_all(cfg, rt)
    passes = everything(rt) if cfg.shard else rt  # ranks that hold the blocks together score all items together
    other = read_other(cfg.against, ready) if cfg.against else {}
    samples = Samples(cfg.samples, rt)
    done = samples.resume({own.name: own.stamp for own in ready})
    records = {}
    if cfg.calibrate or cfg.control == SMALLEST_GATE:
        calibrate_cuts(run, [own for own in ready if own.name != NAMES[1]], cfg, passes)
    with Progress("scoring, in tokens", sum(n_tokens(own.items) for own in ready)) as progress:
        for own in ready:
            how = replace(run, task=own.name)
            if own.name == NAMES[1]:
                how = replace(how, route="off", control=None)
            records[own.name] = score_task(how, own, done[own.name], samples.append, progress, passes)
    samples.finish([record for part in records.values() for record in part])

    weights = run.model.place_weights().tolist() if run.model.routing else ()
    results = results_by_task(cfg, ready, records, weights)
    say_missed(cfg, run, results)
    domains = {name: r for own in ready for name, r in domain_results(own, records[own.name], weights).items()}
    items = {own.name: outcomes(own, records[own.name]) for own in ready}
    report = {"model": cfg.model, "fingerprint": run.model.fingerprint, "route": run.route, "results": results}
    report |= {"items": items, "settings": asdict(cfg), "torch": torch.__version__}
    report |= {"device": runtime.device_name(rt.device), "dtype": str(rt.dtype).removeprefix("torch.")}
    report |= {"peak_memory_bytes": runtime.peak_memory_bytes(rt.device)} | route_report(results, domains)
    if domains:
        report["domains"] = domains
    if cfg.fidelity:
        report["fidelity"] = measure_fidelity(cfg, run, rt)
    if cfg.against:
        report["against"] = {"file": cfg.against, "tasks": compare_runs(items, other)}
    return report


def main() -> None:
    cfg = runtime.cli(EvalConfig)
    rt = runtime.setup(cfg.device, cfg.dtype, cfg.seed)
    if rt.device.type == "cpu":
        torch.set_num_threads(cfg.threads or len(os.sched_getaffinity(0)))
    report = evaluate(cfg, rt)
    if rt.is_master:
        if cfg.out:
            runtime.write_json(cfg.out, report)
        bold = {task.name: task.metrics[0] for task in tasks_named(cfg.tasks, cfg.custom)}
        print("\n".join(report_lines(report, bold) + fidelity_lines(report.get("fidelity"))))
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
