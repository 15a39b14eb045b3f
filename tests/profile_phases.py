"""What each phase of a tuning run does: forward passes over tokens, FLOPs, seconds, peak memory.

Run: python tests/profile_phases.py --model=checkpoints/smollm2-135m-instruct ...      (settings as train.py takes them)

FLOPs are counted where products happen: every linear layer of a block, forward and gradient to its input, the head, and
attention by the pairs of query and key in a causal row (recipe/cost.py). They depend on settings and data, not on the
machine, so that seconds elsewhere can be foretold. `passes` are block calls over tokens, in passes over the whole model
for one training example of mean length. The last line printed is JSON.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import runtime  # noqa: E402
import train  # noqa: E402
from recipe.cost import pairs  # noqa: E402


class Counter:
    """FLOPs and block tokens by phase of the run."""

    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.phase = "other"

    def add(self, kind: str, amount: float) -> None:
        row = self.rows.setdefault(self.phase, {})
        row[kind] = row.get(kind, 0) + amount

    def product(self, kind: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Count y = x W^T, and the gradient to x when it is computed."""
        flops = 2 * x.shape[-1] * y.numel()
        self.add(kind, flops)
        if y.requires_grad:
            y.register_hook(lambda grad: self.add(f"{kind} backward", flops))
        return y

    @contextlib.contextmanager
    def timed(self, name: str):
        begun, before = time.perf_counter(), self.phase
        self.phase = name
        try:
            yield
        finally:
            self.phase = before
            row = self.rows.setdefault(name, {})
            row["seconds"] = row.get("seconds", 0.0) + time.perf_counter() - begun
            row["peak"] = runtime.peak_memory_bytes(torch.device("cpu"))


def watch(counter: Counter) -> None:
    """Let every product of the model tell the counter."""
    linear, head, look, block = (
        model.Linear.forward, model.Transformer.head, model.Attention.look, model.Block.forward,
    )
    phases = runtime.Phases.__call__

    def watched_look(self, q, k, *rest):
        out = look(self, q, k, *rest)
        flops = 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs(q.shape[2], self.window)
        counter.add("attention", flops)
        if out.requires_grad:
            out.register_hook(lambda grad: counter.add("attention backward", 2 * flops))
        return out

    def watched_block(self, x, *rest):
        counter.add("tokens", x.shape[0] * x.shape[1])
        return block(self, x, *rest)

    @contextlib.contextmanager
    def watched_phase(self, name, *rest, **more):
        with counter.timed(name), phases(self, name, *rest, **more):
            yield

    model.Linear.forward = lambda self, x: counter.product("linear", x, linear(self, x))
    model.Transformer.head = lambda self, h: counter.product("head", h, head(self, h))
    model.Attention.look, model.Block.forward = watched_look, watched_block
    runtime.Phases.__call__ = watched_phase


def main() -> None:
    cfg, counter = runtime.cli(train.TrainConfig), Counter()
    watch(counter)
    begun = time.perf_counter()
    summary = train.train(cfg)
    seconds = time.perf_counter() - begun
    layers = model.load_config(cfg.model).n_layers
    print(f"{'phase':<14} {'seconds':>8} {'TFLOP':>8} {'forward':>8} {'head':>8} {'backward':>8} {'GFLOP/s':>8} "
          f"{'ktokens':>8} {'peak MB':>8}")
    total = 0.0
    for name, row in counter.rows.items():
        work = {kind: flops / 1e12 for kind, flops in row.items() if kind not in ("seconds", "tokens", "peak")}
        row["flops"] = 1e12 * sum(work.values())
        total += row["flops"]
        forward = work.get("linear", 0) + work.get("attention", 0)
        backward = sum(flops for kind, flops in work.items() if "backward" in kind)
        took = row.get("seconds", 0.0)
        print(f"{name:<14} {took:8.1f} {row['flops'] / 1e12:8.3f} {forward:8.3f} {work.get('head', 0):8.3f} "
              f"{backward:8.3f} {row['flops'] / 1e9 / max(took, 1e-9):8.1f} {row.get('tokens', 0) / layers / 1e3:8.1f} "
              f"{row.get('peak', 0) / 2**20:8.0f}")
    print(f"{'in all':<14} {seconds:8.1f} {total / 1e12:8.3f}")
    print(json.dumps({"seconds": seconds, "flops": total, "phases": counter.rows, "summary": summary}))


if __name__ == "__main__":
    runtime.run_main(main)
