"""The recipe: costs, benefits, orders, fits, calibration and controls, by property.

Run: python -m pytest tests/test_recipe.py
"""

import pytest
import torch
from tuning import CPU, begun, selection

import router
import train
from data.records import Example, Form, encode
from model import ModelConfig, load_model
from recipe import calibrate, controls, fit, lists, measure, orders, passes, start, trunk
from recipe.base import load_base
from recipe.cost import pairs, prefill_flops, step_flops, trunk_flops
from recipe.passes import Workload
from tokenizer import load_tokenizer


@pytest.mark.parametrize("budget, count", [(0.5, 3), (0.34, 2), (0.0, 0), (1.0, 6)])
def test_quantile_cut_opens_the_asked_share(budget, count):
    z = torch.tensor([[3.0, -1.0, 0.5], [2.0, 9.0, -4.0]])
    assert (z >= passes.quantile_cut(z, budget)).sum() == count


def test_losses_in_blocks_equal_losses_at_once(base, monkeypatch):
    model = load_model(base)
    torch.manual_seed(0)
    h, other, labels = torch.randn(7, 32), torch.randn(7, 32), torch.randint(0, 258, (7,))
    for teacher in (None, other):
        monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 3 * 258)
        loss, gradient = passes.head_gradient(model, h, labels, teacher, scale=0.5)
        leaf = h.clone().requires_grad_()
        whole = (
            torch.nn.functional.cross_entropy(model.head(leaf), labels, reduction="sum")
            if teacher is None
            else (
                model.head(teacher).softmax(-1)
                * (model.head(teacher).log_softmax(-1) - model.head(leaf).log_softmax(-1))
            ).sum()
        )
        (whole * 0.5).backward()
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close(gradient, leaf.grad)
        torch.testing.assert_close(passes.head_losses(model, h, labels, teacher).sum(), loss)


def test_ridge_fits_and_shrinks():
    torch.manual_seed(0)
    x, w = torch.randn(50, 8), torch.randn(8)

    def ridge(x: torch.Tensor, target: torch.Tensor, strength: float) -> torch.Tensor:
        return fit.ridge(x, target[None], strength)[0]

    torch.testing.assert_close(ridge(x, x @ w, 1e-9), w, rtol=1e-4, atol=1e-4)
    assert ridge(x, x @ w, 10.0).norm() < w.norm()
    wide = torch.randn(50, 20) + 3.0  # a strong mean: constants are met, to within the spread along it
    constant = wide @ ridge(wide, torch.full((50,), 2.0), 1.0)
    assert constant.mean().item() == pytest.approx(2.0, rel=0.02) and constant.std() < 0.2
    target = wide[:, 0] * 5.0
    assert (wide @ ridge(wide, target, 10.0)).mean().item() == pytest.approx(
        target.mean().item(), rel=0.02
    )  # shrunk to the mean, not to zero
    mean = torch.nn.functional.normalize(wide.mean(0), dim=0)
    variance, targets = (wide - wide.mean(0)).square().sum(1).mean(), torch.stack([target, wide[:, 1]])
    cheap = torch.linalg.inv(torch.eye(20) + 100 * mean[:, None] * mean)  # along the mean a weight costs a hundredth
    for strength in (0.5, 8.0):  # the normal equations
        found = fit.ridge(wide, targets, strength)
        wanted = torch.linalg.solve(wide.T @ wide + strength * variance * cheap, wide.T @ targets.T).T
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kinds", [3, 1])
def test_a_ridge_step_is_ridge_regression_scaled_to_the_rate(kinds):
    """Woodbury's form equals the explicit inverse, and the sample's logits move by exactly the learning rate (root mean
    square), where each router has inputs of its own and where all share them.
    """
    torch.manual_seed(0)
    inputs, weights = torch.randn(kinds, 7, 12), [torch.nn.Parameter(torch.randn(1, 12)) for _ in range(3)]
    before = torch.cat([w.detach().clone() for w in weights])
    gradient = torch.randn(3, 12)
    for w, g in zip(weights, gradient):
        w.grad = g[None].clone()
    rise = fit.RidgeDescent(weights, inputs, lr=0.3, counts=torch.ones(3)).step()
    moved = torch.cat([w.detach() for w in weights]) - before
    inputs = inputs.expand(3, -1, -1)
    covariance = inputs.transpose(1, 2) @ inputs / 7
    ridge = fit.STEP_RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1)
    wanted = -torch.linalg.solve(covariance + ridge[:, None, None] * torch.eye(12), gradient[..., None])[..., 0] / 7
    logits = torch.einsum("rnd,rd->rn", inputs, moved)
    assert logits.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-4)
    assert logits.mean().item() == pytest.approx(rise, abs=1e-5)
    torch.testing.assert_close(moved / moved.norm(), wanted / wanted.norm(), atol=1e-4, rtol=1e-3)


