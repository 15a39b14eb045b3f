"""Mixtures of experts and routers of experts: every way of computing them is the same function.

Run: python -m pytest tests/test_experts.py
"""

import math
from dataclasses import replace

import pytest
import tiny
import torch
import tuning
from torch.utils.flop_counter import FlopCounterMode

import bench
import eval as scoring
import runtime
import train
from data.records import Example
from model import Experts, KVCache, ModelConfig, Transformer, generate, load_model, load_routers
from recipe import fidelity
from recipe.controls import Controls
from recipe.cost import DENSE, Executed, ItemSize, decode_bytes, layer_elements, mlp_elements, prefill_flops
from recipe.experts import loads, mean_route, reading_gates, smallest_gate
from recipe.forced import make_control
from recipe.passes import Workload, evaluate, random_routes, skip_everywhere
from recipe.places import routing_of
from router import RouterConfig, RouterMeta, cuts_for, read_router_file, save_routers, set_cuts

CONFIG = replace(
    tiny.CONFIG, family="mixtral", n_experts=5, experts_per_token=2, expert_dim=16, hidden_dim=16, norm_topk=True
)
SHAPES = {  # what differs between families, as far as experts go
    "mixtral": CONFIG,
    "qwen2_moe": replace(CONFIG, family="qwen2_moe", shared_dim=24, norm_topk=False, dense_layers=(0, 2)),
    "olmoe": replace(CONFIG, family="olmoe", n_kv_heads=4, qk_norm_whole=True, experts_per_token=3, norm_topk=False),
    "one expert": replace(CONFIG, experts_per_token=1, n_experts=1),
}
CASES = [(name, unit, more) for name in SHAPES for unit in ("token", "sequence") for more in (False, True)]
WIDTH, LENGTHS = 12, [12, 1, 7]


def build(name: str, unit: str | None = None, renormalise: bool = False, cut: float = 0.0) -> Transformer:
    """A random model, its routers with weights of their own."""
    config = SHAPES[name]
    torch.manual_seed(0)
    model = Transformer(config)
    for key, value in model.named_parameters():
        if "norm" not in key:
            value.data.normal_(0, 0.3)
    if unit is not None:
        model.add_routers(routing_of(config, f"expert_{unit}", range(config.n_layers), renormalise=renormalise))
        set_cuts(model, cut)
        for router in model.routers():
            router.weight.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(258, shape, generator=torch.Generator().manual_seed(7))


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


