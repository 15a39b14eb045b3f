"""Which rows are tuned on, which choose among routers, which are held out: decided without holding a row in memory.

    rows = Rows()
    rows.add(row, to_messages(row, place))     # of every row: 16 bytes
    parts = part(rows, sources, draw)          # numbers of rows

Rows with the same prompt stay on one side, so that what a draw holds out is never tuned on. Parting takes 15 to 19
bytes a row more where few are tuned on: a set of rows is a mask (a byte a row), an order of rows holds their numbers in
4 bytes each, and names are sorted in slices. Depends on data/portions.py, data/records.py, runtime, numpy and torch.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.portions import Source, repeat
from data.records import prompt_of
from runtime import generator

NO_SPLIT, TRAIN, HELDOUT, UNUSABLE = range(4)  # what a row says of its side; UNUSABLE: a row that is left out
SPLITS = {None: NO_SPLIT, "train": TRAIN, "heldout": HELDOUT}
SLICES = 16  # in which names are sorted, by their first bits
PIECE = 1 << 13  # rows that are looked up at once


# -----------------------------------------------------------------------------
# What is known of every row


@dataclass
class Rows:
    """Names of prompt and text and the side of every row, in order of the files; 16 bytes a row.

    A name is a hash of 62 bits, shifted by two; a text's holds the row's side as well. begins: number of each file's
    first row. unknown: splits that are neither train nor heldout, with their counts.
    """

    prompts: array = field(default_factory=lambda: array("Q"))
    texts: array = field(default_factory=lambda: array("Q"))
    begins: list[int] = field(default_factory=list)
    unknown: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sides(self) -> np.ndarray:
        """A byte for each row."""
        sides = np.empty(len(self), np.uint8)
        return np.bitwise_and(np.frombuffer(self.texts, np.uint64), 3, out=sides, casting="unsafe")

    @property
    def ends(self) -> list[int]:
        """Number of each file's last row, plus one."""
        return [*self.begins[1:], len(self)]

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
        self.texts.append(text | side)

    def check_splits(self) -> None:
        """Raise ValueError for any other split than train and heldout."""
        if not self.unknown:
            return
        sides = np.bincount(self.sides, minlength=4).tolist()
        counts = sorted({**{repr(name): sides[side] for name, side in SPLITS.items() if name}, **self.unknown}.items())
        found = ", ".join(f"{split} {count}" for split, count in counts if count)
        raise ValueError(f"rows have the split {next(iter(self.unknown))} (all: {found[:200]}); expected train or "
                         "heldout: rename it, or delete these rows")


