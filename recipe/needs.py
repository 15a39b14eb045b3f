"""What a run will need, told before it starts: memory and disk from sizes, time from a short measurement."""

import shutil
import statistics
import time
from pathlib import Path

import torch

from data.records import Example
from model import ModelConfig, Transformer
from recipe.passes import LOGITS_AT_ONCE, Workload, collate
from runtime import print0, synchronize

TRIES = 3  # forward passes that are timed, after one that warms up


def kept_elements(config: ModelConfig, first: int, tokens: int, recompute: bool) -> int:
    """Elements that autograd keeps between forward and backward pass over `tokens` tokens, from layer `first` on.

    A frozen product keeps nothing of its input; norms, attention and the gated product do. recompute: each block keeps
    what enters it, and one block at a time the rest.
    """
    attention = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)  # q, its result, k, v
    block = 4 * config.dim + attention + 3 * config.hidden_dim  # both norms, both sums; gate, its silu, up
    layers = config.n_layers - first
    return tokens * (layers * config.dim + block if recompute else layers * block)


def memory_needed(model: Transformer, first: int, tokens: int, recompute: bool) -> int:
    """Bytes of a rank: weights, what a pass over `tokens` tokens keeps, logits with their gradient."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    itemsize = model.tok_embeddings.weight.element_size()
    return weights + kept_elements(model.config, first, tokens, recompute) * itemsize + 3 * 4 * LOGITS_AT_ONCE


def disk_needed(model: Transformer, examples: list[Example], limit: float, inputs: int) -> int:
    """Most bytes in --out: stored activations, and journal and checkpoint (twice, while one is written) of so many
    router inputs."""
    tokens = sum(len(example.tokens) + example.prompt for example in examples)
    stored = min(limit, tokens * model.config.dim * model.tok_embeddings.weight.element_size())
    return int(stored + 3 * 4 * inputs * model.config.dim * model.config.n_layers)


@torch.no_grad()
def seconds_per_example(work: Workload, rows: int) -> float:
    """Median time of a dense forward pass over `rows` examples of middling length, by example."""
    some = sorted(work.examples[:1000], key=lambda example: len(example.tokens))
    middle = some[len(some) // 2 :][:rows]
    batch, times = collate(middle, work.rt.device), []
    for number in range(1 + TRIES):
        synchronize(work.rt.device)
        started = time.perf_counter()
        work.model.hidden(batch.tokens)
        synchronize(work.rt.device)
        if number:
            times.append(time.perf_counter() - started)
    return statistics.median(times) / len(middle)


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder lies, or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def show_needs(memory: int, disk: int, out: Path, each: float, passes: float) -> None:
    """Print them. each: seconds of a forward pass over an example; passes: how many of these are left to a rank."""
    free = free_bytes(out)
    print0(f"needs about: {memory / 1e9:.2f} GB of memory a rank, up to {disk / 1e9:.2f} GB of disk in {out} "
           f"({free / 1e9:,.1f} GB are free), {each * passes / 60:,.1f} minutes (an example takes {each:.3f} s "
           "forward, measured)")
    if disk > free:
        print0(f"warning: {out} may run full: free space, lower --trunk_gb, or give another --out")
