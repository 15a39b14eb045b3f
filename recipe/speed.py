"""Speed: a model compiled for its calls, the measured speed of a step, and of prompts beside their ceiling."""

import statistics
import time

import torch
from torch import Tensor

import runtime
from model import Experts, KVCache, Transformer, unpack_weights
from recipe.cost import prefill_ceiling
from recipe.passes import Workload
from router import capacity, set_cuts
from runtime import Runtime, synchronize

CONTEXT = 512  # tokens of a prompt, or what the model takes
TRIALS = 6  # prompts, of which the first warms up
RECOMPILE_LIMIT = 64


def compile_model(model: Transformer, **options) -> Transformer:
    """Compile in place, lazily: blocks as one graph for routes off and mask, their static parts for gather and caches.

    Code is compiled once for all layers, and for any number of rows and tokens but one: a lone token has its own.
    Of a layer with experts the parts alone, since how many tokens an expert has is known to the host only when it runs.
    Names and weights stay as they are. The first calls take minutes. Returns the model.
    """
    unpack_weights(model)
    # torch counts a function's codes over all models of a process, and refuses more than 8 of one that must be whole
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    options = dict(fullgraph=True, dynamic=True, **options)
    model.head = torch.compile(model.head, **options)
    for block in model.layers:
        packed = isinstance(block.feed_forward, Experts)
        if not packed:
            block.compile(**options)
        block.attention.project = torch.compile(block.attention.project, **options)
        parts = block.feed_forward.experts if packed else [block.feed_forward]
        for part in (block.attention_norm, block.ffn_norm, *parts):
            part.compile(**options)
    return model


def speed_of(rt: Runtime, tokens: int, flops: float, seconds: float) -> dict:
    """What a step's line says of its speed. mfu: share of the device's peak, None where that is unknown."""
    peak = runtime.peak_flops(runtime.device_name(rt.device))
    mfu = flops / seconds / (peak * rt.world_size) if peak else None
    return {"milliseconds": seconds * 1e3, "tokens_per_second": tokens / seconds, "mfu": mfu}


@torch.no_grad()
def measure_prefill(work: Workload, cuts: dict[float, list[float]]) -> dict[float, dict]:
    """Speed-up of prompts that were not seen before, by budget: `gather` against `off`, each timed in turn, batch 1.

    cuts: those (R) of each budget; the model is left at the last one's. Kernels meet new shapes, as they do in use. The
    ceiling is the ratio of FLOPs for the routes taken.
    """
    model, device = work.model, work.rt.device
    stream = [token for example in work.examples for token in example.tokens]
    length = min(CONTEXT, model.config.max_seq_len)
    stream *= length * TRIALS // len(stream) + 1
    ratios, shares = {budget: [] for budget in cuts}, {budget: [] for budget in cuts}
    for trial in range(TRIALS):
        tokens = torch.tensor([stream[trial * length : (trial + 1) * length]], device=device)  # (1, T)
        dense, _ = timed_prefill(model, tokens, "off")
        for budget, values in cuts.items():
            set_cuts(model, values)
            seconds, gates = timed_prefill(model, tokens, "gather")
            if trial:
                ratios[budget].append(dense / seconds)
                shares[budget].append(gates.flatten(1).mean(1))  # (R,1) or (R,1,T) -> (R,)
    found = {}
    for budget in cuts:
        mean = torch.stack(shares[budget]).mean(0)[:, None]  # (R, 1)
        found[budget] = {
            "prefill_speedup": statistics.median(ratios[budget]),
            "prefill_ceiling": prefill_ceiling(model.config, model.routing, mean, length),
            "prefill_context": length,
            "prefill_capacity": capacity(mean, weights=model.place_weights()).item(),
        }
    return found


def timed_prefill(model: Transformer, tokens: Tensor, route: str) -> tuple[float, Tensor | None]:
    """Seconds that a prompt (1,T) takes up to its next token's logits, and its gates."""
    synchronize(tokens.device)
    started = time.perf_counter()
    h, gates = model.hidden(tokens, route=route, cache=KVCache(model, 1, tokens.shape[1]))
    model.head(h[:, -1:])
    synchronize(tokens.device)
    return time.perf_counter() - started, gates
