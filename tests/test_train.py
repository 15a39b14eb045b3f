"""Tuning: the frozen base stays frozen, batches and ranks do not matter, runs go on bit for bit.  Run: python -m pytest tests/test_train.py"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import router
import runtime
import train
from data.records import Form, encode
from model import ModelConfig, load_model
from recipe import calibrate, controls, fit, measure, orders, passes, trunk
from recipe.cost import prefill_flops
from recipe.passes import Workload
from router import capacity
from tiny import write_base
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = runtime.Runtime(0, 1, 0, torch.device("cpu"), torch.float32, True)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Llama of four layers with a byte tokenizer, and a data file; layers differ in how much they matter."""
    folder = write_base(tmp_path_factory.mktemp("base"))
    lines = []
    for i in range(44):
        ask, answer = ("add " if i % 2 else "say ") + "x" * (i % 7), "yes " * (1 + i % 3)
        lines.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}], "split": "heldout" if i % 5 == 0 else "train"})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(base, out, **changes):
    return train.TrainConfig(**{"model": str(base), "data": (str(base / "data.jsonl"),), "out": str(out), "layers": "1-3", "granularity": "attn_sequence",
                                "batch_size": 8, "micro_batch": 4, "steps": 6, "select_samples": 12, "cost_samples": 8, "clip": math.inf, "dtype": "float32", **changes})


def tuner(base, **changes):
    """A run before its first step."""
    cfg = settings(base, "unused", **{"trunk_gb": 0, **changes})  # nothing is written
    model = load_model(cfg.model)
    data = train.load_data(cfg, load_tokenizer(cfg.model), model.config.max_seq_len)
    return train.begin(cfg, CPU, model, data, train.plan(cfg, data))


def workload(made, trunk=None):
    """The selection set of a run."""
    return Workload(made.model, made.data.select, CPU, trunk)


def gradients(made) -> torch.Tensor:
    """Gradient of the step just done: AdamW's first moment holds a tenth of it."""
    return torch.cat([made.optimizer.state[w]["exp_avg"] for w in made.weights]) * 10


def file_tensors(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# ------------------------------------------------------------------------------------------------------------ pure functions


def test_global_batches_are_a_function_of_seed_and_step():
    stream = [i for step in range(6) for i in train.global_batch(10, 4, 7, step)]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert train.global_batch(10, 4, 7, 3) == stream[12:16] and train.global_batch(10, 4, 8, 3) != stream[12:16]
    assert len(train.global_batch(3, 8, 7, 0)) == 8  # a batch may be larger than the data


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.lr_at(step, 100, 1.0, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[3] == 1.0
    assert all(a >= b for a, b in zip(rates[3:], rates[4:])) and rates[-1] < 1e-3 and train.lr_at(0, 1, 1.0, 0.03) == 1.0


@pytest.mark.parametrize("budget, count", [(0.5, 3), (0.34, 2), (0.0, 0), (1.0, 6)])
def test_quantile_cut_opens_the_asked_share(budget, count):
    z = torch.tensor([[3.0, -1.0, 0.5], [2.0, 9.0, -4.0]])
    assert (z >= router.quantile_cut(z, budget)).sum() == count


def test_losses_in_blocks_equal_losses_at_once(base, monkeypatch):
    model = load_model(base)
    torch.manual_seed(0)
    h, other, labels = torch.randn(7, 32), torch.randn(7, 32), torch.randint(0, 258, (7,))
    for teacher in (None, other):
        monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 3 * 258)
        loss, gradient = passes.head_gradient(model, h, labels, teacher, scale=0.5)
        leaf = h.clone().requires_grad_()
        whole = (torch.nn.functional.cross_entropy(model.head(leaf), labels, reduction="sum") if teacher is None else
                 (model.head(teacher).softmax(-1) * (model.head(teacher).log_softmax(-1) - model.head(leaf).log_softmax(-1))).sum())
        (whole * 0.5).backward()
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close(gradient, leaf.grad)
        torch.testing.assert_close(passes.head_losses(model, h, labels, teacher).sum(), loss)


def test_ridge_fits_and_shrinks():
    torch.manual_seed(0)
    x, w = torch.randn(50, 8), torch.randn(8)
    torch.testing.assert_close(fit.ridge(x, x @ w, 1e-9), w, rtol=1e-4, atol=1e-4)
    assert fit.ridge(x, x @ w, 10.0).norm() < w.norm()
    wide = torch.randn(50, 20) + 3.0  # a strong mean: constants are met, to within the spread along it
    constant = wide @ fit.ridge(wide, torch.full((50,), 2.0), 1.0)
    assert constant.mean().item() == pytest.approx(2.0, rel=0.02) and constant.std() < 0.2
    target = wide[:, 0] * 5.0
    assert (wide @ fit.ridge(wide, target, 10.0)).mean().item() == pytest.approx(target.mean().item(), rel=0.02)  # shrunk to the mean, not to zero


def test_a_ridge_step_is_ridge_regression_scaled_to_the_rate():
    """Woodbury's form equals the explicit inverse, and the sample's logits move by exactly the learning rate (root mean square)."""
    torch.manual_seed(0)
    inputs, weights = torch.randn(3, 7, 12), [torch.nn.Parameter(torch.randn(1, 12)) for _ in range(3)]
    before = torch.cat([w.detach().clone() for w in weights])
    gradient = torch.randn(3, 12)
    for w, g in zip(weights, gradient):
        w.grad = g[None].clone()
    rise = fit.RidgeDescent(weights, inputs, lr=0.3, counts=torch.ones(3)).step()
    moved = torch.cat([w.detach() for w in weights]) - before
    covariance = inputs.transpose(1, 2) @ inputs / 7
    ridge = fit.STEP_RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
    wanted = -torch.linalg.solve(covariance + ridge[:, None, None] * torch.eye(12), gradient[..., None])[..., 0] / 7
    logits = torch.einsum("rnd,rd->rn", inputs, moved)
    assert logits.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-4)
    assert logits.mean().item() == pytest.approx(rise, abs=1e-5)
    torch.testing.assert_close(moved / moved.norm(), wanted / wanted.norm(), atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------- data


def test_collated_positions_predict_their_labels(base):
    tok = load_tokenizer(base)
    examples = [encode({"prompt": "q" * n, "response": "ab"}, "here", Form(tok, 128)) for n in (1, 9)]
    batch = passes.collate(examples, CPU.device, multiple=16)
    assert batch.tokens.shape[1] % 16 == 0 and batch.lengths == [len(e.tokens) for e in examples]
    assert torch.equal(batch.tokens.flatten()[batch.at + 1], batch.labels) and len(batch.labels) == sum(len(e.targets) for e in examples)


# ----------------------------------------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("granularity", router.GRANULARITIES)
def test_paper_recipe_begins_dense(base, granularity):
    """Zero routers and a threshold of 0.5 execute everything: the first step's model is the base model, bit for bit."""
    made = tuner(base, recipe="paper", granularity=granularity)
    batch = passes.collate(made.data.train[:4], CPU.device)
    h, gates, _ = passes.states(made.model, batch, route="mask")
    dense, _, _ = passes.states(made.model, batch, route="off")
    assert capacity(gates, torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]) == 1.0
    assert torch.equal(h, dense) if granularity != "block_sequence" and granularity != "block_token" else torch.allclose(h, dense, atol=1e-5)


