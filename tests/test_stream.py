"""Rows of data files: any size in little memory, in either form, what is no row by its place; reports of what was made.

Run: python -m pytest tests/test_stream.py
"""

import gzip
import json
import tracemalloc
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import stream

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10**9, 10**9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), min_size=1, max_size=6)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(1, 40), st.sampled_from(["lines", None, 1, 4]), st.booleans(), st.booleans())
def test_every_form_gives_the_rows_back(tmp_path, wanted, chunk, form, is_gzipped, has_bom):
    """As json.loads reads them, wherever the pieces of the file end: within a character, a number, a string.

    form: JSON lines, or the indent of a list."""
    if form != "lines":
        text = json.dumps(wanted, ensure_ascii=False, indent=form)
    else:
        text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in wanted)
    content = (b"\xef\xbb\xbf" if has_bom else b"") + b" \n"[: not has_bom and 2] + text.encode()
    path = write(tmp_path / "x.any", gzip.compress(content, mtime=0) if is_gzipped else content)
    with mock.patch.object(stream, "CHUNK", chunk):
        found = list(stream.read_rows(path))
    assert [row for _, row in found] == wanted
    assert len({place for place, _ in found}) == len(wanted)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(1, 40), st.data())
def test_a_list_that_was_cut_anywhere_is_an_error(tmp_path, wanted, chunk, data):
    content = json.dumps(wanted, ensure_ascii=False).encode()
    path = write(tmp_path / "x.json", content[: data.draw(st.integers(1, len(content) - 1))])
    with mock.patch.object(stream, "CHUNK", chunk), pytest.raises(ValueError, match="x.json"):
        list(stream.read_rows(path))


def test_memory_stays_flat_and_a_row_of_ten_megabytes_passes(tmp_path):
    long = {"text": "é" * 5_000_000}
    small = [{"text": "x" * 1000}] * 6_000
    for name, content in (("x.json", json.dumps([*small, long], ensure_ascii=False)),
                          ("x.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*small, long]))):
        path = write(tmp_path / name, content)
        assert [len(row["text"]) for _, row in stream.read_rows(path)] == [1000] * 6_000 + [5_000_000]
        tracemalloc.start()
        reader = stream.read_rows(path)
        for _ in range(6_000):
            next(reader)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * stream.CHUNK < path.stat().st_size / 2


@pytest.mark.parametrize("content, says", [
    ("", "holds no row"),
    (" \n \n", "holds no row"),
    ("[]", "holds no row"),
    ("[{}, 3]", "item 2 is a JSON int"),
    ('{}\n"a"\n', "line 2 is a JSON str"),
    ("[{}] [{}]", "goes on behind the end"),
    ("[{} {}]", "item 1 is followed by '{'"),
    ("[{},]", "item 2 is not JSON"),
    ("[{}", "ends behind .*item 1"),
    ("[{},", "ends before .*item 2"),
    ('[{"a": tru}]', "item 1 is not JSON"),
    ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    (b'{"a": "\xff"}\n', "line 1 is not UTF-8"),
    (b'[{"a": "ok"}, {"a": "\xe9"}]', r"not UTF-8 \(byte 21\)"),
    ('[{"a": 1}]'.encode("utf-16"), "is UTF-16"),
    (b"PAR1\x15\x04", "Parquet file.*read_parquet"),
    (b"PK\x03\x04abc", "zip archive.*unpack"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    (gzip.compress(b"{}\n" * 9999, mtime=0)[:-12], "cannot be unpacked"),
    ("[" * 200_000, "item 1 is not JSON"),
    ("[" + '{"a":' * 200_000, "item 1 is not JSON"),
    ('{"a":' * 200_000, "line 1 is not JSON"),
    ('{"a": ' + "1" * 9999 + "}", "line 1 is not JSON"),
])
def test_what_is_no_row_is_named(tmp_path, content, says):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=says) as error:
        list(stream.read_rows(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("begin", ["", "["])
def test_a_row_without_end_is_refused_before_it_fills_the_memory(tmp_path, begin):
    path = write(tmp_path / "x.json", begin + '{"a": "' + "x" * 200_000)
    with mock.patch.object(stream, "LONGEST", 50_000), mock.patch.object(stream, "CHUNK", 1000):
        with pytest.raises(ValueError, match="longer than"):
            list(stream.read_rows(path))


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        next(stream.read_rows(tmp_path))
    with pytest.raises(FileNotFoundError, match="was not found"):
        next(stream.read_rows(tmp_path / "x.json"))


# ------------------------------------------------------------------------------------------------------------- reports


def test_built_means_same_inputs_and_an_untouched_output(tmp_path):
    output, made_from = tmp_path / "new" / "x.jsonl", {"inputs": [1]}
    assert not stream.is_built(output, made_from)
    report = stream.build(output, made_from, lambda path: {"rows": path.write_bytes(b"{}\n")})
    assert report["rows"] == 3 and stream.is_built(output, made_from) and not stream.is_built(output, {"inputs": [2]})
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.jsonl", "x.report.json"]
    output.write_bytes(b"{}")
    assert not stream.is_built(output, made_from)
    stream.build(output, made_from, lambda path: {"rows": path.write_bytes(b"{}\n")})
    stream.report_of(output).write_text("{")
    assert not stream.is_built(output, made_from)


def test_a_failed_build_leaves_the_old_file_and_no_report(tmp_path):
    output = tmp_path / "x.jsonl"
    stream.build(output, {}, lambda path: {"rows": path.write_bytes(b"old\n")})

    def fails(path):
        path.write_bytes(b"ne")
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        stream.build(output, {}, fails)
    assert output.read_bytes() == b"old\n" and [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def fails(path):
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as error:
        stream.build(tmp_path / "x.jsonl", {}, fails)
    assert error.value.filename == str(tmp_path / "x.jsonl") and not list(tmp_path.iterdir())
