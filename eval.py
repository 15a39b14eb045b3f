"""Score a model, dense or routed, on the paper's nine tasks and on held-out text, with lm-evaluation-harness's definitions.

    python eval.py --model=DIR --tasks=arc_easy,mmlu --data=data/eval --limit=100 --out=dense.json
    python eval.py --model=DIR --routers=FILE --budget=0.7 --tasks=arc_easy --perplexity=FILE.jsonl --against=dense.json --samples=F.jsonl
    torchrun --nproc_per_node=8 eval.py ...         # the same batches shared out, hence the same numbers; --samples lets a killed run go on

Data are read from the files that the publishers give out, under --data (python data/fetch.py gets them). Tasks: boolq rte openbookqa
piqa mmlu mmlu_SUBJECT winogrande gsm8k hellaswag arc_challenge arc_easy, and any {question, choices, answer} file by --custom.
Fast because a context is computed once for all its choices, a few-shot prefix once for all items that share it (where routes do not depend
on what follows: dense, unit token), and logits only where they count. Few-shot numbers are those of arXiv 2410.13184, table 2.

Legend: B rows, T tokens, D width, V vocabulary, R routers, n scored positions.
"""

import csv
import difflib
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import runtime
from data.records import read_records
from model import KVCache, Transformer, decode, load_model, load_routers, pad
from recipe.cost import kv_bytes
from router import mean_order, parse_layers, quantile_cut, random_route, static_route
from tokenizer import Tokenizer, encode_chat, load_tokenizer

HEAD_ROWS = 512  # positions whose logits exist at once: 512 x 128k x 4 bytes = 256 MiB
CALIBRATION_ROWS = 8  # contexts in a batch when cuts are moved, and how often routes and cuts follow each other
CALIBRATION_ROUNDS = 4
MIN_PREFIX = 16  # tokens that must be common to all items before computing them apart pays
MIN_BATCH, MIN_BATCHES = 4096, 8  # small tasks are cut as well, to give every rank a batch, but not below this many tokens
MIN_TOKENS, FULL = 512, 0.8  # from so many tokens on, a batch rather ends than takes an item that would be pads by more than a fifth
PERPLEXITY = ("perplexity", "perplexity_dense")  # names of their records; the dense one stands beside every routed one
NEW_TOKENS = 256  # lm-eval's max_gen_toks for Hugging Face models
STOPS = ("Question:", "</s>", "<|im_end|>")  # lm-eval tasks/gsm8k/gsm8k.yaml
STOP_TAIL = 16  # last tokens of an answer that are searched for a stop text
STRICT, FLEXIBLE = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the same file
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # the same file: deleted before answers are compared

MMLU = {
    "stem":
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics college_physics "
        "computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
        "high_school_computer_science high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities":
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law jurisprudence "
        "logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions",
    "social_sciences":
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_microeconomics "
        "high_school_psychology human_sexuality professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other":
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics miscellaneous "
        "nutrition professional_accounting professional_medicine virology",
}


# ---------------------------------------------------------------------------------------------------------------------------------
# Tasks: where the rows lie, how a row becomes a prompt and its choices, what is counted


@dataclass(frozen=True)
class Example:
    """A question in words. `contexts` has one text per choice (all the same, but for partial scoring); a choice follows after one space."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def solved(self) -> str:
        """The example as one of the few shots."""
        return f"{self.contexts[self.gold]} {self.choices[self.gold]}\n\n"


@dataclass(frozen=True)
class Task:
    """One data set, declared: files are tried in order, under --data; of several that fit a pattern the largest is taken."""

    name: str
    read: Callable[[dict | list], Example]  # one row of the published file; KeyError, TypeError, ValueError mean a bad row
    files: Sequence[str]
    pool: Sequence[str]  # where the few-shot examples come from
    shots: int  # the paper's
    metrics: tuple[str, ...]  # the paper's first
    home: str  # where people get the data
    description: str = ""  # stands before the shots
    in_order: bool = False  # the shots are the first of the pool, whatever --fewshot_by says
    spare: bool = False  # lm-eval draws one shot more and leaves out the item itself (its tasks without a test split)


def ask(context: str, choices: Sequence[str], gold: int) -> Example:
    return Example((context,) * len(choices), tuple(choices), gold)


def pick(label, labels: Sequence) -> int:
    """Place of a label among those allowed."""
    if label not in labels:
        raise ValueError(f"the label is {label!r}, expected one of {', '.join(map(str, labels))}")
    return list(labels).index(label)


def boolq(row: dict) -> Example:
    passage = f"{row['title']} -- {row['passage']}" if "title" in row else row["passage"]  # SuperGLUE's file holds them joined so
    label = str(row["answer"] if "answer" in row else row["label"]).lower()
    return ask(f"{passage}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), pick(label, ("false", "true")))


def rte(row: dict) -> Example:
    first, second = (row["sentence1"], row["sentence2"]) if "sentence1" in row else (row["premise"], row["hypothesis"])
    gold = pick(row["label"], ("entailment", "not_entailment"))
    return ask(f"{first}\nQuestion: {second} True or False?\nAnswer:", ("True", "False"), gold)


def lettered(row: dict, form: str) -> Example:
    """ARC and OpenBookQA: {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}; 3 to 5 labels, letters or digits."""
    choices = row["question"]["choices"]
    gold = pick(row["answerKey"].strip(), [choice["label"] for choice in choices])
    return ask(form.format(row["question"]["stem"]), [choice["text"] for choice in choices], gold)


def piqa(row: dict) -> Example:
    return ask(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), pick(str(row["label"]), ("0", "1")))


def winogrande(row: dict) -> Example:
    """Partial scoring: each option goes into the context, and what follows the blank is scored (arXiv 1806.02847)."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank (_)")
    return Example((before + row["option1"], before + row["option2"]), (after.strip(),) * 2, pick(row["answer"], ("1", "2")))


def hellaswag(row: dict) -> Example:
    def clean(text: str) -> str:  # WikiHow's marks
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return ask(context, [clean(ending) for ending in row["endings"]], pick(int(row["label"]), range(len(row["endings"]))))


def mmlu(row: list) -> Example:
    if len(row) != 6:
        raise ValueError(f"the row has {len(row)} fields, expected six (question, four options, answer)")
    question, *options, answer = row
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options))
    return ask(f"{question.strip()}\n{lines}Answer:", "ABCD", pick(answer, "A B C D".split()))


def gsm8k(row: dict) -> Example:
    return ask(f"Question: {row['question']}\nAnswer:", (row["answer"],), 0)


def custom(row: dict) -> Example:
    gold, choices = row["answer"], row["choices"]
    if not isinstance(choices, list):
        raise ValueError(f"choices is {choices!r}, expected a list of texts")
    gold = pick(gold, range(len(choices))) if type(gold) is int else pick(gold, choices)
    return ask(f"Question: {row['question']}\nAnswer:", choices, gold)


def _arc(name: str, folder: str, shots: int) -> Task:
    files = [f"arc/{folder}/{folder}-{split}.jsonl" for split in ("Test", "Train")]
    read = lambda row: lettered(row, "Question: {}\nAnswer:")  # noqa: E731
    return Task(name, read, files[:1], files[1:], shots, ("acc_norm", "acc"), "https://allenai.org/data/arc")


def _mmlu(subject: str) -> Task:
    test, val, dev = (f"mmlu/data/{split}/{subject}_{split}.csv" for split in ("test", "val", "dev"))
    description = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    return Task(f"mmlu_{subject}", mmlu, [test, val], [dev], 5, ("acc",), "https://github.com/hendrycks/test", description, in_order=True)


def _custom(path: str) -> Task:
    file = [str(Path(path).resolve())]
    return Task(Path(path).stem, custom, file, file, 0, ("acc_norm", "acc"), "--custom", spare=True)


