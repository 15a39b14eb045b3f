"""Rows of data files of any size, read one at a time, and reports that let a second run do nothing.

    for place, row in read_rows("data/raw/alpaca/alpaca_data.json"): ...   # place: "FILE, item 12" or "FILE, line 12"

A file holds one JSON list or one JSON object a line, in UTF-8, perhaps gzipped: its content tells, not its name. At
most one piece of a file (CHUNK bytes) and the row in hand are in memory. Depends on runtime only.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import runtime

CHUNK = 1 << 20  # bytes read at once
LONGEST = 64 << 20  # bytes of one row; what is longer is no row, but a file without line feeds or closing quotes
BLANKS = re.compile(r"[ \t\r\n]*")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # names under which rows are looked for
SPLIT_TOKEN = 16  # characters that a JSON token cut by the end of a piece can have: null, -1.5e-300, a \u escape
OTHER_FORMATS = (  # how a file that is no JSON begins, what it is, and what to do about it
    (b"PAR1", "a Parquet file", "write its rows as JSON lines, e.g. python -c \"import pandas; "
     "pandas.read_parquet('{name}').to_json('{stem}.jsonl', orient='records', lines=True)\""),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself with git lfs pull"),
)


# -------------------------------------------------------------------------------------------------------------- reading


class RowError(ValueError):
    """What is wrong with one row. reason: the kind of fault, under which such rows are counted."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


def read_rows(path: str | Path, bad: list | None = None) -> Iterator[tuple[str, dict]]:
    """Objects of a JSON list or of JSON lines (empty lines skipped), each with its place in words.

    What is wrong with a single row goes to `bad`, a RowError each; without `bad` it is raised. Raises FileNotFoundError
    for a missing file; ValueError for a folder, another format, a row longer than LONGEST, a list not in JSON or not
    UTF-8, and a file that was cut or holds no row.
    """
    path = Path(path)
    check_file(path)
    faults = _Faults(bad)
    try:
        with _open(path) as file:
            is_list = _first_byte(file) == b"["
        with _open(path) as file:
            for place, row in _items(file, path) if is_list else _lines(file, path, faults):
                if isinstance(row, dict):
                    faults.rows += 1
                    yield place, row
                else:
                    found = f"{place} is a JSON {type(row).__name__}"
                    faults.add(f"{found}, expected an object: mend or delete it", "no JSON object")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}), expected a whole .gz file: get it again") from None
    if not faults.rows and not bad:
        raise ValueError(f"{path} holds no row, expected at least one object: check the file")


class _Faults:
    """Faults of single rows, collected or raised at once, and how many rows are good."""

    def __init__(self, bad: list | None):
        self.bad, self.rows = bad, 0

    def add(self, sentence: str, reason: str) -> None:
        fault = RowError(sentence, reason)
        if self.bad is None:
            raise fault
        self.bad.append(fault)


def check_file(path: Path) -> None:
    """Raise unless the path is a file that may hold JSON."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a .json or .jsonl file: name the file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} was not found, expected a .json or .jsonl file: check the path")
    with open(path, "rb") as file:
        begin = file.read(32)
    for magic, what, remedy in OTHER_FORMATS:
        if begin.startswith(magic):
            remedy = remedy.format(name=path, stem=path.with_suffix(""))
            raise ValueError(f"{path} is {what}, expected JSON, JSON lines or either of them gzipped: {remedy}")


def is_plain(path: Path) -> bool:
    """Whether the file holds JSON lines as they stand: not gzipped, no list, no byte order mark."""
    with open(path, "rb") as file:
        return _first_byte(file) not in (b"[", b"\x1f", b"\xef")


def _open(path: Path) -> io.BufferedIOBase:
    """The file's bytes, unpacked, behind its byte order mark."""
    with open(path, "rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    file = gzip.open(path, "rb") if is_gzipped else open(path, "rb")
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


def _first_byte(file: io.BufferedIOBase) -> bytes:
    byte = file.read(1)
    while byte.isspace():
        byte = file.read(1)
    return byte


def _lines(file: io.BufferedIOBase, path: Path, faults: _Faults) -> Iterator[tuple[str, object]]:
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        place = f"{path}, line {number}"
        if len(line) > LONGEST:
            raise _too_long(place)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            faults.add(f"{place} is not UTF-8 (its byte {error.start}): save the file as UTF-8", "not UTF-8")
        except (ValueError, RecursionError) as error:
            faults.add(f"{place} is not JSON ({error}), expected one object a line: mend or delete it", "not JSON")
        else:
            yield place, row


def _items(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, object]]:
    text = _Text(file, path)
    text.take("[", "its begin")
    if text.peek() == "]":
        return
    number = 0
    ended = False
    while not ended:
        number += 1
        place = f"{path}, item {number}"
        yield place, text.take_value(place)
        ended = text.take(",]", place) == "]"
    if text.peek():
        raise ValueError(f"{path} goes on behind the end of its list, expected one list: write one list, or JSON lines")