def test_collated_positions_predict_their_labels(base):
    tok = load_tokenizer(base)
    examples = [encode({"prompt": "q" * n, "response": "ab"}, "here", Form(tok, 128)) for n in (1, 9)]
    batch = passes.collate(examples, CPU.device, multiple=16)
    assert batch.tokens.shape[1] % 16 == 0 and batch.lengths == [len(e.tokens) for e in examples]
    assert torch.equal(batch.tokens.flatten()[batch.at + 1], batch.labels) and len(batch.labels) == sum(
        len(e.targets) for e in examples
    )


def test_fisher_cost_is_the_second_order_kl(base, monkeypatch):
    """KL between the model with a gate at 1 and at 1 - e is e^2 times the cost, up to sampling and third order."""
    monkeypatch.setattr(measure, "LABEL_SAMPLES", 600)
    run = begun(base, recipe="paper", layers="0-3")
    examples = run.data.train[:2]
    measured = measure.measure_costs(Workload(run.model, examples, CPU), 3)
    costs, inputs = measured.costs, measured.inputs
    assert costs.shape == (4, 2) and inputs.shape == (4, 2, 32)
    batch, e = passes.collate(passes.by_length(examples, 4)[0], CPU.device), 0.05
    dense = passes.states(run.model, batch, route="off")[0]
    row = torch.tensor([i // batch.tokens.shape[1] for i in batch.at.tolist()])
    for layer in range(4):
        gates = torch.ones(4, 2)
        gates[layer] -= e
        h = passes.states(run.model, batch, route="mask", gates=gates)[0]
        kl = passes.token_losses(run.model.head(h), batch.labels, run.model.head(dense)).detach()
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
    probs = model.head(h).softmax(-1)
    labels = measure.draw_labels(probs.expand(20000, -1), torch.rand(20000))
    share = torch.bincount(labels, minlength=258) / 20000
    assert (share - probs[0]).abs().max() < 0.015


def test_gradients_of_drawn_labels_are_those_of_their_losses(base, monkeypatch):
    monkeypatch.setattr(passes, "LOGITS_AT_ONCE", 3 * 258)
    model, h, draws = load_model(base), torch.randn(7, 32), [torch.rand(7), torch.rand(7)]
    for u, found in zip(draws, measure.drawn_gradients(model, h, draws), strict=True):
        labels = measure.draw_labels(model.head(h).softmax(-1).detach(), u)
        torch.testing.assert_close(found, passes.head_gradient(model, h, labels, scale=1.0)[1])


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_token", "both_sequence", "attn_token"])
@pytest.mark.parametrize("room, searching", [(0, False), (40_000, False), (2**28, False), (2**28, True)])
def test_lists_that_share_layers_lose_what_each_loses_alone(base, monkeypatch, granularity, room, searching):
    """Whatever is kept from list to list, together or one after another; nothing is measured twice."""
    run = begun(base, granularity=granularity, layers="1-3", recipe="paper")
    monkeypatch.setattr(controls, "room_for_prefixes", lambda model: room)
    beside = controls.Controls(Workload(run.model, run.data.select, CPU, run.work.trunk), searching)
    n = len(run.model.routing.places)
    sets = [(), (0,), (n - 1, 0), (1,), (0, 1), tuple(range(n)), (n - 1,)]
    beside.measure(sets[:4])
    for skipped in sets:
        alone = passes.evaluate(selection(run), passes.skip_everywhere(skipped))["loss"]
        assert beside.loss(skipped) == pytest.approx(alone, rel=1e-6)
    monkeypatch.setattr(controls, "list_states", None)
    assert beside.loss(sets[2]) == beside.loss(sets[2][::-1])


def test_prefixes_keep_the_latest_within_their_bounds():
    prefixes, x = lists.Prefixes(1000), torch.ones(100)  # 400 bytes each
    for key in "abac":
        prefixes.keep(key, x)
    assert set(prefixes.held) == {"a", "c"} and prefixes.size == 800
    prefixes.keep("large", torch.ones(300))
    assert set(prefixes.held) == {"a", "c"} and prefixes.find("b") is None
    x.zero_()
    assert prefixes.find("a").sum() == 100  # a copy


def test_prompts_are_stored_beside_the_whole_examples(base, tmp_path):
    """What sequence routers read is computed once below the first of them."""
    run = begun(base, layers="2-3", recipe="paper", trunk_gb=0)
    run.cfg.trunk_gb, run.cfg.out = 1.0, str(tmp_path)
    work = train.Job.workload(run)
    first = passes.route_logits(work)
    run.model.trunk = None  # not called again
    torch.testing.assert_close(passes.route_logits(work), first)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "both_sequence"])
