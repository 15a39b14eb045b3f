"""Examples in tokens, on disk: made once from files of rows of any size, then mapped into memory.

    store = open_store(folder, identity) or ...build...    # folder: OUT/tokens
    store.examples("train")[7].tokens                      # a view of the file, no copy

FOLDER holds flat arrays in the machine's byte order: tokens (int32), targets (int32 positions in their example whose
token is predicted), ends of every example in both (int64), rows (int64: the row of each example), domains (uint32: a
checksum of its domain, and of whether it is bare), texts (int64: a digest of its tokens as they would be held out, the
same for two texts of which a cut leaves the same), and for each part of the data the numbers of its examples (int32).
about.json says what they were made from and holds their sizes and checksums; it is written last and verified at every
opening, so half a store, or a damaged one, is never read. While a store is made, progress.json says how far it is known
to be on the disk: a killed run goes on from there.
Depends on data/records.py and runtime.
"""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import runtime
from data.records import Example

GROWING = {"tokens": "i", "targets": "i", "token_ends": "q", "target_ends": "q", "rows": "q", "domains": "I",
           "texts": "q"}  # fmt: skip
ABOUT, PROGRESS = "about.json", "progress.json"
CHUNK = 1 << 24  # bytes read at once


class Store:
    """Examples of a folder, each array a read-only view of its file."""

    def __init__(self, folder: Path, about: dict):
        self.about = about
        kinds = GROWING | dict.fromkeys(about["parts"], "i")
        self.arrays = {name: _view(_path(folder, name), kind) for name, kind in kinds.items()}

    def __len__(self) -> int:
        return len(self.arrays["rows"])

    def __getitem__(self, number: int) -> Example:
        tokens, targets = (self._slice(name, number) for name in ("token", "target"))
        return Example(tokens, targets[0], targets, str(self.arrays["domains"][number]))

    def _slice(self, name: str, number: int) -> memoryview:
        ends = self.arrays[f"{name}_ends"]
        return self.arrays[f"{name}s"][ends[number - 1] if number else 0 : ends[number]]

    def length(self, number: int) -> int:
        """Tokens of an example."""
        ends = self.arrays["token_ends"]
        return ends[number] - (ends[number - 1] if number else 0)

    def part(self, name: str) -> "Examples":
        return Examples(self, self.arrays[name])


class Examples(Sequence):
    """Some examples of a store in their order; an example is made when it is asked for, a slice is a view."""

    def __init__(self, store: Store, numbers: Sequence[int]):
        self.store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return Examples(self.store, self.numbers[at])
        return self.store[self.numbers[at]]

    def __add__(self, other: "Examples") -> "Examples":
        numbers = array("i", self.numbers)
        numbers.extend(other.numbers)
        return Examples(self.store, memoryview(numbers))

    def lengths(self) -> Iterable[int]:
        return map(self.store.length, self.numbers)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _view(path: Path, kind: str) -> memoryview:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"").cast(kind)
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(kind)


# -----------------------------------------------------------------------------
# Opening


def open_store(folder: Path, identity: dict) -> Store | None:
    """The store of this identity, every byte of it verified; None where there is none, or only a damaged one."""
    try:
        about = runtime.read_json(folder / ABOUT)
        if about["identity"] != json.loads(json.dumps(identity)):
            return None
        if all(_sum(_path(folder, name)) == tuple(size_and_sum) for name, size_and_sum in about["files"].items()):
            return Store(folder, about)
        runtime.print0(f"{folder} is damaged: its checksums do not hold, so the data are tokenised again")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        pass
    return None


def _sum(path: Path, size: int | None = None) -> tuple[int, int]:
    """Size and CRC-32 of a file, or of its first `size` bytes."""
    crc, done = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(CHUNK if size is None else min(CHUNK, size - done)):
            crc, done = zlib.crc32(piece, crc), done + len(piece)
    return done, crc


# -----------------------------------------------------------------------------
# Making


class Writer:
    """A store in the making: arrays that grow in their files, and how far they are safe on the disk."""

    def __init__(self, folder: Path, identity: dict):
        """Begins where a killed run of the same identity stood, else anew. `notes`: what that run had saved."""
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).unlink(missing_ok=True)
        saved = self._saved()
        if saved is None:
            discard(folder)
            folder.mkdir()
        self.notes = saved["notes"] if saved else None
        self.files = {name: saved["files"][name] if saved else [0, 0] for name in GROWING}  # size, checksum
        self.open = {name: open(_path(folder, name), "r+b" if saved else "wb") for name in GROWING}
        for name, file in self.open.items():
            file.truncate(self.files[name][0])
            file.seek(0, os.SEEK_END)

    def _saved(self) -> dict | None:
        """What the last save said, if its files hold it."""
        try:
            saved = runtime.read_json(self.folder / PROGRESS)
            sums = {name: list(_sum(_path(self.folder, name), saved["files"][name][0])) for name in GROWING}
            return saved if saved["identity"] == self.identity and saved["files"] == sums else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def add(self, row: int, example: Example, asked: Sequence[int]) -> None:
        """The example of a row, which is numbered over all files. asked: its tokens as they would be held out."""
        self._append("tokens", example.tokens)
        self._append("targets", example.targets)
        self._append("token_ends", [self.files["tokens"][0] // 4])
        self._append("target_ends", [self.files["targets"][0] // 4])
        self._append("rows", [row])
        self._append("domains", [zlib.crc32(repr((example.domain, example.bare)).encode())])
        text = hashlib.blake2b(array("i", asked).tobytes(), digest_size=8).digest()
        self._append("texts", [int.from_bytes(text, signed=True)])

    def _append(self, name: str, values: Sequence[int]) -> None:
        data = array(GROWING[name], values).tobytes()
        self.open[name].write(data)
        size, crc = self.files[name]
        self.files[name] = [size + len(data), zlib.crc32(data, crc)]

    def save(self, notes: dict) -> None:
        """Make what was added so far outlast a kill. notes: what the caller needs to go on from here."""
        for file in self.open.values():
            file.flush()
            os.fsync(file.fileno())
        runtime.write_json(self.folder / PROGRESS, {"identity": self.identity, "files": self.files, "notes": notes})

    def close(self) -> None:
        """Bring all to the disk."""
        for file in self.open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self.open = {}

    def finish(self, parts: dict[str, Sequence[int]], report: dict) -> None:
        """Write the parts, numbers of examples each, and last of all what makes this a store."""
        files = dict(self.files)
        for name, numbers in parts.items():
            data = array("i", numbers).tobytes()
            runtime.write_atomic(_path(self.folder, name), lambda path, data=data: path.write_bytes(data))
            files[name] = [len(data), zlib.crc32(data)]
        about = {"identity": self.identity, "files": files, "parts": list(parts), "report": report}
        runtime.write_json(self.folder / ABOUT, about)
        (self.folder / PROGRESS).unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a store, and nothing else that lies there."""
    for name in (ABOUT, PROGRESS):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.bin"):
        path.unlink()
    shutil.rmtree(folder) if folder.exists() and not any(folder.iterdir()) else None
