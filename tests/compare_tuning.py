"""Time one router-tuning step, and its peak memory, beside a plain loop over transformers that does the same job.

Run: python tests/compare_tuning.py --model=checkpoints/smollm2-135m-instruct --data=data/demo/instructions.jsonl
     (needs tests/requirements.txt)

The plain loop is what the paper's trainer amounts to: transformers' model in eval mode, its weights frozen but its
input embeddings requiring gradients, hooks that pool the attention's input, decide with a straight-through gate and
multiply the attention's output by it, logits for every token, AdamW on the routers. Both sides: cross-entropy of the
answers, the deep:N layers per sequence, the same micro-batches in the same order. Each side runs in a process of its
own, in turn; tokens/s are of real tokens in the steps after the first one, memory is the whole process's peak. `cached`
is ours on the same batches once more, when the activations below the first routed layer are read from disk, as in a
second epoch. The last line printed is JSON.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
import train  # noqa: E402
from recipe import passes  # noqa: E402
from model import load_config, load_model  # noqa: E402
from recipe.run import build  # noqa: E402
from recipe.places import deep_layers  # noqa: E402
from router import RouterConfig, pool, ste_gate  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402


@dataclass
class TuningConfig:
    model: str = field(metadata={"help": "checkpoint folder"})
    data: str = field(metadata={"help": "tuning data, as train.py takes it"})
    routed: int = field(default=16, metadata={"help": "deep layers that own a router"})
    batch_size: int = field(default=16, metadata={"help": "examples a step"})
    micro_batch: int = field(default=4, metadata={"help": "examples a pass"})
    steps: int = field(default=3, metadata={"help": "timed steps, after one that warms up"})
    rounds: int = field(default=3, metadata={"help": "times each side runs"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; none: torch's choice"})
    side: Literal["both", "ours", "theirs"] = field(
        default="both", metadata={"help": "both: the comparison; else one side alone, as the comparison runs it"}
    )
    scratch: str = field(
        default="", metadata={"help": "folder for activations; the comparison gives each run a fresh one"}
    )
    out: str | None = field(default=None, metadata={"help": "write the JSON here too"})


def settings(cfg: TuningConfig) -> train.TrainConfig:
    return train.TrainConfig(
        model=cfg.model,
        data=(cfg.data,),
        recipe="paper",
        layers=f"deep:{cfg.routed}",
        lambda_=0.0,
        batch_size=cfg.batch_size,
        micro_batch=cfg.micro_batch,
        steps=2 * cfg.steps + 1,
        trunk_gb=1.0,
        device="cpu",
        dtype="float32",
        out=cfg.scratch,
    )


def their_step(reference, routers: torch.nn.ParameterList, optimizer, micros: list[passes.Batch]) -> float:
    """One step of the plain loop; returns the mean loss."""
    n_targets, total, prompts = sum(len(batch.labels) for batch in micros), 0.0, []
    gates = {}

    def decide(layer: int):
        def hook(module, args, kwargs):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            gates[layer] = ste_gate(pool(x, prompts[-1]) @ routers[layer].squeeze(0))

        return hook

    def multiply(layer: int):
        return lambda module, args, output: (output[0] * gates[layer][:, None, None], *output[1:])

    first = reference.config.num_hidden_layers - 1 - len(routers)
    hooks = []
    for layer in range(len(routers)):
        attention = reference.model.layers[first + layer].self_attn
        hooks += [
            attention.register_forward_pre_hook(decide(layer), with_kwargs=True),
            attention.register_forward_hook(multiply(layer)),
        ]
    for batch in micros:
        prompts.append(torch.tensor(batch.prompts))
        real = (torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        labels = torch.full_like(batch.tokens, -100).flatten()
        labels[batch.at + 1] = batch.labels
        loss = reference(batch.tokens, attention_mask=real, labels=labels.view_as(batch.tokens)).loss * (
            len(batch.labels) / n_targets
        )
        loss.backward()
        total += loss.item()
    for hook in hooks:
        hook.remove()
    optimizer.step()
    optimizer.zero_grad()
    return total


def one_side(cfg: TuningConfig) -> dict:
    """Losses, tokens per second and peak memory of one side, in this process."""
    torch.manual_seed(0)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    tuning = settings(cfg)
    data = train.load_data(tuning, load_tokenizer(cfg.model), load_config(cfg.model).max_seq_len)
    examples = data.train
    batches = [
        sorted(
            (examples[i] for i in train.global_batch(len(examples), cfg.batch_size, tuning.seed, step)),
            key=lambda e: -len(e.tokens),
        )
        for step in range(cfg.steps + 1)
    ]
    steps = 2 * cfg.steps + 1
    if cfg.side == "ours":
        rt = runtime.setup("cpu", "float32", tuning.seed)
        model = load_model(cfg.model)
        routing = RouterConfig.of(tuning.granularity, deep_layers(cfg.routed, model.config.n_layers))
        model.add_routers(routing)  # without the search of orders, which is no part of a step
        job = train.Job(tuning, rt, model, data, train.plan(tuning, data))
        run = build(job, job.workload(), train.State(asdict(routing)), None)
        do = lambda batch: train.step(run)["loss"]  # noqa: E731
    else:
        from compare_transformers import reference_of

        model = load_model(cfg.model)
        reference, dim = reference_of(model), model.config.dim
        reference.requires_grad_(False)
        reference.enable_input_require_grads()
        routers = torch.nn.ParameterList([torch.zeros(1, dim) for _ in deep_layers(cfg.routed, model.config.n_layers)])
        optimizer = torch.optim.AdamW(routers.parameters(), lr=tuning.lr, weight_decay=0.0)
        del model

        def do(batch: list) -> float:
            micros = [
                passes.collate(batch[a : a + cfg.micro_batch], torch.device("cpu"))
                for a in range(0, len(batch), cfg.micro_batch)
            ]
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(len(losses), steps, tuning.lr, tuning.warmup)
            return their_step(reference, routers, optimizer, micros)

    losses = []
    losses.append(do(batches[0]))  # warms up

    def rate() -> float:
        begin = time.perf_counter()
        losses.extend(do(batch) for batch in batches[1:])
        return sum(len(example.tokens) for batch in batches[1:] for example in batch) / (time.perf_counter() - begin)

    found = {"tokens_per_second": rate(), "losses": list(losses)}
    if cfg.side == "ours":
        run.state.step = 1  # the same batches again
        found["cached_tokens_per_second"] = rate()
    return found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def compare(cfg: TuningConfig) -> dict:
    sides = {"ours": [], "theirs": []}
    for turn in range(cfg.rounds):
        for side in sorted(sides, reverse=bool(turn % 2)):
            given = [
                f"--{name}={value}"
                for name, value in asdict(cfg).items()
                if name not in ("side", "out", "rounds", "scratch") and value is not None
            ]
            with tempfile.TemporaryDirectory() as scratch:
                done = subprocess.run(
                    [sys.executable, __file__, *given, f"--side={side}", f"--scratch={scratch}"],
                    capture_output=True,
                    text=True,
                )
            if done.returncode:
                raise RuntimeError(f"side {side} failed:\n{done.stderr}")
            sides[side].append(json.loads(done.stdout.splitlines()[-1]))
            last = sides[side][-1]
            losses = ", ".join(f"{loss:.4f}" for loss in last["losses"])
            peak = f"{last['peak_bytes'] / 2**20:,.0f} MiB"
            print(f"{side:<7} {last['tokens_per_second']:8,.1f} tok/s | peak {peak} | losses {losses}", flush=True)
    difference = max(abs(a - b) for a, b in zip(sides["ours"][0]["losses"], sides["theirs"][0]["losses"]))

    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a[ours] / b[theirs] for a, b in zip(sides["ours"], sides["theirs"]))

    speed, cached = (ratio(ours, "tokens_per_second") for ours in ("tokens_per_second", "cached_tokens_per_second"))
    memory = ratio("peak_bytes", "peak_bytes")
    print(f"ours / theirs: {speed:.2f}x tokens per second, {cached:.2f}x with cached activations, {memory:.2f}x peak "
          f"memory; largest difference of a loss {difference:.1e}")
    assert math.isfinite(difference)
    return {
        "settings": asdict(cfg),
        "speed": speed,
        "cached_speed": cached,
        "memory": memory,
        "loss_difference": difference,
        **sides,
    }


def main() -> None:
    cfg = runtime.cli(TuningConfig)
    if cfg.side != "both":
        print(json.dumps(one_side(cfg)))
        return
    report = compare(cfg)
    if cfg.out is not None:
        runtime.write_json(cfg.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    runtime.run_main(main)
