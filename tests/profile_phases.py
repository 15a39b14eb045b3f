"""What each phase of a tuning run does: FLOPs, seconds, peak memory.

Run: python tests/profile_phases.py [--narrow] --model=checkpoints/smollm2-135m-instruct ...  (settings as train.py's)

FLOPs are counted where products happen: the linear layers of blocks, forward and gradient to their input, the head, and
attention by the pairs of query and key of causal rows (recipe/cost.py). They depend on settings and data, not on the
machine, so that seconds elsewhere can be foretold. --narrow counts them in a minute or two: a random model that is as
deep but 32 wide runs in place of the real one, on the same examples, and its products count as those of the real one
(other places may be routed, so figures differ by a few percent). The last line printed is JSON.
"""

import contextlib
import json
import sys
import tempfile
import time
from array import array
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import runtime  # noqa: E402
import train  # noqa: E402
from data.records import Example  # noqa: E402
from data.store import Store  # noqa: E402
from model import ModelConfig  # noqa: E402
from recipe.cost import pairs  # noqa: E402
from runtime import setting  # noqa: E402

NARROW = dict(dim=32, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=48, vocab_size=512)


class Counter:
    """FLOPs, seconds and peak memory by phase of the run."""

    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.phase = "other"

    def add(self, kind: str, amount: float) -> None:
        row = self.rows.setdefault(self.phase, {})
        row[kind] = row.get(kind, 0) + amount

    def count(self, kind: str, out: torch.Tensor, flops: float, backward: float) -> torch.Tensor:
        """Count an operation, and its backward pass when that runs."""
        self.add(kind, flops)
        if out.requires_grad:
            out.register_hook(lambda grad: self.add("backward", backward))
        return out

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


def products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of a block."""
    width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    into, down = (config.dim, config.hidden_dim), (config.hidden_dim, config.dim)
    attention = {"wq": (config.dim, width), "wk": (config.dim, kv_width), "wo": (width, config.dim)}
    return {**attention, "w1": into, "w2": down}


def watch(counter: Counter, run: ModelConfig, meant: ModelConfig) -> None:
    """Let every product of a model of sizes `run` tell the counter what it is in one of sizes `meant`."""
    sizes = {products(run)[name]: i * o for name, (i, o) in products(meant).items()}
    linear, head, look = model.Linear.forward, model.Transformer.head, model.Attention.look
    phase = runtime.Phases.__call__

    def watched_linear(self, x):
        out = linear(self, x)
        flops = 2 * sizes[self.in_features, self.out_features] * out.numel() / self.out_features
        return counter.count("layers", out, flops, flops)

    def watched_head(self, h):
        out = head(self, h)
        flops = 2 * meant.dim * meant.vocab_size * out.numel() / out.shape[-1]
        return counter.count("head", out, flops, flops)

    def watched_look(self, q, *rest):
        out = look(self, q, *rest)
        flops = 4 * q.shape[0] * meant.n_heads * meant.head_dim * pairs(q.shape[2], self.window)
        return counter.count("attention", out, flops, 2 * flops)

    @contextlib.contextmanager
    def watched_phase(self, name, *rest, **more):
        with counter.timed(name), phase(self, name, *rest, **more):
            yield

    model.Linear.forward, model.Transformer.head = watched_linear, watched_head
    model.Attention.look, runtime.Phases.__call__ = watched_look, watched_phase


def narrow_base(folder: Path, source: str) -> ModelConfig:
    """Write a narrow model beside the tokenizer of `source`; its layers differ in how much they matter."""
    config = replace(model.load_config(source), **NARROW)
    torch.manual_seed(0)
    made = model.Transformer(config)
    made.tok_embeddings.weight.data.normal_(std=0.5)
    for layer, block in enumerate(made.layers):
        block.attention.wo.weight.data *= 2.0 + layer % 3
    save_file(made.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    for file in Path(source).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return config


def few_tokens() -> None:
    """Let stores give examples of tokens that a narrow model knows."""
    whole = Store.__getitem__

    def narrowed(self, number: int) -> Example:
        example = whole(self, number)
        return replace(example, tokens=array("i", [token % NARROW["vocab_size"] for token in example.tokens]))

    Store.__getitem__ = narrowed


def show(rows: dict[str, dict]) -> dict:
    """Print the phases; returns FLOPs and seconds of all."""
    parts, total = ("layers", "attention", "head", "backward"), {"flops": 0.0, "seconds": 0.0}
    print(f"{'phase':<14}" + "".join(f"{kind:>11}" for kind in ("seconds", "TFLOP", *parts, "peak MiB")))
    for name, row in rows.items():
        flops, seconds = [row.get(part, 0.0) for part in parts], row.get("seconds", 0.0)
        total = {"flops": total["flops"] + sum(flops), "seconds": total["seconds"] + seconds}
        shown = [seconds, *(amount / 1e12 for amount in (sum(flops), *flops)), row.get("peak", 0) / 2**20]
        print(f"{name:<14}" + "".join(f"{value:11.2f}" for value in shown))
    print(f"{'in all':<14}{total['seconds']:11.2f}{total['flops'] / 1e12:11.2f}")
    return total


@dataclass
class ProfileConfig(train.TrainConfig):
    narrow: bool = setting(False, "count on a random model of the same depth, 32 wide")


def main() -> None:
    given = runtime.cli(ProfileConfig)
    narrow = given.narrow
    cfg = train.TrainConfig(**{name.name: getattr(given, name.name) for name in fields(train.TrainConfig)})
    meant = model.load_config(cfg.model)
    counter, config = Counter(), meant
    with tempfile.TemporaryDirectory() as folder:
        if narrow:
            config = narrow_base(Path(folder), cfg.model)
            cfg = replace(cfg, model=folder, out=f"{folder}/out", dtype="float32")
            few_tokens()
        watch(counter, config, meant)
        summary = train.train(cfg)
    total = show(counter.rows)
    print(json.dumps({**total, "phases": counter.rows, "summary": summary}))


if __name__ == "__main__":
    runtime.run_main(main)
