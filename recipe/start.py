"""What tuning begins with: the model, where its routers stand, and their first weights."""

import math
import time
from dataclasses import asdict, replace

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from recipe.base import load_base
from recipe.calibrate import settle
from recipe.controls import Controls
from recipe.fit import benefit_prior, order_prior, token_prior
from recipe.lora import LoRAConfig, add_lora
from recipe.measure import Measured, contested, first_inputs, measure_benefits, measure_costs, typical_costs
from recipe.experts import gate_start
from recipe.orders import search_orders
from recipe.passes import EVAL_BATCH, Workload, by_length, evaluate
from recipe.places import parse_layers, routing_of, skipped_places
from recipe.run import Job, Run, State, build, copied, put
from router import RouterConfig, RouterMeta, check_fingerprint, load_router_weights, read_router_file, set_cuts
from runtime import Runtime, permutation, print0

INPUT_SAMPLES = 512  # router inputs on which RidgeDescent measures its steps
SEARCH_SAMPLES = 96  # examples, at most, on which orders are searched
PILOT_SAMPLES = 40  # sequences on which benefits of all places are measured; on others those of contested ones


def prepared(cfg, rt: Runtime) -> Transformer:
    """The model as it stands before its first step, with LoRA where that is trained or given."""
    model = load_base(cfg.model, rt, routers=cfg.recalibrate, base_dtype=cfg.base_dtype, shard=cfg.shard,
                      adapter=cfg.adapter)
    if cfg.adapter is None and "lora" in cfg.train:
        add_lora(model, LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets))
    if cfg.train == "full":  # weights are mapped from their file
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return model


def begin(job: Job) -> Run:
    """A run before its first step: routed places chosen, orders of the static lists found, first routers set."""
    cfg, started, inputs = job.cfg, time.perf_counter(), None
    dtype = str(job.rt.dtype).removeprefix("torch.")
    if cfg.train == "lora":  # one router that stays open, so that the dense model takes the same steps
        job.model.add_routers(RouterConfig.of("mlp_sequence", (0,)))
        set_cuts(job.model, -math.inf)
        return build(job, job.workload(), State(asdict(job.model.routing), {}, dtype, cut=-math.inf), None)
    placed, first = candidates(cfg, job.model.config), None
    if cfg.init:
        first, meta = read_init(cfg, job.model.config)
        placed = meta.routing, None
    with job.phases("costs"):
        measured = place_routers(job.costed(), *placed, cfg.seed)
    work = job.workload()
    with job.phases("orders"):
        orders = orders_of(job, work, measured)
    if cfg.recipe == "default":
        inputs = measured.inputs[:, permutation(measured.inputs.shape[1], cfg.seed, "inputs")[:INPUT_SAMPLES]]
    run = build(job, work, State(asdict(job.model.routing), orders, dtype), inputs)
    if first is not None:
        model = job.model
        check_fingerprint(cfg.init, meta.base_fingerprint, model.fingerprint, model.exact_fingerprint, model.parent)
        load_router_weights(cfg.init, model, first, meta.routing)
    if cfg.recipe == "default":
        with job.phases("first routers"):
            if first is None:
                first_routers(run, measured)
            else:
                run.state.cut = try_out(run)[1]
                set_cuts(run.model, run.state.cut)
    run.state.seconds = time.perf_counter() - started
    return run


def standing(job: Job) -> tuple[Workload, State]:
    """Routers that stand already: of our file, which the model came with, or of the official code's, put into it now.

    Returns the training examples, and the orders of static lists that the file holds, or that are searched.
    """
    cfg, model, orders = job.cfg, job.model, {}
    if cfg.import_official:
        tensors, _ = read_router_file(cfg.import_official, official=True)
        layers = [int(key.split(".")[2]) for key in tensors]  # its names of tensors are ours
        model.add_routers(RouterConfig.of(cfg.granularity, layers, **cfg.routes))
        load_router_weights(cfg.import_official, model, tensors, model.routing)
    else:
        orders, names = read_router_file(cfg.recalibrate)[1].orders, model.routing.names
        orders = {name: [names.index(place) for place in order] for name, order in orders.items()}
    work = job.workload()
    return work, State(orders=orders or orders_of(job, work, measure_costs(job.costed(), cfg.seed)))