@pytest.mark.parametrize("distill, reads", [(False, "first"), (True, "first"), (False, "own")])
def test_benefit_is_the_loss_without_a_layer_minus_the_loss_with_it(base, granularity, distill, reads):
    """Against whole forward passes of one example at a time, at a working point where everyone skips one layer."""
    run, skipped = begun(base, granularity=granularity, layers="1-3", steps=0, reads=reads), (1,)
    examples, n_places = run.data.train[:5], 6 if granularity == "both_sequence" else 3
    benefits, inputs = measure.measure_benefits(Workload(run.model, examples, CPU, run.work.trunk), skipped, distill)
    assert benefits.shape == (n_places, 5) and (benefits.abs() > 1e-4).all()
    assert inputs.shape == (n_places if reads == "own" else 1, 5, 32)
    for n, example in enumerate(e for group in passes.by_length(examples, passes.EVAL_BATCH) for e in group):
        batch, losses = passes.collate([example], CPU.device), {}
        teacher = {0: passes.states(run.model, batch, route="off")[0]} if distill else None
        for place in range(n_places):
            for executed in (True, False):
                left = tuple(sorted({*skipped, place} if not executed else {*skipped} - {place}))
                losses[executed] = passes.evaluate(
                    Workload(run.model, [example], CPU), passes.skip_everywhere(left), teacher
                )["loss"]
            assert benefits[place, n].item() == pytest.approx(
                (losses[False] - losses[True]) * len(example.targets) ** 0.5, rel=1e-3, abs=1e-5
            )


def test_benefit_prior_runs_a_layer_where_it_is_worth_most():
    """Two kinds of inputs, opposite benefits: where one layer fits the budget each kind runs its own; a layer that
    nobody needs stays skipped first.
    """
    torch.manual_seed(0)
    kind = torch.tensor([0, 1] * 20)
    inputs = torch.randn(3, 40, 16) * 0.1 + torch.randn(3, 1, 16) + torch.randn(2, 16)[kind] * 0.5
    benefits = torch.stack([(kind == 0) * 2.0, (kind == 1) * 2.0, torch.full((40,), -1.0)]) + 0.1 * torch.randn(3, 40)
    made = fit.benefit_prior(benefits, inputs, torch.ones(3) / 3, [2, 1, 0], [None] * 40, 1 / 3)
    executed = router.fill_budget(fit.logits_of(made, inputs), torch.ones(3) / 3, 1 / 3)
    assert torch.equal(executed.bool(), torch.stack([kind == 0, kind == 1, kind > 1]))


