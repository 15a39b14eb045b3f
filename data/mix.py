"""Mix `messages` files by portions into one file to tune on, in a seeded order.

    python data/mix.py [--from=data/reformatted] [--out=data/mixed] [--portions=vicuna_sharegpt:2.9,slim_orca:1]
                       [--seed=233] [--heldout=0.1] [--max_rows=500] [--max_chars=600]

Reads FROM/NAME.jsonl (data/reformat.py writes them; other `messages` files may lie there, .json and .gz too) and writes
OUT/data.jsonl and OUT/data.report.json. The default is the paper's mix. A portion's whole part repeats every row, its
fraction is a seeded draw. Rows stay on disk: 16 bytes of memory a row are enough. A second run with the same inputs and
settings does nothing. Then: python train.py --data=OUT/data.jsonl. Depends on data/stream.py, data/portions.py and
runtime.
"""

import difflib
import hashlib
import json
import random
import sys
import tempfile
from array import array
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from data import stream  # noqa: E402
from data.portions import MOST, read_portion, repeat  # noqa: E402

PAPER = ("vicuna_sharegpt:2.9", "evol_instruct:1", "slim_orca:1", "meta_math_qa:1", "evol_code_alpaca:1")
PROGRAM = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # other rules make another file


@dataclass
class Settings:
    from_: str = field(default="data/reformatted", metadata={"help": "folder with NAME.jsonl of the sources"})
    out: str = field(default="data/mixed", metadata={"help": "folder to write data.jsonl into"})
    portions: tuple[str, ...] = field(default=PAPER, metadata={"help": "NAME:X, X times the rows of NAME"})
    seed: int = field(default=233, metadata={"help": "seed of draws and order"})
    heldout: float = field(default=0.0, metadata={"help": "share of questions that get \"split\": \"heldout\""})
    max_rows: int | None = field(default=None, metadata={"help": "most rows drawn of each source, before the portions"})
    max_chars: int | None = field(default=None, metadata={"help": "longest row in characters; others are left out"})

    def __post_init__(self):
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(f"heldout is {self.heldout}, expected a share from 0 to below 1: change --heldout")
        for name in ("max_rows", "max_chars"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more: change --{name}")


# ------------------------------------------------------------------------------------------------------------- portions


def read_portions(words: tuple[str, ...]) -> dict[str, Fraction]:
    """NAME -> portion of "NAME:X" (X is 1 where it is missing), exact: 2.9 is 29/10."""
    portions = {}
    for word in words:
        name, _, text = word.partition(":")
        portion = read_portion(text or "1")
        if not name or portion is None:
            raise ValueError(f"--portions has {word!r}, expected NAME:X with 0 < X <= {MOST}: write e.g. slim_orca:1")
        if name in portions:
            raise ValueError(f"--portions names {name} twice, expected each source once: add the portions up")
        portions[name] = portion
    if not portions:
        raise ValueError("--portions is empty, expected NAME:X,...: name a source")
    return portions


def files_of(names: list[str], folder: Path) -> dict[str, Path]:
    """FROM/NAME.jsonl (or .json, .gz) of every name. Raises with the nearest name that is there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} was not found, expected a folder with NAME.jsonl: run data/reformat.py")
    files = {}
    for name in names:
        found = [folder / (name + suffix) for suffix in stream.SUFFIXES if (folder / (name + suffix)).exists()]
        if not found:
            raise FileNotFoundError(f"{folder}/{name}.jsonl was not found ({nearest(name, folder)}), expected rows: "
                                    "correct the name, leave it out of --portions, or run data/reformat.py")
        if len(found) > 1:
            raise ValueError(f"{' and '.join(map(str, found))} are there, expected one of them: move the other away")
        stream.check_file(found[0])
        files[name] = found[0]
    return files


def nearest(name: str, folder: Path) -> str:
    paths = [path.name for path in folder.iterdir() if path.name.endswith(stream.SUFFIXES)]
    present = sorted(path.partition(".json")[0] for path in paths if not path.endswith(".report.json"))
    near = difflib.get_close_matches(name, present, n=1, cutoff=0)
    return f"the nearest one there is {near[0]}" if near else "no file of rows lies there"


# --------------------------------------------------------------------------------------------------- rows of one source


def as_lines(path: Path, folder: Path, settings: Settings) -> Path:
    """The file itself where it is JSON lines as they stand, else a copy in `folder` that is."""
    if stream.is_plain(path):
        return path
    copy = folder / path.name
    with open(copy, "wb") as file:
        for place, row in runtime.track(stream.read_rows(path), f"unpack {path.name}"):
            file.write(json.dumps(check_row(row, place, settings)).encode("utf-8") + b"\n")
    return copy


def index_rows(path: Path, name: str, settings: Settings) -> tuple[array, int]:
    """Where the rows of a file lie, in a seeded order; and how many were left out, longer than --max_chars.

    8 bytes a row: twice the offset in the file, plus 1 for a held-out row. Raises ValueError for what is no row.
    """
    places, too_long, offset = array("Q"), 0, 0
    with open(path, "rb") as file, runtime.Progress(f"{name}: bytes read", path.stat().st_size) as progress:
        for number, line in enumerate(iter(lambda: file.readline(stream.LONGEST), b""), 1):
            progress.step(len(line))
            if line.strip():
                row = parse_row(line, f"{path}, line {number}", settings)
                if settings.max_chars and count_chars(row) > settings.max_chars:
                    too_long += 1
                else:
                    places.append(2 * offset + is_heldout(row, settings.heldout))
            offset += len(line)
    if not places:
        found = f"{too_long:,} rows, all of them longer than {settings.max_chars} characters" if too_long else "no row"
        raise ValueError(f"{path} holds {found}, expected rows to mix: run data/reformat.py, or raise --max_chars")
    random.Random(f"{settings.seed} {name}").shuffle(places)
    return places, too_long


def count_chars(row: dict) -> int:
    return sum(len(turn["content"]) for turn in row["messages"])


def is_heldout(row: dict, share: float) -> bool:
    """Whether the row is held out. Its first question alone decides (or its `group`), so that rows that share it stay
    together in every mix, whatever the seed, the portions and the other sources."""
    question = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
    name = str(row.get("group") or question).encode("utf-8", "replace")
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    return number < share * 2**64


def parse_row(line: bytes, place: str, settings: Settings) -> dict:
    """One `messages` row. Raises ValueError naming the place."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}), expected a row: mend it, or run data/reformat.py") from None
    return check_row(row, place, settings)


