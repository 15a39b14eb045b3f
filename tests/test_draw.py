"""Which rows go where: every row is used or counted, and rows with one prompt are never on two sides.

Run: python -m pytest tests/test_draw.py
"""

import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import draw as draws
from data.draw import UNUSABLE, Draw, Rows, draw_rows, part
from data.portions import Source, repeat, source_of
from runtime import permutation


def talk(question: str, answer: str) -> tuple:
    """As to_messages gives it."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None


def rows_of(*files) -> Rows:
    """Files of (prompt, split); None in place of a row is one that is left out."""
    rows = Rows()
    for file in files:
        rows.begins.append(len(rows))
        for known in file:
            row = {} if known is None or known[1] is None else {"split": known[1]}
            rows.add(row, None if known is None else talk(str(known[0]), str(known)))
    return rows


ROWS = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(0, 12), st.sampled_from([None, None, None, "train", "heldout"]))),
    min_size=1, max_size=40,
)
PORTIONS = st.sampled_from(["1", "2.9", "0.3", "0.001", "3"]).map(Fraction)
DRAWS = st.builds(
    Draw, st.integers(0, 9), st.sampled_from([0.1, 0.5, True]), st.integers(1, 12), st.none() | st.integers(2, 30),
    st.integers(1, 9),
)


@settings(max_examples=40)
@given(st.lists(ROWS, min_size=2, max_size=3), PORTIONS, DRAWS)
def test_every_row_is_used_or_counted_once(files, portion, draw):
    rows = rows_of(*files)
    sources = [Source(Path("a"), portion)] + [Source(Path("b"))] * (len(files) - 1 - (draw.heldout is True))
    parts = part(rows, sources, draw)
    train, select, held = (set(numbers.tolist()) for numbers in (parts.train, parts.select, parts.held))
    usable = set(np.flatnonzero(rows.sides != UNUSABLE).tolist())
    assert not train & select and not train & held and not select & held and train | select | held <= usable
    assert len(usable) == len(train | select | held) + parts.left_out.total() and all(parts.left_out.values())
    assert len(parts.held) <= draw.heldout_samples and len(parts.train) <= (draw.max_samples or 10**9)
    again = part(rows, sources, draw)
    assert all(np.array_equal(a, b) for a, b in ((again.train, parts.train), (again.select, parts.select),
                                                 (again.held, parts.held)))


def drawn_plainly(rows: list[int], names: list[list[int]], wanted: int, seed: int) -> list[int]:
    """What draw_rows says of itself, with dictionaries and lists."""
    drawn, levels = [], [*names, range(len(names[0]))]
    for level, name in enumerate(levels):
        left, sizes, taken = wanted - len(drawn), Counter(name[n] for n in rows if n not in drawn), []
        fitting = sorted(group for group, size in sizes.items() if size <= left)
        for at in permutation(len(fitting), seed, "groups", level):
            if sum(sizes[group] for group in taken) + sizes[fitting[at]] > left:
                break
            taken.append(fitting[at])
        drawn += [n for n in rows if n not in drawn and name[n] in taken]
        if len(taken) < len(fitting):
            break
    return [drawn[at] for at in permutation(len(drawn), seed)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6) | st.integers(7, 99), st.integers(0, 3)), min_size=1, max_size=60),
       st.data(), st.integers(1, 60), st.integers(0, 9))
def test_a_draw_in_slices_is_the_plain_one(known, data, wanted, seed):
    rows = rows_of([])
    for prompt, answer in known:
        rows.add({}, talk(str(prompt), str(answer)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    names = [np.frombuffer(names, np.uint64) for names in (rows.prompts, rows.texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "PIECE", 8)
        found = draw_rows(mask, names, wanted, seed)
    assert found.tolist() == drawn_plainly(np.flatnonzero(mask).tolist(), [n.tolist() for n in names], wanted, seed)


@pytest.mark.parametrize("portion, most", [("1", 100), ("1", None), ("2.9", None)])
def test_memory_of_a_row_while_rows_are_parted(portion, most):
    """Beside the names: parting took 97 bytes a row, 155 of one taken 2.9 times."""
    rows, n, rng = rows_of([]), 200_000, np.random.default_rng(0)
    for names in (rows.prompts, rows.texts):
        names.frombytes((rng.integers(0, 2**62, n, dtype=np.uint64) << 2).tobytes())
    assert rows.prompts.itemsize + rows.texts.itemsize == 16
    tracemalloc.start()  # knows of numpy, not of torch, whose orders take 4 bytes a row
    part(rows, [Source(Path("a"), Fraction(portion))], Draw(1, 0.1, 100, most, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (8 + 5.5 * float(portion)) * n


def test_a_share_of_distinct_prompts_is_drawn_to_the_row():
    rows = rows_of([(n, None) for n in range(200)])
    parts = part(rows, [Source(Path("a"))], Draw(1, 0.1, 1000, None, 16))
    assert len(parts.held) == 20 and len(parts.select) == 16 and len(parts.train) == 164
    other = part(rows, [Source(Path("a"))], Draw(2, 0.1, 1000, None, 16))
    assert set(other.held.tolist()) != set(parts.held.tolist())


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=30, max_size=60), st.integers(0, 99), st.sampled_from([0.1, 0.3]))
def test_a_prompt_is_on_one_side(sizes, seed, share):
    prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
    rows = rows_of([(prompt, None) for prompt in prompts])
    parts = part(rows, [Source(Path("a"), Fraction("2.9"))], Draw(seed, share, 1000, None, 8))
    train, select, held = ({prompts[n] for n in numbers} for numbers in (parts.train, parts.select, parts.held))
    assert not train & held and not select & held and not {*parts.train} & {*parts.select}
    wanted = round(share * len(prompts))
    assert wanted - max(sizes) < len(parts.held) <= wanted and len(parts.select) <= 8


def test_rows_that_share_one_prompt_are_told_apart_by_their_texts():
    rows = rows_of([(0, None)])
    for number in range(100):
        rows.add({}, talk("Write.", str(number // 2)))
    for seed in range(5):
        parts = part(rows, [Source(Path("a"))], Draw(seed, 0.1, 1000, None, 8))
        held, tuned = {rows.texts[n] for n in parts.held}, {rows.texts[n] for n in (*parts.train, *parts.select)}
        assert len(parts.held) in (9, 10) and len(parts.select) in (7, 8) and not held & tuned


def test_rows_that_are_all_the_same_are_parted_all_the_same():
    rows = rows_of([(0, None)] * 40)
    parts = part(rows, [Source(Path("a"))], Draw(0, 0.1, 1000, None, 8))
    assert (len(parts.train), len(parts.select), len(parts.held)) == (28, 8, 4)


@pytest.mark.parametrize("portion, often", [("2.9", [3] * 9 + [2]), ("1", [1] * 10), ("0.5", [1] * 5 + [0] * 5)])
def test_a_portion_takes_every_row_so_often_and_some_once_more(portion, often):
    copies = np.concatenate(repeat(np.arange(10), Fraction(portion)))
    assert sorted(np.bincount(copies, minlength=10)) == sorted(often)
    rows = rows_of([(n, None) for n in range(10)], [(n, "heldout") for n in range(20, 24)])
    parts = part(rows, [Source(Path("a"), Fraction(portion)), Source(Path("b"))], Draw(0, 0.5, 9, None, 1))
    chosen = parts.select.item()
    counts = np.bincount(parts.train, minlength=10)[[n for n in range(10) if n != chosen]]
    assert sum(counts) in (sum(often) - max(often), sum(often) - 2) and set(counts) <= set(often)


@pytest.mark.parametrize("split", ["test", "Heldout", "", 3, ["train"]])
def test_other_splits_are_refused_with_their_counts(split):
    rows = rows_of([(1, "train"), (2, "heldout"), (3, split), (4, None)])
    with pytest.raises(ValueError, match="expected train or heldout.*rename") as error:
        rows.check_splits()
    assert f"{split!r} 1" in str(error.value) and "'heldout' 1" in str(error.value)


def test_a_portion_stands_behind_the_last_colon_of_no_file(tmp_path):
    plain, odd = tmp_path / "a.jsonl", tmp_path / "a:2"
    for path in (plain, odd):
        path.write_text("{}")
    assert source_of(f"{plain}:2.9") == Source(plain, Fraction(29, 10)) and source_of(str(plain)) == Source(plain)
    assert source_of(str(odd)) == Source(odd) and source_of(f"{odd}:3") == Source(odd, Fraction(3))
    assert source_of("c:/none.jsonl") == Source(Path("c:/none.jsonl"))
    for wrong in ("0", "-1", "x", "", "2000", "inf"):
        with pytest.raises(ValueError, match="expected FILE or FILE:X"):
            source_of(f"{plain}:{wrong}")