@pytest.mark.parametrize("granularity, recipe", [("attn_sequence", "paper"), ("attn_sequence", "default"), ("mlp_token", "default"), ("block_sequence", "paper")])
def test_only_routers_change(base, granularity, recipe):
    made = tuner(base, recipe=recipe, granularity=granularity)
    frozen = {name: p.clone() for name, p in made.model.named_parameters() if "router" not in name}
    before = made.stacked()
    train.step(made)
    assert not torch.equal(before, made.stacked())
    for name, p in made.model.named_parameters():
        assert "router" in name or (torch.equal(p, frozen[name]) and p.grad is None and not p.requires_grad)


def test_no_graph_below_the_lowest_router(base):
    made = tuner(base, layers="2,3", recipe="paper")
    grads = {}
    for layer, block in enumerate(made.model.layers):
        block.register_forward_hook(lambda _, args, out, layer=layer: grads.setdefault(layer, []).append(out[0].requires_grad))
    train.step(made)
    assert not any(grads[0] + grads[1]) and any(grads[2]) and any(grads[3])


@pytest.mark.parametrize("changes", [
    {"recipe": "paper", "budget": 0.3, "lambda_": 0.5},
    {"recipe": "default", "granularity": "attn_token", "kv": "routed"},
    {"recipe": "default", "granularity": "mlp_sequence"},
    {"recipe": "default", "granularity": "both_sequence"},
    {"recipe": "paper", "granularity": "both_sequence", "budget": 0.3, "lambda_": 0.5},
])
def test_accumulation_does_not_change_the_gradient(base, changes):
    made = [tuner(base, micro_batch=n, **changes) for n in (8, 3, 1)]
    rows = [train.step(m) for m in made]
    for m, row in zip(made[1:], rows[1:]):
        torch.testing.assert_close(gradients(m), gradients(made[0]), rtol=2e-4, atol=1e-6)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["capacity"] == pytest.approx(rows[0]["capacity"], abs=1e-6)
        assert m.state.cut == pytest.approx(made[0].state.cut, abs=1e-6)


