"""Time the transformers library (sdpa attention) and this project on the same weights, in turn in one process.

Run: python tests/compare_transformers.py --model=checkpoints/smollm2-135m-instruct --threads=2        (needs tests/requirements.txt)

Not part of the test command: it needs a prepared checkpoint and minutes of an idle machine. Prefill and decode run dense (`off`), eager,
with --compile compiled too; generation also with half of the routed attentions skipped. `ratio` is the median over rounds of transformers'
seconds / ours, the two timed one after the other; above 1 we are faster. Logits are compared first. Beside each decode step stands `floor`:
the seconds that its matrix products alone take, one pass over all weights by the same library calls, so transformers / floor bounds any
eager speed-up. The last line is JSON.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
from bench import forced_gates, run_decode, run_prefill, timed  # noqa: E402
from convert_hf import KEY_MAP_TO_HF, config_to_hf, rename  # noqa: E402
from model import KVCache, Transformer, compile_model, generate, load_model  # noqa: E402
from router import RouterConfig, deep_layers  # noqa: E402


@dataclass
class CompareConfig:
    model: str = field(metadata={"help": "checkpoint folder"})
    prefill: tuple[int, ...] = field(default=(512, 2048), metadata={"help": "prompt lengths, batch 1"})
    decode: tuple[str, ...] = field(default=("1x512", "8x1024"), metadata={"help": "batch x context of decode steps"})
    generate: tuple[str, ...] = field(default=("8x1024+128",), metadata={"help": "batch x prompt + new tokens"})
    generate_dense: bool = field(default=False, metadata={"help": "time generation without skipping as well"})
    routed: int = field(default=16, metadata={"help": "deep layers that own a router in generation"})
    compile: bool = field(default=False, metadata={"help": "time decode with our compiled model too"})
    rounds: int = field(default=5, metadata={"help": "times each pair is measured in turn"})
    steps: int = field(default=8, metadata={"help": "decode steps in one measurement"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; none: torch's choice"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    out: str | None = field(default=None, metadata={"help": "write the JSON here too"})


def reference_of(model: Transformer) -> transformers.PreTrainedModel:
    """The transformers model that shares our tensors."""
    settings = config_to_hf(model.config)
    settings = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    tensors = {
        rename(name, KEY_MAP_TO_HF): tensor for name, tensor in model.state_dict().items() if ".router." not in name
    }
    reference = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    missing, unexpected = reference.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    reference.tie_weights()
    return reference.to(model.tok_embeddings.weight.device).eval()


@torch.inference_mode()
def their_prefill(reference, tokens: torch.Tensor) -> float:
    return timed(tokens.device, lambda: reference(tokens, use_cache=True, logits_to_keep=1))[0]


@torch.inference_mode()
def their_decode(reference, cache, token: torch.Tensor, steps: int) -> float:
    """Seconds of one greedy step; the cache is left at the context it came with."""

    def fn():
        chosen = token
        for _ in range(steps):
            chosen = (
                reference(chosen, past_key_values=cache, use_cache=True, logits_to_keep=1)
                .logits[:, -1]
                .argmax(dim=-1, keepdim=True)
            )

    seconds = timed(token.device, fn)[0] / steps
    cache.crop(-steps)  # transformers 5: tokens to remove
    return seconds


@torch.inference_mode()
def floor(model: Transformer, batch: int, rounds: int) -> float:
    """Median seconds of one pass of `batch` tokens through every weight matrix and the head, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        width: torch.randn(batch, width, dtype=model.norm.weight.dtype, device=model.norm.weight.device)
        for width in {model.config.dim, *(layer.in_features for layer in layers)}
    }

    def fn():
        for layer in layers:
            layer(inputs[layer.in_features])
        model.head(inputs[model.config.dim])

    fn()
    return statistics.median(timed(model.norm.weight.device, fn)[0] for _ in range(rounds))


