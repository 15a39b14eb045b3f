"""A budget held within each sequence by running cuts: causal, the same in any batch and call, on any source.

Run: python -m pytest tests/test_hold.py
"""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as scoring
import sample
from model import KVCache, generate, load_model
from recipe.hold import chunk_starts, hold, hold_shares, running_cuts, shares_for
from recipe.speed import compile_model
from router import RouterConfig, RouterMeta, read_router_file, save_routers
from test_model import CASES, build, rows, tokens_of
from tiny import write_base, write_jsonl

TOKEN_CASES = [case for case in CASES if case[0].endswith("token")]


def held(granularity: str, kv: str = "routed", shares=(0.25, 0.5, 0.75), **more):
    """A tiny model whose places hold these shares; its layers see texts of up to 128 tokens."""
    model = build("llama", granularity, kv, dtype=torch.float64, **more)
    hold_shares(model, [shares[place % len(shares)] for place in range(len(model.routing.places))])
    return model


def gates_of(z: torch.Tensor, cut: float, share: float) -> torch.Tensor:
    cuts, past = running_cuts(z, [0] * len(z), torch.tensor(cut), None, share)
    gates = (z >= cuts).float()
    gates[:, 0] = 1.0
    assert torch.equal(past[0], z) and torch.equal(past[1], gates)
    return gates


# -----------------------------------------------------------------------------
# One place


@given(st.integers(0, 10_000))
def test_chunks_are_short_at_first_and_a_sixteenth_to_an_eighth_of_what_came_before_later(end):
    starts = chunk_starts(end)
    assert starts[0] == 0 and starts[-1] >= end and (len(starts) < 2 or starts[-2] < end)
    for a, b in zip(starts, starts[1:]):
        assert b - a == 8 if a < 128 else a / 16 < b - a <= a / 8


SOURCES = {
    "alike": lambda e: e,
    "runs": lambda e: torch.stack([e[:, max(0, i - 9) : i + 1].mean(1) for i in range(e.shape[1])], dim=1),
    "skewed": lambda e: e.exp(),
    "a step": lambda e: e + 0.7 * (torch.arange(e.shape[1]) > e.shape[1] // 2),
    "few values": lambda e: e.mul(2).round(),
}


@pytest.mark.parametrize("off", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("source", SOURCES)
def test_the_share_is_held_whatever_the_calibrated_cut_lets_through(source, share, off):
    """On sources whose own cut would run anything from nothing to everything, sequences of 64 to 300 tokens."""
    rng = torch.Generator().manual_seed(0)
    z = SOURCES[source](torch.randn(96, 300, generator=rng)) + 0.5 * torch.randn(96, 1, generator=rng)
    cut = z.flatten().quantile(1 - share).item() + off
    gates = gates_of(z, cut, share)
    at_its_cut = (z >= cut).float().mean().item()
    assert off == 0.0 or abs(at_its_cut - share) > 0.15
    for length in (64, 100, 200, 300):
        assert abs(gates[:, :length].mean().item() - share) <= 0.02
    assert (gates.mean(1) - share).abs().max() <= 0.08  # of each sequence, not on average alone


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 170), min_size=1, max_size=4), st.lists(st.integers(1, 60), min_size=1, max_size=6),
       st.floats(0, 1), st.integers(0, 99))
def test_cuts_depend_on_a_rows_own_past_alone(lengths, steps, share, seed):
    """Rows of any lengths in calls of any sizes, against each row alone in one call; and no logit moves an earlier cut.
    """
    rng, cut = torch.Generator().manual_seed(seed), torch.tensor(0.1)
    total = [length + sum(steps) for length in lengths]
    whole = torch.randn(len(lengths), max(total), generator=rng).mul(3).round().div(3)  # with equal ones among them
    alone = [running_cuts(whole[row : row + 1, :n], [0], cut, None, share)[0][0] for row, n in enumerate(total)]
    found, past = running_cuts(whole[:, : max(lengths)], [0] * len(lengths), cut, None, share)
    parts, starts = [[found[row, :length]] for row, length in enumerate(lengths)], list(lengths)
    for step in steps:
        z = torch.stack([whole[row, start : start + step] for row, start in enumerate(starts)])
        found, past = running_cuts(z, starts, cut, past, share)
        starts = [start + step for start in starts]
        for row, part in enumerate(parts):
            part.append(found[row])
    for row, part in enumerate(parts):
        assert torch.equal(torch.cat(part), alone[row])
    other = whole[:1].clone()
    other[:, lengths[0] :] = 9.0
    changed = running_cuts(other[:, : total[0]], [0], cut, None, share)[0][0]
    assert torch.equal(changed[: lengths[0] + 1], alone[0][: lengths[0] + 1])


