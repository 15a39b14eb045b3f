"""Which rows are tuned on, which choose among routers, which are held out: decided without holding a row in memory.

    rows = Rows()
    rows.add(row, to_messages(row, place))     # of every row: 17 bytes
    parts = part(rows, sources, draw)          # numbers of rows

Rows with the same prompt stay on one side, so that what a draw holds out is never tuned on. Depends on
data/portions.py, data/records.py, runtime, numpy and torch.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.portions import Source, repeat
from data.records import prompt_of
from runtime import generator

NO_SPLIT, TRAIN, HELDOUT, UNUSABLE = range(4)  # what a row says of its side; UNUSABLE: a row that is left out
SPLITS = {None: NO_SPLIT, "train": TRAIN, "heldout": HELDOUT}


# -----------------------------------------------------------------------------
# What is known of every row


@dataclass
class Rows:
    """Names of prompt and text and the side of every row, in order of the files; 17 bytes a row.

    begins: number of each file's first row. unknown: splits that are neither train nor heldout, with their counts.
    """

    prompts: array = field(default_factory=lambda: array("Q"))
    texts: array = field(default_factory=lambda: array("Q"))
    sides: bytearray = field(default_factory=bytearray)
    begins: list[int] = field(default_factory=list)
    unknown: Counter = field(default_factory=Counter)

    def add(self, row: dict, content) -> None:
        """The next row of the file in hand. content: what to_messages says of it; None for a row that is left out."""
        prompt, text, side = 0, 0, UNUSABLE
        if content is not None:
            prompt, text = _name(str(row.get("group") or prompt_of(content))), _name(repr(content))
            split = row.get("split")
            side = SPLITS.get(split, UNUSABLE) if split is None or isinstance(split, str) else UNUSABLE
            if side == UNUSABLE:
                self.unknown[repr(split)[:60]] += 1
        self.prompts.append(prompt)
        self.texts.append(text)
        self.sides.append(side)

    def check_splits(self) -> None:
        """Raise ValueError for any other split than train and heldout."""
        if not self.unknown:
            return
        known = {repr(name): self.sides.count(side) for name, side in SPLITS.items() if name}
        counts = sorted({**known, **self.unknown}.items())
        found = ", ".join(f"{split} {count}" for split, count in counts if count)
        raise ValueError(f"rows have the split {next(iter(self.unknown))} (all: {found[:200]}); expected train or "
                         "heldout: rename it, or delete these rows")


def _name(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


# -----------------------------------------------------------------------------
# Parting them


@dataclass(frozen=True)
class Draw:
    """How many rows are taken of each side. heldout: a share, or True where the last file holds them."""

    seed: int
    heldout: float | bool
    heldout_samples: int
    max_samples: int | None
    select_samples: int


@dataclass
class Parts:
    """Numbers of rows: to tune on (repeated ones as often as they are taken), to select by, and held out.

    left_out: how many usable rows are in none of them, by reason.
    """

    train: np.ndarray
    select: np.ndarray
    held: np.ndarray
    left_out: Counter

    @property
    def are_enough(self) -> bool:
        """Whether there is a row on each side."""
        return min(len(self.train), len(self.select), len(self.held)) > 0


def part(rows: Rows, sources: Sequence[Source], draw: Draw) -> Parts:
    """Held-out rows first: of a file, by their split, or drawn; then what is tuned on, and of it the selection set."""
    names = [np.frombuffer(rows.prompts, np.uint64), np.frombuffer(rows.texts, np.uint64)]
    sides = np.frombuffer(rows.sides, np.uint8)
    usable = np.flatnonzero(sides != UNUSABLE)
    data = usable[: np.searchsorted(usable, _end(rows, draw))]
    held = _held(rows, names, sides, data, draw)
    pool = data[(sides[data] != HELDOUT) & ~np.isin(data, held)]
    train = _copies(pool, rows, sources, draw.seed)
    drawn = len(np.unique(train))
    train, scored = train[: draw.max_samples], held[: draw.heldout_samples]
    used = np.unique(train)
    n_select = min(draw.select_samples, max(1, len(train) // 4))
    select = draw_rows(used, names[1:], n_select, draw.seed, "select")  # by text: many prompts tell more than few
    left_out = Counter({
        "not drawn: a portion below 1": len(pool) - drawn,
        "beyond --max_samples": drawn - len(used),
        "beyond --heldout_samples": len(held) - len(scored),
        "of another split than what is read of its file": len(usable) - len(pool) - len(held),
    })
    return Parts(train[~np.isin(train, select)], select, scored, +left_out)


def _end(rows: Rows, draw: Draw) -> int:
    """Number of rows in the files to tune on."""
    return rows.begins[-1] if draw.heldout is True else len(rows.sides)


def _held(rows: Rows, names: list[np.ndarray], sides: np.ndarray, data: np.ndarray, draw: Draw) -> np.ndarray:
    if draw.heldout is True:
        apart = np.arange(rows.begins[-1], len(sides))
        marked = apart[sides[apart] == HELDOUT]
        return marked if len(marked) else apart[sides[apart] != UNUSABLE]
    marked = data[sides[data] == HELDOUT]
    if len(marked):
        return permuted(marked, draw.seed, "heldout")
    return draw_rows(data, names, max(1, round(draw.heldout * len(data))), draw.seed, "heldout")


def _copies(pool: np.ndarray, rows: Rows, sources: Sequence[Source], seed: int) -> np.ndarray:
    """The rows of each source as often as its portion says, in a seeded order."""
    ends = [*rows.begins[1:], len(rows.sides)]
    parts = []
    for number, (source, begin, end) in enumerate(zip(sources, rows.begins, ends)):
        own = permuted(pool[(pool >= begin) & (pool < end)], seed, "source", number)
        parts.append(np.frombuffer(repeat(array("q", own.tobytes()), source.portion), np.int64))
    return permuted(np.concatenate(parts), seed, "train")


def draw_rows(rows: np.ndarray, names: Sequence[np.ndarray], wanted: int, *seed) -> np.ndarray:
    """So many rows, in a seeded order.

    names: what rows share, e.g. their prompts, then their whole texts. Whole groups of one prompt are drawn, none of
    them larger than what is wanted; where these are too few (one instruction that most rows share), groups of one text;
    where these are too few as well, rows.
    """
    drawn = rows[:0]
    for level, name in enumerate((*names, np.arange(len(names[0])))):
        rest = rows[~np.isin(rows, drawn)]
        left = wanted - len(drawn)
        if not len(rest) or left < 1:
            break
        _, group, sizes = np.unique(name[rest], return_inverse=True, return_counts=True)
        fitting = permuted(np.flatnonzero(sizes <= left), *seed, "groups", level)
        taken = fitting[np.cumsum(sizes[fitting]) <= left]
        drawn = np.concatenate([drawn, rest[np.isin(group, taken)]])
        if len(taken) < len(fitting):
            break  # a group more would be too many
    return permuted(drawn, *seed)


def permuted(rows: np.ndarray, *seed) -> np.ndarray:
    """The rows in an order that depends on their number and the seed alone."""
    return rows[torch.randperm(len(rows), generator=generator(*seed)).numpy()]
