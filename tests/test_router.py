"""Gate, pooling, capacity, thresholds and the router file.

Run: python -m pytest tests/test_router.py
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import router as router_module
from recipe.lora import let_train
from recipe.passes import quantile_cut
from recipe.places import deep_layers, parse_layers, random_route, skipped_places, skipped_shares, static_route
from router import (
    GRANULARITIES,
    Place,
    Router,
    RouterConfig,
    RouterMeta,
    capacity,
    check_fingerprint,
    cut_of,
    cuts_for,
    describe,
    fill_budget,
    load_router_weights,
    pool,
    read_router_file,
    save_routers,
    set_cuts,
    ste_gate,
    threshold_of,
)


class Toy(nn.Module):
    """Any module that contains routers: router.py must not care which."""

    def __init__(self, n: int = 2, dim: int = 6):
        super().__init__()
        self.router_of_experts = nn.Linear(
            dim, 4
        )  # a genuine parameter with "router" in its name: never trained, saved or zeroed
        self.parts = nn.ModuleList(Router(dim) for _ in range(n))


def saved(path: Path, layers=(3, 5), **changes) -> Toy:
    toy = Toy(len(layers))
    for part in toy.parts:
        part.weight.data.normal_()
    routing = RouterConfig.of("attn_sequence", layers)
    save_routers(path, toy, RouterMeta(routing, [0.5] * len(layers), "abc", **changes))
    return toy


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8), st.integers(-20, 20))
def test_gate_is_hard_forward_and_identity_to_the_score_backward(numbers, cut):
    z = torch.tensor([n / 4 for n in numbers], dtype=torch.float64, requires_grad=True)
    gate = ste_gate(z, cut / 4)
    assert set(gate.tolist()) <= {0.0, 1.0}
    assert torch.equal(gate.bool(), z >= cut / 4)
    weights = torch.arange(1.0, len(numbers) + 1, dtype=torch.float64)
    (gate * weights).sum().backward()
    score = torch.sigmoid(z.detach())
    torch.testing.assert_close(z.grad, weights * score * (1 - score))


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pooling_ignores_pads_whatever_they_hold(lengths, extra, dtype):
    """The official code averages over pads; here rows alone and rows in a batch pool alike, even over NaN and infinity
    in the pads.
    """
    torch.manual_seed(0)
    width = max(lengths) + extra
    x = torch.randn(len(lengths), width, 5).to(dtype)
    for row, length in enumerate(lengths):
        x[row, length:] = math.nan
    got = pool(x, torch.tensor(lengths))
    assert got.dtype == torch.float32
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row], x[row, :length].float().mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got[row : row + 1], pool(x[row : row + 1, :length]), atol=1e-6, rtol=1e-6)


def test_new_router_executes_everything():
    assert torch.equal(ste_gate(Router(4)(torch.randn(3, 4)), Router(4).cut), torch.ones(3))


def test_only_routers_train_and_they_are_found_by_type():
    toy = Toy(3, 6)
    let_train(toy, "routers")
    assert [name for name, p in toy.named_parameters() if p.requires_grad] == [f"parts.{i}.weight" for i in range(3)]


def test_capacity_is_one_number_over_layers_and_units():
    gates = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert capacity(gates) == 0.5
    token_gates = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    real = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert float(capacity(token_gates, real)) == pytest.approx(3 / 6)


def test_layers_by_name():
    assert deep_layers(16, 32) == tuple(range(15, 31))
    assert parse_layers("deep:16", 32) == (deep_layers(16, 32), None)
    assert parse_layers("auto:4", 8) == (tuple(range(8)), 4)
    assert parse_layers("5,1,8-10", 32) == ((1, 5, 8, 9, 10), None) and parse_layers("all", 3) == ((0, 1, 2), None)
    for bad in ("deep:33", "depp:4", "1,x", "40", "", "auto:0"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(bad, 32)
    with pytest.raises(ValueError, match="before its last one"):
        deep_layers(32, 32)


@pytest.mark.parametrize(
    "places, settings_, message",
    [
        ([(1, "atn")], {}, "expected attn, mlp or block"),
        ([(1, "attn")], dict(kv="all"), "attn_token"),
        ([(1, "block")], dict(unit="token", kv="all"), "attn_token"),
        ([(1, "mlp")], dict(unit="token", kv="all"), "attn_token"),
        ([(1, "attn")], dict(pool="mean"), "pool"),
        ([(1, "attn")], dict(unit="word"), "unit"),
        ([], {}, "one or more"),
        ([(-1, "attn")], {}, "0-based"),
        ([(1, "attn"), (1, "attn")], {}, "each place once"),
        ([(1, "attn"), (1, "block")], {}, "expected one of the two"),
        ([(1, "mlp"), (1, "block")], {}, "expected one of the two"),
        ([(1, "attn")], dict(reads="last"), "reads"),
        ([(1, "attn")], dict(unit="token", reads="first"), "reads"),
        ([(1, "attn", 2)], {}, "expert"),
    ],
)
def test_a_wrong_setting_is_refused_not_guessed(places, settings_, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(places, **settings_)


def test_granularities_are_three_targets_and_both_per_unit():
    assert GRANULARITIES == tuple(
        f"{target}_{unit}" for target in ("attn", "mlp", "block", "both") for unit in ("sequence", "token")
    )
    for granularity in GRANULARITIES:
        assert RouterConfig.of(granularity, (2, 5)).granularity == granularity
    with pytest.raises(ValueError, match="expected one of attn_sequence"):
        RouterConfig.of("atn_token", (1,))


def test_places_stand_in_the_order_in_which_they_are_asked():
    routing = RouterConfig(((4, "attn"), (1, "mlp"), (0, "mlp"), (1, "attn")))
    assert routing.places == (Place(0, "mlp"), Place(1, "attn"), Place(1, "mlp"), Place(4, "attn"))
    assert routing.names == ("0.mlp", "1.attn", "1.mlp", "4.attn") and routing.granularity == "both_sequence"
    assert [routing.rows_of(layer) for layer in range(6)] == [
        slice(0, 1),
        slice(1, 3),
        slice(3, 3),
        slice(3, 3),
        slice(3, 4),
        slice(4, 4),
    ]
    assert routing.at([3, 1]) == RouterConfig(((1, "attn"), (4, "attn"))) and routing.layers == (0, 1, 4)
    plain = RouterConfig.of("mlp_token", (5, 2))
    assert plain.names == ("2", "5") and plain.places == (Place(2, "mlp"), Place(5, "mlp"))


def test_some_places_of_a_routing_keep_what_they_can_of_its_settings():
    """auto:N picks places: MLPs alone have no keys and values to keep, which was an error."""
    whole = RouterConfig.of("both_token", (1, 2), kv="all", pool="all")
    assert whole.at([1, 3]) == RouterConfig.of("mlp_token", (1, 2), pool="all")
    assert whole.at([0, 3]) == RouterConfig(((1, "attn"), (2, "mlp")), "token", "all", "all")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 99))
def test_a_weighted_cut_lets_the_share_through_to_half_a_logit(weights, budget, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    weights /= weights.sum()
    z = torch.randn(len(weights), 7, generator=torch.Generator().manual_seed(seed))
    through = capacity((z >= quantile_cut(z, budget, weights)).double(), weights=weights).item()
    assert abs(through - budget) <= weights.max().item() / 7 / 2 + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 1))
def test_skipped_shares_skip_what_is_asked_in_order(weights, skip):
    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    order = list(reversed(range(len(weights))))
    shares = skipped_shares(order, weights, skip)
    assert sum(w * s for w, s in zip(weights.tolist(), shares)) == pytest.approx(skip, abs=1e-5)
    in_order = [shares[place] for place in order]
    assert in_order == sorted(in_order, reverse=True) and sum(0 < share < 1 for share in shares) <= 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), st.integers(0, 99)
)
def test_lists_and_chance_realise_the_budget_on_average(weights, budget, seed):
    """Over many sequences a static list, and a random route, run what the budget says; a list differs in one place
    alone.
    """
    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed)).tolist()
    rng = torch.Generator().manual_seed(seed)
    listed = torch.stack([static_route(order, weights, budget, rng) for _ in range(400)], dim=1)
    drawn = torch.stack([random_route(weights, budget, rng) for _ in range(400)], dim=1)
    error = 0.15 * weights.max().item() + 1e-5
    assert abs(capacity(listed, weights=weights).item() - budget) <= error
    assert abs(capacity(drawn, weights=weights).item() - budget) <= error
    assert sum(0 < row.mean() < 1 for row in listed) <= 1
    whole = [place for place, row in enumerate(listed) if row.mean() < 0.4]
    assert set(whole) <= set(skipped_places(order, weights, 1 - budget))
    tokens = random_route(weights, budget, rng, tokens=4000)
    assert tokens.shape == (len(weights), 4000) and abs(tokens.mean().item() - budget) < 0.04


@given(st.floats(0, 1))
def test_budget_moves_cuts_monotonically(budget):
    table = {"budgets": [0.25, 0.5, 0.75], "thresholds": [[0.9, 0.99], [0.5, 0.7], [0.2, 0.01]]}
    here, more = cuts_for(budget, table), cuts_for(min(1.0, budget + 0.05), table)
    assert all(low <= high for low, high in zip(more, here))
    if budget in (0.0, 1.0):
        assert here == [math.inf if budget == 0 else -math.inf] * 2
    if budget == 0.5:
        assert [threshold_of(cut) for cut in here] == pytest.approx([0.5, 0.7])


def test_the_ends_of_the_budget_are_exact():
    toy = Toy(2)
    z = torch.tensor([-1e30, 0.0, 1e30])
    for budget, want in ((0.0, 0.0), (1.0, 1.0)):
        set_cuts(toy, cuts_for(budget, {"budgets": [0.5], "thresholds": [[0.5, 0.5]]}))
        assert all(ste_gate(z, part.cut).eq(want).all() for part in toy.parts)


@pytest.mark.parametrize("budget", [-0.1, 1.1, math.nan])
def test_budget_out_of_range(budget):
    with pytest.raises(ValueError, match="expected a share from 0"):
        cuts_for(budget, {"budgets": [0.5], "thresholds": [[0.5]]})


def test_no_table_no_budget():
    with pytest.raises(ValueError, match="no calibration table"):
        cuts_for(0.5, {})


@given(st.floats(1e-12, 1 - 1e-12))
def test_cuts_and_thresholds_are_each_others_inverse(score):
    assert threshold_of(cut_of(score)) == pytest.approx(score, rel=1e-9)
    assert threshold_of(cut_of(0.0)) == 0 and threshold_of(cut_of(1.0)) == 1


@given(st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.booleans(), st.integers(0, 10_000))
def test_each_sequence_fills_its_budget_and_never_exceeds_it(places, rows, budget, alike, seed):
    """By what places count; the best ones first; no place is left that would still fit; a row alone gets what it gets
    among others.
    """
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(places, rows, generator=generator)
    weights = torch.ones(places) if alike else torch.rand(places, generator=generator) + 0.1
    weights = weights.double() / weights.double().sum()
    gates = fill_budget(margins, weights, budget)
    used = weights @ gates.double()
    assert (used <= budget + 2e-6).all() and set(gates.unique().tolist()) <= {0.0, 1.0}
    assert ((used + weights[:, None] > budget) | gates.bool()).all()
    assert torch.equal(fill_budget(margins[:, :1], weights, budget), gates[:, :1])
    if alike:
        k = int(gates[:, 0].sum())
        assert k == math.floor(budget * places + 1e-6) and set(gates[:, 0].nonzero()[:, 0].tolist()) == set(
            margins[:, 0].topk(k).indices.tolist()
        )


def test_file_round_trip_keeps_bits_and_metadata(tmp_path):
    toy = saved(
        tmp_path / "routers.safetensors",
        calibration={"budgets": [0.5], "thresholds": [[0.1, 0.2]]},
        recipe="default",
        step=7,
        config={"lr": 0.1},
    )
    weights, meta = read_router_file(tmp_path / "routers.safetensors")
    other = Toy(2)
    load_router_weights("f", other, weights, meta.routing)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(toy.parts, other.parts))
    assert meta.base_fingerprint == "abc" and meta.step == 7 and meta.config == {"lr": 0.1} and meta.recipe == "default"
    assert meta.routing == RouterConfig.of("attn_sequence", (3, 5)) and meta.calibration["thresholds"] == [[0.1, 0.2]]
    assert set(load_file(tmp_path / "routers.safetensors")) == {
        "model.layers.3.router.weight",
        "model.layers.5.router.weight",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["routers.safetensors"]


def test_two_routers_of_a_layer_have_tensors_of_their_own(tmp_path):
    routing, toy = RouterConfig.of("both_sequence", (3,)), Toy(2)
    for i, part in enumerate(toy.parts):
        part.weight.data.fill_(i + 1)
    save_routers(tmp_path / "r", toy, RouterMeta(routing, [0.5] * 2, "abc"))
    assert set(load_file(tmp_path / "r")) == {"model.layers.3.router.weight", "model.layers.3.mlp_router.weight"}
    weights, meta = read_router_file(tmp_path / "r")
    assert meta.routing == routing
    other = Toy(2)
    load_router_weights("f", other, weights, routing)
    assert [part.weight.unique().tolist() for part in other.parts] == [[1.0], [2.0]]


FORMAT_1 = """{"format": "router-tuning/1", "granularity": "both_sequence", "layers": [3, 7], "mlp_layers": [3],
"pool": "prompt", "kv": "routed", "thresholds": [0.5, 0.25, 0.75],
"calibration": {"budgets": [0.5], "thresholds": [[0.5, 0.25, 0.75]]}, "recipe": "default", "step": 3,
"base_fingerprint": "abc", "config": {"lr": 0.01}, "orders": {"greedy": ["3.mlp", "7.attn", "3.attn"]}}"""


@pytest.mark.parametrize(
    "granularity, layers, mlp_layers, places",
    [
        ("both_sequence", [3, 7], [3], [(3, "attn"), (3, "mlp"), (7, "attn")]),
        ("attn_token", [3, 5], [], [(3, "attn"), (5, "attn")]),
        ("mlp_sequence", [3, 5], [], [(3, "mlp"), (5, "mlp")]),
        ("block_token", [4], [], [(4, "block")]),
        ("both_sequence", [], [3, 5], [(3, "mlp"), (5, "mlp")]),
    ],
)
def test_files_of_format_1_still_load(tmp_path, granularity, layers, mlp_layers, places):
    """They named a granularity and layers in place of places, and an order could hold numbers of layers."""
    meta = json.loads(FORMAT_1) | {
        "granularity": granularity,
        "layers": layers,
        "mlp_layers": mlp_layers,
        "thresholds": [0.5] * len(places),
        "orders": {"greedy": [3, 5]},
    }
    second = [f"model.layers.{layer}.mlp_router.weight" for layer in mlp_layers]
    keys = sorted([f"model.layers.{layer}.router.weight" for layer in layers] + second)
    save_file(
        {key: torch.full((1, 6), float(i)) for i, key in enumerate(keys)},
        tmp_path / "r",
        metadata={"router_tuning": json.dumps(meta)},
    )
    weights, read = read_router_file(tmp_path / "r")
    assert (
        read.routing.places == tuple(Place(*place) for place in places)
        and read.routing.unit == granularity.split("_")[1]
    )
    assert read.orders == {"greedy": ["3", "5"]} and read.config == {"lr": 0.01} and read.base_fingerprint == "abc"
    load_router_weights("r", Toy(len(places)), weights, read.routing)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "is not JSON"),
        ("[]", "cannot be used"),
        ('{"format": "router-tuning/2"}', "lacks 'places'"),
        (FORMAT_1.replace('"thresholds": [0.5, 0.25, 0.75],\n"cal', '"cal'), "lacks 'thresholds'"),
        (FORMAT_1.replace('"abc"', '"abc'), "is not JSON"),
    ],
)
def test_metadata_that_is_short_is_refused_by_what_it_lacks(tmp_path, text, reason):
    save_file({"model.layers.3.router.weight": torch.ones(1, 6)}, tmp_path / "r", metadata={"router_tuning": text})
    with pytest.raises(ValueError, match=reason):
        read_router_file(tmp_path / "r")


WRONG = [
    None,
    True,
    3,
    -1,
    1.5,
    "x",
    "",
    [],
    {},
    [1],
    ["x"],
    {"a": 1},
    math.nan,
    [math.nan, 0.5],
    [2, 0.5],
    [0.5, "x"],
    [True, 0.5],
    [0.5] * 3,
    10**400,
    [[3, "attn"]],
    [[3, "attn", None]] * 2,
    [[3.5, "attn", None]],
    [["3", "attn", None]],
    [[-1, "attn", None]],
    [[3, "x", None]],
    [[3, "attn", 1]],
    [[3, "attn", [1]], [5, "attn", None]],
    [[3, 4, None], [3, "attn", None]],
    [[3, [1], None]],
    [[3, None, None]],
    [[True, "attn", None]],
    [3, [4]],
    {"budgets": [0.5]},
    {"budgets": [0.5], "thresholds": [[0.5]]},
    {"budgets": [math.nan], "thresholds": [[0.5, 0.5]]},
    {"budgets": [0.5, 1.5], "thresholds": [[0.5, 0.5]] * 2},
    {"greedy": 3},
    {"greedy": ["3"]},
    {"greedy": ["3", "9"]},
    "foo_bar",
    "attn_word",
    "router-tuning/9",
]
GOOD = dict(
    recipe=lambda v: isinstance(v, str),
    base_fingerprint=lambda v: isinstance(v, str),
    config=lambda v: isinstance(v, dict),
    step=lambda v: type(v) is int,
    calibration=lambda v: (
        v in ({}, {"a": 1}) or v == {"greedy": 3} or v == {"greedy": ["3"]} or v == {"greedy": ["3", "9"]}
    ),
    orders=lambda v: v == {},
)


@pytest.mark.parametrize("old", [False, True])
def test_metadata_with_any_one_entry_wrong_is_refused_in_one_sentence(tmp_path, old):
    """Each entry missing, or of a wrong type, length or range; formats 1 and 2. Nothing but a ValueError that names the
    file, in one line.
    """
    saved(tmp_path / "r", calibration={"budgets": [0.5], "thresholds": [[0.1, 0.2]]}, orders={"greedy": ["5", "3"]})
    weights, meta = read_router_file(tmp_path / "r")
    text = json.loads(meta.to_json())
    if old:
        text = {
            **json.loads(FORMAT_1),
            "granularity": "attn_sequence",
            "layers": [3, 5],
            "mlp_layers": [],
            "thresholds": [0.5, 0.5],
            "calibration": {},
            "orders": {},
        }

    def refusal(changed: dict | str) -> str | None:
        metadata = {"router_tuning": changed if isinstance(changed, str) else json.dumps(changed)}
        save_file(weights, tmp_path / "r", metadata=metadata)
        try:
            tensors, read = read_router_file(tmp_path / "r")
            load_router_weights(tmp_path / "r", Toy(2), tensors, read.routing)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "r")) and "\n" not in str(error) and len(str(error)) < 600
            return str(error)

    assert refusal(text) is None
    optional = {"calibration", "recipe", "step", "config", "orders", "report", "mlp_layers", "renormalise", "loads"} | (
        set() if old else {"granularity"}
    )
    for key in text:
        reason = refusal({name: value for name, value in text.items() if name != key})
        assert reason is None if key in optional else f"lacks '{key}'" in reason or key == "format"
        for value in WRONG:
            if value == text[key] or key == "mlp_layers" and value == []:
                continue
            reason = refusal({**text, key: value})
            fits = (
                key in GOOD and GOOD[key](value) or old and key in ("calibration", "orders") and isinstance(value, dict)
            )
            assert reason is not None or fits, (key, value)
            assert reason is None or not (key in GOOD and GOOD[key](value)), (key, value, reason)
    for broken in ("", "{", "[" * 100_000, "null", "3", '"x"', "[]", "\x00", "9" * 5000):
        assert refusal(broken)


def test_a_tensor_of_whole_numbers_or_with_a_strange_name_is_no_router(tmp_path):
    saved(tmp_path / "r")
    meta = {"router_tuning": read_router_file(tmp_path / "r")[1].to_json()}
    one = torch.ones(1, 6)
    for key, tensor, reason in (
        ("model.layers.3.router.weight", one.long(), "int64"),
        ("model.layers.03.router.weight", one, "expected only names like"),
        ("model.layers.\u00b2.router.weight", one, "expected only names like"),
        ("model.layers.3.router.bias", one, "expected only names like"),
    ):
        save_file({"model.layers.5.router.weight": torch.zeros(1, 6), key: tensor}, tmp_path / "r", metadata=meta)
        with pytest.raises(ValueError, match=reason):
            read_router_file(tmp_path / "r")


def test_official_file_is_read_when_asked_for(tmp_path):
    """The official code writes the same names and shapes without metadata."""
    save_file({"model.layers.14.router.weight": torch.ones(1, 6, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    weights, meta = read_router_file(tmp_path / "model.safetensors", official=True)
    assert meta is None and list(weights) == ["model.layers.14.router.weight"]
    with pytest.raises(ValueError, match="no router_tuning metadata"):
        read_router_file(tmp_path / "model.safetensors")


def test_every_kind_of_wrong_file_is_refused_with_a_reason(tmp_path):
    path = tmp_path / "routers.safetensors"
    with pytest.raises(FileNotFoundError, match="no router file at"):
        read_router_file(path)
    saved(path)
    good = path.read_bytes()
    for size in (0, 5, 60, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="cannot be read as a router file"):
            read_router_file(path)
    meta = {"router_tuning": json.dumps({"format": "router-tuning/99"})}
    save_file({"model.layers.3.router.weight": torch.ones(1, 6)}, path, metadata=meta)
    with pytest.raises(ValueError, match="router-tuning/99"):
        read_router_file(path)
    save_file({"model.layers.3.mlp.weight": torch.ones(1, 6)}, path, metadata={"router_tuning": "{}"})
    with pytest.raises(ValueError, match="expected only names like"):
        read_router_file(path)
    routing = RouterConfig.of("attn_sequence", (3, 5))
    key, one = "model.layers.{}.router.weight".format, torch.ones(1, 6)
    cases = (
        ({key(3): one}, "missing .'model.layers.5"),
        ({key(3): one, key(5): one, key(9): one}, "extra .'model.layers.9"),
        ({key(3): one, key(5): torch.ones(1, 7)}, r"shape \(1, 7\)"),
        ({key(3): one, key(5): torch.full((1, 6), math.nan)}, "NaN"),
    )
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            load_router_weights(path, Toy(2), weights, routing)
    with pytest.raises(ValueError, match="tuned on a base with fingerprint abc, this base has def"):
        check_fingerprint(path, "abc", "def")
    check_fingerprint(path, "abc", "def", "abc")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "routers.safetensors"
    saved(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        saved(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["routers.safetensors"]


def test_a_file_is_described_in_words(tmp_path):
    path = tmp_path / "routers.safetensors"
    rows = [{"budget": 0.5, "routed": 1.25, "greedy": 1.5, "capacity_per_layer": [1.0]}]
    table = {"budgets": [0.25, 0.75], "thresholds": [[0.6, 0.5], [0.4, 0.5]], "static": {"0.25": "greedy"}}
    saved(path, calibration=table, recipe="default", step=7, orders={"greedy": ["5", "3"]}, report=rows)
    assert read_router_file(path)[1].report == rows
    command = [sys.executable, str(Path(router_module.__file__)), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == describe(path)
    for word in (
        "abc",
        "attn_sequence",
        "3, 5",
        "0.500, 0.500",
        "2, from 0.25 to 0.75",
        "greedy: 5, 3",
        "routed 1.2500",
    ):
        assert word in done.stdout, word
    path.write_bytes(path.read_bytes()[:-3])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert subprocess.run(command[:2], capture_output=True).returncode == 1


def test_router_py_stands_alone(tmp_path):
    """The file copied into an empty folder works by itself: nothing else of the project is imported."""
    source = Path(router_module.__file__).read_text()
    (tmp_path / "router.py").write_text(source)
    code = (
        "import sys, router; assert not {'model', 'runtime', 'tokenizer'} & set(sys.modules); "
        "print(router.Router(8).weight.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1, 8" in done.stdout, done.stderr