def check_row(row, place: str, settings: Settings) -> dict:
    """The row, which must hold messages. Raises ValueError naming the place."""
    turns = row.get("messages") if isinstance(row, dict) else None
    is_good = isinstance(turns, list) and all(is_turn(turn) for turn in turns)
    if not is_good or not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError(f"{place} has no messages with an assistant's turn, expected {{\"messages\": [{{\"role\": "
                         "..., \"content\": ...}, ...]}: convert it with data/reformat.py, or delete it")
    if settings.heldout and "split" in row:
        raise ValueError(f"{place} has a \"split\" of its own, expected none with --heldout: leave --heldout away, or "
                         "take the field out")
    return row


def is_turn(turn) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


# --------------------------------------------------------------------------------------------------------------- mixing


def add_copies(order: array, places: array, begin: int, portion: Fraction) -> tuple[int, int]:
    """Append the copies of the rows from `begin` to the end of `places`; their number to tune on and held out.

    Of n rows to tune on there are floor(portion * n) copies: each floor(portion) times, and the first ones, which are a
    seeded draw, once more. Held-out rows come once.
    """
    heldout = array("I", (number for number in range(begin, len(places)) if places[number] & 1))
    train = array("I", (number for number in range(begin, len(places)) if not places[number] & 1))
    pieces = repeat(train, portion)
    for piece in (heldout, *pieces):
        order.extend(piece)
    return sum(map(len, pieces)), len(heldout)


def mix(files: dict[str, Path], portions: dict[str, Fraction], settings: Settings, output: Path) -> dict:
    """Write the mixed file. The counts: rows in all, and of each source."""
    with tempfile.TemporaryDirectory(prefix=".mix-", dir=output.parent) as folder:
        lines = {name: as_lines(path, Path(folder), settings) for name, path in files.items()}
        return mix_lines(lines, portions, settings, output)


