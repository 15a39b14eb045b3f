"""From files of rows to the examples of a run, tokenised once and mapped from the disk.

    data = load(Request(...), form, rt)     # data.train, data.select, data.held: sequences of data/records.py's Example

Two passes over the files, row by row: the first says what every row is (data/draw.py: 16 bytes each), the second
encodes those in use into a store (data/store.py). A store is known again by the content of the files, the tokenizer and
the settings; where any of them differs it is made anew. One rank makes it, the others wait and open it.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import runtime
from data.draw import HELDOUT, TRAIN, UNUSABLE, Draw, Parts, Rows, Source, part
from data.records import Example, Form, RowError, Tally, encode, refuse_object, settle_bad, to_messages
from data.store import Examples, Store, Writer, discard, open_store
from data.stream import check_file, read_rows
from runtime import Runtime, print0, sum_over_ranks

PAUSE = 20.0  # seconds of work between two saves, after which waiting ranks hear that it goes on
FEW = 10_000  # rows that are soon encoded: their faults are listed together with those of the first pass
NO_ANSWER = "truncation leaves no answer"
TOKENIZER_FILES = ("*.json", "*.model", "*.model.v*", "*.txt", "*.tiktoken", "*.jinja", "*/*.jinja")
HERE = Path(__file__).resolve().parent
MODULES = ("load", "draw", "portions", "records", "stream", "store")
PROGRAM = [HERE.parent / "tokenizer.py", *(HERE / f"{name}.py" for name in MODULES)]  # other rules: other tokens


@dataclass(frozen=True)
class Request:
    """Which rows are asked for, and where their store lies.

    model: the folder of the tokenizer. heldout: a file of held-out rows, None where `draw` says how they are found.
    """

    sources: Sequence[Source]
    heldout: Path | None
    draw: Draw
    skip_bad: bool
    model: Path
    folder: Path

    @property
    def paths(self) -> list[Path]:
        return [source.path for source in self.sources] + ([self.heldout] if self.heldout else [])


@dataclass(frozen=True)
class Data:
    """Examples to tune on, to choose among routers by, and to report on; report: what became of every row."""

    train: Examples
    select: Examples
    held: Examples
    report: dict

    @property
    def all(self) -> Examples:
        return self.select + self.held + self.train

    @property
    def digest(self) -> str:
        """A name for these very examples in this order."""
        return digest_of(repr(sorted(self.train.store.about["files"].items())).encode())


def load(request: Request, form: Form, rt: Runtime) -> Data:
    """Open the store of the request, or make it. Raises ValueError for rows that cannot be used, and for too few."""
    for path in request.paths:
        check_file(path)
    identity = identity_of(request, form)
    store = open_store(request.folder, identity)
    if not all_agree(store is not None, rt):
        take_turns(build(request, form, identity) if rt.is_master else iter(()), rt)
        store = open_store(request.folder, identity)
        if store is None:
            raise ValueError(f"{request.folder} was tokenised but cannot be read here, expected a folder that all "
                             "machines share: give another --out")
    data = Data(*(store.part(name) for name in ("train", "select", "heldout")), store.about["report"])
    describe(data)
    return data


# -----------------------------------------------------------------------------
# What a store belongs to


def identity_of(request: Request, form: Form) -> dict:
    """By what a store is known again: contents, not names or times."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in request.model.glob(pattern)})
    return {
        "files": [(file_digest(source.path), str(source.portion)) for source in request.sources],
        "heldout": file_digest(request.heldout) if request.heldout else None,
        "tokenizer": digest_of("".join(map(file_digest, files)).encode()),
        "program": digest_of("".join(map(file_digest, PROGRAM)).encode()),
        "form": [form.limit, form.chat, form.truncate, form.last_only, form.bare, form.seed],
        "draw": asdict(request.draw),
        "skip_bad": request.skip_bad,
    }


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# -----------------------------------------------------------------------------
# One rank works, the others wait


def all_agree(value: bool, rt: Runtime) -> bool:
    """Whether every rank says so."""
    return sum_over_ranks(torch.tensor(float(value), device=rt.device), rt).item() == rt.world_size