@pytest.mark.parametrize("seed", range(6))
def test_what_routers_gain_on_the_order_by_chance_costs_little(seed):
    """Benefits of which the inputs say nothing: a mix may seem worth more than the order by chance, and then it stays
    near it."""
    torch.manual_seed(seed)
    x, weights, order = torch.randn(1, 80, 16) * 0.3 + torch.randn(1, 1, 16), torch.ones(4) / 4, [3, 2, 1, 0]
    true = torch.tensor([1.1, 0.6, 0.2, -1.0])
    made = fit.benefit_prior(true[:, None] + torch.randn(4, 80), x, weights, order, [None] * 80, 0.25)
    fresh = torch.randn(1, 500, 16) * 0.3 + x.mean(1, keepdim=True)
    gates = router.fill_budget(fit.logits_of(made, fresh), weights, 0.25)
    assert (true @ gates).mean() > 1.1 - 0.06  # the order alone runs what is worth 1.1


def test_contested_places_are_those_on_which_sequences_agree_least():
    """Of four places two fit the budget: one that all run, one that none runs, and two that take turns."""
    turns = torch.tensor([1.0, -1.0] * 10)
    benefits = torch.stack([torch.full((20,), 3.0), turns, torch.full((20,), -3.0), -turns])
    assert measure.contested(benefits, torch.ones(4) / 4, 0.5) == [1, 3]