def read_init(cfg, config: ModelConfig) -> tuple[dict[str, Tensor], RouterMeta]:
    """What the file of --init holds. Raises ValueError naming what these settings do not ask for."""
    tensors, meta = read_router_file(cfg.init)
    has, (wanted, kept) = meta.routing, candidates(cfg, config)
    pairs = {name: (getattr(has, name), getattr(wanted, name)) for name in ("granularity", "pool", "kv", "reads")}
    pairs["layers"] = (has.names, wanted.names) if kept is None else (len(has.places), kept)
    if differing := [f"{name} ({ours!r} there, {asked!r} now)" for name, (ours, asked) in pairs.items()
                     if ours != asked]:
        raise ValueError(f"{cfg.init} cannot begin this run: {', '.join(differing)}; expected the same routers: change "
                         "these settings, or give another --init")
    return tensors, meta


def candidates(cfg, config: ModelConfig) -> tuple[RouterConfig, int | None]:
    """Places where routers may stand, and how many of them (of experts: layers) are kept: the cheapest; None: all.

    Raises ValueError where more are asked for than there are.
    """
    layers, kept = parse_layers(cfg.layers, config.n_layers)
    routing = routing_of(config, cfg.granularity, layers, **cfg.routes)
    most, of = (len(routing.layers), "layers with experts") if routing.experts else (len(routing.places), "places")
    if kept is not None and kept > most:
        raise ValueError(f"layers is {cfg.layers!r}; {cfg.granularity} has {most} {of} in this model: ask for 1 to "
                         f"{most}")
    return routing, kept


def orders_of(job: Job, work: Workload, measured: Measured) -> dict[str, list[int]]:
    """Orders of the static lists, as deep as the budgets in question go."""
    cfg = job.cfg
    examples = work.examples[: min(cfg.cost_samples, SEARCH_SAMPLES)]
    return search_orders(work.of(examples), measured, 1 - min((cfg.budget, *cfg.report)))


def first_routers(run: Run, measured: Measured) -> None:
    """Start from the best static order, as routers that say the same of everyone, or, where the selection set loses
    less, from routers fitted to what was measured."""
    cfg, state, routing = run.cfg, run.state, run.model.routing
    name = best_static(Controls(run.select), state.orders, cfg.budget)[0]
    starts = router_starts(measured, name, state.orders[name], routing.unit)
    if routing.experts and routing.unit == "token":
        gate = gate_start(run.model, measured.inputs)
        starts |= {"gate": gate, "gate + fisher": gate + starts["fisher"]}
    if routing.unit == "sequence" and cfg.benefit_samples and not routing.experts:
        examples = run.data.train[: cfg.benefit_samples]
        starts["benefits"] = benefit_start(
            run.work.of(examples), state.orders[name], cfg.budget, cfg.objective == "distill"
        )
    tried, cuts = {}, {}
    routers = [router.weight for router in run.model.routers()]
    for name, weights in starts.items():
        put(routers, weights)
        tried[name], cuts[name] = try_out(run)
    print0("selection loss of starts: " + ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items()))
    put(run.weights.values(), run.best.values())
    if not cfg.evaluations:
        state.best_loss = math.inf  # nothing is tried later: the last routers are taken
    state.cut = cuts[min(tried, key=tried.get)]
    set_cuts(run.model, state.cut)


def try_out(run: Run) -> tuple[float, float]:
    """Loss on the selection set at exactly the budget, and the cut there; keeps the weights if they are the best so
    far."""
    loss, cut = loss_at_budget(run.select, run.cfg.budget, run.teacher)
    set_cuts(run.model, run.state.cut)
    if loss < run.state.best_loss:
        run.state.best_loss, run.state.best_step, run.best = loss, run.state.step, copied(run.weights)
    return loss, cut