class _Text:
    """The text of a file, read on piece by piece as far as it is looked at; what was taken is forgotten."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.json = json.JSONDecoder()
        self.text, self.at, self.bytes, self.ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._read_on(CHUNK)

    def take(self, expected: str, place: str) -> str:
        """The next character, which must be one of `expected`."""
        found = self.peek()
        if not found:
            raise ValueError(f"{self.path} ends behind {place}, expected one of {expected}: it was cut, get it again")
        if found not in expected:
            raise ValueError(f"{place} is followed by {found!r}, expected one of {expected}: mend the file")
        self.at += 1
        return found

    def take_value(self, place: str):
        """The next JSON value, however many pieces it stretches over."""
        if not self.peek():
            raise ValueError(f"{self.path} ends before {place}: it was cut, get it again")
        size = CHUNK
        while True:
            try:
                value, self.at = self.json.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - SPLIT_TOKEN
                if self.ended or not is_cut:
                    reason = f"{error.msg} at its character {error.pos - self.at}"
                    raise ValueError(f"{place} is not JSON ({reason}): mend it, or get the file again") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON ({error}): mend or delete it") from None
            if len(self.text) - self.at > LONGEST:
                raise _too_long(place)
            self._read_on(size)
            size *= 2  # a long value is decoded from its begin again: doubling keeps the work linear

    def _read_on(self, size: int) -> None:
        piece = self.file.read(size)
        begin = self.bytes - len(self.decoder.getstate()[0])  # the decoder may hold bytes of a cut character
        self.bytes += len(piece)
        self.ended = not piece
        try:
            self.text = self.text[self.at:] + self.decoder.decode(piece, final=self.ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 (byte {begin + error.start:,}): save it as UTF-8") from None
        self.at = 0


def _too_long(place: str) -> ValueError:
    return ValueError(f"{place} is longer than {LONGEST >> 20} MiB, expected a row: write a list, or one object a line")


# -------------------------------------------------------------------------------------------------------------- reports


def report_of(output: Path) -> Path:
    """Where the report of a file lies: x.jsonl -> x.report.json."""
    return output.with_suffix(".report.json")


def stamp(path: Path) -> dict:
    """By what a file is known again without reading it: name, size and time of its last change."""
    status = path.stat()
    return {"file": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def is_built(output: Path, made_from: dict) -> bool:
    """Whether `output` lies there as it was written, from the same inputs and settings, by its report."""
    try:
        report = json.loads(report_of(output).read_text(encoding="utf-8"))
        return report["made_from"] == made_from and report["output"] == stamp(output)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build(output: Path, made_from: dict, write: Callable[[Path], dict]) -> dict:
    """Let `write` fill the file and return its counts, which become the report; both appear whole or not at all.

    The old report goes first: a run that is killed between the two leaves a file without report, which is built anew.
    """
    counts = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    report_of(output).unlink(missing_ok=True)
    runtime.write_atomic(output, lambda path: counts.update(write(path)))
    report = {"made_from": made_from, **counts, "output": stamp(output)}
    runtime.write_json(report_of(output), report)
    return report
