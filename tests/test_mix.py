"""The mix: every row whole times and a seeded part once more, an order by seed alone, held-out questions kept apart.

Run: python -m pytest tests/test_mix.py
"""

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import mix

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "mix.py"


def row(name: str, number: int, question: str | None = None, **more) -> dict:
    asked, answer = question or f"{name} {number}?", f"{name} answer {number} é"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": name, "id": f"{name}_{number}", **more}


def put(folder: Path, name: str, items: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder / f"{name}.jsonl"


@pytest.fixture
def source(tmp_path):
    for name, count in (("a", 10), ("b", 7)):
        put(tmp_path / "from", name, [row(name, number) for number in range(count)])
    return tmp_path / "from"


def call(source: Path, *words: str, out: str = "out") -> list[dict]:
    """The script's main in this process; the mixed rows."""
    with mock.patch.object(sys, "argv", ["mix.py", f"--from={source}", f"--out={source.parent / out}", *words]):
        mix.main()
    return read(source.parent / out / "data.jsonl")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ids(items: list[dict]) -> list[str]:
    return [item["id"] for item in items]


# ------------------------------------------------------------------------------------------------- portions and order

PORTIONS = st.decimals(min_value="0.01", max_value=4, places=2).filter(lambda value: value > 0)


@settings(max_examples=40)  # each writes files
@given(st.lists(st.tuples(st.integers(1, 12), PORTIONS), min_size=1, max_size=3), st.integers(0, 5))
def test_copies_are_whole_times_and_a_drawn_part(tmp_path_factory, sources, seed):
    """floor(portion * n) rows of n, each floor(portion) times or once more; the same bytes for the same seed."""
    folder = tmp_path_factory.mktemp("x")
    names = [f"s{place}" for place in range(len(sources))]
    for name, (count, _) in zip(names, sources):
        put(folder / "from", name, [row(name, number) for number in range(count)])
    portions = [f"{name}:{portion}" for name, (_, portion) in zip(names, sources)]
    words = (f"--portions={','.join(portions)}", f"--seed={seed}")
    wanted = {name: int(Fraction(portion) * count) for name, (count, portion) in zip(names, sources)}
    if not any(wanted.values()):
        with pytest.raises(ValueError, match="no row to tune on"):
            call(folder / "from", *words)
        return
    found = call(folder / "from", *words)
    assert Counter(item["source"] for item in found) == Counter({k: v for k, v in wanted.items() if v})
    times = Counter(ids(found))
    for name, (count, portion) in zip(names, sources):
        assert all(times[f"{name}_{number}"] - int(portion) in (0, 1) for number in range(count))
    assert all(item == row(item["source"], int(item["id"].split("_")[1])) for item in found)
    call(folder / "from", *words, out="again")
    assert (folder / "out" / "data.jsonl").read_bytes() == (folder / "again" / "data.jsonl").read_bytes()


def test_another_seed_draws_and_orders_otherwise(tmp_path):
    put(tmp_path / "from", "a", [row("a", number) for number in range(100)])
    one, two = (ids(call(tmp_path / "from", "--portions=a:1.5", f"--seed={seed}", out=str(seed))) for seed in (1, 2))
    assert one != two and Counter(one) != Counter(two) and len(one) == len(two) == 150
    assert sorted(one) != one


def test_sources_do_not_come_in_blocks(tmp_path):
    for name in "ab":
        put(tmp_path / "from", name, [row(name, number) for number in range(500)])
    found = [item["source"] for item in call(tmp_path / "from", "--portions=a,b")]
    assert 180 < found[:500].count("a") < 320  # 250 +- 6 standard deviations


def test_the_default_is_the_papers_mix(tmp_path):
    counts = {"vicuna_sharegpt": 10, "evol_instruct": 3, "slim_orca": 4, "meta_math_qa": 5, "evol_code_alpaca": 6}
    for name, count in counts.items():
        put(tmp_path / "from", name, [row(name, number) for number in range(count)])
    put(tmp_path / "from", "alpaca", [row("alpaca", 0)])
    assert Counter(item["source"] for item in call(tmp_path / "from")) == counts | {"vicuna_sharegpt": 29}


def test_limits_of_rows_and_length(source):
    put(source, "c", [row("c", number, question="x" * (300 if number < 4 else 3)) for number in range(10)])
    found = call(source, "--portions=a:2,c", "--max_rows=5", "--max_chars=100")
    assert Counter(item["source"] for item in found) == {"a": 10, "c": 5} and len(set(ids(found))) == 10
    assert all(len(item["messages"][0]["content"]) < 300 for item in found)
    report = json.loads((source.parent / "out" / "data.report.json").read_text())
    assert report["rows"] == 15
    wanted = {"rows": 10, "too_long": 4, "not_drawn": 1, "portion": 1.0, "train": 5, "heldout": 0}
    assert report["sources"]["c"] == wanted


# ------------------------------------------------------------------------------------------------------------- held out


@settings(max_examples=40)
@given(st.floats(0.1, 0.9), st.lists(st.integers(0, 8), min_size=4, max_size=30), st.booleans())
def test_held_out_questions_are_never_tuned_on_in_any_mix(tmp_path_factory, share, questions, has_group):
    """Rows of one question, or of one group, fall on one side: the same one for every seed, portion and company."""
    folder = tmp_path_factory.mktemp("x")
    for name in "ab":
        more = [{"group": f"g{q}"} if has_group else {} for q in questions]
        asked = [f"{name} {i}" if has_group else f"question {q}" for i, q in enumerate(questions)]
        put(folder / "from", name, [row(name, i, asked[i], **more[i]) for i in range(len(questions))])
    sides = {"train": set(), "heldout": set()}
    for words in (("--portions=a:2.5,b", "--seed=1"), ("--portions=b:0.7", "--seed=2")):
        try:
            found = call(folder / "from", *words, f"--heldout={share}")
        except ValueError as error:
            assert "held-out share" in str(error) or "no row to tune on" in str(error)
            continue
        for item in found:
            sides[item["split"]].add(item.get("group") or item["messages"][0]["content"])
        assert max(Counter(item["id"] for item in found if item["split"] == "heldout").values()) == 1
    assert not sides["train"] & sides["heldout"]


def test_repeated_rows_without_held_out_ones_are_said_aloud(source, capsys):
    for words, is_said in ((("a:2",), True), (("a:2", "--heldout=0.5"), False), (("a,b",), False)):
        call(source, f"--portions={words[0]}", *words[1:])
        assert ("rows repeat" in capsys.readouterr().out) == is_said


def test_the_held_out_share_is_the_one_asked_for(tmp_path):
    put(tmp_path / "from", "a", [row("a", number) for number in range(4000)])
    found = call(tmp_path / "from", "--portions=a", "--heldout=0.1")
    assert len(found) == 4000 and 300 < sum(item["split"] == "heldout" for item in found) < 500
    assert all("split" not in item for item in call(tmp_path / "from", "--portions=a"))


# --------------------------------------------------------------------------------------------------- files and memory


def test_a_second_run_does_nothing_until_something_changes(source, capsys):
    call(source, "--portions=a,b")
    path = source.parent / "out" / "data.jsonl"
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    call(source, "--portions=a:1.0,b:1")
    assert "nothing to do" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    for words in (("--portions=a,b:2",), ("--portions=a,b", "--seed=1"), ("--portions=a,b", "--heldout=0.5")):
        call(source, *words)
        assert "nothing to do" not in capsys.readouterr().out
    put(source, "a", [row("a", 0)])
    assert len(call(source, "--portions=a")) == 1
    path.write_text("")
    assert len(call(source, "--portions=a")) == 1


def test_memory_is_at_most_sixteen_bytes_a_row(tmp_path):
    count = 8_000
    path = tmp_path / "a.jsonl"
    line = json.dumps(row("a", 0)).encode() + b"\n"
    path.write_bytes(line * count)
    small = tmp_path / "b.jsonl"
    small.write_bytes(line)
    peaks = {}
    for name, one in (("a", path), ("b", small)):
        tracemalloc.start()
        mix.mix({name: one}, {name: Fraction("2.9")}, mix.Settings(), tmp_path / "out")
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    written = 4 * 2.9  # of a row that is read, beside 16
    assert peaks["a"] - peaks["b"] < (16 + written) * count * 1.1  # an array grows by a sixteenth more than it needs


def test_lines_without_a_last_line_feed_and_with_carriage_returns(tmp_path):
    items = [row("a", number) for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\r\n\r\n".join(json.dumps(item) for item in items), newline="")
    (tmp_path / "from").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "from" / "a.jsonl")
    assert sorted(ids(call(tmp_path / "from", "--portions=a:2"))) == sorted(ids(items * 2))


@pytest.mark.parametrize("words, says", [
    (("--portions=aa:1,b:1",), "aa.jsonl was not found .the nearest one there is a"),
    (("--portions=a:1,a:2",), "names a twice"),
    (("--portions=a:0",), "has 'a:0'"),
    (("--portions=a:-1",), "has 'a:-1'"),
    (("--portions=a:x",), "has 'a:x'"),
    (("--portions=a:nan",), "has 'a:nan'"),
    (("--portions=a:inf",), "has 'a:inf'"),
    (("--portions=:1",), "has ':1'"),
    (("--portions=,",), "--portions is empty"),
    (("--portions=a:0.01",), "no row to tune on"),
    (("--portions=a", "--heldout=1.0"), "heldout is 1.0"),
    (("--portions=a", "--heldout=nan"), "heldout is nan"),
    (("--portions=a", "--heldout=0.00001"), "held-out share"),
    (("--portions=a", "--max_rows=0"), "max_rows is 0"),
    (("--portions=a", "--max_chars=3"), "all of them longer than 3"),
    ((), "vicuna_sharegpt.jsonl was not found"),
])
def test_bad_settings_are_one_error_and_nothing_is_written(source, words, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        call(source, *words)
    assert not list((source.parent / "out").glob("*"))


@pytest.mark.parametrize("content, says", [
    (b"", "holds no row"),
    (b"{}\n", "line 1 has no messages"),
    (b"3\n", "line 1 has no messages"),
    (b"\n{\n", "line 2 is not JSON"),
    (b'{"messages": "\xff"}\n', "line 1 is not JSON"),
    (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1 has no messages with an assistant"),
    (b'{"messages": [{"role": "assistant", "content": null}]}\n', "line 1 has no messages"),
    (json.dumps(row("a", 0, split="test")).encode(), "\"split\" of its own"),
    (b"PAR1", "Parquet"),
    (b"\x1f\x8b\x08", "cannot be unpacked"),
    (b'[{"messages": []}]', "item 1 has no messages"),
    (json.dumps([row("a", 0, split="test")]).encode(), "item 1 has a \"split\" of its own"),
])
def test_a_bad_row_is_named_and_nothing_is_written(source, content, says):
    (source / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        call(source, "--portions=b,a", "--heldout=0.2")
    assert str(source / "a.jsonl") in str(error.value) and not list((source.parent / "out").glob("*"))


def test_a_row_is_copied_byte_for_byte(tmp_path):
    """A number's spelling, half of a surrogate pair, blanks: json.loads and dumps would not keep them."""
    line = b'{ "messages": [{"role": "user", "content": "\\ud83d \xc3\xa9"}, {"role": "assistant", "content": "b"}], '
    line += b'"n": 1e00 }'
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a.jsonl").write_bytes(b" " + line + b" \r\n" + line.replace(b'"b"', b'"c"'))
    call(tmp_path / "from", "--portions=a")
    assert sorted((tmp_path / "out" / "data.jsonl").read_bytes().splitlines())[0] == line
    put(tmp_path / "from", "b", [row("b", number) for number in range(20)])
    found = call(tmp_path / "from", "--portions=a,b", "--heldout=0.5")
    assert sum(item["messages"][0]["content"] == "\ud83d é" for item in found) == 2


def test_lists_and_packed_files_are_mixed_as_well(tmp_path):
    items = [row("a", number) for number in range(9)]
    forms = {".jsonl": "".join(json.dumps(item) + "\n" for item in items).encode(), ".json": json.dumps(items).encode()}
    forms |= {f"{suffix}.gz": gzip.compress(content) for suffix, content in forms.items()}
    found = []
    for place, (suffix, content) in enumerate(forms.items()):
        (tmp_path / f"from{place}").mkdir()
        (tmp_path / f"from{place}" / f"a{suffix}").write_bytes(content)
        found.append(call(tmp_path / f"from{place}", "--portions=a:1.5", out=f"out{place}"))
        assert sorted(path.name for path in (tmp_path / f"out{place}").iterdir()) == ["data.jsonl", "data.report.json"]
    assert len(found[0]) == 13 and found[0] == found[1] == found[2] == found[3]


def test_two_files_of_one_name(source):
    (source / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="a.json and .*a.jsonl are there"):
        call(source, "--portions=a")


def test_an_input_is_never_overwritten(source):
    put(source, "data", [row("data", 0)])
    before = (source / "data.jsonl").read_bytes()
    with pytest.raises(ValueError, match="one of the files to mix"):
        call(source, "--portions=data,a", out="from")
    assert (source / "data.jsonl").read_bytes() == before


def test_a_folder_in_place_of_a_file_and_a_missing_folder(source):
    (source / "c.jsonl").mkdir()
    with pytest.raises(ValueError, match="c.jsonl is a folder"):
        call(source, "--portions=c")
    words = [sys.executable, SCRIPT, f"--from={source / 'nowhere'}", f"--out={source.parent / 'out'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "run data/reformat.py" in done.stderr and done.stderr.count("\n") == 1


def test_long_rows_are_copied_whole(tmp_path):
    long = row("a", 0, question="x" * 10_000_000)
    put(tmp_path / "from", "a", [row("a", 1), long, row("a", 2)])
    found = call(tmp_path / "from", "--portions=a")
    assert sorted(found, key=lambda item: item["id"]) == [long, row("a", 1), row("a", 2)]