TASKS = {task.name: task for task in (
    Task("boolq", boolq, ["boolq/dev.jsonl", "boolq/superglue/val.jsonl"],
         ["boolq/train.jsonl", "boolq/train_first.jsonl", "boolq/superglue/train.jsonl"], 0, ("acc",),
         "https://github.com/google-research-datasets/boolean-questions", spare=True),
    Task("rte", rte, ["rte/glue/RTE/dev.tsv", "rte/superglue/val.jsonl"], ["rte/glue/RTE/train.tsv", "rte/superglue/train.jsonl"], 0,
         ("acc",), "https://gluebenchmark.com/tasks", spare=True),
    Task("openbookqa", lambda row: lettered(row, "{}"), ["openbookqa/Main/test.jsonl"], ["openbookqa/Main/train.jsonl"], 0,
         ("acc_norm", "acc"), "https://allenai.org/data/open-book-qa"),
    Task("piqa", piqa, ["piqa/valid.jsonl"], ["piqa/train.jsonl", "piqa/train_first.jsonl"], 0, ("acc_norm", "acc"),
         "https://yonatanbisk.com/piqa", spare=True),
    Task("winogrande", winogrande, ["winogrande/dev.jsonl"], ["winogrande/train_*.jsonl"], 5, ("acc",),
         "https://winogrande.allenai.org", spare=True),
    Task("gsm8k", gsm8k, ["gsm8k/test.jsonl"], ["gsm8k/train.jsonl"], 5, ("exact_match_strict", "exact_match_flexible"),
         "https://github.com/openai/grade-school-math"),
    Task("hellaswag", hellaswag, ["hellaswag/hellaswag_val.jsonl"], ["hellaswag/hellaswag_train.jsonl"], 10, ("acc_norm", "acc"),
         "https://rowanzellers.com/hellaswag", spare=True),
    _arc("arc_challenge", "ARC-Challenge", 25),
    _arc("arc_easy", "ARC-Easy", 0),
    *(_mmlu(subject) for subjects in MMLU.values() for subject in subjects.split()),
)}
GROUPS = {f"mmlu_{category}": [f"mmlu_{subject}" for subject in subjects.split()] for category, subjects in MMLU.items()}
GROUPS["mmlu"] = [name for names in GROUPS.values() for name in names]


def tasks_named(names: Sequence[str], files: Sequence[str] = ()) -> list[Task]:
    """Tasks of the names, groups taken apart, and one per custom file. Raises ValueError for an unknown name, with the nearest one."""
    known = [*TASKS, *GROUPS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            short = ", ".join([task for task in TASKS if not task.startswith("mmlu_")] + list(GROUPS))
            raise ValueError(f"--tasks names {name!r}, the nearest task is {near!r}; expected of {short}, mmlu_SUBJECT")
    if clash := next((file for file in files if Path(file).stem in {*known, *PERPLEXITY}), None):
        raise ValueError(f"--custom={clash} would be the task {Path(clash).stem!r}, which exists already: rename the file")
    chosen = [TASKS[part] for name in names for part in GROUPS.get(name, [name])] + [_custom(file) for file in files]
    return list({task.name: task for task in chosen}.values())


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


def find(data: Path, patterns: Sequence[str]) -> Path | None:
    """First pattern that a file under `data` fits; of several files the largest."""
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).is_absolute() else sorted(data.glob(pattern))
        if found := [path for path in found if path.is_file()]:
            return max(found, key=lambda path: path.stat().st_size)
    return None


def read_rows(path: Path) -> list[tuple[str, dict | list]]:
    """Rows of a .jsonl, .tsv (tab split, no quoting: GLUE's texts hold lone quotes) or .csv file, each with its place in words."""
    if path.suffix == ".jsonl":
        rows = read_records(path)
        labels = path.with_name(f"{path.stem}-labels.lst")
        if labels.is_file():
            values = labels.read_text(encoding="utf-8").split()
            if len(values) != len(rows):
                raise ValueError(f"{labels} holds {len(values)} labels, {path.name} {len(rows)} rows; expected as many: fetch both again")
            rows = [(place, {"label": value, **row}) for (place, row), value in zip(rows, values)]
        return rows
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".csv":
                reader = csv.reader(file, strict=True)
                return [(f"{path}, line {reader.line_num}", row) for row in reader if row]
            header, *lines = file.read().rstrip("\n").split("\n")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file ({error}); expected the published one: fetch it again") from None
    rows, names = [], header.split("\t")
    for number, line in enumerate(lines, 2):
        if len(values := line.split("\t")) != len(names):
            raise ValueError(f"{path}, line {number} has {len(values)} fields, expected {', '.join(names)}: mend or delete the line")
        rows.append((f"{path}, line {number}", dict(zip(names, values))))
    return rows


def read_examples(path: Path, read: Callable) -> list[Example]:
    """Every row of a file as an Example. Raises ValueError with file and line for a row that is not what was published."""
    examples = []
    for place, row in read_rows(path):
        try:
            example = read(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"there is no field {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{place}: {reason}; expected a row as it was published: mend or delete it, or fetch the file again") from None
        for text in (*example.contexts, *example.choices):
            if not isinstance(text, str) or not text.strip():
                what = "question" if text in example.contexts else "choice"
                raise ValueError(f"{place}: a {what} is {text!r}; expected text: mend or delete the row")
        if len(example.choices) < 2 and read is not gsm8k:
            raise ValueError(f"{place}: the row has {len(example.choices)} choices; expected two or more: mend or delete it")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no row; expected at least one: fetch the file again")
    return examples


def locate(tasks: Sequence[Task], data: Path, shots: dict[str, int]) -> dict[str, tuple[Path, Path | None]]:
    """File to score and file of the shots, per task. Raises FileNotFoundError that lists all that is missing and where it is had."""
    found, missing = {}, []
    for task in tasks:
        wanted = [task.files, task.pool if shots[task.name] else ()]
        found[task.name] = tuple(find(data, patterns) for patterns in wanted)
        absent = [patterns[0] for patterns, path in zip(wanted, found[task.name]) if patterns and path is None]
        missing += [(task, ", ".join(absent))] if absent else []
    if missing:
        lines = [f"  {task.name}: {files}  ({task.home})" for task, files in missing[:12]]
        lines += [f"  and {len(missing) - 12} tasks more"] if len(missing) > 12 else []
        names = dict.fromkeys("mmlu" if task.read is mmlu else task.name for task, _ in missing)
        raise FileNotFoundError(f"under {data} these files are missing:\n" + "\n".join(lines)
                                + f"\ncheck --data, or get them: python data/fetch.py --tasks={','.join(names)}")
    return found


def draw_shots(task: Task, items: Sequence[Example], pool: Sequence[Example], n: int, *, by: str, seed: int) -> list[list[Example]]:
    """n solved examples per item: `index` by a generator of seed and index, `first` in file order, `harness` as lm-eval draws."""
    if n == 0:
        return [[] for _ in items]
    need = n if task.in_order or (by != "index" and not task.spare) else n + 1
    if len(pool) < need:
        raise ValueError(f"{task.name}: {n} shots need a pool of {need} and it holds {len(pool)}; lower --fewshot or fetch the whole file")
    if by == "first" or task.in_order:
        return [[shot for shot in pool[:n + 1] if shot != item][:n] for item in items]

    def others(rng: random.Random, item: Example) -> list[Example]:
        drawn = [shot for shot in rng.sample(pool, n + 1) if shot != item][:n]
        return drawn if len(drawn) == n else rng.sample([shot for shot in pool if shot != item], n)  # the item stood in the pool twice

    if by == "index":
        return [others(random.Random(f"{seed}/{index}"), item) for index, item in enumerate(items)]
    rng = random.Random(seed)  # lm-eval api/samplers.py: one generator runs through the task's items
    return [others(rng, item) if task.spare else rng.sample(pool, n) for item in items]


# ---------------------------------------------------------------------------------------------------------------------------------
# From words to tokens, and from items to batches


@dataclass
class Branch:
    """Tokens that follow a context, and the places among them whose log-probabilities are summed."""

    choice: int
    tokens: array
    scored: Sequence[int]


