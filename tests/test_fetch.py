"""The data sets' download, against a small server on this machine that can cut, refuse and ignore ranges.

Run: python -m pytest tests/test_fetch.py
"""

import fnmatch
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.tasks import FIRST_ROWS

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "fetch.py"
spec = importlib.util.spec_from_file_location("data_fetch", SCRIPT)
fetch = importlib.util.module_from_spec(spec)
sys.modules["data_fetch"] = fetch  # dataclasses looks its module up
spec.loader.exec_module(fetch)


class Server:
    """Serves `files` (path -> bytes). cut: bytes after which a reply breaks off; ranges: whether it honours Range."""

    def __init__(self):
        self.files, self.cut, self.ranges, self.asked = {}, None, True, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.asked.append(asked)
                content = server.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
                if begin >= len(content) and begin:
                    return self.send_error(416)
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                self.wfile.write(content[begin:][: server.cut])
                self.close_connection = True

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def source(self, path: str, content: bytes, *files) -> "fetch.PublishedFile":
        self.files[path] = content
        return fetch.PublishedFile((self.address + path,), len(content), hashlib.sha256(content).hexdigest(), files)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


ROWS = b"".join(b'{"question": "%d"}\n' % i for i in range(1000))


def files_under(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_plain_file(server, tmp_path, capsys):
    source = server.source("/train.jsonl", ROWS, ("", "set/train.jsonl", 1000))
    fetch.fetch(source, tmp_path)
    assert (tmp_path / "set/train.jsonl").read_bytes() == ROWS and files_under(tmp_path) == {"set/train.jsonl"}
    fetch.fetch(source, tmp_path)
    assert server.asked == [None] and "there already" in capsys.readouterr().out


def test_zip_and_tar_members(server, tmp_path):
    """Members are found by the end of their path, others left out; a folder of csv files counts its rows together."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (
            "top/Main/dev.jsonl",
            "top/Additional/dev.jsonl",
            "__MACOSX/top/Main/._dev.jsonl",
            "top/Main/x.tsv",
        ):
            archive.writestr(name, b'h\nrow "a\nrow b' if name.endswith("tsv") else name.encode() + b"\nsecond")
    fetch.fetch(
        server.source("/a.zip", buffer.getvalue(), ("Main/dev.jsonl", "a/dev.jsonl", 2), ("Main/x.tsv", "a/x.tsv", 2)),
        tmp_path,
    )
    assert (tmp_path / "a/dev.jsonl").read_bytes() == b"top/Main/dev.jsonl\nsecond"

    buffer = io.BytesIO()
    members = {"data/dev/s_dev.csv": b'"two\nlines",A\nb,B\n', "data/dev/t_dev.csv": b"c,C\r\n"}
    members |= {"data/dev/README": b"no", "data/test/s_test.csv": b"d,D\n"}
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    source = server.source(
        "/data.tar", buffer.getvalue(), ("data/dev/", "m/data/dev/", 3), ("data/test/", "m/data/test/", 1)
    )
    fetch.fetch(source, tmp_path)
    assert files_under(tmp_path / "m") == {"data/dev/s_dev.csv", "data/dev/t_dev.csv", "data/test/s_test.csv"}
    assert (tmp_path / "m/data/dev/s_dev.csv").read_bytes() == members["data/dev/s_dev.csv"] and fetch.is_present(
        tmp_path, source
    )


def test_cut_download_continues_by_itself(server, tmp_path):
    """As long as every attempt brings new bytes it goes on, each time from where the last one stopped."""
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    server.cut = 3000
    fetch.fetch(source, tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == ROWS
    assert server.asked == [None] + [f"bytes={n}-" for n in range(3000, len(ROWS), 3000)]


def test_next_run_continues(server, tmp_path):
    """A run that ended half way leaves a .part and no target; the next one asks for the rest only."""
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    part = tmp_path / ".download" / f"{source.name}.part"
    part.parent.mkdir()
    part.write_bytes(ROWS[:5000])
    server.cut = 0
    with pytest.raises(ValueError, match="cut at 5,000 of .*it continues at 5,000 bytes"):
        fetch.fetch(source, tmp_path)
    assert files_under(tmp_path) == {f".download/{part.name}"}
    server.cut, server.asked = None, []
    fetch.fetch(source, tmp_path)
    assert server.asked == ["bytes=5000-"] and (tmp_path / "train.jsonl").read_bytes() == ROWS


def test_server_without_ranges(server, tmp_path):
    """The file is then begun anew, never appended to what was there."""
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    server.ranges = False
    part = tmp_path / ".download" / f"{source.name}.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 5000)
    fetch.fetch(source, tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == ROWS


def test_wrong_checksum_is_refused(server, tmp_path):
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    server.files["/train.jsonl"] = ROWS.replace(b'"7"', b'"8"')
    with pytest.raises(ValueError, match=rf"has the sha256 \w+, expected {source.sha256}: it was discarded"):
        fetch.fetch(source, tmp_path)
    assert not files_under(tmp_path)


def test_wrong_row_count_is_refused(server, tmp_path):
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1001))
    with pytest.raises(ValueError, match="has 1000 rows for train.jsonl, expected 1001"):
        fetch.fetch(source, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()


def test_incomplete_set_is_fetched_again(server, tmp_path):
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    (tmp_path / "train.jsonl").write_bytes(ROWS[:-30])
    fetch.fetch(source, tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == ROWS


def test_missing_file_and_second_address(server, tmp_path):
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    gone = fetch.PublishedFile((server.address + "/gone",), source.size, source.sha256, source.files)
    with pytest.raises(ValueError, match=r"/gone could not be fetched \(HTTP 404 Not Found\), expected"):
        fetch.fetch(gone, tmp_path)
    fetch.fetch(
        fetch.PublishedFile(gone.addresses + source.addresses, source.size, source.sha256, source.files), tmp_path
    )
    assert (tmp_path / "train.jsonl").read_bytes() == ROWS


def test_shorter_file_on_the_server(server, tmp_path):
    """A part longer than the server's file (416) is dropped, so that it cannot block every later run."""
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    part = tmp_path / ".download" / f"{source.name}.part"
    part.parent.mkdir()
    part.write_bytes(ROWS[:9000])
    server.files["/train.jsonl"] = ROWS[:8000]
    with pytest.raises(ValueError, match="HTTP 416"):
        fetch.fetch(source, tmp_path)
    server.files["/train.jsonl"] = ROWS
    fetch.fetch(source, tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == ROWS


def test_offline(server, tmp_path, monkeypatch, capsys):
    """The script ends with one line on standard error and status 2, and leaves no target behind."""
    source = server.source("/train.jsonl", ROWS, ("", "train.jsonl", 1000))
    server.http.shutdown()
    server.http.server_close()
    monkeypatch.setattr(fetch, "DATASETS", {"toy": fetch.Dataset("MIT", "http://localhost", (source,))})
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--tasks=toy", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        fetch.runtime.run_main(fetch.main)
    shown = capsys.readouterr()
    assert (
        ended.value.code == 2
        and shown.err.count("\n") == 1
        and "Connection refused" in shown.err
        and "toy: licence MIT" in shown.out
    )
    assert files_under(tmp_path) == {".gitignore"}


def test_command_line():
    """--list names every data set with its licence and needs no network; an unknown task is refused."""
    shown = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True).stdout
    assert all(f"{task}: licence {d.licence}" in shown for task, d in fetch.DATASETS.items())
    done = subprocess.run([sys.executable, SCRIPT, "--tasks=boolq,bolq"], capture_output=True, text=True)
    assert done.returncode == 2 and "--tasks has bolq, expected some of boolq, rte" in done.stderr


def test_every_path_of_a_task_is_fetched_or_documented():
    """A task names its files in data/tasks.py alone; what no source has is the start of a file, cut off by hand."""
    targets = [target for d in fetch.DATASETS.values() for source in d.sources for _, target, _ in source.files]
    for task in fetch.TASKS.values():
        for path in {*task.files, *task.pool} - set(FIRST_ROWS):
            found = [t for t in targets if fnmatch.fnmatch(t, path) or (t.endswith("/") and path.startswith(t))]
            assert found, f"{task.name}: nothing fetches {path}"
        assert {*task.files[:1], *task.pool[:1]}.isdisjoint(FIRST_ROWS)


def test_table():
    """Every task that can be scored is here, targets are unique, digests look like sha256."""
    tasks = "boolq rte openbookqa piqa mmlu winogrande gsm8k hellaswag arc_challenge arc_easy lambada_openai".split()
    assert list(fetch.DATASETS) == tasks
    sources = {source for d in fetch.DATASETS.values() for source in d.sources}
    targets = [target for source in sources for _, target, _ in source.files]
    assert len(targets) == len(set(targets)) and len({s.name for s in sources}) == len(sources)
    assert all(
        len(bytes.fromhex(s.sha256)) == 32 and s.size > 0 and all(rows > 0 for *_, rows in s.files) for s in sources
    )
