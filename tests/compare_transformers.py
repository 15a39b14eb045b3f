"""Time the transformers library (sdpa attention) and this project on the same weights, in turn in one process.

Run: python tests/compare_transformers.py --model=checkpoints/smollm2-135m-instruct --threads=2
     (needs tests/requirements.txt)

Not part of the test command: it needs a prepared checkpoint and minutes of an idle machine. Prefill and decode run
dense (`off`), eager, with --compile compiled too; generation also with half of the routed attentions skipped. `ratio`
is the median over rounds of transformers' seconds / ours, the two timed one after the other; above 1 we are faster.
Logits are compared first. Beside each decode step stands `floor`: the seconds that its matrix products alone take, one
pass over all weights by the same library calls, so transformers / floor bounds any eager speed-up. The last line is
JSON.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
from bench import forced_gates, run_decode, run_prefill, timed  # noqa: E402
from convert_hf import KEY_MAP_TO_HF, config_to_hf, rename  # noqa: E402
from model import KVCache, Transformer, generate, load_model  # noqa: E402
from recipe.places import deep_layers  # noqa: E402
from recipe.speed import compile_model  # noqa: E402
from router import RouterConfig  # noqa: E402


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
            out = reference(chosen, past_key_values=cache, use_cache=True, logits_to_keep=1)
            chosen = out.logits[:, -1].argmax(dim=-1, keepdim=True)

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
    mine, reference = statistics.median(b for _, b in pairs), statistics.median(a for a, _ in pairs)
    return reference, mine, statistics.median(a / b for a, b in pairs)


class Comparison:
    """Both models, what draws their prompts, and the rows measured so far."""

    def __init__(self, cfg: CompareConfig):
        self.cfg, self.rt, self.rows = cfg, runtime.setup(cfg.device, cfg.dtype), []
        self.draw = torch.Generator().manual_seed(0)
        self.model = load_model(cfg.model, device=self.rt.device, dtype=self.rt.dtype)
        self.reference = reference_of(self.model)
        self.routing = RouterConfig.of("attn_sequence", deep_layers(cfg.routed, self.model.config.n_layers))
        self.model.add_routers(self.routing)
        self.variants = {"eager": self.model}
        if cfg.compile:
            compiled = load_model(cfg.model, device=self.rt.device, dtype=self.rt.dtype)
            compiled.add_routers(self.routing)
            self.variants["compiled"] = compile_model(compiled)

    def prompts(self, batch: int, length: int) -> torch.Tensor:
        tokens = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=self.draw)
        return tokens.to(self.rt.device)

    @torch.inference_mode()
    def logit_difference(self) -> float:
        tokens = self.prompts(1, 64)
        return (self.reference(tokens).logits.float() - self.model(tokens)[0]).abs().max().item()

    def report(self, what: str, variant: str, theirs, ours, floor: float | None = None) -> None:
        """Time the two functions, which return seconds, in turn; print and keep the row."""
        their_seconds, seconds, ratio = in_turn(theirs, ours, self.cfg.rounds)
        row = dict(what=what, variant=variant, transformers_seconds=their_seconds, seconds=seconds, ratio=ratio)
        self.rows.append({**row, "floor_seconds": floor})
        least = ""
        if floor is not None:
            least = f" | floor {floor * 1e3:8.2f} ms (transformers / floor {their_seconds / floor:.2f})"
        print(
            f"{what:<28} {variant:<12} transformers {their_seconds * 1e3:10.2f} ms | "
            f"ours {seconds * 1e3:10.2f} ms | ratio {ratio:.3f}{least}",
            flush=True,
        )

    def prefill(self, length: int) -> None:
        tokens = self.prompts(1, length)
        theirs = partial(their_prefill, self.reference, tokens)
        ours = partial(run_prefill, self.model, tokens, "off", None)
        self.report(f"prefill 1 x {length}", "eager", theirs, lambda: ours().seconds)

    @torch.inference_mode()
    def decode(self, batch: int, context: int) -> None:
        tokens, steps = self.prompts(batch, context), self.cfg.steps
        their_cache = self.reference(tokens, use_cache=True, logits_to_keep=1).past_key_values
        theirs = partial(their_decode, self.reference, their_cache, tokens[:, -1:], steps)
        for name, variant in self.variants.items():
            cache = KVCache(variant, batch, max_len=context + steps)
            variant.hidden(tokens, cache=cache)
            ours = partial(run_decode, variant, cache, tokens[:, -1:], "off", [None] * steps)
            least = floor(self.model, batch, self.cfg.rounds)
            self.report(f"decode {batch} x {context}", name, theirs, lambda: ours().seconds, least)

    def generate(self, batch: int, context: int, new: int) -> None:
        tokens, device = self.prompts(batch, context), self.rt.device
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        theirs = partial(self.reference.generate, tokens, attention_mask=torch.ones_like(tokens), **settings)
        drawn = forced_gates(self.routing, 0.5, batch, context).to(device)  # (R,B)
        held = lambda rows, starts, width: None if any(starts) else drawn  # noqa: E731  (a prompt's gates hold)
        routes = [("half skipped", "gather", held)]
        if self.cfg.generate_dense:
            routes.insert(0, ("dense", "off", None))
        for name, variant in self.variants.items():
            for label, route, gates in routes:
                ours = partial(generate, variant, tokens.tolist(), new, route=route, gates=gates)
                what = f"generate {batch} x {context} + {new}"
                self.report(what, f"{name} {label}", lambda: timed(device, theirs)[0], lambda: timed(device, ours)[0])


def compare(cfg: CompareConfig) -> dict:
    """Time everything asked for; returns what --out holds."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    both = Comparison(cfg)
    machine = dict(transformers=transformers.__version__, torch=torch.__version__, threads=torch.get_num_threads())
    machine["device"] = runtime.device_name(both.rt.device)
    print(" | ".join([*(f"{name} {value}" for name, value in machine.items()), str(both.rt.dtype)]))
    difference = both.logit_difference()
    print(f"largest difference of a logit: {difference:.2e}", flush=True)
    for length in cfg.prefill:
        both.prefill(length)
    for point in cfg.decode:
        both.decode(*map(int, point.split("x")))
    for point in cfg.generate:
        both.generate(*map(int, point.replace("+", "x").split("x")))
    return dict(settings=asdict(cfg), **machine, logit_difference=difference, rows=both.rows)


def main() -> None:
    cfg = runtime.cli(CompareConfig)
    report = compare(cfg)
    if cfg.out is not None:
        runtime.write_json(cfg.out, report)
    print(json.dumps(report))


if __name__ == "__main__":
    runtime.run_main(main)