@dataclass
class Query:
    """A context that is computed once, and what follows it. Without branches: a prompt to continue. `owner`: task and index of its item."""

    owner: tuple[str, int]
    context: array
    branches: list[Branch] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return max(1, sum(len(branch.tokens) > 1 for branch in self.branches))

    @property
    def width(self) -> int:
        return len(self.context) + (max(len(branch.tokens) for branch in self.branches) if self.branches else NEW_TOKENS)


@dataclass
class Item:
    """One question in tokens: `sizes` are the choices' lengths in characters, `gold` the right choice or the right answer's text."""

    queries: list[Query]
    gold: int | str
    sizes: list[int]
    truncated: bool = False
    domain: str | None = None  # what a messages file says of the row

    @property
    def task(self) -> str:
        return self.queries[0].owner[0]

    @property
    def index(self) -> int:
        return self.queries[0].owner[1]

    @property
    def rows(self) -> int:
        return sum(query.rows for query in self.queries)

    @property
    def width(self) -> int:
        return max(query.width for query in self.queries)

    @property
    def tokens(self) -> int:
        return sum(len(query.context) + sum(len(branch.tokens) for branch in query.branches) for query in self.queries)


@dataclass
class Work:
    """A task ready to run."""

    task: Task
    items: list[Item]
    shots: int
    source: str
    sha: str  # of every context and choice in tokens: two runs with the same sha scored the same thing
    seconds: float = 0.0


def encode_pair(tok: Tokenizer, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of the choice after it, split as lm-eval does (api/model.py, _encode_pair).

    Trailing spaces go to the choice, and the choice is what the whole text has beyond as many tokens as the context alone. Special tokens
    in the text count as such, as there.
    """
    bare = context.rstrip()
    ids = _encode(tok, bare)
    return ids, tok.encode(bare + context[len(bare):] + choice, bos=tok.adds_bos, special=True)[len(ids):]


@lru_cache(maxsize=4)  # the choices of one item share their context
def _encode(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text, bos=tok.adds_bos, special=True)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all rows share: that of the least and the greatest row."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def queries_of(owner: tuple[str, int], pairs: Sequence[tuple[list[int], list[int]]], limit: int, share: bool) -> tuple[list[Query], bool]:
    """Queries of an item's (context, choice) pairs, and whether one was cut from the left to `limit` + 1 tokens, as lm-eval does.

    Choices with the same context share it. Where contexts differ (partial scoring) and `share` allows it, their common beginning is the
    context and the rest belongs to the branches, unscored.
    """
    cut = [context[max(0, len(context) + len(choice) - limit - 1):] for context, choice in pairs]
    groups: dict[tuple[int, ...], list[int]] = {}
    for choice, context in enumerate(cut):
        groups.setdefault(tuple(context), []).append(choice)
    common = common_prefix(list(groups)) if share else 0
    if len(groups) > 1 and common:
        groups = {tuple(cut[0][:common]): list(range(len(pairs)))}
    queries = [Query(owner, array("i", context)) for context in groups]
    for query, choices in zip(queries, groups.values()):
        for choice in choices:
            rest = cut[choice][len(query.context):]
            query.branches.append(Branch(choice, array("i", rest + pairs[choice][1]), range(len(rest), len(rest) + len(pairs[choice][1]))))
    return queries, any(len(short) < len(context) for short, (context, _) in zip(cut, pairs))


def prepare_task(task: Task, paths: tuple[Path, Path | None], tok: Tokenizer, *, shots: int, by: str, seed: int, items: int | None,
                 limit: int, share: bool) -> Work:
    """Read a task and turn its first `items` items into tokens. limit: context length; share: as in queries_of."""
    start, work, digest = time.perf_counter(), [], hashlib.sha256()
    examples = read_examples(paths[0], task.read)[:items]
    pool = read_examples(paths[1], task.read) if shots else []
    for index, (example, drawn) in enumerate(zip(examples, draw_shots(task, examples, pool, shots, by=by, seed=seed))):
        owner, before = (task.name, index), task.description + "".join(shot.solved() for shot in drawn)
        if task.read is gsm8k:
            ids = tok.encode(before + example.contexts[0], bos=tok.adds_bos, special=True)
            pairs, short = [(ids, [])], ids[max(0, len(ids) - (limit - NEW_TOKENS)):]
            item = Item([Query(owner, array("i", short))], example.choices[0], [], len(short) < len(ids))
        else:
            pairs = [encode_pair(tok, before + context, " " + choice) for context, choice in zip(example.contexts, example.choices)]
            for choice, (_, ids) in enumerate(pairs):
                if not 1 <= len(ids) <= limit:
                    raise ValueError(f"{paths[0]}, item {index}: choice {choice} has {len(ids)} tokens; expected 1 to {limit}, the context")
            queries, truncated = queries_of(owner, pairs, limit, share)
            item = Item(queries, example.gold, [len(choice) for choice in example.choices], truncated)
        work.append(item)
        digest.update(b"".join(array("i", [*context, -1, *choice, -2]).tobytes() for context, choice in pairs) + str(item.gold).encode())
    return Work(task, work, shots, str(paths[0]), digest.hexdigest()[:16], time.perf_counter() - start)


def prepare_perplexity(name: str, path: Path, tok: Tokenizer, *, items: int | None, limit: int, split: str | None) -> Work:
    """Answers of a messages file, to be scored after everything before the first of them."""
    start, work, digest = time.perf_counter(), [], hashlib.sha256()
    for place, row in read_records(path):
        if split is not None and row.get("split") != split:
            continue
        if len(work) == items:
            break
        if "messages" not in row:
            raise ValueError(f"{place}: there is no field 'messages'; expected a list of {{\"role\", \"content\"}}: mend or delete the row")
        try:
            ids, mask = encode_chat(tok, row["messages"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        first = mask.index(True)
        if first == 0 or len(ids) > limit:
            raise ValueError(f"{place}: {len(ids)} tokens, {first} before the answer; expected at most {limit}, the context length, "
                             "and one or more before: shorten the row")
        scored = [at - first for at, loss in enumerate(mask) if loss]
        branch = Branch(0, array("i", ids[first:first + scored[-1] + 1]), scored)
        work.append(Item([Query((name, len(work)), array("i", ids[:first]), [branch])], 0, [len(branch.scored)], domain=row.get("domain")))
        digest.update(array("i", [*ids, -first]).tobytes())
    if not work:
        which = f" whose split is {split!r}" if split else ""
        raise ValueError(f"{path} holds no row{which}; expected at least one: check --perplexity and --perplexity_split")
    return Work(Task(name, custom, (), (), 0, ("nll",), ""), work, 0, str(path), digest.hexdigest()[:16], time.perf_counter() - start)


def plan(items: Sequence[Item], budget: int) -> list[list[Item]]:
    """Batches of items of like width, rows x width <= budget (a wider item alone). They depend neither on ranks nor on what is done."""
    scored = bool(items and items[0].queries[0].branches)
    if scored:
        budget = min(budget, max(MIN_BATCH, sum(item.rows * item.width for item in items) // MIN_BATCHES))
    batches: list[list[Item]] = []
    rows = width = 0
    for item in sorted(items, key=lambda item: (-item.width, item.index)):
        padding = scored and item.width < FULL * width and rows * width >= MIN_TOKENS  # generation gains from every row more than pads cost
        if batches and not padding and (rows + item.rows) * width <= budget:
            batches[-1].append(item)
            rows += item.rows
        else:
            batches.append([item])
            rows, width = item.rows, item.width
    return batches


# ---------------------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True)
class Run:
    """What is being scored, and how."""

    model: Transformer
    tok: Tokenizer
    route: str = "off"
    control: "Control | None" = None
    max_batch_tokens: int = 16384

    @property
    def device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @property
    def sequence(self) -> bool:
        """One decision per sequence, made with its context: by sequence routers, or by a list, whatever the unit."""
        return self.route != "off" and (self.model.routing.unit == "sequence" or (self.control is not None and self.control.whole))

    @property
    def shares(self) -> bool:
        """A token's computation depends on the tokens before it and nothing else: one prefix may serve several contexts."""
        return self.route == "off" or (self.route == "gather" and not self.sequence and self.control is None)

    @property
    def caches(self) -> bool:
        """A context may be computed apart from its choices: not by route mask, nor where the router averages over both (pool=all)."""
        return self.route != "mask" and not (self.sequence and self.model.routing.pool == "all")


@dataclass
class Score:
    """Outcome of one query: log-probability by choice, or new tokens; units that executed per router; bytes of keys and values."""

    logprobs: dict[int, float] = field(default_factory=dict)
    executed: list[int] = field(default_factory=list)
    units: int = 0
    kv_bytes: int = 0
    tokens: list[int] = field(default_factory=list)

    def ran(self, counts: list[int], units: int) -> None:
        """Add the executed units of `units` more; counts is empty where nothing is routed."""
        if counts:
            self.executed = add(self.executed, counts) if self.executed else counts
            self.units += units


@dataclass
class Prefix:
    """A beginning that all contexts of a batch share, computed once."""

    length: int = 0
    cache: KVCache | None = None
    score: Score = field(default_factory=Score)


def tally(gates: torch.Tensor | None, batch: int) -> list[list[int]]:
    """Units that executed, per row and router: gates (R,B) or (R,B,T) -> B lists of R."""
    return [[] for _ in range(batch)] if gates is None else (gates.sum(-1) if gates.dim() == 3 else gates).T.int().tolist()


def add(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b)]


