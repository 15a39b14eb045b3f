"""Activations below the first routed layer, stored: they depend on no router."""

import hashlib
import json
import shutil
from pathlib import Path

import torch

import runtime
from model import Transformer
from recipe.passes import Batch, Example

class TrunkCache:
    """Activations (T,D) that enter the first routed layer, by example, in a file of bounded size: they depend on no router, so later epochs,
    trials and runs in the same folder read them instead of computing them. A file of another base, layer, dtype or data set is written anew;
    where the disk has no room nothing is stored."""

    def __init__(self, path: Path, model: Transformer, examples: list[Example], limit: float):
        """limit: bytes; examples beyond it are computed every time. Nothing is stored where no layer stands below the first routed one."""
        weight, first = model.tok_embeddings.weight, model.routing.places[0].layer
        self.place, size = {}, 0  # tokens of an example -> (number, first element)
        for example in examples if first else []:
            key, elements = tuple(example.tokens), len(example.tokens) * model.config.dim
            if key not in self.place and (size + elements) * weight.element_size() <= limit:
                self.place[key] = (len(self.place), size)
                size += elements
        if size:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * size * weight.element_size():  # a mapped file that does not fit kills the process
                self.place, size = {}, 0
        if not size:
            return
        header, done = path.with_suffix(".json"), path.with_suffix(".done")
        digest = hashlib.sha256(json.dumps(list(self.place)).encode()).hexdigest()
        about = {"fingerprint": model.fingerprint, "first_layer": first, "dtype": str(weight.dtype), "tokens": digest}
        if not (header.exists() and path.exists() and done.exists() and runtime.read_json(header) == about):
            for old in (header, path, done):
                old.unlink(missing_ok=True)
            runtime.write_json(header, about)
        self.data = torch.from_file(str(path), shared=True, size=size, dtype=weight.dtype)
        self.done = torch.from_file(str(done), shared=True, size=len(self.place), dtype=torch.uint8)  # set when an example is complete

    @torch.no_grad()
    def __call__(self, model: Transformer, group: list[Example], batch: Batch) -> torch.Tensor:
        """Activations (B,T,D) of a batch, read where all its examples are stored, else computed and stored. Pads hold zeros when read."""
        places = [self.place.get(tuple(example.tokens)) for example in group]
        if any(place is None for place in places):
            return model.trunk(batch.tokens)
        width = model.config.dim
        if all(self.done[number] for number, _ in places):
            x = torch.zeros(*batch.tokens.shape, width, dtype=self.data.dtype)
            for row, ((_, start), length) in enumerate(zip(places, batch.lengths)):
                x[row, :length] = self.data[start:start + length * width].view(length, width)
            return x.to(batch.tokens.device)
        x = model.trunk(batch.tokens)
        for row, ((number, start), length) in enumerate(zip(places, batch.lengths)):
            self.data[start:start + length * width] = x[row, :length].flatten().cpu()
            self.done[number] = 1
        return x
