"""The tasks of eval.py: where their published files lie, how a row becomes a question, how questions become a prompt.

A task is one row of TASKS. A file of a new form needs one reader beside it: a function from a row as it was published
to a Question. data/fetch.py takes the paths that it writes from here. Definitions are lm-evaluation-harness's (its
task files are named where one is followed to the letter), few-shot numbers those of arXiv 2410.13184, table 2. Probes
have no file: their questions are made up, the same ones for a seed everywhere.
"""

import csv
import difflib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import runtime
from data.records import read_records, settle_bad

NAMES = ("perplexity", "perplexity_dense")  # of eval.py's own results, which no task may have
TABLES = {".csv": ",", ".tsv": "\t"}  # --custom files with a header -> what parts their fields
CHOICE = re.compile(r"(choice|option|ending|sol)?[ _]?([a-z]|\d+)", re.IGNORECASE)  # a column of choices in them

# Where published files lie under --data
BOOLQ, BOOLQ_SUPERGLUE = "boolq/{split}.jsonl", "boolq/superglue/{split}.jsonl"
RTE, RTE_SUPERGLUE = "rte/glue/RTE/{split}.tsv", "rte/superglue/{split}.jsonl"
OPENBOOKQA = "openbookqa/Main/{split}.jsonl"
PIQA = "piqa/{split}.jsonl"
WINOGRANDE = "winogrande/{split}.jsonl"
GSM8K = "gsm8k/{split}.jsonl"
LAMBADA = "lambada_openai/lambada_{split}.jsonl"
HELLASWAG = "hellaswag/hellaswag_{split}.jsonl"
ARC = "arc/ARC-{kind}/ARC-{kind}-{split}.jsonl"
MMLU_FOLDER = "mmlu/data/{split}/"
MMLU = MMLU_FOLDER + "{subject}_{split}.csv"
# Not published: the first rows of a training file, cut off by hand, serve where the whole one is not there
FIRST_ROWS = ("boolq/train_first.jsonl", "piqa/train_first.jsonl")

SUBJECTS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
            "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
            "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
            "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
                  "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy "
                  "prehistory professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
                       "high_school_macroeconomics high_school_microeconomics high_school_psychology "
                       "human_sexuality professional_psychology public_relations security_studies sociology "
                       "us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
             "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}


# -----------------------------------------------------------------------------
# Questions and tasks