def log_probs(model: Transformer, h: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of the C wanted tokens of each position, fp32, a few positions at a time. h (n,D) -> n lists of C."""
    values = []
    for part, wanted in zip(h.split(HEAD_ROWS), pad(targets, h.device).split(HEAD_ROWS)):
        # log_softmax as lm-eval: on a CPU its fp32 sums are off by about 1e-5 a token, which logsumexp would not share
        values += model.head(part).log_softmax(-1).gather(1, wanted).tolist()  # (n,D) -> (n,V) -> (n,C)
    return values


def cache_bytes(run: Run, length: int, executed: list[int]) -> int:
    """Bytes of keys and values that `length` tokens leave: skipped (layer, token) pairs leave none, but for MLPs and kv=all."""
    model, skipped = run.model, 0
    if run.route != "off" and (run.sequence or model.routing.kv == "routed"):
        counts = [count for place, count in zip(model.routing.places, executed) if place.target != "mlp"]
        skipped = sum(length * (1 - count) if run.sequence else length - count for count in counts)
    return kv_bytes(model.config, model.tok_embeddings.weight.element_size(), length, skipped)


def prefill(run: Run, queries: Sequence[Query], prefix: Prefix) -> tuple[KVCache, torch.Tensor, list[Score]]:
    """Compute contexts (beyond the prefix). Returns the cache, the last tokens' states (B,D) and a score per query.

    A single context wider than the token budget goes in pieces, except where a sequence router must see it whole.
    """
    if prefix.cache is not None:
        cache = prefix.cache.clone()
        cache.select([0] * len(queries))
    else:
        cache = KVCache(run.model, len(queries), max_len=max(query.width for query in queries))
    scores = [Score({branch.choice: 0.0 for branch in query.branches}, prefix.score.executed, prefix.score.units) for query in queries]
    rows = [query.context[prefix.length:] for query in queries]
    tokens, lengths = pad(rows, run.device), [len(row) for row in rows]
    step = tokens.shape[1] if run.sequence or len(rows) > 1 else run.max_batch_tokens
    for a in range(0, tokens.shape[1], step):
        piece, real = tokens[:, a:a + step], [min(n - a, step) for n in lengths]
        gates = forced(run, queries, cache.lengths, piece.shape[1])
        h, gates = run.model.hidden(piece, lengths=real, cache=cache, route=run.route, gates=gates)
        for score, counts, n in zip(scores, tally(gates, len(rows)), real):
            score.ran(counts, 1 if run.sequence else n)
    for query, score in zip(queries, scores):
        score.kv_bytes = cache_bytes(run, len(query.context), score.executed)
    last = h[torch.arange(len(rows), device=run.device), torch.tensor(lengths, device=run.device) - 1 - a]  # (B,T,D) -> (B,D)
    return cache, last, scores


def score_cached(run: Run, queries: Sequence[Query], prefix: Prefix) -> list[Score]:
    """Log-probabilities of all branches: contexts once, then the branches' tokens on copies of their rows of the cache."""
    cache, last, scores = prefill(run, queries, prefix)
    first = {b: found for b, query in enumerate(queries) if (found := [branch for branch in query.branches if branch.scored[0] == 0])}
    if first:  # the first token of a choice is predicted by the context's last
        states = last[torch.tensor(list(first), device=run.device)]  # (B,D) -> (n,D)
        wanted = [[branch.tokens[0] for branch in found] for found in first.values()]
        for (b, found), values in zip(first.items(), log_probs(run.model, states, wanted)):
            for branch, value in zip(found, values):
                scores[b].logprobs[branch.choice] += value

    rest = [(b, branch) for b, query in enumerate(queries) for branch in query.branches if len(branch.tokens) > 1]
    rest.sort(key=lambda pair: -len(pair[1].tokens))
    size = len(rest)  # a batch of several queries was planned to fit
    if rest and len(queries) == 1:
        size = max(1, run.max_batch_tokens // queries[0].width)
    for a in range(0, len(rest), size or 1):
        group = rest[a:a + size]
        branched = cache.clone() if a + size < len(rest) else cache
        branched.select([b for b, _ in group])
        tokens, lengths = pad([branch.tokens[:-1] for _, branch in group], run.device), [len(branch.tokens) - 1 for _, branch in group]
        gates = None if run.sequence else forced(run, [queries[b] for b, _ in group], branched.lengths, tokens.shape[1])
        h, gates = run.model.hidden(tokens, lengths=lengths, cache=branched, route=run.route, gates=gates)
        places = [(row, place - 1) for row, (_, branch) in enumerate(group) for place in branch.scored if place]
        row, column = torch.tensor(places, device=run.device).T
        values = iter(log_probs(run.model, h[row, column], [[group[r][1].tokens[c + 1]] for r, c in places]))  # (B,T,D) -> (n,D)
        for (b, branch), n, counts in zip(group, lengths, tally(None if run.sequence else gates, len(group))):
            scores[b].logprobs[branch.choice] += sum(value for value, in islice(values, sum(place > 0 for place in branch.scored)))
            scores[b].ran(counts, n)
    return scores


def score_plain(run: Run, queries: Sequence[Query]) -> list[Score]:
    """The same without a cache, each branch after a context of its own: for route mask and pool=all, and what score_cached must equal.

    A context's units count once, though they are computed for every choice (with pool=all every choice has a route of its own).
    """
    scores = [Score() for _ in queries]
    flat = [(score, query, branch) for score, query in zip(scores, queries) for branch in query.branches]
    size = max(1, run.max_batch_tokens // max(query.width for query in queries))
    for a in range(0, len(flat), size):
        group = flat[a:a + size]
        rows, prompts = [query.context + branch.tokens[:-1] for _, query, branch in group], [len(query.context) for _, query, _ in group]
        tokens = pad(rows, run.device)
        gates = forced(run, [query for _, query, _ in group], [0] * len(group), tokens.shape[1])
        h, gates = run.model.hidden(tokens, lengths=[len(row) for row in rows], prompt_lengths=prompts, route=run.route, gates=gates)
        places = [(row, prompt + place - 1) for row, (prompt, (_, _, branch)) in enumerate(zip(prompts, group)) for place in branch.scored]
        row, column = torch.tensor(places, device=run.device).T
        values = iter(log_probs(run.model, h[row, column], [[branch.tokens[place]] for _, _, branch in group for place in branch.scored]))
        for r, (score, query, branch) in enumerate(group):
            def counts(start: int, stop: int) -> list[int]:
                return [] if gates is None else tally(gates[:, r:r + 1] if run.sequence else gates[:, r:r + 1, start:stop], 1)[0]

            first, length = branch is query.branches[0], len(rows[r])
            score.logprobs[branch.choice] = sum(value for value, in islice(values, len(branch.scored)))
            if first:
                score.ran(counts(0, length), 1 if run.sequence else length)
                score.kv_bytes = cache_bytes(run, prompts[r], counts(0, prompts[r]))
            elif not run.sequence or run.model.routing.pool == "all":
                score.ran(counts(prompts[r], length), 1 if run.sequence else length - prompts[r])
    return scores


def generate_answers(run: Run, queries: Sequence[Query], prefix: Prefix) -> list[Score]:
    """Greedy continuations up to a stop token or a stop text; a finished row leaves the batch."""
    cache, last, scores = prefill(run, queries, prefix)

    def choose(last: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, list[int]]:
        chosen, going = run.model.head(last).argmax(-1), []
        for index, (row, token) in enumerate(zip(rows, chosen.tolist())):  # the one host sync of a step
            output = scores[row].tokens
            output.append(token)
            tail = run.tok.decode(output[-STOP_TAIL:])
            if token not in run.tok.stop_ids and len(output) < NEW_TOKENS and not any(stop in tail for stop in STOPS):
                going.append(index)
        return chosen, going

    def gates_of(rows: list[int], lengths: list[int]) -> torch.Tensor | None:
        return None if run.sequence else forced(run, [queries[row] for row in rows], lengths, 1)

    for rows, gates in decode(run.model, cache, last, choose, route=run.route, gates=gates_of):
        for row, counts in zip(rows, tally(None if run.sequence else gates, len(rows))):
            scores[row].ran(counts, 1)
    for query, score in zip(queries, scores):
        score.kv_bytes = cache_bytes(run, len(query.context) + len(score.tokens) - 1, score.executed)
    return scores


def score_batch(run: Run, batch: Sequence[Item], prefix: Prefix) -> list[dict]:
    """Records of a batch's items, one sample line each."""
    queries = [query for item in batch for query in item.queries]
    fits = sum(query.rows for query in queries) * max(query.width for query in queries) <= run.max_batch_tokens
    scores = []
    for part in [queries] if fits else [[query] for query in queries]:  # a lone item of several wide contexts goes one by one
        if not part[0].branches:
            scores += generate_answers(run, part, prefix)
        else:
            scores += score_cached(run, part, prefix) if run.caches else score_plain(run, part)
    found = iter(scores)
    return [record(run, item, [next(found) for _ in item.queries]) for item in batch]


def record(run: Run, item: Item, scores: Sequence[Score]) -> dict:
    """Sample line of one item. The first five fields are what everybody reads; the rest is what the results are summed from."""
    total = Score()
    for score in scores:
        total.ran(score.executed, score.units)
        total.logprobs |= score.logprobs
    logprobs = [total.logprobs[choice] for choice in range(len(total.logprobs))]
    rest = {"executed": total.executed, "units": total.units, "kv_bytes": sum(score.kv_bytes for score in scores) // len(scores),
            "truncated": item.truncated}
    line = {"task": item.task, "index": item.index, "logprobs": logprobs}
    if not logprobs:
        stops = (*STOPS, "" if run.tok.eos_id is None else run.tok.decode([run.tok.eos_id]))
        text = cut_at_stop(run.tok.decode(scores[0].tokens, skip_special=True), stops)
        gold, strict, flexible = normal(item.gold), extract(text, STRICT, 0), extract(text, FLEXIBLE, -1)
        return line | {"prediction": strict, "gold": gold, "prediction_flexible": flexible, "text": text,
                       "exact_match_strict": int(normal(strict) == gold), "exact_match_flexible": int(normal(flexible) == gold)} | rest
    if item.task in PERPLEXITY:
        return line | {"prediction": None, "gold": None, "tokens": item.sizes[0]} | rest
    best, best_norm = _argmax(logprobs), _argmax([value / size for value, size in zip(logprobs, item.sizes)])
    return line | {"prediction": best, "gold": item.gold, "prediction_norm": best_norm, "acc": int(best == item.gold),
                   "acc_norm": int(best_norm == item.gold)} | rest


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # the first of equals, as numpy's


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


# ---------------------------------------------------------------------------------------------------------------------------------
# Controls: routes that no router chose, over the same routed layers


@dataclass(frozen=True)
class Control:
    """Gates of an item's tokens start .. stop - 1: (R,) for whole sequences, (R, stop - start) for tokens."""

    gates: Callable[[tuple[str, int], int, int], torch.Tensor]
    whole: bool  # they are for whole sequences


def forced(run: Run, queries: Sequence[Query], starts: Sequence[int], width: int) -> torch.Tensor | None:
    """Gates of the control, (R,B) or (R,B,T), for `width` columns of rows that begin at `starts`; None without a control."""
    if run.control is None:
        return None
    return torch.stack([run.control.gates(query.owner, start, start + width) for query, start in zip(queries, starts)], 1).to(run.device)


def make_control(text: str, model: Transformer, budget: float | None, orders: dict[str, list[str]]) -> Control | None:
    """--control: none, static:LAYERS (everyone skips these; of both: names such as 5.attn,7.mlp), the name of one of the router file's orders (a static
    list at capacity --budget), random:SEED (at --budget), mean:FILE.json (the average of a routed run's routes as a list, per task at its capacity)."""
    kind, _, value = text.partition(":")
    if kind == "none":
        return None
    if budget is None and (kind == "random" or kind in orders):
        raise ValueError(f"--control={text} needs the capacity at which it skips: give --budget=0..1")
    if kind == "random" and value.isdigit():
        return random_control(value, model, budget)
    if kind in orders and not value:
        order = [model.routing.names.index(name) for name in orders[kind]]
        return list_control(lambda task: (order, budget), model)
    if kind == "static":
        return list_control(static_list(text, value, model), model)
    if kind == "mean":
        return list_control(mean_list(text, value, model), model)
    raise ValueError(f"--control is {text!r}; expected none, static:LAYERS, random:SEED, mean:FILE.json, or an order of the router file "
                     f"({', '.join(orders) or 'this one holds none'})")


def seeded(*key) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7]))


