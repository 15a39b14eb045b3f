"""A budget held within each sequence of tokens, on any source: cuts that run with the sequence, for token routers."""

import math
from bisect import bisect_left, bisect_right
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer, upload
from router import RouterMeta, row_at

CHUNK = 8  # tokens that share a running cut; later more, so that an octave of positions has CHUNK cuts


def shares_for(budget: float, calibration: dict, weights: Tensor) -> list[float]:
    """Share of its tokens that each place runs at a budget, as calibrated; by weight (R,) they sum to the budget."""
    if budget in (0.0, 1.0):
        return [budget] * len(weights)
    shares = torch.tensor(row_at(budget, calibration, "shares"), dtype=torch.float64)
    total = (weights @ shares).item()
    if total > budget:
        return (shares * (budget / total)).tolist()
    return (1 - (1 - shares) * ((1 - budget) / max(1 - total, 1e-12))).tolist()


def chunk_starts(end: int) -> list[int]:
    """Positions at which running cuts change, from 0 on; the last one is `end` or later."""
    starts = [0]
    while starts[-1] < end:
        starts.append(starts[-1] + max(CHUNK, (1 << starts[-1].bit_length()) // (2 * CHUNK)))
    return starts


def running_cuts(z: Tensor, starts: list[int], cut: Tensor, past: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Cuts (B,T) under which every row runs `share` of its tokens at one place; z (B,T): logits from positions `starts`
    on. Beside them what the next call is given as `past`: logits and gates by position (2,B,S).

    The tokens of a chunk share a cut. The first chunk's is `cut`; a later one's lets as many of the row's own earlier
    logits through as brings what it has run, by the chunk's end, to `share`. So it depends on the row's past alone: not
    on a calibration set, other rows, or how calls part the sequence. No host sync.
    """
    (rows, width), device, ends = z.shape, z.device, chunk_starts(max(starts) + z.shape[1])
    at = upload(starts, device)[:, None] + torch.arange(width, device=device)  # (B,T)
    past = z.new_zeros(2, rows, 0) if past is None else past
    past = F.pad(past, (0, max(0, max(starts) + width - past.shape[2])))  # a copy
    past[0].scatter_(1, at, z)
    firsts = [bisect_right(ends, start) - 1 for start in starts]
    cuts, gates = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(max(bisect_left(ends, start + width) - first for start, first in zip(starts, firsts))):
        chunks = [min(first + step, len(ends) - 2) for first in firsts]
        begin, end = (upload([[ends[chunk + i]] for chunk in chunks], device) for i in (0, 1))
        own = cut_of_chunk(past[..., : ends[max(chunks)]], begin, end, cut, share)  # (B,1)
        here = (at >= begin) & (at < end)
        cuts = torch.where(here, own, cuts)
        gates = torch.where(here, ((z >= own) | (at == 0)).to(z), gates)
        past[1].scatter_(1, at, gates)
    return cuts, past


def cut_of_chunk(past: Tensor, begin: Tensor, end: Tensor, cut: Tensor, share: float) -> Tensor:
    """The cut of each row's chunk from position begin (B,1) to end (B,1), by what came before it; past (2,B,S)."""
    if past.shape[2] == 0:
        return cut.expand_as(begin).to(past)
    before = torch.arange(past.shape[2], device=past.device) < begin  # (B,S)
    wanted = (share * end - (past[1] * before).sum(1, keepdim=True)) / (end - begin)  # share of this chunk
    before[:, 0] = False  # the first token runs in any case
    ordered = past[0].masked_fill(~before, -math.inf).sort(dim=1, descending=True).values
    count = (wanted.clamp(0, 1) * before.sum(1, keepdim=True)).round().long()
    least = ordered.gather(1, (count - 1).clamp(min=0))  # of those that would have run
    own = least - 1e-4 * least.abs()  # equal logits stay on one side, whatever their last bits
    own = own.masked_fill(count == 0, math.inf).masked_fill(wanted >= 1, -math.inf)
    return torch.where(begin == 0, cut, own)


def hold_shares(model: Transformer, shares: list[float]) -> None:
    """Let each place (R) run this share of every sequence's tokens, by running cuts that begin at the routers' own."""
    model.holds_budget = True
    for router, share in zip(model.routers(), shares, strict=True):
        router.running = partial(running_cuts, share=share)


def hold(model: Transformer, meta: RouterMeta, budget: float | None) -> None:
    """Let token routers hold a budget within each sequence. meta: what `load_routers` said of their file.

    Raises ValueError without a budget, for sequence routers, and for a file without shares of places.
    """
    if budget is None or meta.routing.unit == "sequence" or "shares" not in meta.calibration:
        raise ValueError(f"hold_budget with budget {budget} and the {meta.routing.granularity} routers of this file; "
                         "expected a budget, and token routers whose file holds shares of places: give a budget, add "
                         "the shares by train.py --recalibrate=FILE (there are none for experts), or hold the budget "
                         "of sequence routers by budget_per=sequence")
    hold_shares(model, shares_for(budget, meta.calibration, model.place_weights()))
