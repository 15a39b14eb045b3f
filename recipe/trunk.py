"""Activations below the first routed layer, stored: they depend on no router."""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import runtime
from data.records import Example
from model import Transformer


@torch.no_grad()
def trunk(model: Transformer, tokens: Tensor) -> Tensor:
    """Activations (B,T,D) of tokens (B,T) that enter the first routed layer."""
    x, call = model.begin(tokens)
    for block in model.layers[: model.routing.places[0].layer]:
        x = block(x, call)[0]
    return x


class TrunkCache:
    """Activations (T,D) that enter the first routed layer, by example, in a file of bounded size.

    Later epochs, trials and runs in the same folder read them instead of computing them. Each example has a checksum,
    verified on reading: what a cut, damaged or never finished file holds is computed again. A file of another base,
    layer, dtype or data set is written anew; where the disk has no room nothing is stored.
    """

    def __init__(self, path: Path, model: Transformer, examples: Iterable[Example], limit: float):
        """limit: bytes; examples beyond it are computed every time. Nothing is stored where no layer stands below.

        Where the disk has no room, what would be stored is computed every time, as it is for the store: the same bits.
        """
        dtype, first = model.dtype, model.routing.places[0].layer
        self.computed: list[int] = []  # lengths of the examples that were not read, until somebody clears it
        self.data: Tensor | None = None  # the store
        self.slots, size = {}, 0  # tokens of an example -> (number, first element)
        for example in examples if first else []:
            key, elements = tuple(example.tokens), len(example.tokens) * model.config.dim
            if (size + elements) * dtype.itemsize > limit:
                break  # of a large data set only the first ones are looked at
            if key not in self.slots:
                self.slots[key] = (len(self.slots), size)
                size += elements
        if not size or runtime.free_bytes(path.parent) < 2 * size * dtype.itemsize:  # a mapped file that does not fit
            return  # kills the process
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(list(self.slots)).encode()).hexdigest()
        about = {"fingerprint": model.exact_fingerprint, "first_layer": first}
        about |= {"dtype": str(dtype), "stored": str(model.tok_embeddings.weight.dtype), "tokens": digest}
        sums = path.with_suffix(".sums")
        _clear_other(path.with_suffix(".json"), (path, sums), about)
        try:
            self.sums = torch.from_file(str(sums), shared=True, size=len(self.slots), dtype=torch.int64)  # 0: no
            self.data = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        except RuntimeError as error:  # a limit on the size of files, or on mapped memory
            runtime.print0(f"no activations are stored, all are computed each time: {str(error).splitlines()[0]}")

    @torch.no_grad()
    def __call__(self, model: Transformer, examples: list[Example], tokens: Tensor) -> Tensor:
        """Activations (B,T,D) of a batch, read where all its examples are stored, else computed and stored."""
        slots = [self.slots.get(tuple(example.tokens)) for example in examples]
        if any(slot is None for slot in slots):
            self.computed += [len(example.tokens) for example in examples]
            return trunk(model, tokens)
        if self.data is None:
            return self.alone(model, examples, tokens)
        lengths = [len(example.tokens) * model.config.dim for example in examples]
        stored = [self.data[start : start + length] for (_, start), length in zip(slots, lengths)]
        if all(self.sums[number] == _checksum(part) for (number, _), part in zip(slots, stored)):
            x = torch.zeros(*tokens.shape, model.config.dim, dtype=self.data.dtype)  # pads hold zeros
            for row, part in enumerate(stored):
                x[row].view(-1)[: len(part)] = part
            return x.to(tokens.device)
        x = self.alone(model, examples, tokens)
        for row, ((number, _), part) in enumerate(zip(slots, stored)):
            part.copy_(x[row].flatten()[: len(part)])
            self.sums[number] = _checksum(part)
        return x

    def alone(self, model: Transformer, examples: list[Example], tokens: Tensor) -> Tensor:
        """The same, each example computed alone, so that no other one has a part in its rounding."""
        rows = [trunk(model, tokens[row : row + 1, : len(example.tokens)])[0] for row, example in enumerate(examples)]
        self.computed += map(len, rows)
        return torch.stack([F.pad(x, (0, 0, 0, tokens.shape[1] - len(x))) for x in rows])  # B x (t,D) -> (B,T,D)


def _checksum(part: Tensor) -> int:
    """Never 0, which marks an example that is not stored."""
    return 1 + zlib.crc32(part.view(torch.uint8).numpy())


def _clear_other(header: Path, files: tuple[Path, ...], about: dict) -> None:
    """Delete files that were written for something else than `about`."""
    try:
        same = runtime.read_json(header) == about
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        for path in (header, *files):
            path.unlink(missing_ok=True)
        runtime.write_json(header, about)