def random_control(seed: str, model: Transformer, budget: float) -> Control:
    """Each sequence, or token, skips by chance; the draw depends on seed, task and item alone."""
    weights, sequence = model.place_weights(), model.routing.unit == "sequence"

    def gates(owner: tuple[str, int], start: int, stop: int) -> torch.Tensor:
        route = random_route(weights, budget, seeded("random", seed, *owner), None if sequence else stop)
        return route if sequence else route[:, start:]

    return Control(gates, whole=sequence)


def list_control(listed: Callable[[str], tuple[list[int], float]], model: Transformer) -> Control:
    """Everyone skips the same places. listed(task): an order of the places, and the capacity down to which it skips.

    The place at which that ends is skipped for a share of the items, so that the average is the capacity asked for.
    """
    weights = model.place_weights()

    def gates(owner: tuple[str, int], start: int, stop: int) -> torch.Tensor:
        order, budget = listed(owner[0])
        return static_route(order, weights, budget, seeded("list", *owner))

    return Control(gates, whole=True)


def static_list(text: str, value: str, model: Transformer) -> Callable[[str], tuple[list[int], float]]:
    names, weights = model.routing.names, model.place_weights()
    wanted = value.split(",") if model.routing.target == "both" else parse_layers(value, model.config.n_layers)[1]
    skipped = {value} if isinstance(wanted, int) else set(map(str, wanted))
    if not skipped <= set(names):
        raise ValueError(f"--control={text}: expected numbers of routed layers, which are {', '.join(names)}")
    order = sorted(range(len(names)), key=lambda place: names[place] not in skipped)
    budget = 1 - sum(weights[place].item() for place in order[:len(skipped)])
    return lambda task: (order, budget)


