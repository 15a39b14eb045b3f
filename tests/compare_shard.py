"""What --shard saves: private bytes of each rank that holds a base whole, as a copy, or shared out, and the logits.

    torchrun --nproc_per_node=2 tests/compare_shard.py --model=checkpoints/smollm2-135m-instruct

Private_Clean + Private_Dirty of /proc/self/smaps_rollup, less those before the base was loaded. A base that stands
mapped in the file's own dtype is no rank's private memory, so that the copy is what sharing is compared with.
"""

import copy
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from compare_int8 import memory, most_private

import runtime
from model import load_model, unpack_weights
from recipe.shard import load_shared
from runtime import setting


@dataclass
class Config:
    model: str = setting("checkpoints/smollm2-135m-instruct", "checkpoint folder")
    dtype: str = setting("float32", "of the base")


def measured(make) -> tuple[torch.nn.Module, int, int]:
    """The model, its private bytes, and the most while it was loaded."""
    before, ended, seen = memory()["private"], threading.Event(), []
    watch = threading.Thread(target=most_private, args=(ended, seen))
    watch.start()
    model = make()
    ended.set()
    watch.join()
    return model, memory()["private"] - before, max(seen) - before


@torch.no_grad()
def main() -> None:
    cfg = runtime.cli(Config)
    rt = runtime.setup("cpu", cfg.dtype)
    torch.set_num_threads(1)
    found = []
    for name, make in (("shared", lambda: load_shared(cfg.model, rt)),
                       ("whole", lambda: copy.deepcopy(load_model(cfg.model, dtype=rt.dtype)))):
        model, private, most = measured(make)
        unpack_weights(model)  # the same products
        found.append(model(torch.arange(64)[None])[0])
        del model
        sizes = f"{private / 1e6:,.1f} MB private, {most / 1e6:,.1f} MB while loading"
        print(f"rank {rt.rank}, {name}: {sizes}", flush=True)
    runtime.print0(f"largest difference of a logit: {(found[0] - found[1]).abs().max().item():.1e}")
    runtime.cleanup()


if __name__ == "__main__":
    runtime.run_main(main)
