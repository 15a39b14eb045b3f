"""Examples on disk: the same as encoding every row, made once, verified, gone on with after a kill, flat in memory.

Run: python -m pytest tests/test_load.py
"""

import json
from dataclasses import replace
from itertools import islice

import pytest
from tiny import write_jsonl, write_tokenizer
from tuning import CPU

from data import load as loading
from data.draw import Draw
from data.load import Request, load
from data.portions import source_of
from data.records import Form, encode
from data.store import open_store
from tokenizer import load_tokenizer

DRAW = Draw(seed=1, heldout=0.2, heldout_samples=64, max_samples=None, select_samples=6)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    return folder


def rows_of(n, start=0):
    return [{"prompt": f"question {i}", "response": "yes " * (1 + i % 5)} for i in range(start, start + n)]


def request_of(model, *words, draw=DRAW, heldout=None, skip_bad=False) -> Request:
    out = model.parent / "out" / "tokens"
    return Request([source_of(str(word)) for word in words], heldout, draw, skip_bad, model, out)


def form_of(model, limit=128, **more) -> Form:
    return Form(load_tokenizer(model), limit, **more)


def texts(examples) -> list[tuple]:
    return [(list(example.tokens), example.prompt, list(example.targets)) for example in examples]


def test_the_store_holds_what_encoding_every_row_gives(model, tmp_path):
    rows = rows_of(40)
    path, form = write_jsonl(tmp_path / "a.jsonl", rows), form_of(model)
    data = load(request_of(model, path), form, CPU)
    wanted = texts(encode(row, "here", form) for row in rows)
    assert sorted(texts(data.all)) == sorted(wanted) and len(data.train) == 26 and len(data.select) == 6
    assert texts(data.train[3:9]) == texts(data.train)[3:9] and texts(data.train[::-1]) == texts(data.train)[::-1]
    assert list(data.all.lengths()) == [len(example.tokens) for example in data.all]
    assert data.report["tokens"] == sum(data.train.lengths())


def test_it_is_made_once_and_known_by_content(model, tmp_path, monkeypatch):
    path, form = write_jsonl(tmp_path / "a.jsonl", rows_of(30)), form_of(model)
    first = load(request_of(model, path), form, CPU)
    monkeypatch.setattr(loading, "build", lambda *_: pytest.fail("made again"))
    moved = path.rename(tmp_path / "b.jsonl")
    again = load(request_of(model, moved), form_of(model), CPU)
    assert texts(again.all) == texts(first.all) and again.digest == first.digest