@pytest.mark.parametrize("granularity", ["attn_sequence", "both_sequence"])
def test_after_the_first_sequences_contested_places_alone_are_measured(base, granularity, monkeypatch):
    """What the fit is given: the first sequences' benefits as they are; of later ones those of the contested places,
    and at the others the mean of the first."""
    run, given = begun(base, granularity=granularity, layers="1-3", steps=0), {}
    monkeypatch.setattr(start, "PILOT_SAMPLES", 3)
    monkeypatch.setattr(start, "benefit_prior", lambda *args: given.update(args=args))
    n_places, examples = len(run.model.routing.places), run.data.train[:7]
    order, weights = list(range(n_places)), run.model.place_weights()
    start.benefit_start(run.work.of(examples), order, 0.5, False)
    benefits, inputs, _, _, sources, _ = given["args"]
    skipped = start.skipped_places(order, weights, 0.5)
    first, read = measure.measure_benefits(run.work.of(examples[:3]), skipped)
    later, read_later = measure.measure_benefits(run.work.of(examples[3:]), skipped)
    asked = measure.contested(first, weights, 0.5)
    settled = [place for place in range(n_places) if place not in asked]
    assert len(asked) == -(-n_places // 2) and len(sources) == 7
    torch.testing.assert_close(inputs, torch.cat([read, read_later], dim=1))
    torch.testing.assert_close(benefits[:, :3], first)
    torch.testing.assert_close(benefits[asked, 3:], later[asked])
    torch.testing.assert_close(benefits[settled, 3:], first[settled].mean(1, keepdim=True).expand(-1, 4))


@pytest.mark.parametrize("carries", [True, False])
def test_benefits_count_as_far_as_they_carry_over_to_a_source_that_was_left_out(carries):
    """Two sources in which the same direction says the same of what is worth running, or the opposite: then the list
    stands, for everyone.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 80, 16) * 0.3 + torch.randn(1, 1, 16)
    sources, side = ["a"] * 40 + ["b"] * 40, (x[0] - x[0].mean(0))[:, 0].sign()
    sign = side * (1 if carries else torch.tensor([1.0] * 40 + [-1.0] * 40))
    benefits = torch.stack([1.0 + sign, 1.0 - sign, torch.full((80,), 0.5), torch.full((80,), -1.0)])
    weights, order = torch.ones(4) / 4, [3, 2, 1, 0]
    made = fit.benefit_prior(benefits, x, weights, order, sources, 0.25)
    gates = router.fill_budget(fit.logits_of(made, x), weights, 0.25)
    assert (gates.sum(0) == 1).all()
    if carries:
        assert (gates * benefits).sum() > 0.9 * 2.0 * 80
    else:
        assert torch.equal(gates, torch.tensor([1.0, 0, 0, 0])[:, None].expand(4, 80))


@pytest.mark.parametrize("sources", [["a"] * 21, ["a", "b", None] * 7, [str(i) for i in range(30)], ["a"], []])
def test_folds_part_the_sequences_by_source(sources):
    parts = fit.folds(sources)
    if len(sources) < 2:
        assert parts == []
        return
    assert 2 <= len(parts) <= fit.FOLDS and (torch.stack(parts).sum(0) == 1).all() and all(part.any() for part in parts)
    if "a" in sources and len(set(sources)) > 1:
        for part in parts:
            assert len({source for source, left in zip(sources, part.tolist()) if left}) == 1


def test_order_prior_is_the_static_order():
    torch.manual_seed(0)
    inputs = torch.randn(4, 30, 16) * 0.1 + torch.randn(4, 1, 16)  # a strong mean, as normalised inputs have
    order = [2, 0, 3, 1]
    weights = fit.order_prior(order, inputs)
    z = torch.einsum("rnd,rd->rn", inputs, weights)
    for skipped in range(1, 4):
        executed = z >= passes.quantile_cut(z, 1 - skipped / 4)
        assert (
            set(order[:skipped]) == {place for place in range(4) if not executed[place].any()}
            and executed[order[skipped:]].all()
        )


@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_gate_norm_ranks_attentions_by_the_coupling_of_queries_and_keys(base, base_dtype):
    """Against the matrices themselves, head by head; two query heads share a key head. No data is looked at."""
    model = load_base(base, CPU, base_dtype=base_dtype)
    model.add_routers(router.RouterConfig.of("attn_token", (0, 1, 3)))
    coupling = []
    for layer, factor in ((0, 3.0), (1, 0.1), (3, 1.0)):
        attention = model.layers[layer].attention
        if base_dtype is None:
            attention.wq.weight.data.mul_(factor)
        q, k = (part.weight * getattr(part, "scale", torch.ones(1))[:, None] for part in (attention.wq, attention.wk))
        heads = zip(q.view(4, 8, 32), k.view(2, 8, 32).repeat_interleave(2, dim=0))
        coupling.append(sum(torch.linalg.matrix_norm(own.T @ other).square().item() for own, other in heads))
    order = orders.gate_norm_order(model)
    assert order == sorted(range(3), key=coupling.__getitem__) and (base_dtype or order == [1, 2, 0])


def test_a_tuned_file_holds_the_order_of_weights_alone(base):
    run = begun(base, layers="0-3", granularity="attn_sequence")
    assert run.state.orders["gate_norm"] == orders.gate_norm_order(run.model)
    assert "gate_norm" not in begun(base, layers="0-3", granularity="mlp_sequence").state.orders


def test_greedy_order_drops_what_costs_least_each_time(base):
    run = begun(base, layers="0-3", recipe="paper")
    for guess in (
        [1.0, 2.0, 3.0, 4.0],
        [4.0, 3.0, 2.0, 1.0],
    ):  # six tries see all four layers in the first round, so the guess does not matter there
        order = orders.greedy_order(Workload(run.model, run.data.train, CPU), torch.tensor(guess), 0.5)
        loss = [
            passes.evaluate(Workload(run.model, run.data.train, CPU), passes.skip_everywhere((place,)))["loss"]
            for place in range(4)
        ]
        assert order[0] == min(range(4), key=lambda place: loss[place]) and sorted(order) == [0, 1, 2, 3]
    everything = orders.greedy_order(Workload(run.model, run.data.train, CPU), torch.tensor(guess), 1.0)
    pairs = {
        place: passes.evaluate(Workload(run.model, run.data.train, CPU), passes.skip_everywhere((order[0], place)))[
            "loss"
        ]
        for place in range(4)
        if place != order[0]
    }
    assert everything[:2] == order[:2] and pairs[order[1]] <= min(pairs.values()) + 0.02


def test_similarity_order_follows_the_angle_that_a_layer_turns(base):
    run = begun(base, layers="0-3", recipe="paper")
    run.model.layers[2].attention.wo.weight.data *= 1e-4  # changes nothing any more
    assert measure.measure_costs(Workload(run.model, run.data.train, CPU), 0).turned.argsort()[0] == 2
    run.model.layers[2].attention.wo.weight.data *= 1e4


@pytest.mark.parametrize("rows, tokens", [(4, 10**6), (64, 120), (3, 100), (8, 1)])
def test_groups_hold_to_their_budget_of_tokens(rows, tokens):
    lengths = sorted([90, 3, 3, 60, 31, 30, 30, 8, 1, 45, 7, 2], reverse=True)
    groups = passes.under_budget([Example([0] * length, 1, [1]) for length in lengths], rows, tokens)
    sizes = [[len(example.tokens) for example in group] for group in groups]
    assert [size for group in sizes for size in group] == lengths
    assert all(len(group) <= rows and (len(group) == 1 or len(group) * group[0] <= tokens) for group in sizes)
    assert all(len(a) == rows or (len(a) + 1) * a[0] > tokens for a in sizes[:-1])  # none could hold one more


def test_trunk_cache_stays_away_from_a_full_disk(base, tmp_path, monkeypatch):
    """Nothing is written, and what is computed is the same to the bit as with room."""
    run, group = begun(base, layers="2-3", recipe="paper"), slice(0, 3)
    batch = passes.collate(run.data.train[group], torch.device("cpu"))
    room = trunk.TrunkCache(tmp_path / "room.bin", run.model, run.data.train, 1e9)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 1000})())
    cache = trunk.TrunkCache(tmp_path / "trunk.bin", run.model, run.data.train, 1e9)
    found = [store(run.model, run.data.train[group], batch.tokens) for store in (room, cache, cache)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not (tmp_path / "trunk.bin").exists()


@pytest.mark.parametrize("limit, stored", [(1e9, True), (9000, True), (0, False)])
def test_trunk_cache_reads_what_was_computed(base, tmp_path, limit, stored):
    run = begun(base, layers="2-3", recipe="paper", trunk_gb=0)
    cache = trunk.TrunkCache(tmp_path / "trunk.bin", run.model, run.data.train, limit)
    group = run.data.train[:5]
    batch = passes.collate(group, torch.device("cpu"))
    fresh = trunk.trunk(run.model, batch.tokens)
    computed = cache(run.model, group, batch.tokens)
    again = trunk.TrunkCache(tmp_path / "trunk.bin", run.model, run.data.train, limit)  # another run in the same folder
    mixed = passes.collate(run.data.train[3:9], torch.device("cpu"))  # some stored, some not
    found, expected = again(run.model, run.data.train[3:9], mixed.tokens), trunk.trunk(run.model, mixed.tokens)
    for row, length in enumerate(mixed.lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length])
    read = again(run.model, group, batch.tokens)
    for row, length in enumerate(batch.lengths):  # pads may differ: nothing reads them
        torch.testing.assert_close(read[row, :length], fresh[row, :length])
        assert torch.equal(read[row, :length], computed[row, :length])
    size = (tmp_path / "trunk.bin").stat().st_size if (tmp_path / "trunk.bin").exists() else 0
    assert size <= limit and bool(again.slots) == stored
    if stored:
        run.model.exact_fingerprint = "another base"
        assert not trunk.TrunkCache(tmp_path / "trunk.bin", run.model, run.data.train, limit).sums.any()


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token", "both_sequence"])
def test_one_table_serves_every_budget(base, granularity):
    run = begun(base, granularity=granularity, layers="0-3")
    torch.manual_seed(2)
    for w in run.weights.values():  # routers that really tell inputs apart
        w.data.normal_(std=1.0)
    table = calibrate.calibrate(selection(run), 0.5)
    assert table["budgets"] == sorted(table["budgets"]) and len(table["budgets"]) == len(calibrate.BUDGETS)
    n = passes.route_logits(selection(run)).shape[1] * 4
    assert ("shares" in table) == ("token" in granularity)
    for budget, shares in zip(table["budgets"], table.get("shares", ())):  # of places, by the logits of nearby routes
        assert abs((run.model.place_weights() @ torch.tensor(shares, dtype=torch.float64)).item() - budget) <= 0.06
    for budget in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0):
        router.set_cuts(run.model, router.cuts_for(budget, table))
        kept = passes.evaluate(selection(run))["capacity"]
        if (
            "token" in granularity
        ):  # first tokens execute under every budget; equal bytes have equal logits, so shares come in steps
            assert kept == pytest.approx(max(budget, len(run.data.select) * 4 / n), abs=0.05)
        else:
            assert kept == pytest.approx(budget, abs=0.02 + 1.5 / n)


def test_routers_that_decide_at_the_first_routed_layer_are_calibrated_without_a_routed_one(base, monkeypatch):
    """Their logits depend on no route: one pass over what stands below fills the table, and moves the cuts."""
    run, calls = begun(base, layers="1-3"), []
    for module in (calibrate, passes):
        look = module.route_logits
        monkeypatch.setattr(module, "route_logits", lambda work, look=look: calls.append(work) or look(work))
    monkeypatch.setattr(run.model, "hidden", None)
    table = calibrate.calibrate(selection(run), 0.5)
    assert len(calls) == 1 and len(table["budgets"]) == len(calibrate.BUDGETS)
    cut = passes.settle(selection(run), 0.5)
    assert len(calls) == 2 and [router.cut.item() for router in run.model.routers()] == pytest.approx([cut] * 3)


def test_calibration_falls_back_on_the_best_static_order(base):
    """Routers that run the wrong layers: the table then holds the cuts of the order that loses least, and realises the
    budget all the same.
    """
    run = begun(base, granularity="attn_sequence", layers="0-3")
    beside = controls.Controls(selection(run))
    order = min(run.state.orders.values(), key=lambda order: beside.static(order, 0.5))
    train.put(run.weights.values(), fit.order_prior(order[::-1], run.inputs))
    table = calibrate.calibrate(selection(run), 0.5, beside, {"worst": order[::-1], "best": order})
    assert table["static"][0.5] == "best"
    router.set_cuts(run.model, router.cuts_for(0.5, table))
    static = passes.evaluate(selection(run), passes.skip_everywhere(tuple(order[:2])))
    found = passes.evaluate(selection(run))
    assert (
        found["loss"] == pytest.approx(static["loss"]) and found["capacity_per_layer"] == static["capacity_per_layer"]
    )
    assert not calibrate.calibrate(selection(run), 0.5)["static"]


def test_static_cuts_close_in_order_and_split_a_layer():
    z, third = torch.arange(12.0).view(3, 4), torch.ones(3) / 3
    executed = z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 0.5, third))[:, None]
    assert executed.tolist() == [[False, False, True, True], [True] * 4, [False] * 4]
    assert (
        not (z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 0.0, third))[:, None]).any()
        and (z >= torch.tensor(calibrate.static_cuts(z, [2, 0, 1], 1.0, third))[:, None]).all()
    )


def loss_by_route(run, route: str) -> float:
    """Mean loss of the selection set in one batch."""
    batch = passes.collate(run.data.select, CPU.device)
    return passes.head_losses(run.model, passes.states(run.model, batch, route=route)[0], batch.labels).mean().item()


def test_evaluation_does_not_depend_on_the_route_mode(base):
    run = begun(base, layers="0-3")
    assert passes.evaluate(selection(run))["loss"] == pytest.approx(loss_by_route(run, "mask"), abs=1e-5)
    skipped = passes.evaluate(selection(run), passes.skip_everywhere((0, 2)))
    assert skipped["capacity_per_layer"] == [0.0, 1.0, 0.0, 1.0] and skipped["capacity"] == 0.5
    dense = passes.evaluate(selection(run), passes.skip_everywhere(()))["loss"]
    assert dense == pytest.approx(loss_by_route(run, "off"), abs=1e-5)


def test_static_control_interpolates_between_whole_layers(base):
    run = begun(base, layers="0-3")
    losses = [passes.evaluate(selection(run), passes.skip_everywhere(skipped))["loss"] for skipped in ((2,), (2, 0))]
    beside = controls.Controls(selection(run))
    assert beside.static([2, 0, 1, 3], 0.25) == pytest.approx(losses[0])
    assert beside.static([2, 0, 1, 3], 0.35) == pytest.approx(0.6 * losses[0] + 0.4 * losses[1])


@pytest.mark.parametrize(
    "granularity, kv",
    [("attn_sequence", "routed"), ("attn_token", "all"), ("mlp_token", "routed"), ("block_sequence", "routed")],
)
def test_share_saved_counts_flops(base, granularity, kv):
    """Two layers off for everyone save two layers; half of all tokens of every layer save less than half of them where
    keys and values stay.
    """
    run = begun(base, layers="0-3", granularity=granularity, kv=kv, recipe="paper")
    beside = controls.Controls(selection(run))
    saved, ceiling = beside.share_saved([0.0, 1.0, 0.0, 1.0])
    assert ceiling > 1 and (saved < 0.5 if kv == "all" else saved == pytest.approx(0.5))
    assert beside.share_saved([1.0] * 4) == (0.0, 1.0)


def test_a_dropped_layer_leaves_nothing_whatever_the_unit(base):
    losses = []
    for granularity, kv in (("attn_sequence", "routed"), ("attn_token", "all"), ("attn_token", "routed")):
        run = begun(base, layers="0-3", granularity=granularity, kv=kv, recipe="paper")
        routing = run.model.routing
        losses.append(passes.evaluate(selection(run), passes.skip_everywhere((1, 3)))["loss"])
        assert run.model.routing is routing and run.model.layers[1].routing is routing
    assert losses[0] == losses[1] == losses[2]


def test_step_flops_count_passes():
    """One routed layer of two: the lower layer runs once, the upper one forward, backward, as teacher and once more
    where it is recomputed; the head where loss is taken.
    """
    config = ModelConfig(
        family="llama",
        dim=8,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=4,
        hidden_dim=16,
        vocab_size=10,
        max_seq_len=64,
        norm_eps=1e-5,
        rope_theta=1e4,
    )
    layer = (prefill_flops(config, 3, logits=0) + prefill_flops(config, 5, logits=0)) / 2
    scores = 4 * 8 * (pairs(3, None) + pairs(5, None))  # backward costs them twice
    head = 4 * 2 * 8 * 10
    assert trunk_flops(config, 1, [3, 5]) == layer
    assert step_flops(config, 1, [3, 5], 4, distill=True) == 3 * layer + scores + 3 * head
    assert step_flops(config, 0, [3, 5], 4, distill=False) == 2 * 2 * layer + 2 * scores + 2 * head
    assert step_flops(config, 1, [3, 5], 4, distill=False, again=2) == 4 * layer + scores + 2 * head