def take_turns(work: Iterator, rt: Runtime) -> None:
    """Do the work on the rank that has some, with a word to the others every PAUSE seconds: no wait times out."""
    is_done = False
    while not is_done:
        until = time.monotonic() + PAUSE
        is_done = not any(time.monotonic() > until for _ in work)
        is_done = all_agree(is_done, rt)


# -----------------------------------------------------------------------------
# Making a store


def build(request: Request, form: Form, identity: dict) -> Iterator[None]:
    """Make the store, a row at a time."""
    rows, bad = Rows(), Tally()
    yield from scan(request, rows, bad)
    rows.check_splits()
    parts = part(rows, request.sources, request.draw)
    if not parts.are_enough:
        settle_bad(bad, request.skip_bad, print0)  # more to the point
        raise too_few(parts)
    wanted = np.zeros(len(rows), np.int8)  # 1: tuned on; 2: held out
    for side, numbers in ((1, parts.train), (1, parts.select), (2, parts.held)):
        wanted[numbers] = side
    if np.count_nonzero(wanted) > FEW and not request.skip_bad:
        settle_bad(bad, skip=False)
    writer = Writer(request.folder, identity)
    encoding = Encoding.resumed(writer.notes)
    yield from encode_rows(request, form, wanted, writer, encoding)
    try:
        settle_bad(joined(bad, encoding.bad), request.skip_bad, print0)
        finish(writer, parts, report_of(request, rows, parts, bad, encoding))
    except ValueError:
        writer.close()
        discard(request.folder)
        with contextlib.suppress(OSError):
            request.folder.parent.rmdir()  # --out, where nothing else lies in it
        raise


def scan(request: Request, rows: Rows, bad: Tally) -> Iterator[None]:
    """The first pass: what every row is. Faults go to `bad`."""
    for path in request.paths:
        rows.begins.append(len(rows))
        faults = bad.counts.total()
        for place, row in runtime.track(read_rows(path, bad), f"read {path.name}"):
            content = None
            try:
                content = to_messages(row, place)
            except RowError as error:
                bad.append(error)
            rows.add(row, content)
            yield
        if rows.begins[-1] == len(rows) and bad.counts.total() > faults + 1:
            refuse_object(path)


def too_few(parts: Parts) -> ValueError:
    n_train, n_held = len(parts.train) + len(parts.select), len(parts.held)
    return ValueError(f"{n_train} training and {n_held} held-out examples, expected at least 2 and 1: add data or "
                      "change --heldout, --max_samples")


@dataclass
class Encoding:
    """How far the second pass is, and what became of its rows."""

    row: int
    cut: int
    no_answer: int
    bare: int
    bad: Tally

    @classmethod
    def resumed(cls, notes: dict | None) -> "Encoding":
        bad = Tally()
        if notes is None:
            return cls(0, 0, 0, 0, bad)
        bad.extend(RowError(*fault) for fault in notes["faults"])
        bad.counts.update(notes["counts"])
        print0(f"tokenising goes on from row {notes['row']:,}")
        return cls(notes["row"], notes["cut"], notes["no_answer"], notes["bare"], bad)

    def notes(self) -> dict:
        return {"row": self.row, "cut": self.cut, "no_answer": self.no_answer, "bare": self.bare,
                "counts": dict(self.bad.counts), "faults": [(str(fault), fault.reason) for fault in self.bad]}


def encode_rows(request: Request, form: Form, wanted: np.ndarray, writer: Writer, done: Encoding) -> Iterator[None]:
    """The second pass: tokens of the rows in use, saved every PAUSE seconds."""
    saved, total = time.monotonic(), np.count_nonzero(wanted[done.row :])
    forms = {1: form, 2: replace(form, bare=0.0)}  # what is held out stands as it is asked in use
    all_rows = (numbered for path in request.paths for numbered in read_rows(path, Tally()))  # faults are counted
    with runtime.Progress("tokenise", total) as progress:
        for number, (place, row) in enumerate(all_rows):
            if number >= done.row and wanted[number]:
                encode_row(row, place, forms[wanted[number]], writer, done, number)
                progress.step()
            done.row = max(done.row, number + 1)
            if time.monotonic() > saved + PAUSE:
                writer.save(done.notes())
                saved = time.monotonic()
            yield


