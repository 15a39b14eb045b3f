"""How many times the rows of a file are taken: --portions=NAME:2.9 of data/mix.py, --data=FILE:2.9 of train.py.

A portion's whole part repeats every row, its fraction is a draw of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

MOST = 1000  # largest portion


@dataclass(frozen=True)
class Source:
    """A file of rows, and how many times they are taken."""

    path: Path
    portion: Fraction = Fraction(1)


def read_portion(text: str) -> Fraction | None:
    """The exact value of a portion (2.9 is 29/10); None for what is not a number above 0 and up to MOST."""
    try:
        return Fraction(text) if 0.0 < float(text) <= MOST else None
    except ValueError:
        return None


def source_of(word: str) -> Source:
    """FILE or FILE:X. A word that names a file as it stands is that file: a path may hold colons."""
    path, _, text = word.rpartition(":")
    portion = read_portion(text)
    if not path or Path(word).exists() or (portion is None and not Path(path).exists()):
        return Source(Path(word))
    if portion is None:
        raise ValueError(f"--data has {word!r}, expected FILE or FILE:X with 0 < X <= {MOST}: write e.g. {path}:2.9")
    return Source(Path(path), portion)


def repeat(rows: Sequence, portion: Fraction) -> list[Sequence]:
    """Of n rows floor(portion * n), in pieces: all of them floor(portion) times, and the first ones once more."""
    whole = int(portion)
    return [rows] * whole + [rows[: int(portion * len(rows)) - whole * len(rows)]]