def test_bare_rows_are_counted_and_none_is_held_out(model, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    data = load(request_of(model, path), form_of(model, bare=0.5, seed=1), CPU)
    plain = load(request_of(model, path), form_of(model), CPU)
    parts = ("train", "select", "held")
    changed = [name for name in parts if texts(getattr(data, name)) != texts(getattr(plain, name))]
    assert "held" not in changed and "train" in changed and 10 < data.report["bare"] < 45 and plain.report["bare"] == 0
    assert len({example.domain for example in data.train}) == 2  # bare rows count as a source of their own


def test_what_a_row_is_does_not_depend_on_its_form(model, tmp_path):
    """Which rows are too long, and which held-out texts are tuned on: the same whatever share stands bare."""
    rows, bad, forms = [{"prompt": "q" * (1 + i), "response": "yes"} for i in range(40)], {}, (0.0, 0.5, 1.0)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lengths = sorted(len(encode(row, "here", form_of(model)).tokens) for row in rows)
    apart = replace(DRAW, heldout=True)
    for bare in forms:
        data = load(request_of(model, path, draw=apart, heldout=path), form_of(model, bare=bare), CPU)
        assert data.report["leaked"] == data.report["heldout"] == 40
        with pytest.raises(ValueError) as caught:
            load(request_of(model, path), form_of(model, limit=lengths[30], bare=bare), CPU)
        bad[bare] = str(caught.value)
    assert len(set(bad.values())) == 1 and f"{lengths[-1]} tokens" in bad[0.0]


@pytest.mark.parametrize("change", ["file", "tokenizer", "length", "seed", "portion"])
def test_another_file_tokenizer_or_setting_makes_it_anew(model, tmp_path, change):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(30))
    first = load(request_of(model, path), form_of(model), CPU)
    word, draw, limit = path, DRAW, 128
    if change == "file":
        path.write_text(path.read_text().replace("question 7", "question x"))
    elif change == "tokenizer":
        (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    limit = 127 if change == "length" else 128
    draw = Draw(2, 0.2, 64, None, 6) if change == "seed" else DRAW
    word = f"{path}:2" if change == "portion" else path
    identity = loading.identity_of(request_of(model, word, draw=draw), form_of(model, limit))
    assert open_store(model.parent / "out" / "tokens", identity) is None
    again = load(request_of(model, word, draw=draw), form_of(model, limit), CPU)
    assert again.report["rows"] == 30 and (again.digest == first.digest) == (change in ("tokenizer", "length"))


@pytest.mark.parametrize("name", ["tokens", "targets", "token_ends", "rows", "train", "heldout"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_store_is_never_read(model, tmp_path, name, damage):
    path, form = write_jsonl(tmp_path / "a.jsonl", rows_of(30)), form_of(model)
    whole = texts(load(request_of(model, path), form, CPU).all)
    file = model.parent / "out" / "tokens" / f"{name}.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[:-4] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    assert open_store(file.parent, loading.identity_of(request_of(model, path), form)) is None
    assert texts(load(request_of(model, path), form, CPU).all) == whole


@pytest.mark.parametrize("stop", [1, 40, 41, 75])
def test_a_killed_making_goes_on_where_it_was_saved(model, tmp_path, monkeypatch, stop, capsys):
    """Killed behind any row, with bytes in the files that no save knows of: the same store as without a kill."""
    rows = rows_of(40)
    rows[33] = {"prompt": "q", "response": "long " * 60}
    path, form = write_jsonl(tmp_path / "a.jsonl", rows), form_of(model)
    request = request_of(model, path, skip_bad=True)
    whole = load(request, form, CPU)
    expected = {file.name: file.read_bytes() for file in request.folder.iterdir()}
    (request.folder / "about.json").unlink()
    monkeypatch.setattr(loading, "PAUSE", -1.0)  # saved behind every row
    making = loading.build(request, form, loading.identity_of(request, form))
    list(islice(making, stop))  # the first 40 are the first pass
    making.close()
    with open(request.folder / "tokens.bin", "ab") as file:
        file.write(b"torn")
    monkeypatch.undo()
    assert texts(load(request, form, CPU).all) == texts(whole.all)
    assert {file.name: file.read_bytes() for file in request.folder.iterdir()} == expected
    assert ("goes on from row" in capsys.readouterr().out) == (stop > 40)


def test_rows_are_used_or_counted_by_reason(model, tmp_path, capsys):
    bad = [{"foo": 1}, 3, {"prompt": "long " * 60, "response": "a"}, {"prompt": "q", "response": "long " * 60}]
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(30) + bad)
    with open(path, "ab") as file:
        file.write(b'{"prompt": "\xff", "response": "a"}\nno json\n')
    request = request_of(model, path, skip_bad=True)
    report = load(request, form_of(model, truncate=True), CPU).report
    assert report["rows"] == 36 == report["used"] + sum(report["left_out"].values())
    assert {"no known form", "no JSON object", "not UTF-8", "not JSON", loading.NO_ANSWER} <= set(report["left_out"])
    assert report["cut"] == 1 and report["leaked"] == 0
    said = capsys.readouterr().out
    assert all(f"left out {count}: {reason}" in said for reason, count in report["left_out"].items())
    with pytest.raises(ValueError, match="4 rows cannot be used"):
        load(request_of(model, path), form_of(model, truncate=True), CPU)
    assert not request.folder.parent.exists()  # nothing is left of what was refused


def test_portions_repeat_examples_and_a_cap_counts_them(model, tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", rows_of(30)), write_jsonl(tmp_path / "b.jsonl", rows_of(30, start=50))
    data = load(request_of(model, f"{a}:2.9", b, draw=Draw(1, 0.2, 64, 50, 6)), form_of(model), CPU)
    assert len(data.train) <= 50 and len({tuple(example.tokens) for example in data.train}) < len(data.train)
    assert [file["portion"] for file in data.report["files"]] == [2.9, 1.0]


@pytest.mark.parametrize("content, says", [
    (b"", "no row"),
    (b'{"text": "a b"}\n', "0 training and 1 held-out"),
    (b'{"messages": [{"role": "user", "content": "q"}]}\n', "no turn of the assistant"),
    (b'{"messages": [{"role": "judge", "content": "q"}]}\n', "role 'judge'"),
    (b'{"prompt": "\xff", "response": "a"}\n', "not UTF-8"),
    (b"[1]", "expected an object"),
    (b"PAR1", "Parquet"),
    (b"\x1f\x8b\x08\x00", "unpacked"),
])
def test_files_that_cannot_be_used_are_refused_by_name(model, tmp_path, content, says):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load(request_of(model, tmp_path / "a.jsonl"), form_of(model), CPU)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is a folder"):
        load(request_of(model, tmp_path), form_of(model), CPU)


def test_bom_line_ends_and_a_row_of_a_megabyte(model, tmp_path):
    lines = [json.dumps(row) for row in rows_of(20)] + [json.dumps({"text": "word " * 200_000})]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    with pytest.raises(ValueError, match="line 21: 1,000,000 tokens, expected at most 128"):
        load(request_of(model, tmp_path / "a.jsonl"), form_of(model), CPU)
    data = load(request_of(model, tmp_path / "a.jsonl"), form_of(model, truncate=True), CPU)
    assert data.report["left_out"] == {loading.NO_ANSWER: 1} and data.report["used"] == 20
