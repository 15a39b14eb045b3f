"""The raw sources become `messages` rows: every row is kept or counted, what is kept can be tuned on, files are whole.

Run: python -m pytest tests/test_reformat.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import records, reformat
from tiny import write_tokenizer
from tokenizer import load_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "reformat.py"


def talk(*turns: str) -> dict:
    """A conversation from "speaker: text" words."""
    return {"conversations": [dict(zip(("from", "value"), turn.split(": ", 1))) for turn in turns]}


GOOD = {
    "vicuna_sharegpt": [talk("human: a", "gpt: b", "user: c", "bard: d") | {"id": "x_0"}, talk("user: e", "gpt: f")],
    "evol_instruct": [talk("human: a", "gpt: b") | {"idx": "1"}],
    "slim_orca": [talk("system: s", "human: a", "gpt: b")],
    "meta_math_qa": [{"query": "a", "response": "b", "type": "t", "original_question": "o"}],
    "evol_code_alpaca": [{"instruction": "a", "output": "b"}],
    "alpaca": [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": "i", "output": "b"}],
}


def put(raw: Path, name: str, rows: list, file: str | None = None) -> Path:
    """The rows in the form and under the name of the publisher's file."""
    path = raw / name / (file or reformat.SOURCES[name].files[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows, indent=1))
    return path


@pytest.fixture
def raw(tmp_path):
    for name, rows in GOOD.items():
        put(tmp_path / "raw", name, rows)
    return tmp_path / "raw"


def call(raw: Path, monkeypatch, *words: str) -> Path:
    """The script's main in this process; the folder that it writes."""
    monkeypatch.setattr(sys, "argv", ["reformat.py", f"--raw={raw}", f"--out={raw.parent / 'out'}", *words])
    reformat.main()
    return raw.parent / "out"


def texts(row: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row["messages"]]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- whole


def test_six_sources_in_their_publishers_forms(raw, monkeypatch, capsys):
    out = call(raw, monkeypatch)
    rows = {name: read(out / f"{name}.jsonl") for name in GOOD}
    assert {path.name for path in out.iterdir()} == {f"{n}.{end}" for n in GOOD for end in ("jsonl", "report.json")}
    a_b = [("user", "a"), ("assistant", "b")]
    assert texts(rows["vicuna_sharegpt"][0]) == [*a_b, ("user", "c"), ("assistant", "d")]
    assert texts(rows["slim_orca"][0]) == [("system", "s"), *a_b]
    assert [texts(row) for row in rows["alpaca"]] == [a_b, [("user", "a\n\ni"), ("assistant", "b")]]
    assert all(texts(rows[name][0]) == a_b for name in ("evol_instruct", "meta_math_qa", "evol_code_alpaca"))
    for name, found in rows.items():
        assert all(row["source"] == row["domain"] == name for row in found)
        assert [row["id"] for row in found] == [f"{name}_{i}" for i in range(len(GOOD[name]))]
        report = json.loads((out / f"{name}.report.json").read_text())
        assert (report["rows"], report["kept"], report["dropped"]) == (len(GOOD[name]), len(GOOD[name]), {})
    assert "type (1 rows)" in capsys.readouterr().out  # what is not used is said

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    call(raw, monkeypatch)
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_only_what_changed_is_made_again(raw, monkeypatch, capsys):
    out = call(raw, monkeypatch)
    put(raw, "alpaca", GOOD["alpaca"][:1])
    (out / "slim_orca.jsonl").write_text("{}\n")
    capsys.readouterr()
    call(raw, monkeypatch)
    said = capsys.readouterr().out
    assert said.count("nothing to do") == 4 and "alpaca: 1 rows, 1 kept" in said and "slim_orca: 1 rows, 1 kept" in said


# ------------------------------------------------------------------------------------------------------------ cleaning

SPEAKERS = ("human", "user", "gpt", "chatgpt", "bard", "assistant", "system", "bing", "narrator", None, 3, [])
TURNS = st.lists(st.one_of(
    st.fixed_dictionaries({"from": st.sampled_from(SPEAKERS[:8]), "value": st.sampled_from(["a", "b c", "", " \n"])},
                          optional={"weight": st.sampled_from([None, 0, 0.0, 1, 1.0])}),
    st.fixed_dictionaries({"from": st.sampled_from(SPEAKERS), "value": st.sampled_from(["a", "\ud800", None, 3])}),
    st.sampled_from([{}, "a", None]),
), max_size=6)
TEXTS = st.sampled_from(["a", "", " ", None, 3, ["a"]])
RAW_ROWS = st.one_of(
    st.fixed_dictionaries({}, optional={"conversations": TURNS | st.none(), "id": TEXTS, "system": TEXTS}),
    st.fixed_dictionaries({}, optional={key: TEXTS for key in ("instruction", "input", "output", "history")}),
    st.fixed_dictionaries({}, optional={key: TEXTS for key in ("query", "response", "original_question")}),
)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@given(st.sampled_from(sorted(GOOD)), st.lists(RAW_ROWS, max_size=8))
def test_kept_and_dropped_are_all_rows_and_kept_ones_can_be_tuned_on(tmp_path_factory, tok, name, rows):
    folder = tmp_path_factory.mktemp("x")
    path = put(folder, name, [*rows, GOOD[name][0]])  # one good row: a file without any is an error
    report = reformat.convert(name, [path], folder / "y")
    kept = read(folder / "y")
    assert report["rows"] == len(rows) + 1
    assert report["kept"] == len(kept) == report["rows"] - sum(entry["rows"] for entry in report["dropped"].values())
    for row in kept:
        roles = [message["role"] for message in row["messages"]]
        turns = row["messages"][roles[0] == "system":]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(turn["content"].strip() for turn in turns)
        assert records.encode(row, "here", records.Form(tok, limit=10_000, chat="mistral")).targets  # the strictest
    indices = [int(row["id"].rpartition("_")[2]) for row in kept]
    assert indices == sorted(set(indices)) and indices[-1] == len(rows)  # an id says which row of the source it was