def in_turn(theirs, ours, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio theirs / ours, after one warm-up of each."""
    theirs(), ours()
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            mine, reference = ours(), theirs()
        else:
            reference, mine = theirs(), ours()
        pairs.append((reference, mine))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def compare(cfg: CompareConfig) -> dict:
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    rt = runtime.setup(cfg.device, cfg.dtype)
    model = load_model(cfg.model, device=rt.device, dtype=rt.dtype)
    reference = reference_of(model)
    routing = RouterConfig.of("attn_sequence", deep_layers(cfg.routed, model.config.n_layers))
    model.add_routers(routing)
    variants = {"eager": model}
    if cfg.compile:
        compiled = load_model(cfg.model, device=rt.device, dtype=rt.dtype)
        compiled.add_routers(routing)
        variants["compiled"] = compile_model(compiled)
    draw = torch.Generator().manual_seed(0)
    print(
        f"transformers {transformers.__version__} | torch {torch.__version__} | {runtime.device_name(rt.device)} | {rt.dtype} | {torch.get_num_threads()} CPU threads"
    )

    def prompts(batch: int, length: int) -> torch.Tensor:
        return torch.randint(0, model.config.vocab_size, (batch, length), generator=draw).to(rt.device)

    with torch.inference_mode():
        tokens = prompts(1, 64)
        difference = (reference(tokens).logits.float() - model(tokens)[0]).abs().max().item()
    print(f"largest difference of a logit: {difference:.2e}", flush=True)
    rows = []

    def report(what: str, variant: str, theirs, ours, floor: float | None = None) -> None:
        their_seconds, seconds, ratio = in_turn(theirs, ours, cfg.rounds)
        rows.append(
            dict(
                what=what,
                variant=variant,
                transformers_seconds=their_seconds,
                seconds=seconds,
                ratio=ratio,
                floor_seconds=floor,
            )
        )
        least = (
            ""
            if floor is None
            else f" | floor {floor * 1e3:8.2f} ms (transformers / floor {their_seconds / floor:.2f})"
        )
        print(
            f"{what:<28} {variant:<12} transformers {their_seconds * 1e3:10.2f} ms | ours {seconds * 1e3:10.2f} ms | ratio {ratio:.3f}{least}",
            flush=True,
        )

    for length in cfg.prefill:
        tokens = prompts(1, length)
        report(
            f"prefill 1 x {length}",
            "eager",
            lambda: their_prefill(reference, tokens),
            lambda: run_prefill(model, tokens, "off", None).seconds,
        )
    for point in cfg.decode:
        batch, context = map(int, point.split("x"))
        tokens = prompts(batch, context)
        with torch.inference_mode():
            their_cache = reference(tokens, use_cache=True, logits_to_keep=1).past_key_values
        for name, variant in variants.items():
            cache = KVCache(variant, batch, max_len=context + cfg.steps)
            with torch.inference_mode():
                variant.hidden(tokens, cache=cache)
            report(
                f"decode {batch} x {context}",
                name,
                lambda: their_decode(reference, their_cache, tokens[:, -1:], cfg.steps),
                lambda: run_decode(variant, cache, tokens[:, -1:], "off", [None] * cfg.steps).seconds,
                floor(model, batch, cfg.rounds),
            )
    for point in cfg.generate:
        batch, context, new = map(int, point.replace("+", "x").split("x"))
        tokens = prompts(batch, context)
        settings = dict(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(tokens),
        )

        def theirs() -> float:
            return timed(rt.device, lambda: reference.generate(tokens, **settings))[0]

        for name, variant in variants.items():
            half = ("half skipped", "gather", forced_gates(routing, 0.5, batch, context).to(rt.device))
            for label, route, gates in (("dense", "off", None), half) if cfg.generate_dense else (half,):
                report(
                    f"generate {batch} x {context} + {new}",
                    f"{name} {label}",
                    theirs,
                    lambda: timed(rt.device, lambda: generate(variant, tokens.tolist(), new, route=route, gates=gates))[
                        0
                    ],
                )
    return dict(
        settings=asdict(cfg),
        transformers=transformers.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=runtime.device_name(rt.device),
        logit_difference=difference,
        rows=rows,
    )


def main() -> None:
    cfg = runtime.cli(CompareConfig)
    report = compare(cfg)
    if cfg.out is not None:
        runtime.write_json(cfg.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    runtime.run_main(main)