def place_routers(work: Workload, routing: RouterConfig, kept: int | None, seed: int) -> Measured:
    """Put zero routers at these places, or at the `kept` of them that cost least by what they count.

    Returns what those cost.
    """
    model = work.model
    model.add_routers(replace(routing, reads="own") if routing.reads == "first" else routing)
    measured = measure_costs(work, seed)
    typical = typical_costs(measured.costs)
    shown = zip(routing.names, typical.tolist())
    print0("cost of skipping, in nats: " + ", ".join(f"{name}: {cost:.3g}" for name, cost in shown))
    prices, loads, chosen = typical / model.place_weights(), model.loads, list(range(len(routing.places)))
    if kept is not None:
        cheapest = sorted(prices.argsort()[:kept].tolist())
        chosen = cheapest_layers(routing, prices, kept) if routing.experts else cheapest
    model.add_routers(routing.at(chosen))
    model.loads = loads and [loads[place] for place in chosen]
    measured = measured.at(chosen)
    return measured if routing.reads != "first" else replace(measured, inputs=first_inputs(work))


def cheapest_layers(routing: RouterConfig, prices: Tensor, kept: int) -> list[int]:
    """Places of all experts of the `kept` layers whose experts cost least on average. prices (R,)."""
    mean = {layer: prices[routing.rows_of(layer)].mean().item() for layer in routing.layers}
    layers = sorted(mean, key=mean.get)[:kept]
    return [number for number, place in enumerate(routing.places) if place.layer in layers]


def best_static(controls: Controls, orders: dict[str, list[int]], budget: float) -> tuple[str, tuple[int, ...]]:
    """Name of the order that loses least on the selection set at this budget, and the places that it skips."""
    weights = controls.work.model.place_shares()
    skipped = {name: skipped_places(order, weights, 1 - budget) for name, order in orders.items()}
    controls.measure(skipped.values())
    losses = {name: controls.loss(places) for name, places in skipped.items()}
    print0("selection loss of static orders: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    best = min(losses, key=losses.get)
    return best, skipped[best]


def router_starts(measured: Measured, name: str, order: list[int], unit: str) -> dict[str, Tensor]:
    """First routers (R,D) to choose from, by name: the static order as routers that say the same of everyone; unit
    token: routers fitted to each token's Fisher cost too, alone or mixed with the order."""
    static = order_prior(order, measured.inputs)
    starts = {f"static ({name})": static}
    if unit == "token":
        fisher = token_prior(measured.costs, measured.inputs)
        starts |= {"fisher": fisher, "fisher + static": fisher + 0.3 * static}
    return starts


def benefit_start(work: Workload, order: list[int], budget: float, distill: bool) -> Tensor:
    """First routers (R,D) fitted to what each place is worth to each sequence beside a static list.

    Where the first sequences agree on a place, it is not measured again: it is worth their mean to all that follow.
    """
    weights = work.model.place_weights()
    skipped = skipped_places(order, weights, 1 - budget)
    pilot, rest = work.examples[:PILOT_SAMPLES], work.examples[PILOT_SAMPLES:]
    benefits, inputs = measure_benefits(work.of(pilot), skipped, distill)
    if rest:
        asked = contested(benefits, weights, budget)
        more, read = measure_benefits(work.of(rest), skipped, distill, asked)
        more = benefits.mean(dim=1, keepdim=True).expand_as(more).index_copy(0, torch.tensor(asked), more[asked])
        benefits, inputs = torch.cat([benefits, more], dim=1), torch.cat([inputs, read], dim=1)
    sources = [example.domain for part in (pilot, rest) for group in by_length(part, EVAL_BATCH) for example in group]
    return benefit_prior(benefits, inputs, weights, order, sources, budget)


def loss_at_budget(
    select: Workload, budget: float, teacher: dict[int, Tensor] | None = None
) -> tuple[float, float]:
    """Loss of the routers on the selection set at exactly the budget, and the cut there, at which they are left."""
    cut = settle(select, budget)
    return evaluate(select, teacher=teacher)["loss"], cut
