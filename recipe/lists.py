"""Passes where everyone skips the same places: lists that begin alike share the layers below where they part."""

import contextlib

import torch
from torch import Tensor

from model import Transformer
from recipe.passes import Batch, Workload, skip_everywhere, states

KEPT_BYTES = 2**28  # of activations that are kept for lists to come; a quarter of the weights where that is more


def room_for_prefixes(model: Transformer) -> int:
    return max(KEPT_BYTES, sum(p.numel() * p.element_size() for p in model.parameters()) // 4)


class Prefixes:
    """Activations of one batch that enter routed layers, by layer and what is skipped below it: the latest ones, in
    bounded memory.
    """

    def __init__(self, limit: int):
        """limit: bytes."""
        self.limit, self.size = limit, 0
        self.held: dict[tuple, Tensor] = {}  # the least recently used first

    def find(self, key: tuple) -> Tensor | None:
        if key in self.held:
            self.held[key] = self.held.pop(key)
        return self.held.get(key)

    def keep(self, key: tuple, x: Tensor) -> None:
        if x.nbytes > self.limit or self.find(key) is not None:
            return
        self.held[key] = x.clone()  # what comes next may overwrite x
        self.size += x.nbytes
        while self.size > self.limit:
            self.size -= self.held.pop(next(iter(self.held))).nbytes

    @contextlib.contextmanager
    def watching(self, model: Transformer, keys: dict[int, tuple]):
        """Keep, for a while, what enters these layers, under their keys."""
        hooks = []
        for layer, key in keys.items():
            hook = lambda _, args, key=key: self.keep(key, args[0].detach())  # noqa: E731
            hooks.append(model.layers[layer].attention_norm.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def list_states(work: Workload, batch: Batch, skipped: tuple[int, ...], prefixes: Prefixes) -> Tensor:
    """Final states (n,D) where everyone skips these places. Only what no earlier list shares is computed."""
    model, routing = work.model, work.model.routing
    keys = {}
    for layer in routing.layers:
        below = tuple(sorted(place for place in skipped if routing.places[place].layer < layer))
        keys[layer] = (layer, below)
    first, x = work.first_layer, None
    for layer, key in keys.items():
        found = prefixes.find(key)
        if found is not None:
            first, x = layer, found.view(*batch.tokens.shape, -1)
    if x is None:
        x = work.entered(batch)
    gates = skip_everywhere(skipped)(model, batch, 0)[routing.rows_of(first).start :]
    with prefixes.watching(model, {layer: key for layer, key in keys.items() if layer >= first}):
        return states(model, batch, route="gather", gates=gates, x=x, first_layer=first)[0]