@pytest.mark.parametrize("granularity", ["attn_sequence", "both_sequence"])
def test_penalty_is_one_number_over_layers_and_the_global_batch(base, granularity):
    """A penalty per micro-batch or per layer would push although the capacity of the whole batch is within the budget. MLPs count by their compute."""

    def first_gradient(budget, lambda_):
        made = tuner(base, recipe="paper", budget=budget, lambda_=lambda_, micro_batch=1, granularity=granularity)
        torch.manual_seed(6)
        for w in made.weights:  # routes that differ by layer and sequence
            w.data.normal_(std=2.0)
        weights = made.stacked()
        row = train.step(made)
        return gradients(made), row["capacity"], made, weights

    without, kept, _, _ = first_gradient(0.5, 0.0)
    assert 0.2 < kept < 0.8
    within, _, _, _ = first_gradient(kept + 0.01, 3.0)
    over, _, made, weights = first_gradient(kept - 0.01, 3.0)
    torch.testing.assert_close(within, without)
    made.put(weights)  # reference: autograd of lambda * capacity over the whole batch at once
    whole = sorted((made.data.train[i] for i in train.global_batch(len(made.data.train), 8, made.cfg.seed, 0)), key=lambda e: -len(e.tokens))
    gates = passes.states(made.model, passes.collate(whole, CPU.device), route="mask")[1]
    expected = torch.cat(torch.autograd.grad(3.0 * capacity(gates, weights=made.model.place_weights()), made.weights))
    torch.testing.assert_close(over - without, expected, rtol=1e-3, atol=1e-6)


def test_fisher_cost_is_the_second_order_kl(base, monkeypatch):
    """KL between the model with a gate at 1 and at 1 - e is e^2 times the cost, up to sampling and third order."""
    monkeypatch.setattr(measure, "LABEL_SAMPLES", 600)
    made = tuner(base, recipe="paper", layers="0-3")
    examples = made.data.train[:2]
    measured = measure.measure_costs(Workload(made.model, examples, CPU), 3)
    costs, inputs = measured.costs, measured.inputs
    assert costs.shape == (4, 2) and inputs.shape == (4, 2, 32)
    batch, e = passes.collate(passes.by_length(examples, 4)[0], CPU.device), 0.05
    dense = passes.states(made.model, batch, route="off")[0]
    row = torch.tensor([i // batch.tokens.shape[1] for i in batch.at.tolist()])
    for layer in range(4):
        gates = torch.ones(4, 2)
        gates[layer] -= e
        h = passes.states(made.model, batch, route="mask", gates=gates)[0]
        kl = passes.token_losses(made.model.head(h), batch.labels, made.model.head(dense)).detach()
        by_row = torch.zeros(2).index_add(0, row, kl) / e**2
        torch.testing.assert_close(costs[layer], by_row, rtol=0.25, atol=1e-4)


def test_typical_cost_follows_all_units_not_the_dearest():
    costs = torch.rand(4, 100, generator=torch.Generator().manual_seed(0)) + torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    costs[:, :10] = 0.0  # what few labels make of a small cost
    assert torch.allclose(measure.typical_costs(7 * costs), 7 * measure.typical_costs(costs))
    costs[0, 50] = 500.0
    assert costs.mean(dim=1).argmin() != 0
    assert measure.typical_costs(costs).argsort().tolist() == [0, 1, 2, 3]


def test_drawn_labels_follow_the_model(base):
    model = load_model(base)
    h = torch.randn(1, 32) * 3
    labels = measure.draw_labels(model, h.expand(20000, 32), torch.rand(20000))
    share = torch.bincount(labels, minlength=258) / 20000
    assert (share - model.head(h)[0].softmax(-1)).abs().max() < 0.015


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "both_sequence"])
def test_tuning_starts_at_the_budget_and_no_worse_than_the_static_orders(base, granularity):
    made = tuner(base, granularity=granularity, layers="0-3", budget=0.5)
    z, weights = passes.route_logits(workload(made)), made.model.place_weights()
    assert (capacity((z >= made.state.cut).float(), weights=weights) - 0.5).abs() < 0.02
    beside = controls.Controls(workload(made))
    static = [beside.static(order, 0.5) for order in made.state.orders.values()]
    # first tokens always execute, so a token router at the same capacity closes a few units of the next layer instead
    assert made.state.best_loss <= min(static) + (1e-3 if granularity == "attn_sequence" else 0.01)
    assert set(made.state.orders) == {"greedy", "fisher", "similarity"} and all(sorted(order) == list(range(len(weights))) for order in made.state.orders.values())


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "both_sequence"])
@pytest.mark.parametrize("distill", [False, True])
def test_benefit_is_the_loss_without_a_layer_minus_the_loss_with_it(base, granularity, distill):
    """Against whole forward passes of one example at a time, at a working point where everyone skips one layer."""
    made, closed = tuner(base, granularity=granularity, layers="1-3", steps=0), (1,)
    examples, n_places = made.data.train[:5], 6 if granularity == "both_sequence" else 3
    benefits, inputs = measure.measure_benefits(Workload(made.model, examples, CPU, made.work.trunk), closed, distill)
    assert benefits.shape == (n_places, 5) and inputs.shape == (n_places, 5, 32) and (benefits.abs() > 1e-4).all()
    for n, example in enumerate(e for group in passes.by_length(examples, passes.EVAL_BATCH) for e in group):
        batch, losses = passes.collate([example], CPU.device), {}
        teacher = {0: passes.states(made.model, batch, route="off")[0]} if distill else None
        for place in range(n_places):
            for opened in (True, False):
                dropped = tuple(sorted({*closed, place} if not opened else {*closed} - {place}))
                losses[opened] = passes.evaluate(Workload(made.model, [example], CPU), passes.skip_everywhere(dropped), teacher)["loss"]
            assert benefits[place, n].item() == pytest.approx((losses[False] - losses[True]) * len(example.targets) ** 0.5, rel=1e-3, abs=1e-5)


