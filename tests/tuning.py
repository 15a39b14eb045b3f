"""What the tests of tuning and of its recipe share: a small base with data, settings, a run before its first step."""

import math

import train
from recipe.passes import Workload
from runtime import ALONE as CPU
from tokenizer import load_tokenizer

SETTINGS = {
    "layers": "1-3",
    "granularity": "attn_sequence",
    "batch_size": 8,
    "micro_batch": 4,
    "steps": 6,
    "select_samples": 12,
    "cost_samples": 8,
    "clip": math.inf,
    "dtype": "float32",
    "report": (),
}


def settings(base, out, **changes) -> train.TrainConfig:
    files = {"model": str(base), "data": (str(base / "data.jsonl"),), "out": str(out)}
    return train.TrainConfig(**{**files, **SETTINGS, **changes})


def begun(base, **changes) -> train.Run:
    """A run before its first step."""
    cfg = settings(base, base / "begun", **{"trunk_gb": 0, **changes})  # of a run only its tokens are written
    model = train.prepared(cfg, CPU)
    data = train.load_data(cfg, load_tokenizer(cfg.model), model.config.max_seq_len)
    return train.begin(train.Job(cfg, CPU, model, data, train.plan(cfg, data)))


def selection(run: train.Run) -> Workload:
    """The selection set of a run, without stored activations."""
    return Workload(run.model, run.data.select, CPU)