def test_none_and_all_are_exact():
    z = torch.randn(3, 200)
    assert (gates_of(z, -math.inf, 1.0) == 1).all()
    assert gates_of(z, math.inf, 0.0).sum().item() == 3  # the first tokens


# -----------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("granularity, kv", TOKEN_CASES)
def test_mask_gather_cached_steps_and_rows_alone_agree(granularity, kv):
    model, lengths, more = held(granularity, kv), [70, 23, 41], 9
    full = [length + more for length in lengths]
    tokens = tokens_of(3, max(full))
    expected, gates = model(tokens, full, lengths, route="mask")
    gathered, again = model(tokens, full, lengths, route="gather")
    assert torch.equal(gates, again)
    torch.testing.assert_close(rows(gathered, full), rows(expected, full), atol=1e-9, rtol=1e-9)
    cache = KVCache(model, 3)
    _, found = model(tokens[:, :70], lengths, cache=cache, route="gather")
    starts, seen = list(lengths), [[found[:, row, :n]] for row, n in enumerate(lengths)]
    for step in (1, 5, 3):
        part = torch.stack([tokens[row, start : start + step] for row, start in enumerate(starts)])
        logits, found = model(part, cache=cache, route="gather")
        for row, start in enumerate(starts):
            torch.testing.assert_close(logits[row], expected[row, start : start + step], atol=1e-9, rtol=1e-9)
            seen[row].append(found[:, row])
        starts = [start + step for start in starts]
    for row, n in enumerate(full):
        assert torch.equal(torch.cat(seen[row], dim=1), gates[:, row, :n])
        alone, own = model(tokens[row : row + 1, :n], route="gather")
        assert torch.equal(own[:, 0], gates[:, row, :n])
        torch.testing.assert_close(alone[0], expected[row, :n], atol=1e-9, rtol=1e-9)


def test_a_cache_that_is_copied_picked_from_or_rewound_goes_on_as_it_would_have():
    model, tokens = held("attn_token"), tokens_of(2, 60)
    expected, gates = model(tokens, route="mask")
    cache = KVCache(model, 2)
    model(tokens[:, :50], cache=cache, route="gather")
    copy, other = cache.clone(), tokens_of(2, 10, seed=5)
    model(other, cache=copy, route="gather")  # leaves the first one alone
    copy.rewind([50, 37])
    copy.select([1, 0, 1])
    for rows_, start, held_cache in (([1], 37, copy), ([0, 1], 50, cache)):
        held_cache.select([0] if start == 37 else [0, 1])
        logits, found = model(tokens[rows_, start:], cache=held_cache, route="gather")
        torch.testing.assert_close(logits, expected[rows_, start:], atol=1e-9, rtol=1e-9)
        assert torch.equal(found, gates[:, rows_, start:])


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token", "both_token"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
def test_the_budget_is_held_on_text_of_another_kind(granularity, budget):
    """Routers whose cuts were set on one kind of text, which hold nothing on another; each place keeps to its share."""
    model = build("llama", granularity, dtype=torch.float64)
    text, other = tokens_of(8, 120), tokens_of(24, 120, seed=3) % 7  # seven words alone
    weights, free = model.place_weights(), torch.linspace(0.5, 1.5, len(model.routing.places))
    wanted = (free * budget * 0.6).double()
    wanted = (wanted * (budget / (weights @ wanted))).clamp(max=0.98)
    # places from the first on, as routes change what is seen
    for router, share in zip(model.routers(), wanted.tolist()):
        z = model.hidden(text, route="mask", return_scores=True)[2]
        place = next(n for n, own in enumerate(model.routers()) if own is router)
        router.cut.fill_(z[place].flatten().quantile(1 - share).item())
    loose = model(other, route="gather")[1].double().mean((1, 2))
    hold_shares(model, wanted.tolist())
    for length in (64, 120):
        shares = model(other[:, :length], route="gather")[1].double().mean((1, 2))
        assert abs((weights @ shares).item() - (weights @ wanted).item()) <= 0.02
        assert (shares - wanted).abs().max() <= 0.04
    assert (loose - wanted).abs().max() > 0.05, "the cuts alone hold it too: nothing was shown"


def test_running_cuts_are_not_compiled_and_what_is_around_them_may_be():
    model, tokens = held("mlp_token"), tokens_of(2, 40)
    expected, gates = model(tokens, route="mask")
    compile_model(model, backend="eager")
    found, again = model(tokens, route="mask")
    torch.testing.assert_close(found, expected)
    assert torch.equal(gates, again)
    torch._dynamo.reset()


# -----------------------------------------------------------------------------
# Files and scripts


