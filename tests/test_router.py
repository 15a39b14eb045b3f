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
from router import (GRANULARITIES, Router, RouterConfig, capacity, check_fingerprint, closed_shares, deep_layers, freeze_all_but_routers,
                    load_router_weights, logit, parse_layers, pool, quantile_cut, read_router_file, save_routers, set_thresholds, ste_gate, thresholds_for)


class Toy(nn.Module):
    """Any module that contains routers: router.py must not care which."""

    def __init__(self, n: int = 2, dim: int = 6):
        super().__init__()
        self.router_of_experts = nn.Linear(dim, 4)  # a genuine parameter with "router" in its name: never trained, saved or zeroed
        self.parts = nn.ModuleList(Router(dim) for _ in range(n))


def saved(path: Path, layers=(3, 5), **changes) -> Toy:
    toy = Toy(len(layers))
    for part in toy.parts:
        part.weight.data.normal_()
    save_routers(path, toy, RouterConfig("attn_sequence", layers), fingerprint="abc", thresholds=[0.5] * len(layers), **changes)
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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_pooling_ignores_pads_whatever_they_hold(lengths, extra, dtype):
    """The official code averages over pads; here rows alone and rows in a batch pool alike, even over NaN and infinity in the pads."""
    torch.manual_seed(0)
    width = max(lengths) + extra
    x = torch.randn(len(lengths), width, 5).to(dtype)
    for row, length in enumerate(lengths):
        x[row, length:] = math.nan
    got = pool(x, torch.tensor(lengths))
    assert got.dtype == torch.float32
    for row, length in enumerate(lengths):
        torch.testing.assert_close(got[row], x[row, :length].float().mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got[row:row + 1], pool(x[row:row + 1, :length]), atol=1e-6, rtol=1e-6)


def test_new_router_executes_everything():
    assert torch.equal(ste_gate(Router(4)(torch.randn(3, 4)), Router(4).cut), torch.ones(3))


def test_only_routers_train_and_they_are_found_by_type():
    toy = Toy(3, 6)
    assert freeze_all_but_routers(toy) == (18, 28)
    assert [name for name, p in toy.named_parameters() if p.requires_grad] == [f"parts.{i}.weight" for i in range(3)]


def test_capacity_is_one_number_over_layers_and_units():
    gates = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert capacity(gates) == 0.5
    token_gates = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    real = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert float(capacity(token_gates, real)) == pytest.approx(3 / 6)


def test_layers_by_name():
    assert deep_layers(16, 32) == tuple(range(15, 31))
    assert parse_layers("deep:16", 32) == ("deep", 16) and parse_layers("auto:4", 8) == ("auto", 4)
    assert parse_layers("5,1,8-10", 32) == ("list", (1, 5, 8, 9, 10)) and parse_layers("all", 3) == ("list", (0, 1, 2))
    for bad in ("deep:33", "depp:4", "1,x", "40", "", "auto:0"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(bad, 32)
    with pytest.raises(ValueError, match="before its last one"):
        deep_layers(32, 32)


@pytest.mark.parametrize("settings_, message", [
    (dict(granularity="atn_token"), "expected one of"), (dict(granularity="attn_sequence", kv="all"), "attn_token"), (dict(pool="mean"), "pool"),
    (dict(layers=(3, 2)), "ascending"), (dict(layers=(-1, 2)), "ascending"), (dict(mlp_layers=(1,)), "both_sequence"),
    (dict(granularity="both_sequence", mlp_layers=(3, 2)), "ascending")])
def test_a_wrong_setting_is_refused_not_guessed(settings_, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**settings_)


def test_granularities_are_the_six_and_both_under_one_budget():
    assert GRANULARITIES == ("attn_sequence", "attn_token", "mlp_sequence", "mlp_token", "block_sequence", "block_token", "both_sequence")


def test_places_stand_in_the_order_in_which_they_are_asked():
    routing = RouterConfig("both_sequence", (1, 4), mlp_layers=(0, 1))
    assert routing.places == ((0, "mlp"), (1, "attn"), (1, "mlp"), (4, "attn")) and routing.names == ("0.mlp", "1.attn", "1.mlp", "4.attn")
    assert RouterConfig("both_sequence").at(list(reversed(routing.names))) == routing
    plain = RouterConfig("mlp_token", (2, 5))
    assert plain.places == ((2, "mlp"), (5, "mlp")) and plain.names == ("2", "5") and RouterConfig("mlp_token").at(["5", "2"]) == plain


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 99))
def test_a_weighted_cut_lets_the_share_through_to_half_a_logit(weights, budget, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    weights /= weights.sum()
    z = torch.randn(len(weights), 7, generator=torch.Generator().manual_seed(seed))
    through = capacity((z >= quantile_cut(z, budget, weights)).double(), weights=weights).item()
    assert abs(through - budget) <= weights.max().item() / 7 / 2 + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 1))
def test_closed_shares_close_what_is_asked_in_order(weights, closed):
    weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    order = list(reversed(range(len(weights))))
    shares = closed_shares(order, weights, closed)
    assert sum(w * s for w, s in zip(weights.tolist(), shares)) == pytest.approx(closed, abs=1e-5)
    in_order = [shares[place] for place in order]
    assert in_order == sorted(in_order, reverse=True) and sum(0 < share < 1 for share in shares) <= 1