def _name(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) & ~3


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
    sides, names = rows.sides, [np.frombuffer(names, np.uint64) for names in (rows.prompts, rows.texts)]
    held = _held(rows, names, sides, draw)
    pool = _readable(rows, sides, draw) & (sides != HELDOUT)
    pool[held] = False
    copies = _copies(pool, rows, sources, draw.seed)
    n_drawn = int(_mask(copies, len(rows)).sum())
    train, scored = permuted(copies, draw.seed, "train", most=draw.max_samples), held[: draw.heldout_samples]
    used = _mask(train, len(rows))
    n_used, n_select = int(used.sum()), min(draw.select_samples, max(1, len(train) // 4))
    select = draw_rows(used, names[1:], n_select, draw.seed, "select")  # by text: many prompts tell more than few
    used[select] = False
    n_pool, n_usable = int(pool.sum()), int((sides != UNUSABLE).sum())
    left_out = Counter({
        "not drawn: a portion below 1": n_pool - n_drawn,
        "beyond --max_samples": n_drawn - n_used,
        "beyond --heldout_samples": len(held) - len(scored),
        "of another split than what is read of its file": n_usable - n_pool - len(held),
    })
    return Parts(train[_take(used, train)], select, scored, +left_out)


def _readable(rows: Rows, sides: np.ndarray, draw: Draw) -> np.ndarray:
    """Mask of the usable rows in the files to tune on."""
    usable = sides != UNUSABLE
    if draw.heldout is True:
        usable[rows.begins[-1] :] = False
    return usable


def _held(rows: Rows, names: list[np.ndarray], sides: np.ndarray, draw: Draw) -> np.ndarray:
    data = _readable(rows, sides, draw)
    if draw.heldout is True:
        apart = ~data & (sides != UNUSABLE)
        marked = apart & (sides == HELDOUT)
        return _where(marked if marked.any() else apart)
    marked = data & (sides == HELDOUT)
    if marked.any():
        return permuted(_where(marked), draw.seed, "heldout")
    wanted = max(1, round(draw.heldout * int(data.sum())))
    return draw_rows(data, names, wanted, draw.seed, "heldout")


def _copies(pool: np.ndarray, rows: Rows, sources: Sequence[Source], seed: int) -> np.ndarray:
    """The rows of each source as often as its portion says."""
    parts = []
    for number, (source, begin, end) in enumerate(zip(sources, rows.begins, rows.ends)):
        own = permuted(_where(pool[begin:end]), seed, "source", number)
        own += begin
        parts += repeat(own, source.portion)
    return np.concatenate(parts)


def draw_rows(rows: np.ndarray, names: Sequence[np.ndarray], wanted: int, *seed) -> np.ndarray:
    """So many of the rows of a mask, in a seeded order.

    names: what rows share, e.g. their prompts, then their whole texts. Whole groups of one prompt are drawn, none of
    them larger than what is wanted; where these are too few (one instruction that most rows share), groups of one text;
    where these are too few as well, rows.
    """
    rest, drawn = rows.copy(), np.zeros(0, np.int32)
    for level, name in enumerate((*names, None)):
        left = wanted - len(drawn)
        if left < 1 or not rest.any():
            break
        if name is None:  # each row by itself
            taken, is_enough = np.sort(permuted(_where(rest), *seed, "groups", level, most=left)), True
        else:
            groups, is_enough = _draw_groups(rest, name, left, *seed, "groups", level)
            taken = _where(rest & _are_named(name, groups))
        drawn = np.concatenate([drawn, taken])
        if is_enough:
            break
        rest[taken] = False
    return permuted(drawn, *seed)


def _draw_groups(rest: np.ndarray, name: np.ndarray, left: int, *seed) -> tuple[np.ndarray, bool]:
    """Names of groups of at most `left` rows together, sorted; and whether a group more would be too many."""
    counts = [len(found) for found, _ in _groups(rest, name, left)]
    order = _order(sum(counts), *seed)[:left].copy()  # a group has a row at least
    names, sizes, begin = np.empty(len(order), np.uint64), np.empty(len(order), np.int32), 0
    for found, count in _groups(rest, name, left):
        mine = np.flatnonzero((order >= begin) & (order < begin + len(found)))
        names[mine], sizes[mine] = found[order[mine] - begin], count[order[mine] - begin]
        begin += len(found)
    taken = names[np.cumsum(sizes) <= left]
    return np.sort(taken), len(taken) < sum(counts)


def _groups(rows: np.ndarray, name: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Names of groups of at most so many rows, and their sizes: rising, in slices."""
    width = 2**64 // SLICES
    for low in range(0, 2**64, width):
        own = name[rows & (name >= low) & (name <= low + width - 1)] >> 2
        names, sizes = np.unique(own, return_counts=True)
        yield names[sizes <= most], sizes[sizes <= most]


def _are_named(name: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mask of the rows with one of these names, which are sorted."""
    found = np.zeros(len(name), bool)
    for at in range(0, len(name) if len(chosen) else 0, PIECE):
        own = name[at : at + PIECE] >> 2
        found[at : at + PIECE] = chosen[np.searchsorted(chosen[:-1], own)] == own
    return found


# Numpy makes numbers that index an array into 8 bytes each, all at once; torch takes them as they are.


def _where(mask: np.ndarray) -> np.ndarray:
    """Numbers of the rows of a mask."""
    return np.arange(len(mask), dtype=np.int32)[mask]


def _mask(numbers: np.ndarray, size: int) -> np.ndarray:
    """The rows of these numbers."""
    mask, ones = torch.zeros(size, dtype=torch.bool), torch.ones(1, dtype=torch.bool).expand(len(numbers))
    return mask.index_add_(0, torch.from_numpy(numbers), ones).numpy()


def _take(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).index_select(0, torch.from_numpy(numbers)).numpy()


def permuted(rows: np.ndarray, *seed, most: int | None = None) -> np.ndarray:
    """The rows, or so many of them, in an order that depends on their number and the seed alone."""
    return _take(rows, _order(len(rows), *seed)[:most])


def _order(n: int, *seed) -> np.ndarray:
    return torch.randperm(n, generator=generator(*seed), dtype=torch.int32).numpy()