def mean_list(text: str, path: str, model: Transformer) -> Callable[[str], tuple[list[int], float]]:
    results, weights = runtime.read_json(path).get("results", {}), model.place_weights()

    def listed(task: str) -> tuple[list[int], float]:
        shares = results.get(task, {}).get("capacity_per_layer", ())
        if len(shares) != len(weights):
            raise ValueError(f"--control={text}: {task} has no {len(weights)} routed layers there; write it with the same --routers")
        return mean_order(shares), (weights @ torch.tensor(shares, dtype=torch.float64)).item()

    return listed


# ---------------------------------------------------------------------------------------------------------------------------------
# From records to results


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error from the sample's deviation (n - 1), as lm-eval; None for a single value."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def summarise(records: Sequence[dict], metrics: Sequence[str], weights: Sequence[float] = ()) -> dict:
    """Results of one task, or of a group taken together. weights: what each router counts in the capacity, of sum 1; (): all the same."""
    n, units = len(records), sum(r["units"] for r in records)
    layers = len(records[0]["executed"])
    result: dict = {}
    for metric in metrics:
        if metric == "nll":
            tokens, total = sum(r["tokens"] for r in records), -sum(r["logprobs"][0] for r in records)
            result |= {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}
        else:
            result[metric], result[f"{metric}_stderr"] = mean_stderr([r[metric] for r in records])
    if "exact_match_strict" in metrics:
        result |= {"acc": result["exact_match_strict"], "acc_stderr": result["exact_match_strict_stderr"]}
    result |= {"n": n, "truncated": sum(r["truncated"] for r in records)}
    result |= {"capacity": 1.0, "kv_bytes": sum(r["kv_bytes"] for r in records) / n}
    if layers:
        shares = [[r["executed"][i] / r["units"] for r in records] for i in range(layers)]
        result["capacity_per_layer"] = each = [sum(r["executed"][i] for r in records) / units for i in range(layers)]
        result["capacity"] = sum(weight * share for weight, share in zip(weights or [1 / layers] * layers, each))
        result["route_variance"] = sum(_variance(share) for share in shares) / layers  # between the items of the task
    return result


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def routes_of(shares: Sequence[Sequence[float]], within: Sequence[float]) -> dict:
    """How dynamic routes are: shares[task][layer] of executing units, within[task] the variance between a task's items, mean over layers."""
    constant = [share <= 0.01 or share >= 0.99 for row in shares for share in row]
    return {"variance_within_tasks": sum(within) / len(within), "variance_between_tasks": sum(map(_variance, zip(*shares))) / len(shares[0]),
            "constant_task_layer_pairs": sum(constant) / len(constant)}


def summarise_group(names: Sequence[str], results: dict, records: dict[str, list[dict]], weights: Sequence[float] = ()) -> dict:
    """MMLU and its categories: acc over all items, its standard error pooled as in lm-eval; acc_subjects is the plain mean of subjects."""
    result = summarise([r for name in names for r in records[name]], ("acc",), weights)
    sizes, errors = [results[name]["n"] for name in names], [results[name]["acc_stderr"] for name in names]
    if None not in errors:
        pooled = sum((n - 1) * error**2 * n for n, error in zip(sizes, errors)) / (sum(sizes) - len(sizes))
        result["acc_stderr"] = math.sqrt(pooled / sum(sizes))
    return result | {"acc_subjects": sum(results[name]["acc"] for name in names) / len(names), "subjects": len(names),
                     "shots": results[names[0]]["shots"], "seconds": sum(results[name]["seconds"] for name in names)}


def read_other(path: str, works: Sequence[Work]) -> dict:
    """Per-item outcomes in another run's --out, which must have scored the same items."""
    other = runtime.read_json(path)
    if not isinstance(other, dict) or "items" not in other:
        raise ValueError(f"--against={path} has no field 'items'; expected a file that eval.py wrote with --out")
    common = [work for work in works if work.task.name in other["items"]]
    if not common:
        raise ValueError(f"--against={path} has none of the tasks scored here; it has {', '.join(other['items'])}: score the same tasks")
    if unlike := [work.task.name for work in common if work.sha != other["items"][work.task.name]["sha"]]:
        raise ValueError(f"--against={path} scored other items or prompts of {', '.join(unlike)}; give both runs the same --data, --limit, "
                         "--fewshot, --fewshot_by and --seed")
    return other["items"]


def compare(items: dict, other: dict) -> dict:
    """This run minus another on the same items: difference, its standard error (paired) and how many items changed sides."""
    paired = {}
    for name in [name for name in items if name in other]:
        for metric in [metric for metric in items[name] if metric not in ("sha", "tokens")]:
            ours, theirs = items[name][metric], other[name][metric]
            if metric == "nll":
                tokens, change = items[name]["tokens"], [a - b for a, b in zip(ours, theirs)]
                mean = sum(change) / sum(tokens)  # a ratio of sums: its error by linearisation
                error = mean_stderr([(d - mean * t) * len(tokens) / sum(tokens) for d, t in zip(change, tokens)])[1]
                paired.setdefault(name, {})["loss"] = {"difference": mean, "stderr": error, "n": len(tokens)}
                continue
            change = [int(a) - int(b) for a, b in zip(ours, theirs)]
            mean, error = mean_stderr(change)
            paired.setdefault(name, {})[metric] = {"difference": mean, "stderr": error, "gained": change.count(1), "lost": change.count(-1),
                                                   "flips": sum(map(abs, change)), "n": len(change)}
    return paired


def table(results: dict, bold: dict[str, str], paired: dict) -> str:
    """Markdown; the paper's metric is bold. Subjects of MMLU stand in --out only, where their group is shown."""
    def number(value: float | None, form: str = "{:.4f}") -> str:
        return "" if value is None else form.format(value)

    grouped = {name for group, names in GROUPS.items() if group in results for name in names}
    lines, best = ["| task | shots | n | acc | ± | acc_norm | ± | capacity | KV MB/item | seconds |", "|---|" + "---:|" * 9], []
    for name, r in results.items():
        if name in grouped or name in PERPLEXITY:
            continue
        first, cells = bold.get(name, "acc"), []
        for metric in (("exact_match_strict", "exact_match_flexible") if name == "gsm8k" else ("acc", "acc_norm")):
            value = number(r.get(metric))
            cells += [f"**{value}**" if metric == first else value, number(r.get(f"{metric}_stderr"))]
        if name not in GROUPS or name == "mmlu":
            best.append(r[first])
        cells += [number(r["capacity"], "{:.3f}"), number(r["kv_bytes"] / 1e6, "{:.2f}"), number(r["seconds"], "{:.1f}")]
        lines.append(f"| {name} | {r['shots']} | {r['n']:,} | {' | '.join(cells)} |")
    lines = lines if best else []
    if len(best) > 1:
        lines.append(f"| mean of the bold | | | {sum(best) / len(best):.4f} | | | | | | |")
    if "gsm8k" in results:
        lines.append("\ngsm8k: strict exact match under acc, flexible under acc_norm.")
    for name in [name for name in PERPLEXITY if name in results]:
        r = results[name]
        lines.append(f"\n{name.replace('_', ' ')} {r['perplexity']:.4f} | loss {r['loss']:.5f} | {r['tokens']:,} answer tokens | "
                     f"capacity {r['capacity']:.3f} | KV {r['kv_bytes'] / 1e6:.2f} MB/item | {r['seconds']:.1f} s")
    for name, entry in paired.items():
        for metric, c in entry.items():
            flips = f", {c['flips']} flips (+{c['gained']} -{c['lost']})" if "flips" in c else ""
            error = "n/a" if c["stderr"] is None else f"{c['stderr']:.5f}"
            lines.append(f"\nagainst: {name} {metric} {c['difference']:+.5f} ± {error}{flips}, n {c['n']:,}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------------------
# Running


class Samples:
    """The samples file: a line per item, appended as batches end, sorted at the end. Lines carry `run`, a hash of all that decides them."""

    def __init__(self, path: str | None, rt: runtime.Runtime):
        self.path, self.rt = Path(path) if path else None, rt

    def resume(self, runs: dict[str, str]) -> dict[str, dict[int, dict]]:
        """Records that a killed run left, by task and index; the master reads them for all ranks. A torn last line is dropped."""
        outcome = [None]
        if self.rt.is_master:
            try:
                outcome = [self._read(runs)]
            except ValueError as error:
                outcome = [str(error)]
        if self.rt.world_size > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], str):
            raise ValueError(outcome[0])
        return outcome[0]

    def _read(self, runs: dict[str, str]) -> dict[str, dict[int, dict]]:
        done: dict[str, dict[int, dict]] = {name: {} for name in runs}
        if self.path is None or not self.path.exists():
            return done
        data = self.path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                same = runs.get(record["task"]) == record["run"]
                done.get(record["task"], {})[record["index"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}, line {number} is not a sample line; expected what --samples writes: name another") from None
            if not same:
                raise ValueError(f"{self.path}, line {number} ({record['task']}) comes from a run with another model, route, data, prompt, "
                                 "limit, dtype or batch size; repeat that command to go on, or give another --samples")
        if whole != data:
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return done

    def append(self, records: Sequence[dict]) -> None:
        if self.path is not None and self.rt.is_master and records:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(records))

    def finish(self, records: Sequence[dict]) -> None:
        if self.path is not None and self.rt.is_master:
            runtime.write_atomic(self.path, lambda path: path.write_text(_lines(records), encoding="utf-8"))


