"""Routers tuned by one process and by two (gloo), on the same data: how far apart they end.

    python tests/compare_ranks.py --model=DIR --data=FILE [--dtype=float32,bfloat16] [--steps=6] [--batch_size=16]

Prints, for each dtype, how far the routers moved and the largest difference between the two runs.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

import runtime  # noqa: E402
from runtime import setting  # noqa: E402


@dataclass
class Settings:
    model: str = setting("checkpoints/smollm2-135m-instruct", "checkpoint folder written by convert_hf.py")
    data: str = setting("data/demo/instructions.jsonl", "rows to tune on")
    dtype: tuple[str, ...] = setting(("float32", "bfloat16"), "of the frozen model")
    recipe: str = setting("paper", "default or paper")
    steps: int = setting(6, "optimizer steps")
    batch_size: int = setting(16, "examples per step, over all ranks")
    micro_batch: int = setting(4, "examples per forward pass and rank")
    lr: float = setting(2e-4, "learning rate")
    layers: str = setting("deep:16", "routed layers")
    max_length: int = setting(96, "longest example in tokens")


def tuned(settings: Settings, dtype: str, ranks: int, out: Path) -> dict:
    """Routers of a run on so many ranks."""
    names = ("model", "data", "recipe", "steps", "batch_size", "micro_batch", "lr", "layers", "max_length")
    words = [f"--{name}={getattr(settings, name)}" for name in names]
    few = {"max_samples": 96, "cost_samples": 4, "select_samples": 4, "calibrate_samples": 4, "heldout_samples": 2}
    words += [f"--{name}={value}" for name, value in few.items()]
    words += ["--truncate", f"--dtype={dtype}", f"--out={out}", "--device=cpu"]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d",
                  "--rdzv_endpoint=localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, str(ROOT / "train.py"), *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"a run on {ranks} ranks ended with {done.returncode}: {done.stderr[-2000:]}")
    return load_file(out / "routers.safetensors")


def main() -> None:
    settings = runtime.cli(Settings)
    for dtype in settings.dtype:
        with tempfile.TemporaryDirectory() as folder:
            one, two = (tuned(settings, dtype, ranks, Path(folder) / str(ranks)) for ranks in (1, 2))
        moved = max(tensor.abs().max().item() for tensor in one.values())
        apart = max((one[name] - two[name]).abs().max().item() for name in one)
        print(f"{dtype}: largest weight {moved:.3g}, largest difference between 1 and 2 ranks {apart:.3g}", flush=True)


if __name__ == "__main__":
    runtime.run_main(main)
