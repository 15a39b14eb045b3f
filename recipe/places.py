"""Places that settings name, and routes over them that no router made: static lists and chance."""

import torch
from torch import Tensor

from model import ModelConfig
from router import EXPERT_GRANULARITIES, RouterConfig


def deep_layers(n: int, n_layers: int) -> tuple[int, ...]:
    """The deepest n layers except the last one: the paper's choice (arXiv 2410.13184, section 4)."""
    if not 1 <= n <= n_layers - 1:
        raise ValueError(f"deep:{n} asks for {n} layers; a model of {n_layers} layers has 1 to {n_layers - 1} before "
                         "its last one")
    return tuple(range(n_layers - 1 - n, n_layers - 1))


def parse_layers(text: str, n_layers: int) -> tuple[tuple[int, ...], int | None]:
    """Layers that a `--layers` setting names: 'deep:16', 'auto:16', '3,5,8-12' or 'all'.

    Beside them how many places are to be chosen of these, for auto:N, whose are all; None: they are chosen.
    """
    kind, _, number = text.partition(":")
    if kind == "deep" and number.isdigit():
        return deep_layers(int(number), n_layers), None
    if kind == "auto" and number.isdigit() and int(number):
        return tuple(range(n_layers)), int(number)
    if text == "all":
        return tuple(range(n_layers)), None
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
        layers = sorted({layer for span in spans for layer in range(span[0], span[-1] + 1)})
    except ValueError:
        raise ValueError(f"layers is {text!r}; expected deep:N, auto:N, all, or numbers such as 3,5,8-12") from None
    if not layers or layers[-1] >= n_layers:
        raise ValueError(f"layers is {text!r}; this model has layers 0 to {n_layers - 1}")
    return tuple(layers), None


def named_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Layers that a `--layers` setting names where nothing was measured. Raises ValueError for auto:N too."""
    layers, kept = parse_layers(text, n_layers)
    if kept is not None:
        raise ValueError(f"layers is {text!r}; nothing was measured to choose by: give deep:N, all, or numbers")
    return layers


def routing_of(config: ModelConfig, granularity: str, layers, **more) -> RouterConfig:
    """Routers of a named granularity at these layers of a model, of experts at those that have any.

    Raises ValueError for an unknown name, or where no layer has experts.
    """
    if granularity in EXPERT_GRANULARITIES:
        layers = [layer for layer in layers if config.has_experts(layer)]
        if not layers:
            raise ValueError(f"granularity is {granularity!r}, and no layer that was asked for has experts; expected "
                             "a mixture of experts: choose another granularity, model or --layers")
    return RouterConfig.of(granularity, layers, n_experts=config.n_experts, **more)


def skipped_shares(order: list[int], weights: Tensor, skip: float) -> list[float]:
    """Share to skip of each place (R) when everyone skips places in order, until `skip` of all they count is skipped.

    weights (R,) of sum 1. The result is 1 for the first ones, a fraction for the one where that ends, 0 for the rest.
    """
    shares = [0.0] * len(order)
    for place in order:
        share = min(max(skip / weights[place].item(), 0.0), 1.0)
        shares[place] = 0.0 if share < 1e-6 else 1.0 if share > 1 - 1e-6 else share
        skip -= weights[place].item()
    return shares


def skipped_places(order: list[int], weights: Tensor, skip: float) -> tuple[int, ...]:
    """The places that `skipped_shares` skips, to the nearest whole one, ascending."""
    return tuple(place for place, share in enumerate(skipped_shares(order, weights, skip)) if share >= 0.5)


def static_route(order: list[int], weights: Tensor, budget: float, rng: torch.Generator) -> Tensor:
    """Gates (R,) of one sequence under a static list: the same places are skipped for everyone.

    The place at which the list ends is skipped by chance, so that the average over sequences is the budget.
    """
    chance = torch.rand((), generator=rng).item()
    return torch.tensor([float(share <= chance) for share in skipped_shares(order, weights, 1 - budget)])


def random_route(weights: Tensor, budget: float, rng: torch.Generator, tokens: int | None = None) -> Tensor:
    """Gates (R,) of one sequence, or (R,T) of its tokens, by chance: the control that knows nothing.

    A sequence skips places in a random order until the budget is met; a token skips each place by chance.
    """
    if tokens is None:
        return static_route(torch.randperm(len(weights), generator=rng).tolist(), weights, budget, rng)
    return (torch.rand(tokens, len(weights), generator=rng) < budget).float().T  # (T,R) -> (R,T)