def plainly(mixture: Experts, x: torch.Tensor, gates: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """Eq. 6-8 with a loop over tokens and experts. x (n,D), gates (n,E)."""
    out = torch.zeros_like(x)
    for row, token in enumerate(x):
        scores = torch.softmax(mixture.gate(token).float(), -1)
        best = scores.argsort(descending=True)[: mixture.k].tolist()
        weights = {e: scores[e].item() for e in best}
        if mixture.normed:
            weights = {e: w / sum(weights.values()) for e, w in weights.items()}
        runs = {e: w for e, w in weights.items() if gates[row, e] > 0}
        if renormalise and runs:
            runs = {e: w * sum(weights.values()) / sum(runs.values()) for e, w in runs.items()}
        for e, weight in runs.items():
            out[row] += weight * mixture.experts[e](token)
        if mixture.shared is not None:
            out[row] += torch.sigmoid(mixture.shared_gate(token)) * mixture.shared(token)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_packed_experts_are_the_sum_over_a_loop(name):
    mixture = build(name).layers[1].feed_forward
    x = torch.randn(17, 32)
    assert error(mixture(x), plainly(mixture, x, torch.ones(17, CONFIG.n_experts), False)) < 1e-5


@pytest.mark.parametrize(("name", "unit", "renormalise"), CASES)
@pytest.mark.parametrize("cut", [-math.inf, 0.2, math.inf])
def test_mask_gather_and_a_loop_are_one_function(name, unit, renormalise, cut):
    """Outputs and gates agree, with pads; the loop stands in for each layer's MLP with the gates that were returned."""
    model = build(name, unit, renormalise, cut)
    tokens, how = tokens_of(3, WIDTH), {"lengths": LENGTHS, "prompt_lengths": [5, 1, 7]}
    masked, gates, z = model(tokens, route="mask", return_scores=True, **how)
    packed, same, _ = model(tokens, route="gather", return_scores=True, **how)
    assert torch.equal(gates, same)
    rows = gates if gates.dim() == 3 else gates[..., None].expand(-1, -1, WIDTH)  # (R,B,T)
    plain = build(name)
    for layer in model.routing.layers:
        own = rows[model.routing.rows_of(layer)].permute(1, 2, 0).flatten(0, 1)  # (n,E)
        mixture = plain.layers[layer].feed_forward
        mixture.forward = lambda x, own=own, mixture=mixture: plainly(mixture, x, own, renormalise)
    looped = plain(tokens)[0]
    for row, length in enumerate(LENGTHS):
        assert error(masked[row, :length], packed[row, :length]) < 1e-4
        assert error(masked[row, :length], looped[row, :length]) < 1e-4
        assert not rows[:, row, length:].any() or unit == "sequence"
    if cut == -math.inf:
        assert error(packed[0], model(tokens)[0][0]) < 1e-5
    if unit == "token":  # pairs that were assigned have logits, and a first token runs them all
        k = model.config.experts_per_token
        real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
        assigned = (z > -math.inf).unflatten(0, (-1, model.config.n_experts)).sum(1)  # (layers,B,T)
        assert (assigned == k * real).all()
        assert torch.equal(gates[..., 0].sum(0), torch.full((3,), float(k * len(model.routing.layers))))
    if cut == math.inf:
        assert not (rows[..., 1:] if unit == "token" else rows).any()


@pytest.mark.parametrize(("name", "unit", "renormalise"), CASES)
def test_cached_steps_equal_one_pass_and_rows_equal_rows_alone(name, unit, renormalise):
    model, tokens, cache = build(name, unit, renormalise, 0.2), tokens_of(3, 24), None
    prompts, steps = [9, 1, 5], [3, 1, 2]
    cache = KVCache(model, 3)
    model(tokens[:, :9], lengths=prompts, cache=cache, route="gather")
    more = torch.stack([tokens[row, n : n + 3] for row, n in enumerate(prompts)])
    step, gates = model(more, lengths=steps, cache=cache, route="gather")
    held = cache.clone()
    held.select([2, 0])
    last = model(tokens[:2, 20:21], cache=held, route="gather")[0]
    for row, (n, m) in enumerate(zip(prompts, steps)):
        whole = tokens[row : row + 1, : n + m]
        alone, own = model(whole, prompt_lengths=[n], route="gather")
        assert error(step[row, :m], alone[0, n:]) < 1e-4
        if unit == "token":
            assert torch.equal(gates[:, row, :m], own[:, 0, n:])
        else:
            assert torch.equal(gates[:, row], own[:, 0])
    for line, row in enumerate((2, 0)):
        whole = torch.cat([tokens[row, : prompts[row] + steps[row]], tokens[line, 20:21]])[None]
        alone = model(whole, prompt_lengths=[prompts[row]], route="gather")[0]
        assert error(last[line, 0], alone[0, -1]) < 1e-4
    texts = [tokens[row, :n].tolist() for row, n in enumerate(prompts)]
    assert generate(model, texts, 6) == [generate(model, [text], 6)[0] for text in texts]


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_forced_experts_stay_off_in_later_steps(unit):
    """A list of experts that everyone skips, first tokens too, is held in the cache; pairs are counted one by one."""
    model, tokens = build("mixtral", unit, cut=-math.inf), tokens_of(2, 12)
    gates = torch.ones(20, 2)
    gates[[0, 3, 7, 19]] = 0.0
    whole, made = model(tokens, gates=gates, route="gather")
    cache, parts = KVCache(model, 2), []
    for part in tokens.split([5, 1, 6], dim=1):
        parts.append(model(part, cache=cache, route="gather", gates=None if parts else gates)[0])
    assert error(torch.cat(parts, 1), whole) < 1e-4
    assert error(model(tokens, gates=gates, route="mask")[0], whole) < 1e-4
    assert not made[[0, 3, 7, 19]].any() and made.any()


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_gates_gradient_is_what_its_pair_is_worth(renormalise):
    """Straight-through gradients of router logits are those of gates: a finite difference of the multiplied pair."""
    model = build("mixtral", "token", renormalise, cut=-math.inf).double()
    tokens, gates = tokens_of(1, 6), torch.ones(20, 1, 6, dtype=torch.float64)
    probe = torch.randn(1, 6, 32, dtype=torch.float64)

    def loss(gates):
        return (model.hidden(tokens, gates=gates, route="mask")[0] * probe).sum()

    gates.requires_grad_(True)
    gradient = torch.autograd.grad(loss(gates), gates)[0]
    made = model(tokens, gates=gates.detach(), route="mask")[1]
    place, column = next((p, t) for p in range(20) for t in range(1, 6) if made[p, 0, t])
    lower, upper = gates.detach().clone(), gates.detach().clone()
    lower[place, 0, column], upper[place, 0, column] = 0.99, 1.01
    assert gradient[place, 0, column].item() == pytest.approx((loss(upper) - loss(lower)).item() / 0.02, rel=0.02)
    assert not gradient[made == 0].any() and not gradient[..., 0].any()


def test_other_targets_skip_a_whole_mixture():
    for granularity in ("mlp_sequence", "mlp_token", "block_token", "both_sequence"):
        model = build("qwen2_moe")
        model.add_routers(RouterConfig.of(granularity, (1, 2, 3)))
        for router in model.routers():
            router.weight.data.normal_(0, 0.3)
        tokens = tokens_of(3, 20)
        masked, gates = model(tokens, route="mask")
        packed, same = model(tokens, route="gather")
        assert error(masked, packed) < 1e-4 and torch.equal(gates, same) and 0 < gates.mean() < 1


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"experts_per_token": 6}, "6 of 5 experts"),
        ({"expert_dim": 0}, "positive width"),
        ({"n_experts": -1}, "n_experts"),
        ({"n_experts": 0}, "n_experts is 0"),
        ({"dense_layers": "all"}, "dense_layers"),
        ({"norm_topk": 1}, "norm_topk"),
    ],
)
def test_mixtures_that_cannot_be(change, told):
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **change)
    assert ModelConfig.from_dict(vars(CONFIG)) == CONFIG


