"""Steps of the paper's recipe (AdamW from zero routers) on one process and on two (gloo): how far apart they end.

    python tests/compare_ranks.py --model=DIR --data=FILE [--dtype=float32,bfloat16] [--steps=6] [--batch_size=16]

Prints, for each dtype, how far the routers moved and the largest difference between the two runs, which cut a batch
into the same parts; beside it what another --micro_batch does on one process, where the parts have other shapes.
"""

import os
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import runtime  # noqa: E402
import train  # noqa: E402
from model import load_model  # noqa: E402
from recipe.run import build  # noqa: E402
from recipe.start import candidates  # noqa: E402
from runtime import setting  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

FEW = {"max_samples": 96, "select_samples": 4, "heldout_samples": 2}


@dataclass
class Settings:
    model: str = setting("checkpoints/smollm2-135m-instruct", "checkpoint folder written by convert_hf.py")
    data: str = setting("data/demo/instructions.jsonl", "rows to tune on")
    dtype: tuple[str, ...] = setting(("float32", "bfloat16"), "of the frozen model")
    steps: int = setting(6, "optimizer steps")
    batch_size: int = setting(16, "examples per step, over all ranks")
    micro_batch: int = setting(4, "examples per forward pass and rank")
    other_micro_batch: int | None = setting(None, "the same of a third run, on one process; none: no such run")
    lr: float = setting(2e-4, "learning rate")
    layers: str = setting("deep:16", "routed layers")
    max_length: int = setting(96, "longest example in tokens")
    chat: str = setting("plain", "chat form")


def config_of(settings: Settings, dtype: str, folder: str) -> train.TrainConfig:
    names = ("model", "steps", "batch_size", "micro_batch", "lr", "layers", "max_length", "chat")
    own = {name: getattr(settings, name) for name in names}
    own |= {"recipe": "paper", "data": (settings.data,), "truncate": True, "dtype": dtype}
    own |= {"device": "cpu", "out": folder}
    return train.TrainConfig(**own, **FEW)


def take_steps(cfg: train.TrainConfig, out: Path) -> None:
    """What a rank does: all steps; the first rank keeps the routers (R,D) before and after each, and the losses."""
    rt = runtime.setup(cfg.device, cfg.dtype, cfg.seed)
    model = load_model(cfg.model, dtype=rt.dtype)
    data = train.load_data(cfg, load_tokenizer(cfg.model), model.config.max_seq_len, rt)
    model.add_routers(candidates(cfg, model.config)[0])
    job = train.Job(cfg, rt, model, data, train.plan(cfg, data))
    run = build(job, job.workload(), train.State(), None)
    routers, losses = [torch.cat(list(run.weights.values())).detach().clone()], []
    for _ in range(cfg.steps):
        losses.append(train.step(run)["loss"])
        routers.append(torch.cat(list(run.weights.values())).detach().clone())
    if rt.is_master:
        torch.save((torch.stack(routers), losses), out)
    runtime.cleanup()


def tuned(cfg: train.TrainConfig, ranks: int, out: Path) -> tuple[torch.Tensor, list[float]]:
    """Routers (steps + 1,R,D) and losses of a run on so many forked ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, children = str(probe.getsockname()[1]), []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            try:
                runtime.run_main(lambda: take_steps(cfg, out))
            except SystemExit as stop:
                os._exit(stop.code)
            os._exit(0)  # not through the caller, who would remove the folder
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise ValueError(f"a run on {ranks} ranks failed: read what it printed")
    return torch.load(out)


def compare(settings: Settings, dtype: str, folder: Path) -> None:
    cfg = config_of(settings, dtype, str(folder))
    one, losses = tuned(cfg, 1, folder / "1.pt")
    others = {"2 ranks": tuned(cfg, 2, folder / "2.pt")[0]}
    if settings.other_micro_batch:
        other = replace(cfg, micro_batch=settings.other_micro_batch)
        others[f"micro-batches of {other.micro_batch}"] = tuned(other, 1, folder / "other.pt")[0]
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    print(f"{dtype}: losses {shown}; largest weight {one[-1].abs().max():.3g}")
    for name, routers in others.items():
        apart = (one - routers).abs().flatten(1).amax(1).tolist()
        shown = ", ".join(f"{value:.2g}" for value in apart)
        print(f"largest difference from {name} after each step: {shown}", flush=True)


def main() -> None:
    settings = runtime.cli(Settings)
    torch.set_num_threads(1)
    for dtype in settings.dtype:
        with tempfile.TemporaryDirectory() as folder:
            compare(settings, dtype, Path(folder))


if __name__ == "__main__":
    runtime.run_main(main)