def test_benefit_prior_runs_a_layer_where_it_is_worth_most():
    """Two kinds of inputs, opposite benefits: at half the budget each kind runs its own layer; a layer that nobody needs stays closed first."""
    torch.manual_seed(0)
    kind = torch.tensor([0, 1] * 20)
    inputs = torch.randn(3, 40, 16) * 0.1 + torch.randn(3, 1, 16) + torch.randn(2, 16)[kind] * 0.5
    benefits = torch.stack([(kind == 0) * 2.0, (kind == 1) * 2.0, torch.full((40,), -1.0)]) + 0.1 * torch.randn(3, 40)
    z = torch.einsum("rnd,rd->rn", inputs, fit.benefit_prior(benefits, inputs, torch.ones(3) / 3))
    opened = z >= router.quantile_cut(z, 1 / 3)
    assert torch.equal(opened, torch.stack([kind == 0, kind == 1, kind > 1]))


def test_order_prior_is_the_static_order():
    torch.manual_seed(0)
    inputs = torch.randn(4, 30, 16) * 0.1 + torch.randn(4, 1, 16)  # a strong mean, as normalised inputs have
    order = [2, 0, 3, 1]
    weights = fit.order_prior(order, inputs)
    z = torch.einsum("rnd,rd->rn", inputs, weights)
    for closed in range(1, 4):
        opened = z >= router.quantile_cut(z, 1 - closed / 4)
        assert set(order[:closed]) == {place for place in range(4) if not opened[place].any()} and opened[order[closed:]].all()


def test_greedy_order_drops_what_costs_least_each_time(base):
    made = tuner(base, layers="0-3", recipe="paper")
    for guess in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]):  # six tries see all four layers in the first round, so the guess does not matter there
        order = orders.greedy_order(Workload(made.model, made.data.train, CPU), torch.tensor(guess), 0.5)
        loss = [passes.evaluate(Workload(made.model, made.data.train, CPU), passes.skip_everywhere((place,)))["loss"] for place in range(4)]
        assert order[0] == min(range(4), key=lambda place: loss[place]) and sorted(order) == [0, 1, 2, 3]
    everything = orders.greedy_order(Workload(made.model, made.data.train, CPU), torch.tensor(guess), 1.0)
    pairs = {place: passes.evaluate(Workload(made.model, made.data.train, CPU), passes.skip_everywhere((order[0], place)))["loss"] for place in range(4) if place != order[0]}
    assert everything[:2] == order[:2] and pairs[order[1]] <= min(pairs.values()) + 0.02


def test_similarity_order_follows_the_angle_that_a_layer_turns(base):
    made = tuner(base, layers="0-3", recipe="paper")
    made.model.layers[2].attention.wo.weight.data *= 1e-4  # changes nothing any more
    assert measure.measure_costs(Workload(made.model, made.data.train, CPU), 0).turned.argsort()[0] == 2
    made.model.layers[2].attention.wo.weight.data *= 1e4


def test_trunk_cache_stays_away_from_a_full_disk(base, tmp_path, monkeypatch):
    made = tuner(base, layers="2-3", recipe="paper")
    monkeypatch.setattr(trunk.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 1000})())
    cache = trunk.TrunkCache(tmp_path / "trunk.bin", made.model, made.data.train, 1e9)
    batch = passes.collate(made.data.train[:3], torch.device("cpu"))
    assert not cache.slots and not (tmp_path / "trunk.bin").exists()
    torch.testing.assert_close(cache(made.model, made.data.train[:3], batch.tokens), made.model.trunk(batch.tokens))


