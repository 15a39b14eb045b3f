"""Every setting of train.py, and what those that are left at `none` mean."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import runtime
from recipe.check import check_settings
from recipe.lora import TARGETS
from router import EXPERT_GRANULARITIES, GRANULARITIES
from runtime import setting

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = os.path.relpath(ROOT / "checkpoints" / "smollm2-135m-instruct")
DEMO_DATA = os.path.relpath(ROOT / "data" / "demo" / "instructions.jsonl")

NAMED = (*GRANULARITIES, *EXPERT_GRANULARITIES)

# What a setting left at `none` means under each recipe, and under each effort.
RECIPES = {
    "default": {"layers": "auto:16", "objective": "ce", "lambda_": 0.0},
    "paper": {"layers": "deep:16", "objective": "ce", "lambda_": 0.1, "lr": 2e-4},
}
EFFORTS = {
    "quick": dict(cost_samples=12, benefit_samples=80, select_samples=16, calibrate_samples=64, evaluations=1),
    "default": dict(cost_samples=24, benefit_samples=160, select_samples=32, calibrate_samples=128, evaluations=1),
    "thorough": dict(cost_samples=96, benefit_samples=320, select_samples=96, calibrate_samples=384, evaluations=4),
}
# Settings that may differ between a run and its continuation; what `effort` stands for is compared instead of its name.
FREE = ("out", "save_every", "overwrite", "trunk_gb", "effort", "skip_bad", "shard", "rank_timeout", "max_bad_steps")


@dataclass
class TrainConfig:
    """Every setting of a run; `none` leaves the choice to the recipe, or to the effort."""

    model: str = setting(DEMO_MODEL, "checkpoint folder written by convert_hf.py")
    data: tuple[str, ...] = setting(
        (DEMO_DATA,), "files of rows, in any form that data/records.py names; FILE:2.9 takes its rows 2.9 times"
    )
    out: str = setting("out/demo", "folder for routers.safetensors, log.jsonl, summary.json, checkpoint.safetensors")
    train: Literal["routers", "lora", "routers+lora", "full"] = setting(
        "routers", "what is trained; lora: on the dense model; full: all weights of the base, with routers"
    )
    recipe: Literal["default", "paper"] = setting("default", "default: measured start, ridge; paper: AdamW, penalty")
    effort: Literal["quick", "default", "thorough"] = setting("default", "examples that the recipe measures on")
    granularity: str = setting("attn_sequence", "what a gate skips, and for what: " + ", ".join(NAMED))
    layers: str | None = setting(None, "routed layers: auto:N (N cheapest places), deep:N (paper), all, or 3,5,8-12")
    budget: float = setting(0.5, "share of (place, unit) pairs that execute; both_*: of their compute")
    objective: Literal["ce", "distill"] | None = setting(
        None, "ce: cross-entropy of answers; distill: KL to the dense model"
    )
    pool: Literal["prompt", "all"] = setting("prompt", "what a sequence router averages over; all: as the paper does")
    reads: Literal["first", "own"] | None = setting(
        None, "sequence routers: first, all decide at the first routed layer; own, each at its layer; none: by recipe"
    )
    renormalise: bool = setting(False, "experts: a token's remaining weights keep their sum; the paper: they stay")
    kv: Literal["routed", "all"] | None = setting(None, "keys and values of skipped tokens; none: all for attn_token")
    max_samples: int | None = setting(None, "training examples to use; none: all")
    max_length: int | None = setting(None, "longest example in tokens; none: the model's context")
    truncate: bool = setting(False, "cut longer examples instead of refusing them")
    skip_bad: bool = setting(False, "leave out rows that cannot be used, instead of stopping")
    heldout: float | str = setting(0.1, 'held-out share, or file; data with "split" fields decide themselves')
    heldout_samples: int = setting(64, "most held-out examples that are scored")
    chat: str | None = setting(None, "plain, chatml, llama3, mistral, or one of the model's templates; none: its own")
    bare: float | None = setting(
        None, "share of the conversations tuned on that stand without a chat form; none: 0.25 for sequence routers "
        "that the default recipe fits, else 0"
    )
    loss_on: Literal["all", "last"] = setting("all", "answers of a conversation that carry the loss")
    batch_size: int = setting(16, "examples per step, over all ranks")
    micro_batch: int = setting(4, "most examples of a forward pass and rank; does not change the result")
    batch_tokens: int = setting(8192, "most tokens of a forward pass and rank, pads included; one example at least")
    epochs: float | None = setting(None, "passes over the training examples; none: 0.1 for routers alone, else 1")
    steps: int | None = setting(None, "optimizer steps; none: from epochs")
    lr: float | None = setting(
        None, "learning rate; default recipe: how far a step moves the logits (root mean square)"
    )
    lambda_: float | None = setting(None, "weight of the capacity penalty ReLU(capacity - budget)")
    warmup: float = setting(0.03, "share of the steps with rising learning rate")
    schedule: Literal["cosine", "constant"] = setting("cosine", "learning rate after the warm-up")
    lora_first: bool = setting(True, "routers+lora: LoRA first, then routers on the result; false: both in each step")
    lora_rank: int = setting(8, "rank of each projection's change")
    lora_alpha: float = setting(16.0, "changes are scaled by alpha / rank")
    lora_dropout: float = setting(0.0, "share of a change's inputs that a step leaves out")
    lora_targets: tuple[str, ...] = setting(TARGETS, "projections that are changed")
    lora_lr: float | None = setting(None, "learning rate of LoRA, none: 1e-3; with full of the base, none: 2e-5")
    adapter: str | None = setting(None, "adapter folder, ours or peft's: LoRA goes on from it, routers stand on it")
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay")
    clip: float = setting(1.0, "greatest gradient norm")
    cost_samples: int | None = setting(None, "training examples that price places and (96 at most) search orders")
    benefit_samples: int | None = setting(None, "training examples scored with places toggled; 0: none")
    select_samples: int | None = setting(None, "training examples set aside to choose the best router")
    calibrate_samples: int | None = setting(None, "examples whose prompts calibrate the cuts, those first")
    evaluations: int | None = setting(None, "times during tuning that the router is tried on those; the best is kept")
    report: tuple[float, ...] = setting(
        (0.75, 0.5, 0.25), "budgets at which the routers are compared with their controls, beside the run's own"
    )
    trunk_gb: float = setting(1.0, "most disk space (GB, in --out) for activations below the first routed layer")
    max_bad_steps: int = setting(10, "steps in a row without finite gradient after which the run stops")
    save_every: int = setting(5, "steps between checkpoints")
    rank_timeout: float = setting(runtime.RANK_TIMEOUT, "minutes that a rank waits for another before it gives up")
    overwrite: bool = setting(False, "begin anew in an --out that holds another run")
    init: str | None = setting(None, "router file of train.py whose routers begin this run, instead of fitted ones")
    import_official: str | None = setting(None, "router file of the official code: calibrate and write it as ours")
    recalibrate: str | None = setting(None, "router file of train.py: calibrate it on these data and write it again")
    seed: int = setting(1337, "seed of data order and label samples")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of the frozen model: auto, float32, bfloat16, float16; routers are float32")
    base_dtype: Literal["int8"] | None = setting(None, "int8: frozen weights rounded to a byte each; none: in dtype")
    compile: bool | None = setting(None, "torch.compile each block; none: on CUDA only")
    shard: bool = setting(False, "under torchrun, share each block's weights out over the ranks (FSDP2): less memory")
    checkpoint_activations: bool = setting(False, "compute each block again in the backward pass: less memory")

    def __post_init__(self):
        if self.layers is None and self.granularity in EXPERT_GRANULARITIES:
            self.layers = "all"
        for name, value in {**RECIPES[self.recipe], **EFFORTS[self.effort]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lr is None:  # many tokens vote on a token router's step, few sequences on a sequence router's
            self.lr = 0.1 if self.granularity.endswith("token") else 0.01
        if self.train == "lora":  # there is no capacity to hold
            self.lambda_ = 0.0
        if self.lora_lr is None:
            self.lora_lr = 2e-5 if self.train == "full" else 1e-3
        if self.kv is None:
            self.kv = "all" if self.granularity in ("attn_token", "both_token") else "routed"
        sequence = self.granularity.endswith("sequence") and self.granularity not in EXPERT_GRANULARITIES
        ours = sequence and self.recipe == "default" and not self.import_official
        if self.bare is None:  # routers know the forms of text that they were fitted on
            self.bare = 0.25 if ours and self.train == "routers" and not self.recalibrate else 0.0
        if self.reads is None:
            self.reads = "first" if ours else "own"
        check_settings(self)

    @property
    def routes(self) -> dict:
        """How routers decide."""
        return {"pool": self.pool, "kv": self.kv, "reads": self.reads, "renormalise": self.renormalise}

    @property
    def measures(self) -> bool:
        """Routers are tried, chosen and held to the budget by what is measured of them."""
        return self.recipe == "default" and self.train != "lora"

    @property
    def decisive(self) -> dict:
        """Settings that decide what comes out: a continuation must agree on them."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
