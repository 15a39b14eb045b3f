"""The order in which places are best skipped for everyone: by search, by Fisher cost, by similarity, by weights alone.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer
from recipe.controls import Controls
from recipe.int8 import plain_weight
from recipe.measure import Measured, typical_costs
from recipe.passes import Workload
from runtime import Progress, print0

MOST_SEARCHED = 96  # places, at most, whose order is searched: of more (experts) the search takes hours
GATE_NORM = "gate_norm"
TRIES = 3  # places that a round of the greedy search measures at most (the first round twice as many)


def search_orders(work: Workload, measured: Measured, skip: float) -> dict[str, list[int]]:
    """Orders by name: numbers of places, the first to skip in front. skip: how deep the greedy one is searched."""
    weights = work.model.place_weights()
    prices = typical_costs(measured.costs) / weights
    orders = {"fisher": prices.argsort().tolist()}
    if work.model.routing.experts:
        orders["load"] = work.model.place_shares().argsort().tolist()
    else:
        orders["similarity"] = (measured.turned / weights).argsort().tolist()
    if work.model.routing.target == "attn":
        orders[GATE_NORM] = gate_norm_order(work.model)
    if len(prices) <= MOST_SEARCHED:
        orders = {"greedy": greedy_order(work, prices, skip), **orders}
    for name, order in orders.items():
        print0(f"first to skip, {name}: " + ", ".join(work.model.routing.names[place] for place in order))
    return orders


def greedy_order(work: Workload, guess: Tensor, skip: float) -> list[int]:
    """Skip places one after another until a share `skip` of all they count is skipped, each time the one whose loss on
    the examples rises least by what it counts; the rest follow by estimate.

    guess (R,): price of each place by what it counts, in any unit. Lazy (Minoux 1978): a place's last measured rise
    stands until a round finds it cheapest, and what was never measured counts with its guess at the rate of those that
    were; a round measures at most TRIES places.
    """
    guess, weights = guess.tolist(), (work.model.place_shares() * len(guess)).tolist()
    controls, path, measured, rest = Controls(work, searching=True), [], {}, set(range(len(guess)))
    first = sorted(rest, key=guess.__getitem__)[: 2 * TRIES]  # no measured rise to go by yet: more of them
    controls.measure([(), *((place,) for place in first)])
    now = controls.loss(())

    def rise(place: int) -> float:
        return (controls.loss((*path, place)) - now) / weights[place]

    with Progress("greedy order", math.ceil(skip * len(guess))) as progress:
        while sum(weights[place] for place in path) < skip * len(guess) - 1e-6:
            fresh = {} if path else {place: rise(place) for place in first}
            rate = sum(max(risen, 0.0) for risen in measured.values()) / max(sum(guess[p] for p in measured), 1e-12)
            while path and len(fresh) < TRIES:
                cheapest = min(rest, key=lambda place: (measured.get(place, rate * guess[place]), guess[place]))
                if cheapest in fresh:
                    break
                fresh[cheapest] = measured[cheapest] = rise(cheapest)
            measured |= fresh
            best = min(fresh, key=fresh.get)
            now += fresh[best] * weights[best]
            path.append(best)
            rest.discard(best)
            progress.step()
    return path + sorted(rest, key=lambda place: (measured.get(place, math.inf), guess[place]))


@torch.no_grad()
def gate_norm_order(model: Transformer) -> list[int]:
    """Attentions by how much their queries and keys are coupled, the least first. No data, no pass of the model.

    The coupling is the Frobenius norm, over the heads i of a layer, of W_q,i^T W_k,i (D,D), which makes a score of two
    tokens at one position. Source: Gate-Norm, arXiv 2512.20636, which ranks attentions by their query-key coupling;
    more than its abstract was not at hand, so that the norm is our reading of it. Raises ValueError for other targets.
    """
    if model.routing.target != "attn":
        raise ValueError(f"{GATE_NORM} ranks attentions by their weights, and these routers are "
                         f"{model.routing.granularity}; expected attn_sequence or attn_token: use another control")
    coupling = []
    for place in model.routing.places:
        attention = model.layers[place.layer].attention
        q, k = (gram(part, attention.head_dim) for part in (attention.wq, attention.wk))  # (H,h,h), (K,h,h)
        coupling.append((q.unflatten(0, (len(k), -1)) * k[:, None]).sum().item())  # |A^T B|^2 = <A A^T, B B^T>
    return sorted(range(len(coupling)), key=lambda place: (coupling[place], place))


def gram(projection: nn.Module, width: int) -> Tensor:
    """Products of the rows of each head's weight (H*h,D) with each other: (H,h,h)."""
    heads = plain_weight(projection).unflatten(0, (-1, width))
    return heads @ heads.mT