@pytest.mark.parametrize("limit, stored", [(1e9, True), (9000, True), (0, False)])
def test_trunk_cache_reads_what_was_computed(base, tmp_path, limit, stored):
    made = tuner(base, layers="2-3", recipe="paper", trunk_gb=0)
    cache = trunk.TrunkCache(tmp_path / "trunk.bin", made.model, made.data.train, limit)
    group = made.data.train[:5]
    batch = passes.collate(group, torch.device("cpu"))
    fresh = made.model.trunk(batch.tokens)
    torch.testing.assert_close(cache(made.model, group, batch.tokens), fresh)
    again = trunk.TrunkCache(tmp_path / "trunk.bin", made.model, made.data.train, limit)  # another run in the same folder
    mixed = passes.collate(made.data.train[3:9], torch.device("cpu"))  # some stored, some not
    torch.testing.assert_close(again(made.model, made.data.train[3:9], mixed.tokens), made.model.trunk(mixed.tokens))
    read = again(made.model, group, batch.tokens)
    for row, length in enumerate(batch.lengths):  # pads may differ: nothing reads them
        torch.testing.assert_close(read[row, :length], fresh[row, :length])
    size = (tmp_path / "trunk.bin").stat().st_size if (tmp_path / "trunk.bin").exists() else 0
    assert size <= limit and bool(again.slots) == stored
    if stored:
        made.model.fingerprint = "another base"
        assert not trunk.TrunkCache(tmp_path / "trunk.bin", made.model, made.data.train, limit).sums.any()


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token", "both_sequence"])
def test_one_table_serves_every_budget(base, granularity):
    made = tuner(base, granularity=granularity, layers="0-3")
    torch.manual_seed(1)
    for w in made.weights:  # routers that really tell inputs apart
        w.data.normal_(std=1.0)
    table = calibrate.calibrate(workload(made), 0.5)
    assert table["budgets"] == sorted(table["budgets"]) and len(table["budgets"]) == len(calibrate.BUDGETS)
    n = passes.route_logits(workload(made)).shape[1] * 4
    for budget in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        router.set_cuts(made.model, router.cuts_for(budget, table))
        kept = passes.evaluate(workload(made))["capacity"]
        if "token" in granularity:  # first tokens execute under every budget; equal bytes have equal logits, so shares come in steps
            assert kept == pytest.approx(max(budget, len(made.data.select) * 4 / n), abs=0.05)
        else:
            assert kept == pytest.approx(budget, abs=0.02 + 1.5 / n)


def test_calibration_falls_back_on_the_best_static_order(base):
    """Routers that run the wrong layers: the table then holds the cuts of the order that loses least, and realises the budget all the same."""
    made = tuner(base, granularity="attn_sequence", layers="0-3")
    beside = controls.Controls(workload(made))
    order = min(made.state.orders.values(), key=lambda order: beside.static(order, 0.5))
    made.put(fit.order_prior(order[::-1], made.inputs))
    table = calibrate.calibrate(workload(made), 0.5, beside, {"worst": order[::-1], "best": order})
    assert table["static"][0.5] == "best"
    router.set_cuts(made.model, router.cuts_for(0.5, table))
    static = passes.evaluate(workload(made), passes.skip_everywhere(tuple(order[:2])))
    found = passes.evaluate(workload(made))
    assert found["loss"] == pytest.approx(static["loss"]) and found["capacity_per_layer"] == static["capacity_per_layer"]
    assert not calibrate.calibrate(workload(made), 0.5)["static"]


def test_static_cuts_close_in_order_and_split_a_layer():
    z, third = torch.arange(12.0).view(3, 4), torch.ones(3) / 3
    opened = z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 0.5, third))[:, None]
    assert opened.tolist() == [[False, False, True, True], [True] * 4, [False] * 4]
    assert not (z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 0.0, third))[:, None]).any() and (z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 1.0, third))[:, None]).all()


def loss_by_route(made, route: str) -> float:
    """Mean loss of the selection set in one batch."""
    batch = passes.collate(made.data.select, CPU.device)
    return passes.head_losses(made.model, passes.states(made.model, batch, route=route)[0], batch.labels).mean().item()


def test_evaluation_does_not_depend_on_the_route_mode(base):
    made = tuner(base, layers="0-3")
    assert passes.evaluate(workload(made))["loss"] == pytest.approx(loss_by_route(made, "mask"), abs=1e-5)
    skipped = passes.evaluate(workload(made), passes.skip_everywhere((0, 2)))
    assert skipped["capacity_per_layer"] == [0.0, 1.0, 0.0, 1.0] and skipped["capacity"] == 0.5
    dense = passes.evaluate(workload(made), passes.skip_everywhere(()))["loss"]
    assert dense == pytest.approx(loss_by_route(made, "off"), abs=1e-5)


