"""The measured speed-up of prompts, beside its ceiling."""

import statistics
import time

import torch

from model import KVCache
from recipe.cost import prefill_ceiling
from recipe.passes import Workload
from router import capacity
from runtime import synchronize

CONTEXT = 512  # tokens of a prompt, or what the model takes
TRIALS = 6  # prompts, of which the first warms up


@torch.no_grad()
def measure_prefill(work: Workload) -> dict:
    """Speed-up of prompts that were not seen before, `gather` against `off`, each timed in turn, batch 1.

    Kernels meet new shapes, as they do in use. The ceiling is the ratio of FLOPs for the routes taken.
    """
    model, device = work.model, work.rt.device
    stream = [token for example in work.examples for token in example.tokens]
    length = min(CONTEXT, model.config.max_seq_len)
    stream *= length * TRIALS // len(stream) + 1
    ratios, shares = [], []
    for trial in range(TRIALS):
        tokens = torch.tensor([stream[trial * length : (trial + 1) * length]], device=device)  # (1, T)
        seconds = {}
        for route in ("off", "gather"):
            synchronize(device)
            started = time.perf_counter()
            h, gates = model.hidden(tokens, route=route, cache=KVCache(model, 1, length))
            model.head(h[:, -1:])
            synchronize(device)
            seconds[route] = time.perf_counter() - started
        if trial:
            ratios.append(seconds["off"] / seconds["gather"])
            shares.append(gates.flatten(1).mean(1))  # (R,1) or (R,1,T) -> (R,)
    mean = torch.stack(shares).mean(0)[:, None]  # (R, 1)
    return {
        "prefill_speedup": statistics.median(ratios),
        "prefill_ceiling": prefill_ceiling(model.config, model.routing, mean, length),
        "prefill_context": length,
        "prefill_capacity": capacity(mean, weights=model.place_weights()).item(),
    }