def mix_lines(files: dict[str, Path], portions: dict[str, Fraction], settings: Settings, output: Path) -> dict:
    places, order, begins, counts = array("Q"), array("I"), [], {}
    for name, path in files.items():
        begins.append(len(places))
        drawn, too_long = index_rows(path, name, settings)
        usable = len(drawn)
        places.extend(drawn[: settings.max_rows] if settings.max_rows else drawn)
        del drawn  # as large as its source: gone before copies are made
        train, heldout = add_copies(order, places, begins[-1], portions[name])
        counts[name] = {"rows": usable + too_long, "too_long": too_long,
                        "not_drawn": usable - (len(places) - begins[-1]),
                        "portion": float(portions[name]), "train": train, "heldout": heldout}
    check_counts(counts, settings)
    random.Random(f"{settings.seed} order").shuffle(order)
    write_rows((order, places, begins), list(files.values()), output, bool(settings.heldout))
    return {"rows": len(order), "sources": counts}


def check_counts(counts: dict[str, dict], settings: Settings) -> None:
    if not sum(count["train"] for count in counts.values()):
        raise ValueError("no row to tune on is left, expected at least one: raise --portions or lower --heldout")
    if settings.heldout and not sum(count["heldout"] for count in counts.values()):
        raise ValueError(f"no question falls into the held-out share of {settings.heldout}, expected at least one: "
                         "raise --heldout or --max_rows")


def write_rows(index: tuple[array, array, list[int]], paths: list[Path], output: Path, has_split: bool) -> None:
    """Copy the rows in their order, each with its "split" where there is one.

    index: numbers of rows in order, place of every row, number of each file's first row.
    """
    order, places, begins = index
    with ExitStack() as stack:
        sources = [stack.enter_context(open(path, "rb")) for path in paths]
        target = stack.enter_context(open(output, "wb"))
        for number in runtime.track(order, "rows written"):
            source, place = sources[bisect_right(begins, number) - 1], places[number]
            source.seek(place >> 1)
            line = source.readline().strip()
            if has_split:  # put before the closing brace, so that the row stays as it is, byte for byte
                line = line[:-1] + (b', "split": "heldout"}' if place & 1 else b', "split": "train"}')
            target.write(line + b"\n")


def show(output: Path, report: dict) -> None:
    for name, count in report["sources"].items():
        left = {"too long": count["too_long"], "not drawn": count["not_drawn"]}
        left_out = "".join(f", {n:,} {why}" for why, n in left.items() if n)
        held = f" and {count['heldout']:,} held out" if count["heldout"] else ""
        print(f"{name}: {count['rows']:,} rows{left_out}; x {count['portion']:g} -> {count['train']:,}{held}")
    print(f"{output}: {report['rows']:,} rows", flush=True)
    repeats = any(count["portion"] > 1 for count in report["sources"].values())
    if repeats and not any(count["heldout"] for count in report["sources"].values()):
        print("rows repeat: with --heldout=0.01 those that train.py scores on come once")


# ----------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    settings = runtime.cli(Settings)
    portions = read_portions(settings.portions)
    files = files_of(list(portions), Path(settings.from_))
    output = Path(settings.out) / "data.jsonl"
    if any(path.resolve() == output.resolve() for path in files.values()):
        raise ValueError(f"{output} is one of the files to mix, expected another place for the mix: change --out")
    made_from = {
        "program": PROGRAM,
        "portions": {name: str(portion) for name, portion in portions.items()},
        **{name: getattr(settings, name) for name in ("seed", "heldout", "max_rows", "max_chars")},
        "inputs": [stream.stamp(path) for path in files.values()],
    }
    if stream.is_built(output, made_from):
        print(f"{output} is there already, made from the same files with the same settings: nothing to do")
        return
    show(output, stream.build(output, made_from, lambda path: mix(files, portions, settings, path)))


if __name__ == "__main__":
    runtime.run_main(main)