def test_static_control_interpolates_between_whole_layers(base):
    made = tuner(base, layers="0-3")
    losses = [passes.evaluate(workload(made), passes.skip_everywhere(closed))["loss"] for closed in ((2,), (2, 0))]
    beside = controls.Controls(workload(made))
    assert beside.static([2, 0, 1, 3], 0.25) == pytest.approx(losses[0])
    assert beside.static([2, 0, 1, 3], 0.35) == pytest.approx(0.6 * losses[0] + 0.4 * losses[1])


@pytest.mark.parametrize("granularity, kv", [("attn_sequence", "routed"), ("attn_token", "all"), ("mlp_token", "routed"), ("block_sequence", "routed")])
def test_share_saved_counts_flops(base, granularity, kv):
    """Two layers off for everyone save two layers; half of all tokens of every layer save less than half of them where keys and values stay."""
    made = tuner(base, layers="0-3", granularity=granularity, kv=kv, recipe="paper")
    beside = controls.Controls(workload(made))
    saved, ceiling = beside.share_saved([0.0, 1.0, 0.0, 1.0])
    assert ceiling > 1 and (saved < 0.5 if kv == "all" else saved == pytest.approx(0.5))
    assert beside.share_saved([1.0] * 4) == (0.0, 1.0)


def test_a_dropped_layer_leaves_nothing_whatever_the_unit(base):
    losses = []
    for granularity, kv in (("attn_sequence", "routed"), ("attn_token", "all"), ("attn_token", "routed")):
        made = tuner(base, layers="0-3", granularity=granularity, kv=kv, recipe="paper")
        routing = made.model.routing
        losses.append(passes.evaluate(workload(made), passes.skip_everywhere((1, 3)))["loss"])
        assert made.model.routing is routing and made.model.layers[1].routing is routing
    assert losses[0] == losses[1] == losses[2]


def test_step_flops_count_passes():
    """One routed layer of two: the lower layer runs once, the upper one forward, backward and as teacher; the head where loss is taken."""
    config = ModelConfig(family="llama", dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=16, vocab_size=10, max_seq_len=64, norm_eps=1e-5,
                         rope_theta=1e4)
    layer = (prefill_flops(config, 3, logits=0) + prefill_flops(config, 5, logits=0)) / 2
    assert train.step_flops(config, 1, [3, 5], 4, distill=True) == layer * (1 + 3) + 3 * 4 * 2 * 8 * 10
    assert train.step_flops(config, 0, [3, 5], 4, distill=False) == layer * (2 + 2) + 2 * 4 * 2 * 8 * 10


# --------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("granularity", ["attn_sequence", "both_sequence"])
def test_run_writes_what_it_promises(base, tmp_path, granularity):
    cfg = settings(base, tmp_path / "run", layers="auto:3", granularity=granularity)
    summary = train.train(cfg)
    promised = {"heldout_loss_dense", "heldout_loss_routed", "capacity", "budget", "capacity_per_layer", "granularity", "layers", "tokens_per_second",
                "peak_memory_bytes", "seconds", "prefill_speedup", "prefill_ceiling"}
    assert promised <= set(summary) and summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["layers"]) == 3 == len(summary["capacity_per_layer"]) and all(math.isfinite(summary[k]) for k in promised if k.startswith(("held", "prefill")))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert list(log[0]) == ["step", "loss", "capacity", "lr", "grad_norm", "budget", "cut", "select_loss", "milliseconds", "tokens_per_second", "mfu"]
    assert "held-out loss" in train.show(summary)
    model = load_model(base, routers=tmp_path / "run/routers.safetensors")  # what was written is what was measured
    held = train.load_data(cfg, load_tokenizer(base), 128).held
    again = passes.evaluate(Workload(model, held, CPU))
    assert again["loss"] == pytest.approx(summary["heldout_loss_routed"], abs=1e-6) and again["capacity"] == summary["capacity"]
    assert load_model(base, routers=tmp_path / "run/routers.safetensors", budget=0.9).routers()[0].cut < model.routers()[0].cut
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.safetensors", "log.jsonl", "routers.safetensors", "summary.json"]


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_compiled_steps_end_as_eager_ones(base, tmp_path, recipe, monkeypatch):
    """The whole run with blocks compiled for its steps: what stands before and after them looks into the blocks, and must not meet compiled ones."""
    ends, plain = {}, torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain(self, backend="eager", **options))  # traced, not built: no C++ needed
    for compiled in (False, True):
        torch.compiler.reset()
        ends[compiled] = train.train(settings(base, tmp_path / str(compiled), recipe=recipe, steps=3, compile=compiled))
    for name in ("heldout_loss_dense", "heldout_loss_routed", "heldout_loss_static", "capacity"):
        assert ends[True][name] == pytest.approx(ends[False][name], rel=1e-4)