def _lines(records: Sequence[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class Progress:
    """One line on stderr: overwritten on a terminal, every 20 seconds elsewhere. Work is counted in tokens."""

    def __init__(self, works: Sequence[Work], is_master: bool):
        items = [item for work in works for item in work.items]
        self.total, self.items, self.is_master = sum(item.tokens for item in items), len(items), is_master
        self.spent = self.seen = self.skipped = 0
        self.start = self.last = time.perf_counter()

    def step(self, name: str, items: Sequence[Item], resumed: bool = False) -> None:
        self.spent, self.seen = self.spent + sum(item.tokens for item in items), self.seen + len(items)
        self.skipped += sum(item.tokens for item in items) if resumed else 0
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if not self.is_master or resumed or (not terminal and now - self.last < 20 and self.seen < self.items):
            return
        self.last, elapsed, fresh = now, now - self.start, self.spent - self.skipped
        eta, end = elapsed / fresh * (self.total - self.spent), "\x1b[K\r" if terminal and self.seen < self.items else "\n"
        line = f"{name} | {self.seen:,}/{self.items:,} items | {fresh / elapsed:,.0f} tok/s | eta {eta / 60:.1f}m"
        print(line, end=end, file=sys.stderr, flush=True)


def calibrate(run: Run, work: Work, count: int, budget: float, cuts: list[float]) -> None:
    """Set the routers' cuts (R) and move them all by one amount, in logits, until the contexts of a task's first `count` items realise `budget`.

    No answer is looked at. A router that learned where layers matter runs more of them on one source than on another; this holds the average
    where it is asked for. Deeper logits depend on the route, hence several rounds. Every rank does the same.
    """
    contexts = sorted((query.context for item in work.items[:count] for query in item.queries), key=len)
    offsets, rise = torch.tensor(cuts)[:, None], None

    def move(rise: float) -> None:
        for router, cut in zip(run.model.routers(), cuts):
            router.cut.fill_(cut + rise)

    move(0.0)
    for _ in range(CALIBRATION_ROUNDS if 0.0 < budget < 1.0 else 0):
        above = []  # by how much each unit's logit exceeds its layer's cut
        for a in range(0, len(contexts), CALIBRATION_ROWS):
            rows = contexts[a:a + CALIBRATION_ROWS]
            z = run.model.hidden(pad(rows, run.device), lengths=[len(row) for row in rows], route=run.route, return_scores=True)[2].cpu()
            for row, context in enumerate(rows):
                own = (z[:, row, None] if run.sequence else z[:, row, :len(context)]) - offsets  # (R,B) or (R,B,T) -> (R, 1|T)
                if not run.sequence:
                    own[:, 0] = math.inf  # a first token always executes
                above.append(own)
        found = quantile_cut(torch.cat(above, dim=1), budget, run.model.place_weights())
        rise = found if rise is None else 0.5 * (rise + found)  # half way, so that two routes do not take turns
        move(rise)


def run_work(run: Run, work: Work, done: dict[int, dict], stamp: str, samples: Samples, progress: Progress, rt: runtime.Runtime,
             ) -> list[dict]:
    """Score what is not done yet; ranks take whole batches in turn, so that a record does not depend on how many there are."""
    start = time.perf_counter()
    whole, cut = [item for item in work.items if not item.truncated], [item for item in work.items if item.truncated]
    length = 0
    if run.shares and len(whole) > 1:
        contexts = [query.context for item in whole for query in item.queries]
        length = min(common_prefix(contexts), min(map(len, contexts)) - 1)
        length = length if length >= MIN_PREFIX else 0
    shared = Prefix(length)
    batches = [(batch, prefix) for items, prefix in ((whole, shared), (cut, Prefix())) for batch in plan(items, run.max_batch_tokens)]
    todo = [(batch, prefix) for batch, prefix in batches if any(item.index not in done for item in batch)]
    for batch, _ in batches:
        if all(item.index in done for item in batch):
            progress.step(work.task.name, batch, resumed=True)
    for a in range(0, len(todo), rt.world_size):
        batch, prefix = todo[a + rt.rank] if a + rt.rank < len(todo) else ([], Prefix())
        if prefix.length and prefix.cache is None:
            query = whole[0].queries[0]
            prefix.cache, _, (prefix.score,) = prefill(run, [Query(query.owner, query.context[:length])], Prefix())
        records = [record | {"run": stamp} for record in score_batch(run, batch, prefix)] if batch else []
        if rt.world_size > 1:
            everyone: list = [None] * rt.world_size
            dist.all_gather_object(everyone, records)
            records = [record for part in everyone for record in part]
        samples.append([record for record in records if record["index"] not in done])
        done |= {record["index"]: record for record in records}
        progress.step(work.task.name, [item for batch, _ in todo[a:a + rt.world_size] for item in batch])
    runtime.synchronize(run.device)
    work.seconds += time.perf_counter() - start
    return [done[item.index] for item in work.items]


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class EvalConfig:
    """Settings of eval.py."""

    model: str = field(metadata={"help": "checkpoint folder"})
    tasks: tuple[str, ...] = setting((), "names as above, by comma")
    data: str = setting("data/eval", "folder of the data sets, as data/fetch.py fills it")
    custom: tuple[str, ...] = setting((), "more tasks: .jsonl files of {question, choices, answer}; answer is a 0-based number or a choice")
    perplexity: str | None = setting(None, "messages file whose answers are scored")
    perplexity_split: str | None = setting(None, "of that file only the rows with this `split`")
    routers: str | None = setting(None, "router file")
    route: Literal["auto", "off", "mask", "gather"] = setting("auto", "auto: gather with --routers, else off")
    budget: float | None = setting(None, "capacity from 0 to 1; none: the router file's own")
    calibrate: int | None = setting(None, "first move the cuts until the contexts of each task's first N items, without labels, realise --budget")
    control: str = setting("none", "forced routes: greedy, fisher or similarity (the router file's drop orders) at --budget, static:LAYERS to drop (both_sequence: 5.attn,7.mlp), random:SEED at --budget, mean:FILE.json of a routed run")
    fewshot: int | None = setting(None, "examples before each item; none: the paper's number per task")
    fewshot_by: Literal["index", "first", "harness"] = setting("index", "by seed and item, in file order, or as lm-eval draws them")
    seed: int = setting(1234, "of the few-shot draw; 1234 is lm-eval's")
    limit: int | None = setting(None, "first N items of each task only")
    max_length: int | None = setting(None, "context length; longer items lose their beginning; none: the model's")
    max_batch_tokens: int = setting(16384, "tokens in a batch, and in its cache")
    samples: str | None = setting(None, "write a line per item here, and go on from it after a kill")
    out: str | None = setting(None, "write all results here as JSON")
    against: str | None = setting(None, "--out of another run on the same items, to compare with")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = setting("auto", "auto, float32, bfloat16, float16")
    threads: int | None = setting(None, "of a process on the CPU; none: all cores, also under torchrun: their number moves last bits")


def check(cfg: EvalConfig) -> None:
    """Refuse settings that contradict each other before anything is loaded."""
    if not cfg.tasks and not cfg.custom and cfg.perplexity is None:
        raise ValueError("there is nothing to score; give --tasks=NAME,..., --custom=FILE.jsonl or --perplexity=FILE.jsonl")
    if cfg.routers is None and (cfg.route in ("mask", "gather") or cfg.control != "none" or cfg.budget is not None):
        raise ValueError(f"--route={cfg.route} --control={cfg.control} --budget={cfg.budget} needs routed layers, and no router file was given: give --routers")
    if cfg.calibrate is not None and (cfg.routers is None or cfg.budget is None or cfg.control != "none" or cfg.route == "off"):
        raise ValueError(f"--calibrate={cfg.calibrate} moves the routers' cuts to a budget, and there is no router file, no budget, or a control in its place; "
                         "give --routers and --budget, and neither --control nor --route=off")
    if cfg.route == "off" and cfg.control != "none":
        raise ValueError(f"--control={cfg.control} forces routes and --route=off has none; leave --route away")
    for name, low in (("fewshot", 0), ("limit", 1), ("max_length", 2), ("max_batch_tokens", 1), ("threads", 1), ("calibrate", 1)):
        if getattr(cfg, name) is not None and getattr(cfg, name) < low:
            raise ValueError(f"--{name} is {getattr(cfg, name)}; expected {low} or more")
    for path in [Path(path).resolve() for path in (cfg.out, cfg.samples) if path]:
        folder = next(parent for parent in path.parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path} cannot be written, {path if path.is_dir() else folder} is in the way; name a file in your own folder")


def prepare(cfg: EvalConfig, run: Run, tasks: Sequence[Task], shots: dict[str, int], paths: dict) -> list[Work]:
    """All tasks in tokens, so that whatever is wrong with any of them shows before anything is computed."""
    limit, longest = cfg.max_length or run.model.config.max_seq_len, run.model.config.max_seq_len
    if limit > longest:
        raise ValueError(f"--max_length is {limit}; this model's context is {longest}")
    if "gsm8k" in shots and (limit <= NEW_TOKENS or run.route == "mask"):
        raise ValueError(f"gsm8k generates {NEW_TOKENS} tokens; it needs a context beyond {limit} and a cache: --route=off or gather")
    works = [prepare_task(task, paths[task.name], run.tok, shots=shots[task.name], by=cfg.fewshot_by, seed=cfg.seed, items=cfg.limit,
                          limit=limit, share=run.shares) for task in tasks]
    for name in PERPLEXITY[:1 + (run.route != "off")] if cfg.perplexity else ():
        works.append(prepare_perplexity(name, Path(cfg.perplexity), run.tok, items=cfg.limit, limit=limit, split=cfg.perplexity_split))
    if cfg.control.startswith("mean:"):
        for work in works:
            run.control.gates((work.task.name, 0), 0, 1)  # a task that the file lacks shows now
    return works


def evaluate(cfg: EvalConfig, rt: runtime.Runtime) -> dict:
    """Everything that --out holds."""
    check(cfg)
    tasks = tasks_named(cfg.tasks, cfg.custom)
    shots = {task.name: task.shots if cfg.fewshot is None else cfg.fewshot for task in tasks}
    paths = locate(tasks, Path(cfg.data), shots)
    budget = None if cfg.control.startswith("random:") else cfg.budget  # random routes need no threshold
    model, tok = load_model(cfg.model, device=rt.device, dtype=rt.dtype), load_tokenizer(cfg.model)
    orders = load_routers(model, cfg.routers, budget).orders if cfg.routers else {}
    route = cfg.route if cfg.route != "auto" else "gather" if cfg.routers else "off"
    run = Run(model, tok, route, make_control(cfg.control, model, cfg.budget, orders), cfg.max_batch_tokens)
    works = prepare(cfg, run, tasks, shots, paths)
    other = read_other(cfg.against, works) if cfg.against else None
    if rt.is_master and (val := [work for work in works if Path(work.source).parent.name == "val" and work.task.read is mmlu]):
        print(f"note: {len(val)} MMLU subjects have no test file in {cfg.data}, so their val files are scored, unlike published numbers",
              file=sys.stderr)

    routers = hashlib.sha256(Path(cfg.routers).read_bytes()).hexdigest() if cfg.routers else None
    decides = [model.fingerprint, routers, route, cfg.budget, cfg.control, cfg.calibrate, str(rt.dtype), rt.device.type, cfg.max_batch_tokens]
    stamps = {work.task.name: hashlib.sha256(repr([*decides, work.sha, work.task.name]).encode()).hexdigest()[:16] for work in works}
    samples, progress, records, results, items, domains = Samples(cfg.samples, rt), Progress(works, rt.is_master), {}, {}, {}, {}
    done, cuts = samples.resume(stamps), [router.cut.item() for router in model.routers()]
    weights = model.place_weights().tolist() if model.routing else ()
    for work in works:
        name, resumed = work.task.name, len(done[work.task.name])
        how = replace(run, route="off", control=None) if name == PERPLEXITY[1] else run
        with torch.inference_mode():
            if cfg.calibrate and how is run:
                calibrate(run, work, cfg.calibrate, cfg.budget, cuts)
            records[name] = mine = run_work(how, work, done[name], stamps[name], samples, progress, rt)
        results[name] = summarise(mine, work.task.metrics, weights)
        results[name] |= {"shots": work.shots, "seconds": work.seconds, "file": work.source, "resumed": resumed}
        items[name] = {"sha": work.sha} | {metric: "".join(str(r[metric]) for r in mine) for metric in work.task.metrics if metric != "nll"}
        if name in PERPLEXITY:
            items[name] |= {"nll": [-r["logprobs"][0] for r in mine], "tokens": [r["tokens"] for r in mine]}
            domains |= {f"{name}/{domain}": summarise([r for r in mine if work.items[r["index"]].domain == domain], ("nll",), weights)
                        for domain in sorted({item.domain for item in work.items} - {None})}
    samples.finish([record for part in records.values() for record in part])
    for group in [group for group in GROUPS if group in cfg.tasks or "mmlu" in cfg.tasks]:
        results[group] = summarise_group(GROUPS[group], results, records, weights)

    report = {"model": cfg.model, "fingerprint": model.fingerprint, "route": route, "results": results, "items": items,
              "settings": asdict(cfg), "torch": torch.__version__, "device": runtime.device_name(rt.device),
              "dtype": str(rt.dtype).removeprefix("torch."), "peak_memory_bytes": runtime.peak_memory_bytes(rt.device)}
    if domains:
        report["domains"] = domains
    routed = [r for name, r in {**results, **domains}.items() if "capacity_per_layer" in r and name not in GROUPS and not (domains and name in PERPLEXITY)]
    if len(routed) > 1:
        report["routes"] = routes_of([r["capacity_per_layer"] for r in routed], [r["route_variance"] for r in routed])
    if other is not None:
        report["against"] = {"file": cfg.against, "tasks": compare(items, other)}
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
        print(table(report["results"], bold, report.get("against", {}).get("tasks", {})))
        for name, r in report.get("domains", {}).items():
            print(f"{name.replace('_', ' '):<32} loss {r['loss']:.5f} | {r['n']} items, {r['tokens']:,} answer tokens | capacity {r['capacity']:.3f}")
        if "routes" in report:
            print("routes: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in report["routes"].items()))
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