def test_places_that_cannot_be():
    with pytest.raises(ValueError, match="no layer that was asked for has experts"):
        routing_of(tiny.CONFIG, "expert_token", (1, 2))
    with pytest.raises(ValueError, match="no layer that was asked for has experts"):
        routing_of(SHAPES["qwen2_moe"], "expert_token", (0, 2))
    mixed = ((1, "expert", 0), (2, "attn", None))
    for places in (((1, "expert", None),), ((1, "attn", 2),), ((1, "expert", -1),), mixed):
        with pytest.raises(ValueError, match="expert"):
            RouterConfig(places)
    with pytest.raises(ValueError, match="renormalise"):
        RouterConfig.of("attn_token", (1,), renormalise=True)
    with pytest.raises(ValueError, match="reads"):
        RouterConfig.of("expert_sequence", (1,), n_experts=2, reads="gate")
    model = build("qwen2_moe")
    for places in (((1, "expert", 0),), ((0, "expert", 0),), tuple((1, "expert", e) for e in range(6))):
        with pytest.raises(ValueError, match="experts of layer"):
            model.add_routers(RouterConfig(places))


# -----------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cut", [-math.inf, 0.0])
def test_flops_are_what_torch_counts(name, cut):
    """The MLPs' products alone, of a prompt with and without skipped pairs; routers left out."""
    model, tokens = build(name, "token", cut=cut), tokens_of(2, 30)
    with FlopCounterMode(display=False, depth=4) as counter:
        gates = model.hidden(tokens, route="gather")[1]
    found = counter.get_flop_counts()
    ours, theirs = 0.0, 0
    executed = Executed.by(model.config, model.routing, gates)
    for layer in range(model.config.n_layers):
        theirs += sum(found.get(f"Transformer.layers.{layer}.feed_forward", {}).values())
        assign = 2 * 60 * model.config.dim * model.config.n_experts  # asked for in Block, not in the mixture
        theirs += assign if layer in model.routing.layers and f"Transformer.layers.{layer}.feed_forward" in found else 0
        ours += 60 * 2 * mlp_elements(model.config, layer, executed.experts(model.config, layer))
    total = sum(sum(each.values()) for key, each in found.items() if key == "Global")
    routers = 2 * 60 * model.config.dim * len(model.routing.places)
    attention = sum(n for op, n in found["Global"].items() if "attention" in str(op))
    c = model.config
    projections = 60 * 4 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads) * c.n_layers
    assert total - routers - attention - projections == pytest.approx(ours)
    assert prefill_flops(c, 30, executed) <= prefill_flops(c, 30)