def test_finished_run_is_recognised_and_another_refused(base, tmp_path, capsys):
    cfg = settings(base, tmp_path, steps=1)
    first = train.train(cfg)
    written = (tmp_path / "routers.safetensors").read_bytes()
    assert train.train(cfg) == first and "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"lr \(0.01 there, 0.5 now\), seed \(1337 there, 3 now\).*--overwrite"):
        train.train(settings(base, tmp_path, steps=1, lr=0.5, seed=3))
    (tmp_path / "summary.json").unlink()  # an unfinished one is refused by its checkpoint
    with pytest.raises(ValueError, match=r"budget \(0.5 there, 0.4 now\)"):
        train.train(settings(base, tmp_path, steps=1, budget=0.4))
    assert (tmp_path / "routers.safetensors").read_bytes() == written
    assert train.train(settings(base, tmp_path, steps=1, budget=0.4, overwrite=True))["budget"] == 0.4


def test_damaged_checkpoint_is_named(base, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint.safetensors cannot be read.*--overwrite"):
        train.train(settings(base, tmp_path))


def test_official_router_file_becomes_ours(base, tmp_path):
    torch.manual_seed(2)
    weights = {f"model.layers.{i}.router.weight": torch.randn(1, 32) for i in (1, 3)}
    save_file(weights, tmp_path / "official.safetensors")
    summary = train.train(settings(base, tmp_path / "out", import_official=str(tmp_path / "official.safetensors"), recipe="paper"))
    assert summary["layers"] == [1, 3] and summary["steps"] == 0
    for name, tensor in file_tensors(tmp_path / "out/routers.safetensors").items():
        assert torch.equal(tensor, weights[name])
    assert load_model(base, routers=tmp_path / "out/routers.safetensors").routers()[0].cut == 0.0


def test_a_finished_file_is_calibrated_on_other_data(base, tmp_path):
    """Weights, granularity and orders stay, cuts follow the new examples; the settings of the command line have no say in what the file decides."""
    train.train(settings(base, tmp_path / "a", granularity="mlp_sequence", layers="0,2,3"))
    lines = [{"messages": [{"role": "user", "content": "sum " * (1 + i % 5)}, {"role": "assistant", "content": "no " * (1 + i % 4)}]} for i in range(40)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = tmp_path / "a/routers.safetensors"
    summary = train.train(settings(base, tmp_path / "b", recalibrate=str(old), data=(str(tmp_path / "other.jsonl"),), select_samples=30))
    new = tmp_path / "b/routers.safetensors"
    assert (summary["granularity"], summary["layers"], summary["steps"]) == ("mlp_sequence", [0, 2, 3], 0)
    assert all(torch.equal(tensor, file_tensors(new)[name]) for name, tensor in file_tensors(old).items())
    before, after = router.read_router_file(old)[1], router.read_router_file(new)[1]
    assert before.orders == after.orders and before.calibration != after.calibration
    with pytest.raises(ValueError, match="import_official and --recalibrate"):
        settings(base, tmp_path / "c", recalibrate=str(old), import_official=str(old))


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_running_quantile_holds_the_budget(base, granularity):
    """Every gate that opens lowers the loss, so all logits rise while tuning; the cut rises with them."""
    made = tuner(base, layers="0-3", granularity=granularity, steps=30, lr=0.05, batch_size=16)
    kept = [train.step(made)["capacity"] for _ in range(30)]
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.05) and made.state.cut > 0.0


def run_cli(arguments, *, ranks=None, prelude=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if ranks:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                   str(ROOT / "train.py")]
    elif prelude:
        command = [sys.executable, "-c", f"{prelude}\nimport runtime, train\nruntime.run_main(train.main)"]
    else:
        command = [sys.executable, str(ROOT / "train.py")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, timeout=300)


def flags(base, out, **changes):
    cfg = {"model": base, "data": base / "data.jsonl", "out": out, "dtype": "float32", "layers": "1-3", "batch_size": 8, "micro_batch": 2, "steps": 8, "select_samples": 12,
           "cost_samples": 8, "save_every": 3, "lr": 0.1, **changes}
    return [f"--{name}={value}" for name, value in cfg.items()]


KILLS = {
    "in step 5": "import os, train\nstep = train.step\ntrain.step = lambda run: os.kill(os.getpid(), 9) if run.state.step == 4 else step(run)",
    "while writing the second checkpoint": "import os, runtime\nrename, count = os.replace, []\n"
        "def replace(a, b):\n    count.append(b)\n    os.kill(os.getpid(), 9) if sum('checkpoint' in str(p) for p in count) == 2 else rename(a, b)\nos.replace = replace",
    "before the summary": "import os, runtime\nruntime.write_json = lambda *a: os.kill(os.getpid(), 9)",
}


def test_killed_and_continued_equals_uninterrupted(base, tmp_path):
    """SIGKILL in a step, in the middle of a checkpoint and before the summary: the same command ends in the same bytes."""
    train.train(runtime.cli(train.TrainConfig, flags(base, tmp_path / "whole")))
    for prelude in KILLS.values():
        killed = run_cli(flags(base, tmp_path / "killed"), prelude=prelude)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    continued = run_cli(flags(base, tmp_path / "killed"))
    assert continued.returncode == 0 and "going on from step" in continued.stdout, continued.stderr
    assert (tmp_path / "whole/routers.safetensors").read_bytes() == (tmp_path / "killed/routers.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == ["checkpoint.safetensors", "log.jsonl", "routers.safetensors", "summary.json", "trunk"]
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "killed")]
    timeless = [[{k: v for k, v in row.items() if k not in ("milliseconds", "tokens_per_second")} for row in log] for log in logs]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 8


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_two_ranks_equal_one(base, tmp_path, recipe):
    changes = {"recipe": recipe, "budget": 0.4, "granularity": "attn_token" if recipe == "default" else "attn_sequence", "lr": 0.02}
    train.train(runtime.cli(train.TrainConfig, flags(base, tmp_path / "one", **changes)))
    two = run_cli(flags(base, tmp_path / "two", **changes), ranks=2)
    assert two.returncode == 0, two.stderr
    a, b = (file_tensors(tmp_path / run / "routers.safetensors") for run in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and two.stdout.count("iter 1/8") == 1


# ------------------------------------------------------------------------------------------------------------------- errors


def good_line() -> str:
    return json.dumps({"prompt": "q", "response": "a"}) + "\n"


@pytest.mark.parametrize("changes, part", [
    ({"budget": 1.5}, "budget is 1.5, expected a share between 0 and 1"),
    ({"budget": 0.0}, "budget is 0.0"),
    ({"layers": "9"}, "this model has layers 0 to 3"),
    ({"layers": "deep:9"}, "deep:9"),
    ({"layers": "some"}, "'some'"),
    ({"granularity": "attention"}, "granularity is 'attention'"),
    ({"granularity": "mlp_token", "kv": "all"}, "kv is 'all'"),
    ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
    ({"lambda_": -1.0}, "lambda is -1.0, expected 0 or more: change --lambda"),
    ({"heldout": 1.0}, "heldout is 1.0"),
    ({"max_length": 1000}, "max_length is 1,000, expected at most the model's context of 128"),
    ({"max_length": 12}, "data.jsonl, line .*tokens, expected at most 12"),
    ({"model": "nowhere"}, "nowhere"),
    ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl was not found"),
    ({"heldout": "nowhere.jsonl", "max_samples": 4}, "nowhere.jsonl was not found"),
    ({"max_samples": 1}, "max_samples is 1"),
    ({"import_official": "nowhere.safetensors"}, "nowhere.safetensors"),
])
def test_wrong_settings_are_told_and_nothing_is_written(base, tmp_path, changes, part):
    with pytest.raises((ValueError, FileNotFoundError), match=part):
        train.train(settings(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line, part", [
    ("{not json}\n", "line 2 is not JSON"),
    ('{"question": "q"}\n', r"line 2 has the keys \['question'\]; expected messages"),
    ('{"messages": "text"}\n', "line 2: messages is not a list of turns"),
    ('{"messages": [{"role": "tool", "content": "x"}]}\n', "line 2: no turn of the assistant"),
    ('{"messages": [{"role": "user", "content": null}]}\n', "line 2, turn 1 has role 'user' and content of type NoneType"),
    ('{"messages": [{"role": "user", "content": "x"}]}\n', "line 2: no turn of the assistant"),
    ('{"text": ""}\n', "line 2: no loss-carrying token"),
])
def test_bad_lines_are_named(base, tmp_path, line, part):
    (tmp_path / "data.jsonl").write_text(good_line() + line + good_line() * 9)
    with pytest.raises(ValueError, match=part):
        train.train(settings(base, tmp_path / "out", data=(str(tmp_path / "data.jsonl"),), heldout=0.2))
    assert not (tmp_path / "out").exists()


def test_user_errors_end_with_status_two_and_one_line(base, tmp_path):
    weights = (base / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((base / name).read_bytes())
    (broken / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    result = run_cli(flags(base, tmp_path / "out", model=broken))
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "model.safetensors" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ranks_must_share_a_batch_evenly(base, tmp_path):
    cfg, three = settings(base, tmp_path / "out", batch_size=8), runtime.Runtime(0, 3, 0, CPU.device, CPU.dtype, True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="batch_size is 8 on 3 ranks"):
        patch.setattr(runtime, "setup", lambda *a: three)
        train.train(cfg)
