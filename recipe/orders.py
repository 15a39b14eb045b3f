"""The order in which places are best skipped for everyone: by greedy search, and by similarity."""

import contextlib
import math

import torch
import torch.nn.functional as F

import runtime
from model import Transformer
from recipe.controls import Controls
from recipe.passes import EVAL_BATCH, Example, by_length, collate, mine, sum_over_ranks
from recipe.trunk import TrunkCache

TRIES = 3  # layers that a round of the greedy search measures at most (the first round twice as many)


def greedy_order(model: Transformer, examples: list[Example], rt: runtime.Runtime, guess: list[float], depth: float, trunk: "TrunkCache | None" = None) -> list[int]:
    """Drop places one after another until a share `depth` of all they count is off, each time the one whose loss on the examples rises least by what it
    counts; the rest follow by estimate.

    guess: price of each place by what it counts, in any unit. Lazy (Minoux 1978): a place's last measured rise stands until a round finds it cheapest,
    and what was never measured counts with its guess at the rate of those that were; a round measures at most TRIES places.
    """
    loss = Controls(model, examples, rt, trunk).loss
    path, now, measured = [], loss(()), {}
    rest, weights = set(range(len(guess))), (model.place_weights() * len(guess)).tolist()

    def rise(place: int) -> float:
        return (loss((*path, place)) - now) / weights[place]

    while sum(weights[place] for place in path) < depth * len(guess) - 1e-6:
        fresh = {}
        if not path:  # no measured rise to go by yet: more of them, by their guesses
            for place in sorted(rest, key=lambda place: guess[place])[:2 * TRIES]:
                fresh[place] = rise(place)
        else:
            rate = sum(max(risen, 0.0) for risen in measured.values()) / max(sum(guess[place] for place in measured), 1e-12)
            while len(fresh) < TRIES:
                cheapest = min(rest, key=lambda place: (measured.get(place, rate * guess[place]), guess[place]))
                if cheapest in fresh:
                    break
                fresh[cheapest] = measured[cheapest] = rise(cheapest)
        measured |= fresh
        path.append(min(fresh, key=fresh.get))
        now += fresh[path[-1]] * weights[path[-1]]
        rest.discard(path[-1])
    return path + sorted(rest, key=lambda place: (measured.get(place, math.inf), guess[place]))


@contextlib.contextmanager
def sublayers_of(model: Transformer):
    """A list that collects, for a while and by layer, what enters the layer, and what its attention and feed-forward add (B,T,D)."""
    seen: list[dict[str, torch.Tensor]] = []
    hooks = []
    for block in model.layers:
        hooks.append(block.register_forward_pre_hook(lambda _, args: seen.append({"x": args[0].detach()})))
        for name in ("attention", "feed_forward"):
            part = getattr(block, name)
            hooks.append(part.register_forward_hook(lambda _, args, out, name=name: seen[-1].update({name: out.detach().clone()})))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def similarity_order(model: Transformer, examples: list[Example], rt: runtime.Runtime) -> list[int]:
    """Places by 1 - cos(x, y), x what enters the target and y that plus its output (What Matters in Transformers, arXiv 2406.15786), by what they count."""
    places = model.routing.places
    total = torch.zeros(len(places), dtype=torch.float64, device=rt.device)
    for _, group in mine(by_length(examples, EVAL_BATCH), rt):
        batch = collate(group, rt.device)
        real = torch.arange(batch.tokens.shape[1], device=rt.device) < torch.tensor(batch.lengths, device=rt.device)[:, None]  # (B,T)
        with sublayers_of(model) as seen:
            model.hidden(batch.tokens, route="off")
        for number, place in enumerate(places):
            x = seen[place.layer]["x"]
            middle = x + seen[place.layer]["attention"].view_as(x)
            after = middle + seen[place.layer]["feed_forward"].view_as(x)
            before, changed = {"attn": (x, middle), "mlp": (middle, after), "block": (x, after)}[place.target]
            total[number] += (1 - F.cosine_similarity(before[real].float(), changed[real].float(), dim=-1)).sum()
    return (sum_over_ranks(total, rt).cpu() / model.place_weights()).argsort().tolist()