def test_a_decode_step_reads_the_experts_that_run():
    (one, _), (many, _) = (layer_elements(CONFIG, 1, batch, 8, DENSE) for batch in (1, 1000))
    pair = 3 * CONFIG.dim * CONFIG.expert_dim
    assert many - one == pytest.approx(3 * pair)  # all 5 instead of 2
    half = Executed(pairs=[0.5] * 4)
    dense, routed = (decode_bytes(CONFIG, 1, 8, ItemSize(4, 4), executed) for executed in (DENSE, half))
    assert dense - routed == pytest.approx(4 * 4 * pair)


# -----------------------------------------------------------------------------
# Tuning, scoring, timing


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny.write_base(tmp_path_factory.mktemp("experts"), SHAPES["qwen2_moe"])
    answers = [f"{'ab' * (i % 4)} {i * 7}" for i in range(40)]
    turns = [(f"say {i}", answer) for i, answer in enumerate(answers)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    tiny.write_jsonl(folder / "data.jsonl", rows)
    return folder


def tuned(base, out, granularity: str, **changes) -> dict:
    few = dict(steps=2, select_samples=6, cost_samples=6, calibrate_samples=12, heldout_samples=6, budget=0.75)
    return train.train(tuning.settings(base, out, granularity=granularity, layers="all", **few, **changes))


@pytest.mark.parametrize("granularity", ["expert_token", "expert_sequence"])
def test_tune_score_and_time(base, tmp_path, granularity):
    """The same commands as for any router: the file serves every budget, holds loads, and its controls stand beside."""
    out = tmp_path / "out"
    summary = tuned(base, out, granularity, renormalise=granularity == "expert_token")
    row = summary["report"][-1]
    assert {"greedy", "fisher", "load", "random", "mean_route"} <= row.keys()
    assert ("smallest_gate" in row) == (granularity == "expert_token")
    tensors, meta = read_router_file(out / "routers.safetensors")
    assert sorted(tensors) == [f"model.layers.{i}.experts.{e}.router.weight" for i in (1, 3) for e in range(5)]
    assert meta.routing.renormalise == (granularity == "expert_token") and sum(meta.loads) == pytest.approx(1)
    assert RouterMeta.from_json(meta.to_json()) == meta
    model = load_model(base)
    shares = []
    for budget in (0.0, 0.5, 1.0):
        load_routers(model, out / "routers.safetensors", budget)
        gates = model(tokens_of(4, 60), route="gather")[1]
        shares.append((model.place_weights() @ gates.flatten(1).mean(1).double()).item())
    assert shares[0] < 0.05 and shares[0] <= shares[1] < 0.8 and shares[2] == pytest.approx(1)
    files = {"model": str(base), "routers": str(out / "routers.safetensors"), "perplexity": str(base / "data.jsonl")}
    report = scoring.evaluate(scoring.EvalConfig(**files, budget=0.5, limit=8), tuning.CPU)
    assert 0.2 < report["results"]["perplexity"]["capacity"] < 0.8


def test_controls_run_as_many_pairs(base):
    """Random pairs, the smallest gates and whole experts off are counted in pairs; controls leave no trace."""
    run = tuning.begun(base, granularity="expert_token", layers="all", budget=0.75)
    work, model = tuning.selection(run), run.model
    assigned, ran = loads(work)
    assert sum(assigned) == pytest.approx(2 * len(model.routing.layers))  # k = 2 a token
    set_cuts(model, -math.inf)
    assert loads(work)[1] == assigned and evaluate(work)["capacity"] == pytest.approx(1)
    drawn = evaluate(work, random_routes(0.75))["capacity"]
    dropped = evaluate(work, skip_everywhere((0, 4)))["capacity"]
    assert drawn == pytest.approx(0.75, abs=0.08)
    assert dropped == pytest.approx(1 - (assigned[0] + assigned[4]) / sum(assigned))
    with reading_gates(model):
        set_cuts(model, math.log(0.3))
        gates, z = model.hidden(torch.tensor([work.examples[0].tokens]), route="gather", return_scores=True)[1:]
        assert torch.equal(gates[..., 1:] == 1, z[..., 1:] >= math.log(0.3))
    assert all(router.cut == -math.inf for router in model.routers())
    assert math.isfinite(smallest_gate(work, 0.5)) and model.routing.reads == "own"


def test_eval_skips_the_pairs_of_the_smallest_gates(base, tmp_path, monkeypatch):
    """--control=smallest_gate: as many pairs as asked for, those of the least weights, whatever the routers say."""
    model = load_model(base)
    model.add_routers(routing_of(model.config, "expert_token", (1, 3)))
    meta = RouterMeta(model.routing, [0.5] * 10, model.fingerprint)  # no table of cuts: none is needed
    save_routers(tmp_path / "r.safetensors", model, meta)
    files = {"model": str(base), "routers": str(tmp_path / "r.safetensors"), "perplexity": str(base / "data.jsonl")}
    cfg = scoring.EvalConfig(**files, budget=0.6, control="smallest_gate", dtype="float32")
    report = scoring.evaluate(cfg, tuning.CPU)["results"]
    assert report["perplexity"]["capacity"] == pytest.approx(0.6, abs=0.03)
    assert report["perplexity"]["loss"] != report["perplexity_dense"]["loss"]
    for module in (scoring, fidelity):
        monkeypatch.setattr(module, "ANSWER_TOKENS", 12)
    found = scoring.evaluate(replace(cfg, fidelity=cfg.perplexity, perplexity=None, limit=5), tuning.CPU)["fidelity"]
    assert found["variants"]["smallest_gate"]["capacity"] == pytest.approx(0.6, abs=0.03)
    for wrong, reason in ((replace(cfg, budget=None), "give --budget"), (replace(cfg, calibrate=3), "calibrate=3")):
        with pytest.raises(ValueError, match=reason):
            scoring.evaluate(wrong, tuning.CPU)


def test_the_mean_route_is_one_order_everywhere(base, tmp_path):
    """An expert that few tokens are given is not rare for that: train, --control=mean and --fidelity once disagreed."""
    model = load_model(base)
    model.add_routers(routing_of(model.config, "expert_token", (1, 3)))
    model.loads = [0.02, 0.08, 0.1, 0.1, 0.2] * 2  # of all pairs; k = 2 in two layers
    given = [load * 4 / sum(model.loads) for load in model.loads]  # of the tokens
    ran = [0.9, 0.2, 0.5, 0.6, 0.3, 0.95, 0.4, 0.7, 0.1, 0.8]
    shares = [load * share for load, share in zip(given, ran)]
    order, capacity = mean_route(model, shares)
    assert order == sorted(range(10), key=ran.__getitem__) != sorted(range(10), key=shares.__getitem__)
    assert capacity == pytest.approx(sum(shares) / 4)
    runtime.write_json(tmp_path / "run.json", {"results": {"x": {"capacity_per_layer": shares}}})
    control = make_control(f"mean:{tmp_path / 'run.json'}", model, None, {}, ["x"])
    assert control.lists == {"x": (order, capacity)}
    work = Workload(model, [Example([1, 2, 3, 4, 5], 2, [2, 3, 4])], tuning.CPU)
    found = {"capacity_per_layer": shares, "capacity": capacity}
    variants = fidelity.with_controls(fidelity.Variant("routed", model, "gather"), {}, work)
    seen = evaluate(work)
    by_name = {variant.name: variant.control for variant in variants}
    assert by_name["mean_route"].lists["fidelity"][0] == mean_route(model, seen["capacity_per_layer"])[0]
    controls = Controls(work)
    row = controls.rows({0.5: found | {"loss": 1.0}}, {"first": list(range(10))})[0]
    assert row["mean_route"] == controls.static(order, 1 - capacity)


def test_bench_counts_experts(base, capsys):
    config = bench.BenchConfig(model=str(base), granularity="expert_token", layers="all", budget=(0.5,), prefill=(32,),
                               decode=(16,), batch=(2,), rounds=1, steps=2)
    rows = bench.bench(config)["rows"]
    routed = [row for row in rows if row["route"] == "gather"]
    assert all(row["ceiling"] > 1 and 0.3 < row["capacity"] < 0.75 for row in routed)


def test_a_file_for_experts_is_refused_by_another_model(base, tmp_path):
    model = load_model(base)
    model.add_routers(routing_of(model.config, "expert_token", (1,)))
    meta = RouterMeta(model.routing, [0.5] * 5, model.fingerprint)
    save_routers(tmp_path / "r.safetensors", model, meta)
    assert load_routers(model, tmp_path / "r.safetensors").routing == model.routing
    with pytest.raises(ValueError, match="no calibration table"):
        cuts_for(0.5, meta.calibration)
    other = Transformer(replace(SHAPES["qwen2_moe"], n_experts=4))
    other.fingerprint = model.fingerprint
    with pytest.raises(ValueError, match="experts of layer 1"):
        load_routers(other, tmp_path / "r.safetensors")