@dataclass(frozen=True)
class Question:
    """A question in words. A context for each choice, all the same but for partial scoring; a space stands between."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    def solved(self) -> str:
        """The question with its answer, as one of the few shots."""
        return f"{self.contexts[self.gold]} {self.choices[self.gold]}\n\n"


def ask(context: str, choices: Sequence[str], gold: int) -> Question:
    """A question whose choices share their context."""
    return Question((context,) * len(choices), tuple(choices), gold)


ACC = ("acc",)
ACC_NORM = ("acc_norm", "acc")
EXACT_MATCH = ("exact_match_strict", "exact_match_flexible")
CONTINUATION = ("acc", "perplexity")  # of one target: whether greedy decoding says it, and exp(-mean log P(target))
LOSS = ("nll",)  # of texts, which have no choices


@dataclass(frozen=True)
class Task:
    """One data set. Files are tried in order under --data; of several that fit a pattern the largest is taken."""

    name: str
    read: Callable[[dict | list], Question]  # of a row as published; KeyError, TypeError, ValueError: a bad row
    files: tuple[str, ...]
    pool: tuple[str, ...]  # where the few-shot examples come from
    shots: int  # the paper's
    metrics: tuple[str, ...]  # the paper's first
    home: str  # where people get the data
    description: str = ""  # stands before the shots
    in_order: bool = False  # the shots are the first of the pool, whatever --fewshot_by says
    spare: bool = False  # lm-eval draws one shot more and leaves out the item itself: tasks without a test split
    load: "Callable[[Path, list[str]], list] | None" = None  # reads a file as read_published does, which None means
    make: "Callable[[random.Random], list] | None" = None  # rows of a task that has no file

    @property
    def generates(self) -> bool:
        """The answer is generated, not chosen."""
        return self.metrics == EXACT_MATCH

    @property
    def continues(self) -> bool:
        """One target is scored, which brings the space before it along."""
        return self.metrics == CONTINUATION


# -----------------------------------------------------------------------------
# Readers: a row as published -> a question


def text(row: dict, key: str, empty: bool = False) -> str:
    """A field that must be text, to be put into a prompt. Raises KeyError or ValueError naming it."""
    value = row[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{key} is {value!r}, expected text")
    return value


def pick(label, labels: Sequence) -> int:
    """Place of a label among those allowed."""
    if label not in labels:
        raise ValueError(f"the label is {label!r}, expected one of {', '.join(map(str, labels))}")
    return list(labels).index(label)


def boolq(row: dict) -> Question:
    passage = text(row, "passage")
    if "title" in row:  # SuperGLUE's file holds title and passage joined so
        passage = f"{text(row, 'title', empty=True)} -- {passage}"
    label = row["answer"] if "answer" in row else row["label"]
    gold = pick(str(label).lower(), ("false", "true"))
    return ask(f"{passage}\nQuestion: {text(row, 'question')}?\nAnswer:", ("no", "yes"), gold)


def rte(row: dict) -> Question:
    names = ("sentence1", "sentence2") if "sentence1" in row else ("premise", "hypothesis")
    first, second = (text(row, name) for name in names)
    gold = pick(row["label"], ("entailment", "not_entailment"))
    return ask(f"{first}\nQuestion: {second} True or False?\nAnswer:", ("True", "False"), gold)


def lettered(row: dict, form: str) -> Question:
    """ARC and OpenBookQA: question.stem, question.choices[].{text, label}, answerKey; 3 to 5 letters or digits."""
    choices = row["question"]["choices"]
    gold = pick(text(row, "answerKey").strip(), [choice["label"] for choice in choices])
    return ask(form.format(text(row["question"], "stem")), [choice["text"] for choice in choices], gold)


def arc(row: dict) -> Question:
    return lettered(row, "Question: {}\nAnswer:")


def openbookqa(row: dict) -> Question:
    return lettered(row, "{}")


def piqa(row: dict) -> Question:
    gold = pick(str(row["label"]), ("0", "1"))
    return ask(f"Question: {text(row, 'goal')}\nAnswer:", (row["sol1"], row["sol2"]), gold)


def winogrande(row: dict) -> Question:
    """Partial scoring: an option goes into the context, what follows the blank is scored (arXiv 1806.02847)."""
    before, blank, after = text(row, "sentence").partition("_")
    if not blank:
        raise ValueError("the sentence has no blank (_)")
    contexts = tuple(before + text(row, key) for key in ("option1", "option2"))
    return Question(contexts, (after.strip(),) * 2, pick(str(row["answer"]), ("1", "2")))


def hellaswag(row: dict) -> Question:
    def clean(words: str) -> str:  # WikiHow's marks
        words = words.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", words).replace("  ", " ")

    begin, end = text(row, "ctx_a", empty=True), text(row, "ctx_b", empty=True)
    context = clean(f"{text(row, 'activity_label')}: {begin} {end.capitalize()}")
    if not isinstance(row["endings"], list):
        raise ValueError(f"endings is {row['endings']!r}, expected a list of texts")
    endings = [clean(ending) for ending in row["endings"]]
    return ask(context, endings, pick(str(row["label"]), list(map(str, range(len(endings))))))


def mmlu(row: list) -> Question:
    if len(row) != 6:
        raise ValueError(f"the row has {len(row)} fields, expected six (question, four options, answer)")
    fields = dict(zip(("question", *"ABCD", "answer"), row))
    lines = "".join(f"{letter}. {fields[letter]}\n" for letter in "ABCD")
    gold = pick(fields["answer"], "A B C D".split())
    return ask(f"{text(fields, 'question').strip()}\n{lines}Answer:", "ABCD", gold)


def gsm8k(row: dict) -> Question:
    return ask(f"Question: {text(row, 'question')}\nAnswer:", (text(row, "answer"),), 0)


def lambada(row: dict) -> Question:
    """The last word after all before it (lm-eval tasks/lambada/lambada_openai.yaml). As a shot two spaces part them."""
    before, _, last = text(row, "text").rpartition(" ")
    return ask(before, (f" {last}",), 0)


def pair(row: tuple[str, str]) -> Question:
    """A row that was made up: context, target."""
    return ask(row[0], row[1:], 0)


def custom(row: dict) -> Question:
    """{"question", "choices", "answer"}; answer: a 0-based number, or one of the choices."""
    gold, choices = row["answer"], row["choices"]
    if not isinstance(choices, list):
        raise ValueError(f"choices is {choices!r}, expected a list of texts")
    gold = pick(gold, range(len(choices))) if type(gold) is int else pick(gold, choices)
    return ask(f"Question: {text(row, 'question')}\nAnswer:", choices, gold)


def table_row(row: dict) -> Question:
    """A row of a table: question, answer, and a column for each choice (empty: none), or JSON lists in one column
    `choices`. answer: a 0-based number, the choice itself, or the name of its column."""
    if None in row or None in row.values():
        raise ValueError("the row has more or fewer fields than the header")
    if "choices" in row:
        try:
            choices = json.loads(row["choices"])
        except ValueError:
            raise ValueError(f"choices is {row['choices']!r}, expected a JSON list") from None
        names = [""] * len(choices) if isinstance(choices, list) else []
    else:
        names = [name for name in row if name not in ("question", "answer") and row[name].strip()]
        choices = [row[name] for name in names]
    answer = row["answer"].strip()
    meant = [number for number, name in enumerate(names) if answer in (choices[number], name, str(number))]
    if len(meant) > 1:
        raise ValueError(f"the answer {answer!r} names {len(meant)} choices, by number, text or column, expected one")
    return custom({"question": row["question"], "choices": choices, "answer": meant[0] if meant else answer})


# -----------------------------------------------------------------------------
# Rows that are made up. A full stop ends each target, so that 14 is no answer where 145 is right


PROBED = 500  # rows of a probe


def arithmetic(rng: random.Random) -> list[tuple[str, str]]:
    """Sums and differences of numbers below 100, and products below 10; no difference is negative."""
    rows = {}
    while len(rows) < PROBED:
        sign = rng.choice("++++----*")
        below = 10 if sign == "*" else 100
        b, a = sorted((rng.randrange(below), rng.randrange(below)))
        rows[f"{a} {sign} {b} ="] = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return [(context, f" {value}.") for context, value in rows.items()]


def brackets(rng: random.Random) -> list[tuple[str, str]]:
    """What closes a row of open brackets of four kinds, innermost first."""
    closing, rows = {"(": ")", "[": "]", "{": "}", "<": ">"}, {}
    while len(rows) < PROBED:
        words, still = [], []
        for _ in range(rng.randrange(2, 11)):
            if still and rng.random() < 0.4:
                words.append(closing[still.pop()])
            else:
                words.append(rng.choice(tuple(closing)))
                still.append(words[-1])
        if still:
            rows[" ".join(words)] = "".join(f" {closing[kind]}" for kind in reversed(still)) + " ."
    return list(rows.items())


# -----------------------------------------------------------------------------
# The tasks, one row each


def mmlu_task(subject: str) -> Task:
    test, val, dev = (MMLU.format(split=split, subject=subject) for split in ("test", "val", "dev"))
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    home = "https://github.com/hendrycks/test"
    return Task(f"mmlu_{subject}", mmlu, (test, val), (dev,), 5, ACC, home, description=about, in_order=True)


def paths_of(*paths: tuple[str, str]) -> tuple[str, ...]:
    """Paths from (template, split) pairs."""
    return tuple(path.format(split=split) for path, split in paths)


def arc_paths(kind: str, split: str) -> tuple[str, ...]:
    return (ARC.format(kind=kind, split=split),)


ROWS = (
    Task("boolq", boolq, paths_of((BOOLQ, "dev"), (BOOLQ_SUPERGLUE, "val")),
         (*paths_of((BOOLQ, "train")), FIRST_ROWS[0], *paths_of((BOOLQ_SUPERGLUE, "train"))),
         0, ACC, "https://github.com/google-research-datasets/boolean-questions", spare=True),
    Task("rte", rte, paths_of((RTE, "dev"), (RTE_SUPERGLUE, "val")), paths_of((RTE, "train"), (RTE_SUPERGLUE, "train")),
         0, ACC, "https://gluebenchmark.com/tasks", spare=True),
    Task("openbookqa", openbookqa, paths_of((OPENBOOKQA, "test")), paths_of((OPENBOOKQA, "train")),
         0, ACC_NORM, "https://allenai.org/data/open-book-qa"),
    Task("piqa", piqa, paths_of((PIQA, "valid")), (*paths_of((PIQA, "train")), FIRST_ROWS[1]),
         0, ACC_NORM, "https://yonatanbisk.com/piqa", spare=True),
    Task("winogrande", winogrande, paths_of((WINOGRANDE, "dev")), paths_of((WINOGRANDE, "train_*")),
         5, ACC, "https://winogrande.allenai.org", spare=True),
    Task("gsm8k", gsm8k, paths_of((GSM8K, "test")), paths_of((GSM8K, "train")),
         5, EXACT_MATCH, "https://github.com/openai/grade-school-math"),
    Task("hellaswag", hellaswag, paths_of((HELLASWAG, "val")), paths_of((HELLASWAG, "train")),
         10, ACC_NORM, "https://rowanzellers.com/hellaswag", spare=True),
    Task("arc_challenge", arc, arc_paths("Challenge", "Test"), arc_paths("Challenge", "Train"),
         25, ACC_NORM, "https://allenai.org/data/arc"),
    Task("arc_easy", arc, arc_paths("Easy", "Test"), arc_paths("Easy", "Train"),
         0, ACC_NORM, "https://allenai.org/data/arc"),
    *(mmlu_task(subject) for subjects in SUBJECTS.values() for subject in subjects.split()),
    Task("lambada_openai", lambada, paths_of((LAMBADA, "test")), paths_of((LAMBADA, "test")),
         0, CONTINUATION, "https://huggingface.co/datasets/EleutherAI/lambada_openai", spare=True),
    Task("probe_arithmetic", pair, (), (), 5, CONTINUATION, "made up", spare=True, make=arithmetic),
    Task("probe_brackets", pair, (), (), 5, CONTINUATION, "made up", spare=True, make=brackets),
)
TASKS = {task.name: task for task in ROWS}
GROUPS = {f"mmlu_{area}": [f"mmlu_{subject}" for subject in subjects.split()] for area, subjects in SUBJECTS.items()}
GROUPS["mmlu"] = [name for names in GROUPS.values() for name in names]


def custom_name(path: str) -> str:
    return Path(path.removesuffix(".gz")).stem


def custom_task(path: str) -> Task:
    """The task of a --custom file; its own other rows are the few shots."""
    file = (str(Path(path).resolve()),)
    read = table_row if Path(path).suffix.lower() in TABLES else custom
    return Task(custom_name(path), read, file, file, 0, ACC_NORM, "--custom", spare=True, load=read_custom)


def tasks_named(names: Sequence[str], files: Sequence[str] = ()) -> list[Task]:
    """Tasks of these names, groups taken apart, and one of each custom file. Raises ValueError naming what is wrong."""
    known = [*TASKS, *GROUPS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            short = ", ".join([task for task in TASKS if not task.startswith("mmlu_")] + list(GROUPS))
            raise ValueError(f"--tasks names {name!r}, the nearest task is {near!r}; expected of {short}, mmlu_SUBJECT")
    owner: dict[str, str] = {}
    for file in files:
        name = custom_name(file)
        if name in (*known, *NAMES):
            raise ValueError(f"--custom={file} would be the task {name!r}, which exists already: rename the file")
        if name in owner:
            raise ValueError(
                f"--custom names {owner[name]} and {file}, which would both be the task {name!r}: rename one of them"
            )
        owner[name] = file
    chosen = [TASKS[part] for name in names for part in GROUPS.get(name, [name])]
    return list(dict.fromkeys(chosen)) + [custom_task(file) for file in files]


# -----------------------------------------------------------------------------
# Files


def find(data: Path, patterns: Sequence[str]) -> Path | None:
    """First pattern that a file under `data` fits; of several files the largest."""
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).is_absolute() else sorted(data.glob(pattern))
        files = [path for path in found if path.is_file()]
        if files:
            return max(files, key=lambda path: path.stat().st_size)
    return None


def locate(tasks: Sequence[Task], data: Path, shots: dict[str, int]) -> dict[str, tuple[Path, Path | None]]:
    """File to score and file of the shots, by task. Raises FileNotFoundError with all that is missing, and its home."""
    found, missing = {}, []
    for task in tasks:
        wanted = [task.files, task.pool if shots[task.name] else ()]
        found[task.name] = tuple(find(data, patterns) for patterns in wanted)
        absent = [patterns[0] for patterns, path in zip(wanted, found[task.name]) if patterns and path is None]
        if absent:
            missing.append((task, ", ".join(absent)))
    if not missing:
        return found
    own = [files for task, files in missing if task.load is read_custom]
    if own:
        raise FileNotFoundError(f"--custom={own[0]} was not found; expected a file: check the path")
    lines = [f"  {task.name}: {files}  ({task.home})" for task, files in missing[:12]]
    if len(missing) > 12:
        lines.append(f"  and {len(missing) - 12} tasks more")
    names = dict.fromkeys("mmlu" if task.read is mmlu else task.name for task, _ in missing)
    lines.append(f"check --data, or get them: python data/fetch.py --tasks={','.join(names)}")
    raise FileNotFoundError("\n".join([f"under {data} these files are missing:", *lines]))


def labels_of(path: str) -> str:
    """The file beside a .jsonl or .json in which some publishers keep the labels."""
    return re.sub(r"\.jsonl?$", "-labels.lst", path)


def read_published(path: Path, bad: list[str]) -> list[tuple[str, dict | list]]:
    """Rows of a published .jsonl, .json, .tsv or .csv file (the last without header), each with its place in words.

    Lines that are no row go to `bad`.
    """
    if path.suffix in (".jsonl", ".json"):
        return with_labels(path, read_records(path, bad), bad)
    try:
        return read_csv(path) if path.suffix == ".csv" else read_tsv(path, bad)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a readable {path.suffix} file ({error}); expected the published one: fetch it again"
        ) from None


def with_labels(path: Path, rows: list, bad: list[str]) -> list[tuple[str, dict]]:
    """Rows joined with the labels of the file beside theirs, if there is one."""
    labels = Path(labels_of(str(path)))
    if not labels.is_file():
        return rows
    if bad:
        raise ValueError(f"{bad[0]}; no row can be left out, since {labels.name} goes by their order")
    values = labels.read_text(encoding="utf-8", errors="replace").split()
    if len(values) != len(rows):
        raise ValueError(
            f"{labels} holds {len(values)} labels, {path.name} {len(rows)} rows; expected as many: fetch both again"
        )
    return [(place, {"label": value, **row}) for (place, row), value in zip(rows, values)]


def read_csv(path: Path, delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """Fields of each record that is not empty; a quoted field may hold line feeds."""
    with open(path, encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        return [(f"{path}, line {reader.line_num}", row) for row in reader if row]


def read_tsv(path: Path, bad: list[str]) -> list[tuple[str, dict]]:
    """Lines split at tabs, by the header's names; no quoting, since GLUE's texts hold lone quotes."""
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows, names = [], header.split("\t")
    for number, line in enumerate(lines, 2):
        values = line.split("\t")
        if len(values) != len(names):
            bad.append(
                f"{path}, line {number} has {len(values)} fields, expected {', '.join(names)}: mend or delete it"
            )
            continue
        rows.append((f"{path}, line {number}", dict(zip(names, values))))
    return rows


def read_custom(path: Path, bad: list[str]) -> list[tuple[str, dict]]:
    """Rows of a --custom file: JSON lines, a JSON list, or a table under a header."""
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return read_table(path, TABLES[suffix])
    if suffix not in (".jsonl", ".json", ".gz"):
        raise ValueError(
            f"--custom={path} ends in {suffix or 'nothing'}; expected .jsonl, .json, .csv or .tsv: convert it"
        )
    return read_records(path, bad)


def read_table(path: Path, delimiter: str) -> list[tuple[str, dict]]:
    """Rows by the names of a header, which must be columns that `table_row` knows. One too many is under None."""
    try:
        records = read_csv(path, delimiter)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a readable table ({error}); expected UTF-8, and fields in double quotes where "
            "they hold one: save it again"
        ) from None
    header = [name.strip() for name in records[0][1]] if records else []
    choices = [name for name in header if name not in ("question", "answer")]
    odd = [] if choices == ["choices"] else [name for name in choices if not CHOICE.fullmatch(name)]
    if not {"question", "answer"} <= set(header) or not choices or odd or len(set(header)) < len(header):
        raise ValueError(
            f"{path} has the columns {', '.join(header) or 'none'}; expected question, answer, and choices "
            "named A, B, ... or choice1, choice2, ..., or one column choices of JSON lists: rename or "
            f"delete {', '.join(odd) or 'columns'}"
        )
    return [(place, dict(zip_longest(header, fields))) for place, fields in records[1:]]


def read_questions(path: Path | None, task: Task, skip_bad: bool = False, seed: int = 0) -> list[Question]:
    """Every row of a file, or of a task without one those of a seed, as a Question.

    Raises ValueError listing bad rows by line, or leaves them out and says so.
    """
    if task.make:
        return list(map(task.read, task.make(random.Random(f"{task.name}/{seed}"))))
    questions, bad = [], []
    for place, row in (task.load or read_published)(path, bad):
        try:
            questions.append(checked(task, task.read(row)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"there is no field {error}" if isinstance(error, KeyError) else error
            bad.append(f"{place}: {reason}; mend or delete it" + ("" if task.load else ", or fetch the file again"))
    settle_bad(bad, skip_bad, runtime.print0)
    if not questions:
        raise ValueError(f"{path} holds no row; expected at least one: check the file")
    return questions


def checked(task: Task, question: Question) -> Question:
    """The question, if all its parts are text and there is a choice to make."""
    for name, texts in (("question", question.contexts), ("choice", question.choices)):
        for words in texts:
            if not isinstance(words, str) or not words.strip():
                raise ValueError(f"a {name} is {words!r}, expected text")
    if len(question.choices) < 2 and not task.generates and not task.continues:
        raise ValueError(f"the row has {len(question.choices)} choices, expected two or more")
    return question


# -----------------------------------------------------------------------------
# Prompts


def draw_shots(
    task: Task,
    items: Sequence[Question],
    pool: Sequence[Question],
    n: int,
    by: str,
    seed: int,
) -> list[list[Question]]:
    """n solved questions for each item: `index` by a generator of seed and index, `first` in file order, `harness` as
    lm-eval draws them (api/samplers.py: one generator runs through the task's items)."""
    if n == 0:
        return [[] for _ in items]
    need = n if task.in_order or (by != "index" and not task.spare) else n + 1
    if len(pool) < need:
        raise ValueError(
            f"{task.name}: {n} shots need a pool of {need} and it holds {len(pool)}; lower --fewshot or "
            "fetch the whole file"
        )
    if by == "first" or task.in_order:
        return [[shot for shot in pool[: n + 1] if shot != item][:n] for item in items]
    if by == "index":
        return [draw_others(random.Random(f"{seed}/{index}"), pool, n, item) for index, item in enumerate(items)]
    rng = random.Random(seed)
    return [draw_others(rng, pool, n, item) if task.spare else rng.sample(pool, n) for item in items]


def draw_others(rng: random.Random, pool: Sequence[Question], n: int, item: Question) -> list[Question]:
    """n of the pool that are not the item."""
    drawn = [shot for shot in rng.sample(pool, n + 1) if shot != item][:n]
    if len(drawn) < n:  # the item stood in the pool twice
        drawn = rng.sample([shot for shot in pool if shot != item], n)
    return drawn


def preamble(task: Task, system: str) -> str:
    """A system instruction and the task's description, a blank line between them (lm-eval api/utils.py)."""
    if not system or not task.description:
        return system or task.description
    apart = not system[-1].isspace() and not task.description[0].isspace()
    return system + ("\n\n" if apart else "") + task.description


def plain_prompt(task: Task, shots: Sequence[Question], context: str, system: str = "") -> str:
    """Description, solved questions, the question."""
    return preamble(task, system) + "".join(shot.solved() for shot in shots) + context


def chat_prompt(task: Task, shots: Sequence[Question], context: str, system: str, multiturn: bool) -> list[dict]:
    """The same as a conversation whose last turn is the user's; multiturn: each shot is a turn of its own."""
    system = preamble(task, system)
    messages = [{"role": "system", "content": system}] if system else []
    if not multiturn:
        context = "".join(shot.solved() for shot in shots) + context
        return messages + [{"role": "user", "content": context}]
    for shot in shots:
        messages.append({"role": "user", "content": shot.contexts[shot.gold]})
        messages.append({"role": "assistant", "content": shot.choices[shot.gold]})
    return messages + [{"role": "user", "content": context}]