@given(st.floats(0, 1))
def test_budget_moves_thresholds_monotonically(budget):
    table = {"budgets": [0.25, 0.5, 0.75], "thresholds": [[0.9, 0.99], [0.5, 0.7], [0.2, 0.01]]}
    here, more = thresholds_for(budget, table), thresholds_for(min(1.0, budget + 0.05), table)
    assert all(0 <= low <= high <= 1 for low, high in zip(more, here))
    if budget in (0.0, 1.0):
        assert here == [1 - budget] * 2
    if budget == 0.5:
        assert here == pytest.approx([0.5, 0.7])


def test_the_ends_of_the_budget_are_exact():
    toy = Toy(2)
    z = torch.tensor([-1e30, 0.0, 1e30])
    for budget, want in ((0.0, 0.0), (1.0, 1.0)):
        set_thresholds(toy, thresholds_for(budget, {"budgets": [0.5], "thresholds": [[0.5, 0.5]]}))
        assert all(ste_gate(z, part.cut).eq(want).all() for part in toy.parts)


@pytest.mark.parametrize("budget", [-0.1, 1.1, math.nan])
def test_budget_out_of_range(budget):
    with pytest.raises(ValueError, match="expected a share from 0"):
        thresholds_for(budget, {"budgets": [0.5], "thresholds": [[0.5]]})


def test_no_table_no_budget():
    with pytest.raises(ValueError, match="no calibration table"):
        thresholds_for(0.5, {})


@given(st.floats(1e-12, 1 - 1e-12))
def test_logit_inverts_the_sigmoid(score):
    assert 1 / (1 + math.exp(-logit(score))) == pytest.approx(score, rel=1e-9)


def test_file_round_trip_keeps_bits_and_metadata(tmp_path):
    toy = saved(tmp_path / "routers.safetensors", calibration={"budgets": [0.5], "thresholds": [[0.1, 0.2]]}, recipe="default", step=7, config={"lr": 0.1})
    weights, meta = read_router_file(tmp_path / "routers.safetensors")
    other = Toy(2)
    load_router_weights("f", other, weights, RouterConfig("attn_sequence", (3, 5)))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(toy.parts, other.parts))
    assert meta["base_fingerprint"] == "abc" and meta["step"] == 7 and meta["layers"] == [3, 5] and meta["config"] == {"lr": 0.1}
    assert set(load_file(tmp_path / "routers.safetensors")) == {"model.layers.3.router.weight", "model.layers.5.router.weight"}
    assert [path.name for path in tmp_path.iterdir()] == ["routers.safetensors"]


def test_two_routers_of_a_layer_have_tensors_of_their_own(tmp_path):
    routing, toy = RouterConfig("both_sequence", (3,), mlp_layers=(3,)), Toy(2)
    for i, part in enumerate(toy.parts):
        part.weight.data.fill_(i + 1)
    save_routers(tmp_path / "r", toy, routing, fingerprint="abc", thresholds=[0.5] * 2)
    assert set(load_file(tmp_path / "r")) == {"model.layers.3.router.weight", "model.layers.3.mlp_router.weight"}
    weights, meta = read_router_file(tmp_path / "r")
    assert RouterConfig(meta["granularity"], meta["layers"], mlp_layers=meta["mlp_layers"]) == routing
    other = Toy(2)
    load_router_weights("f", other, weights, routing)
    assert [part.weight.unique().tolist() for part in other.parts] == [[1.0], [2.0]]


def test_official_file_is_read_when_asked_for(tmp_path):
    """The official code writes the same names and shapes without metadata."""
    save_file({"model.layers.14.router.weight": torch.ones(1, 6, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    weights, meta = read_router_file(tmp_path / "model.safetensors", official=True)
    assert meta == {} and list(weights) == ["14"]
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
    save_file({"model.layers.3.mlp.weight": torch.ones(1, 6)}, path, metadata={"router_tuning": json.dumps({"format": router_module.FILE_FORMAT})})
    with pytest.raises(ValueError, match="expected only names like"):
        read_router_file(path)
    routing = RouterConfig("attn_sequence", (3, 5))
    for weights, message in (({"3": torch.ones(1, 6)}, "missing \\['5'\\]"), ({"3": torch.ones(1, 6), "5": torch.ones(1, 6), "9": torch.ones(1, 6)}, "extra \\['9'\\]"),
                             ({"3": torch.ones(1, 6), "5": torch.ones(1, 7)}, "shape \\(1, 7\\)"),
                             ({"3": torch.ones(1, 6), "5": torch.full((1, 6), math.nan)}, "NaN")):
        with pytest.raises(ValueError, match=message):
            load_router_weights(path, Toy(2), weights, routing)
    with pytest.raises(ValueError, match="tuned on a base with fingerprint abc"):
        check_fingerprint(path, "abc", "def")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "routers.safetensors"
    saved(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        saved(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["routers.safetensors"]


def test_router_py_stands_alone(tmp_path):
    """The file copied into an empty folder works by itself: nothing else of the project is imported."""
    source = Path(router_module.__file__).read_text()
    (tmp_path / "router.py").write_text(source)
    code = "import sys, router; assert not {'model', 'runtime', 'tokenizer'} & set(sys.modules); print(router.Router(8).weight.shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "1, 8" in done.stdout, done.stderr