TABLE = {
    "budgets": [0.0, 0.4, 0.8, 1.0],
    "thresholds": [[1.0] * 3, [0.6] * 3, [0.4] * 3, [0.0] * 3],
    "shares": [[0.0] * 3, [0.2, 0.4, 0.6], [0.7, 0.8, 0.9], [1.0] * 3],
}


def saved(folder, granularity: str = "attn_token", table=TABLE):
    """A base, and a router file of it with this table."""
    base = write_base(folder / "base")
    model = load_model(base)
    model.add_routers(RouterConfig.of(granularity, (1, 2, 3)))
    torch.manual_seed(2)
    for router in model.routers():
        torch.nn.init.normal_(router.weight)
    save_routers(folder / "routers", model, RouterMeta(model.routing, [0.5] * 3, model.fingerprint, table))
    return base, folder / "routers"


def holding(base, routers, budget):
    """The model of a folder, whose routers hold a budget."""
    model = load_model(base, routers, budget)
    hold(model, read_router_file(routers)[1], budget)
    return model


@given(st.floats(0, 1), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_shares_of_places_sum_to_the_budget(budget, weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    weights /= weights.sum()
    shares = shares_for(budget, TABLE, weights)
    assert all(0 <= share <= 1 for share in shares)
    assert (weights @ torch.tensor(shares, dtype=torch.float64)).item() == pytest.approx(budget, abs=1e-6)


def test_a_loaded_model_holds_its_budget_and_answers(tmp_path):
    base, routers = saved(tmp_path)
    model, tokens = holding(base, routers, 0.5), tokens_of(6, 100)
    shares = model(tokens, route="gather")[1].mean((1, 2)).tolist()
    assert shares == pytest.approx(shares_for(0.5, TABLE, model.place_weights()), abs=0.04)
    assert sum(shares) / 3 == pytest.approx(0.5, abs=0.02)
    prompts = [tokens[0, :30].tolist(), tokens[1, :7].tolist()]
    assert generate(model, prompts, 12) == [generate(model, [prompt], 12)[0] for prompt in prompts]
    assert load_model(base, routers, budget=0.5).routers()[0].running is None
    for budget in (0.0, 1.0):
        whole = holding(base, routers, budget)
        ran = whole(tokens, route="gather")[1]
        assert (ran[..., 1:] == budget).all() and (ran[..., 0] == 1).all()


def test_what_cannot_hold_a_budget_is_refused_with_the_remedy(tmp_path):
    base, routers = saved(tmp_path)
    with pytest.raises(ValueError, match="budget None and .*: give a budget"):
        holding(base, routers, None)
    base, sequences = saved(tmp_path / "sequence", "attn_sequence")
    with pytest.raises(ValueError, match="the attn_sequence routers .* sequence routers by budget_per=sequence"):
        holding(base, sequences, 0.5)
    base, old = saved(tmp_path / "old", table={name: TABLE[name] for name in ("budgets", "thresholds")})
    with pytest.raises(ValueError, match="file holds shares of places: .* --recalibrate"):
        holding(base, old, 0.5)
    with pytest.raises(ValueError, match="expected thresholds and shares for each of its budgets"):
        RouterMeta(load_model(base, old).routing, [0.5] * 3, "x", TABLE | {"shares": [[0.5] * 3]})


def test_scripts_hold_budgets_and_refuse_what_contradicts(tmp_path, monkeypatch, capsys):
    base, routers = saved(tmp_path)
    rows_ = [{"text": "abc " * (16 + n)} for n in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows_)
    given_ = ["eval.py", f"--model={base}", f"--routers={routers}", f"--perplexity={path}", "--budget=0.5", "--rolling",
              "--dtype=float32", "--hold_budget", f"--out={tmp_path / 'out.json'}"]
    monkeypatch.setattr(sys, "argv", given_)
    scoring.main()
    assert abs(scoring.runtime.read_json(tmp_path / "out.json")["results"]["perplexity"]["capacity"] - 0.5) <= 0.02
    for wrong in ("--calibrate=3", "--control=random:1", "--route=off"):
        monkeypatch.setattr(sys, "argv", [*given_, wrong])
        with pytest.raises(ValueError, match="--hold_budget|--route=off has none|no router file, "):
            scoring.main()
    said = ["sample.py", f"--model={base}", f"--routers={routers}", "--budget=0.5", "--hold_budget", "--prompt=abc",
            "--raw", "--max_new_tokens=5", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", said)
    sample.main()
    assert "of routed units skipped" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [word for word in said if "routers" not in word and "--budget" not in word])
    with pytest.raises(ValueError, match="--hold_budget are about routers"):
        sample.main()