A_B = [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("turns, wanted", [
    (("gpt: x", "human: a", "gpt: b"), A_B),
    (("human: a", "gpt: b", "human: x"), A_B),
    (("system: s", "gpt: x", "human: a", "gpt: b", "human: y"), [("system", "s"), *A_B]),
])
def test_turns_without_question_or_answer_at_the_ends_are_cut_off_and_counted(tmp_path, turns, wanted):
    path = put(tmp_path, "slim_orca", [talk(*turns)])
    report = reformat.convert("slim_orca", [path], tmp_path / "y")
    assert texts(read(tmp_path / "y")[0]) == wanted and report["shortened"] == 1


@pytest.mark.parametrize("name, row, reason", [
    ("vicuna_sharegpt", talk("human: a", "bing: b"), "a turn by bing"),
    ("evol_instruct", talk("human: a", "bing: b"), "a turn by bing"),
    ("evol_instruct", talk("system: s", "human: a", "gpt: b"), "a turn by system"),
    ("slim_orca", talk("human: a", "bing: b"), "a turn by an unknown role"),
    ("slim_orca", talk("human: a", "narrator: b", "gpt: c"), "a turn by an unknown role"),
    ("slim_orca", talk("human: a"), "no answer of the assistant"),
    ("slim_orca", talk("gpt: a"), "no answer of the assistant"),
    ("slim_orca", talk("system: a"), "no answer of the assistant"),
    ("slim_orca", {"conversations": []}, "no conversation"),
    ("slim_orca", {"messages": [{"role": "user", "content": "a"}]}, "no conversation"),
    ("slim_orca", talk("human: a", "gpt: b", "gpt: c"), "two turns of one role"),
    ("slim_orca", talk("human: a", "gpt:  "), "an empty turn"),
    ("slim_orca", talk("human: a", "system: s", "gpt: b"), "a system turn behind the first"),
    ("slim_orca", talk("human: a", "gpt: \ud83d"), "half of a surrogate pair"),
    ("slim_orca", {"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
     "no answer that carries loss"),
    ("slim_orca", talk("human: a", "gpt: b") | {"system": "Speak like a sailor."}, "context in a field"),
    ("evol_code_alpaca", {"instruction": "and now?", "output": "b", "history": [["a", "b"]]}, "context in a field"),
    ("alpaca", {"instruction": "a", "input": "", "output": ""}, "an empty turn"),
    ("alpaca", {"instruction": None, "input": "i", "output": "b"}, "a turn without text"),
    ("alpaca", {"instruction": "a", "input": ["i"], "output": "b"}, "a turn without text"),
    ("alpaca", {"instruction": "a"}, "a turn without text"),
    ("meta_math_qa", {"query": "a", "response": 3}, "a turn without text"),
])
def test_why_a_row_is_dropped(tmp_path, name, row, reason):
    path = put(tmp_path, name, [row, *GOOD[name]])
    report = reformat.convert(name, [path], tmp_path / "y")
    (found, entry), = report["dropped"].items()
    assert found.startswith(reason) and entry["rows"] == 1 and report["kept"] == len(GOOD[name])
    assert entry["first"].startswith(f"{path}, {'line' if path.suffix == '.jsonl' else 'item'} 1: ")


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_raw_row_and_its_reformatted_row_are_the_same_conversation(tmp_path, name):
    """As train.py reads the two."""
    reformat.convert(name, [put(tmp_path, name, GOOD[name])], tmp_path / "y")
    for raw_row, row in zip(GOOD[name], read(tmp_path / "y"), strict=True):
        assert records.to_messages(raw_row, "here") == records.to_messages(row, "here")


def test_a_loss_flag_stays_where_it_matters(tmp_path):
    turns = [("human", "a", 1), ("gpt", "b", 0), ("human", "c", 0), ("gpt", "d", 1.0)]
    row = {"conversations": [{"from": who, "value": text, "weight": weight} for who, text, weight in turns]}
    reformat.convert("slim_orca", [put(tmp_path, "slim_orca", [row])], tmp_path / "y")
    assert [message.get("weight") for message in read(tmp_path / "y")[0]["messages"]] == [None, 0, None, None]


def test_rows_of_one_origin_share_a_group(tmp_path):
    names = ("QWJhYvA_0", "QWJhYvA_12", "i6IyJda_0", None, "identity_0", "identity_1")
    pieces = [talk("human: a", "gpt: b") | {"id": identity} for identity in names]
    reformat.convert("vicuna_sharegpt", [put(tmp_path, "vicuna_sharegpt", pieces)], tmp_path / "y")
    groups = [row.get("group") for row in read(tmp_path / "y")]
    assert groups[0] == groups[1] and groups[3] is None and len(set(groups)) == 5


# --------------------------------------------------------------------------------------------------------------- files


def test_a_row_of_ten_megabytes_is_kept(tmp_path):
    path = put(tmp_path, "alpaca", [{"instruction": "a" * 10_000_000, "output": "b"}, *GOOD["alpaca"]])
    assert reformat.convert("alpaca", [path], tmp_path / "y")["kept"] == 3


def test_the_publishers_files_are_read_and_others_named(raw, monkeypatch, capsys):
    put(raw, "alpaca", GOOD["alpaca"], file="older.json")
    out = call(raw, monkeypatch, "--only=alpaca")
    assert len(read(out / "alpaca.jsonl")) == 2 and "not read: older.json" in capsys.readouterr().out
    os.rename(raw / "alpaca" / "alpaca_data.json", raw / "alpaca" / "part2.json")
    call(raw, monkeypatch, "--only=alpaca")
    assert len(read(out / "alpaca.jsonl")) == 4 and "not read" not in capsys.readouterr().out


def break_file(content: bytes):
    return lambda folder: (folder / "alpaca_data.json").write_bytes(content)


def rename(name: str):
    return lambda folder: os.rename(folder / "alpaca_data.json", folder / name)


def folder_for_file(folder: Path) -> None:
    os.remove(folder / "alpaca_data.json")
    (folder / "alpaca_data.json").mkdir()


def file_for_folder(folder: Path) -> None:
    os.rename(folder / "alpaca_data.json", folder.parent / "x")
    folder.rmdir()
    os.rename(folder.parent / "x", folder)


def parquet_only(folder: Path) -> None:
    os.remove(folder / "alpaca_data.json")
    (folder / "data").mkdir()
    (folder / "data" / "train-0.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize("spoil, says", [
    (break_file(b""), "holds no row"),
    (break_file(b"[]"), "holds no row"),
    (break_file(b'[{"instruction": "\xff"}]'), "not UTF-8"),
    (break_file(b'[{"instruction": "a", "outp'), "item 1 is not JSON"),
    (break_file(b'[{"text": "a"}, {"text": "b"}]'), "none of 2 rows can be used: a turn without text"),
    (break_file(b"PAR1"), "read_parquet"),
    (rename("notes.txt"), "holds no .json"),
    (rename("alpaca_data.parquet"), "holds no .json"),  # a name alone makes no Parquet file
    (parquet_only, "read_parquet"),
    (folder_for_file, "is a folder"),
    (file_for_folder, "is a file, expected a folder"),
    (lambda folder: os.rename(folder, folder.parent / "gone"), "was not found, expected a folder with alpaca_data"),
    (lambda folder: (folder / "alpaca_data.json.gz").write_bytes(b""), "alpaca_data.json and alpaca_data.json.gz"),
])
def test_bad_input_is_one_error_and_nothing_is_written(raw, monkeypatch, spoil, says):
    spoil(raw / "alpaca")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        call(raw, monkeypatch, "--only=alpaca")
    assert str(raw / "alpaca") in str(error.value) or "alpaca:" in str(error.value)
    assert not list((raw.parent / "out").glob("*")) and "\n" not in str(error.value)


def test_a_bad_source_is_found_before_a_good_one_is_written(raw, monkeypatch):
    os.rename(raw / "alpaca", raw / "gone")
    with pytest.raises(FileNotFoundError, match="alpaca was not found.*--only"):
        call(raw, monkeypatch)
    assert not (raw.parent / "out").exists()


@pytest.mark.parametrize("only, says", [("slim_orka", "the nearest one is slim_orca"), (",", "--only is empty")])
def test_an_unknown_source_names_the_nearest(raw, monkeypatch, only, says):
    with pytest.raises(ValueError, match=says):
        call(raw, monkeypatch, f"--only={only}")


def test_a_missing_raw_folder(tmp_path):
    words = [sys.executable, SCRIPT, f"--raw={tmp_path / 'nowhere'}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "vicuna_sharegpt was not found" in done.stderr and done.stderr.count("\n") == 1