def encode_row(row: dict, place: str, form: Form, writer: Writer, done: Encoding, number: int) -> None:
    try:
        example, asked = in_form(row, place, form)
    except RowError as error:
        done.bad.append(error)
        return
    if example is None:
        done.no_answer += 1
    else:
        done.cut += example.cut
        done.bare += example.bare
        writer.add(number, example, asked.tokens)


def in_form(row: dict, place: str, form: Form) -> tuple[Example | None, Example | None]:
    """The example of a row, and what it would be if it were held out: with its chat form, in which it must be usable.
    One that only fits so stands so."""
    try:
        example = encode(row, place, form)
    except RowError:
        example = None
    if example and not example.bare:
        return example, example
    asked = encode(row, place, replace(form, bare=0.0))
    return example or asked, asked or example


def joined(first: Tally, second: Tally) -> Tally:
    both = Tally()
    for tally in (first, second):
        both.extend(tally)
        both.counts.update(tally.counts)
    return both


# -----------------------------------------------------------------------------
# What became of every row


def finish(writer: Writer, parts: Parts, report: dict) -> None:
    """Turn numbers of rows into numbers of examples, count what stands on two sides, and complete the store."""
    writer.close()
    store, numbers = Store(writer.folder, {"parts": []}), {}
    rows = np.asarray(store.arrays["rows"])  # in order; one that was left out has no example
    for name, chosen in (("train", parts.train), ("select", parts.select), ("heldout", parts.held)):
        at = np.searchsorted(rows[:-1], chosen).astype(np.int32)
        numbers[name] = at[rows[at] == chosen] if len(rows) else at[:0]
    if not all(len(found) for found in numbers.values()):
        raise ValueError("no answer is left in the training, selection or held-out examples, expected some in each: "
                         "raise --max_length, or add data")
    report["leaked"] = leaked(store, numbers)
    report["tokens"] = sum(Examples(store, memoryview(numbers["train"])).lengths())
    writer.finish(numbers, report | {name: len(found) for name, found in numbers.items()})


def leaked(store: Store, numbers: dict[str, np.ndarray]) -> int:
    """How many held-out texts are tuned on, too, in whatever form: only a user's own split can do that."""
    texts, tuned = np.asarray(store.arrays["texts"]), np.concatenate([numbers["train"], numbers["select"]])
    return int(np.isin(texts[numbers["heldout"]], texts[tuned]).sum())


def report_of(request: Request, rows: Rows, parts: Parts, bad: Tally, done: Encoding) -> dict:
    """What summary.json says of the data: rows = used + left out, by reason."""
    files, sides = [], rows.sides
    for number, (path, begin, end) in enumerate(zip(request.paths, rows.begins, rows.ends)):
        has_split = np.isin(sides[begin:end], (TRAIN, HELDOUT)).any().item()
        files.append({"file": str(path), "rows": end - begin, "has_split": has_split})
        if number < len(request.sources):
            files[-1]["portion"] = float(request.sources[number].portion)
    n_read = int((sides != UNUSABLE).sum()) + bad.counts.total()  # with what was no row at all
    left_out = parts.left_out + bad.counts + done.bad.counts + Counter({NO_ANSWER: done.no_answer})
    return {"files": files, "rows": n_read, "used": n_read - left_out.total(),
            "left_out": dict(left_out.most_common()), "cut": done.cut, "bare": done.bare}


def describe(data: Data) -> None:
    report = data.report
    print0(f"data: {report['train']:,} examples to tune on ({report['tokens']:,} tokens), {report['select']:,} to "
           f"select, {report['heldout']:,} held out; {report['rows']:,} rows read, {report['used']:,} used, "
           f"{report['cut']:,} cut to --max_length, {report['bare']:,} without chat form")
    for reason, count in report["left_out"].items():
        print0(f"  left out {count:,}: {reason}")
    if report["leaked"]:
        print0(f"warning: {report['leaked']} of {report['heldout']} held-out texts are also tuned on, so held-out "
               "losses flatter")
