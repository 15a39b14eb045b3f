"""The order in which places are best skipped for everyone: by greedy search, by Fisher cost, by similarity."""

import math

from torch import Tensor

from recipe.controls import Controls
from recipe.measure import Measured, typical_costs
from recipe.passes import Workload
from runtime import Progress, print0

MOST_SEARCHED = 96  # places, at most, whose order is searched: of more (experts) the search takes hours
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
