"""What the phases before and after the steps have computed, on disk: a killed run goes on within the phase.

    with Journal(folder, "start", identity, rt):      # reads what a killed run left
        losses = [once(lambda: measure(group)) for group in groups]

The phases ask the same questions in the same order on every run with the same settings and number of ranks. So the n-th
answer of a rank is its n-th entry, and a run that comes back reads its entries instead of computing, bit for bit.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime import RankError, Runtime, print0, write_atomic

SECONDS = 20.0  # between two writes: what a kill may cost


class Journal:
    """Answers of one rank, in files of a folder: `NAME-rank0-00000.safetensors`, the number is that of the first.

    Files of another identity or number of ranks, and such as cannot be read, are left aside: their answers are computed
    again. While it is open, `once` asks it.
    """

    active: "Journal | None" = None

    def __init__(self, folder: Path, name: str, identity: dict, rt: Runtime, seconds: float | None = None):
        self.stem, self.seconds = folder / f"{name}-rank{rt.rank}", SECONDS if seconds is None else seconds
        about = json.dumps([identity, rt.world_size], sort_keys=True)
        self.about = {"run": hashlib.sha256(about.encode()).hexdigest()}
        self.asked, self.fresh = 0, {}  # questions so far; answers that no file holds yet
        self.known: dict[str, Tensor] = {}
        for path in sorted(folder.glob(f"{self.stem.name}-*.safetensors")):
            self.known |= self.read(path)
        if self.known:
            print0(f"going on within the phases: {len({key.split('.')[0] for key in self.known})} parts are read from "
                   f"{folder}")

    def read(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() == self.about:
                    return {key: file.get_tensor(key).clone() for key in file.keys()}
        except (SafetensorError, OSError):
            print0(f"{path} cannot be read: what it held is computed again")
        return {}

    def __enter__(self) -> "Journal":
        Journal.active, self.written = self, time.monotonic()
        return self

    def __exit__(self, kind, error, trace) -> None:
        Journal.active = None
        if isinstance(error, (KeyboardInterrupt, RankError)):
            self.write()

    def answer(self, make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        number, found = self.asked, []
        self.asked += 1
        while (key := f"{number}.{len(found)}") in self.known:
            found.append(self.known.pop(key))
        if found:
            return found
        made = [tensor.cpu() for tensor in make()]
        self.fresh |= {f"{number}.{index}": tensor for index, tensor in enumerate(made)}
        if time.monotonic() - self.written >= self.seconds:
            self.write()
        return made

    def write(self) -> None:
        if self.fresh:
            first = min(int(key.split(".")[0]) for key in self.fresh)
            data = save({key: tensor.contiguous() for key, tensor in self.fresh.items()}, metadata=self.about)
            write_atomic(f"{self.stem}-{first:05}.safetensors", lambda path: path.write_bytes(data))
        self.fresh, self.written = {}, time.monotonic()


def once(make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The tensors that `make` returns, on the CPU: from the open journal where a killed run left them."""
    if Journal.active is None:
        return [tensor.cpu() for tensor in make()]
    return Journal.active.answer(make)
