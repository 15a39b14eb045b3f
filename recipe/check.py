"""Settings of train.py that cannot be, alone, together, or with the ranks and the model there are."""

from collections.abc import Iterator

from model import ModelConfig
from recipe.lora import LoRAConfig
from recipe.start import candidates, read_init
from router import RouterConfig, read_router_file
from runtime import Runtime

LEAST = {  # least value of each number
    **dict.fromkeys(("batch_size", "micro_batch", "batch_tokens"), 1),
    **dict.fromkeys(("cost_samples", "select_samples", "calibrate_samples"), 1),
    **dict.fromkeys(("heldout_samples", "save_every", "max_bad_steps"), 1),
    **dict.fromkeys(("evaluations", "steps", "epochs", "lr", "lambda_", "trunk_gb", "benefit_samples", "lora_lr"), 0),
    "rank_timeout": 0,
    **dict.fromkeys(("max_samples", "max_length"), 2),
}


def check_settings(cfg) -> None:
    """Raise ValueError for a setting that is out of range, or that contradicts another. cfg: a TrainConfig."""
    RouterConfig.of(cfg.granularity, (0,), n_experts=1, **cfg.routes)  # raises for what cannot be, as the next does
    LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
    refuse(out_of_range(cfg))
    refuse(contradictions(cfg))


def check_run(cfg, rt: Runtime, config: ModelConfig) -> None:
    """The same for settings that do not go with the ranks, the model, or a router file that they name."""
    if cfg.import_official:
        read_router_file(cfg.import_official, official=True)
    elif not cfg.recalibrate:
        candidates(cfg, config)
    if cfg.init:
        read_init(cfg, config)
    refuse(misfits(cfg, rt, config))


def refuse(cases: Iterator[tuple[bool, str]]) -> None:
    for wrong, message in cases:
        if wrong:
            raise ValueError(message)


def out_of_range(cfg) -> Iterator[tuple[bool, str]]:
    yield (not 0.0 < cfg.budget < 1.0,
           f"budget is {cfg.budget}, expected a share between 0 and 1 (both excluded): tune at e.g. --budget=0.5, and "
           "the router file then serves every budget from 0 to 1")
    for name, least in LEAST.items():
        value, shown = getattr(cfg, name), name.rstrip("_")
        yield (value is not None and not value >= least,
               f"{shown} is {value}, expected {least} or more: change --{shown}")
    yield (not all(0.0 <= budget <= 1.0 for budget in cfg.report),
           f"report is {cfg.report}, expected shares from 0 to 1: change --report")
    yield not 0.0 <= cfg.bare <= 1.0, f"bare is {cfg.bare}, expected a share from 0 to 1: change --bare"
    yield (isinstance(cfg.heldout, float) and not 0.0 < cfg.heldout < 1.0,
           f"heldout is {cfg.heldout}, expected a share between 0 and 1, or a file: change --heldout")


def contradictions(cfg) -> Iterator[tuple[bool, str]]:
    full = cfg.train == "full"
    yield (cfg.train != "routers" and (cfg.objective == "distill" or cfg.import_official or cfg.recalibrate),
           f"train is {cfg.train!r} with --objective=distill, --import_official or --recalibrate; expected a model "
           "that stays as it is: leave that away, or use --train=routers")
    yield (full and (cfg.adapter or cfg.dtype not in ("auto", "float32")),
           f"train is 'full' with dtype {cfg.dtype} and adapter {cfg.adapter}; expected float32, since steps vanish in "
           "16 bits, and no adapter: leave --dtype away, or merge the adapter with convert_hf.py first")
    yield (full and cfg.base_dtype is not None,
           "train is 'full' with --base_dtype=int8; expected weights that can move by less than a step of int8: leave "
           "--base_dtype away, or use --train=lora")
    yield (cfg.shard and (full or cfg.base_dtype or cfg.compile),
           "--shard with --train=full, --base_dtype or --compile; expected a frozen base in dtype, in eager code: "
           "leave these away")
    yield (sum(map(bool, (cfg.init, cfg.import_official, cfg.recalibrate))) > 1,
           "--init, --import_official and --recalibrate each name a router file, expected one: leave the others away")
    yield (cfg.import_official and (cfg.granularity.startswith(("both", "expert")) or cfg.reads == "first"),
           f"granularity is {cfg.granularity!r}, reads {cfg.reads!r} with --import_official; the official code has one "
           "router per layer, which reads its own input: name what it gated, and leave --reads away")


def misfits(cfg, rt: Runtime, config: ModelConfig) -> Iterator[tuple[bool, str]]:
    yield (cfg.train == "full" and rt.world_size > 1,
           f"train is 'full' on {rt.world_size} ranks, expected one, since the head's gradient is not summed over "
           "ranks: use one process, or --train=routers+lora")
    yield (cfg.batch_size % rt.world_size,
           f"batch_size is {cfg.batch_size} on {rt.world_size} ranks, expected a multiple: change --batch_size or the "
           "number of ranks")
    yield ((cfg.max_length or 0) > config.max_seq_len,
           f"max_length is {cfg.max_length or 0:,}, expected at most the model's context of {config.max_seq_len:,} "
           "tokens: lower --max_length")
