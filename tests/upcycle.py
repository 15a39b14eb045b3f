"""Make a small mixture of experts of a dense model, and ask on it what routers of experts are worth.

    python tests/upcycle.py --model=checkpoints/smollm2-135m-instruct --out=out/upcycled

One command, seeded, no weights kept in the repository: the mixture (OUT/base, if it is not there yet), routers at a
skip share of 25 % of the pairs of a token and one of its experts (OUT/tuned), OUT/table.json and, with matplotlib,
OUT/load.png. Needs a CPU for about an hour.

The mixture, of Qwen2-MoE's form: each MLP's strongest neurons make the shared expert and the next ones an expert that
most tokens choose; the others are told apart by balanced k-means of when they are active, one group an expert. A token
runs the experts whose outputs a ridge regression of the MLP's input expects to be the longest; nothing balances their
use. The gate is that regression, on so small a scale that the weights hardly differ from 1 / k (the down projections
carry the k). The down projections are refitted by least squares, layer by layer, which makes up for the experts that do
not run. Then experts and gates are trained on the dense model's own predictions until the mixture is close to it.
"""

import dataclasses
import math
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import runtime  # noqa: E402
import train  # noqa: E402
from model import Experts, FeedForward, Transformer, load_config, load_model, load_routers  # noqa: E402
from recipe.calibrate import settle  # noqa: E402
from recipe.controls import Controls  # noqa: E402
from recipe.experts import gate_start, loads, reading_gates  # noqa: E402
from recipe.fit import token_prior  # noqa: E402
from recipe.measure import measure_costs, typical_costs  # noqa: E402
from recipe.passes import Workload, collate, evaluate, head_gradient, head_losses, states  # noqa: E402
from recipe.report import table  # noqa: E402
from recipe.trunk import TrunkCache  # noqa: E402
from recipe.places import named_layers, routing_of  # noqa: E402
from router import set_cuts  # noqa: E402
from runtime import ALONE as CPU, print0, setting  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

GATE_SPREAD = 0.1  # standard deviation of a new gate's logits
RIDGE = 0.03  # of the gate's regression, in mean squares of the inputs
RIDGES = (0.1, 0.3, 1.0)  # of the down projections', in mean squares of their inputs


@dataclass
class UpcycleConfig:
    model: str = setting("checkpoints/smollm2-135m-instruct", "dense checkpoint folder")
    data: tuple[str, ...] = setting((str(ROOT / "data/demo/instructions.jsonl"),), "rows to train on, as train.py's")
    heldout: float | str = setting(str(ROOT / "data/demo/instructions.jsonl"), "rows to report on, as train.py's")
    out: str = setting("out/upcycled", "folder for everything that is written")
    layers: str = setting("all", "layers whose MLPs become mixtures, as train.py's --layers")
    experts: int = setting(8, "experts of each layer")
    active: int = setting(3, "experts that a token runs")
    shared: int = setting(768, "neurons, the strongest ones, of the expert that every token runs beside them")
    tokens: int = setting(8192, "tokens on which neurons are told apart")
    minutes: float = setting(20.0, "longest training")
    gap: float = setting(0.15, "training ends where the loss is this close to the dense model's")
    lr: float = setting(3e-4, "learning rate")
    batch: int = setting(8, "rows a step")
    budget: float = setting(0.75, "share of pairs that run with routers")
    report: tuple[float, ...] = setting((0.5,), "more budgets in the table")
    samples: int = setting(32, "examples that price places, and that select; twice as many calibrate")
    steps: int | None = setting(None, "optimizer steps of the routers; none: as train.py's")
    max_length: int = setting(512, "tokens of an example, at most")
    heldout_samples: int = setting(64, "most examples in the table")
    tune: Literal["full", "start", "no"] = setting(
        "full", "how routers come: by train.py; by its first routers alone; no: make the mixture alone")
    speed: bool = setting(True, "time the tuned routers too")
    seed: int = setting(1337, "seed of everything")


# -----------------------------------------------------------------------------
# From one MLP to a mixture


def told_apart(activity: Tensor, n: int, rounds: int = 10) -> Tensor:
    """Group (F,) of each neuron, n groups of equal size, by balanced k-means of its activity (N,F) over tokens."""
    features = F.normalize(activity.T, dim=1)  # (F,N)
    size, order = len(features) // n, torch.randperm(len(features), generator=runtime.generator("centres"))
    centres, group = features[order[:n]], torch.zeros(len(features), dtype=torch.long)
    for _ in range(rounds):
        likeness, room = features @ centres.T, [size] * n  # (F,n)
        wishes = likeness.argsort(dim=1, descending=True).tolist()
        for neuron in likeness.max(dim=1).values.argsort(descending=True).tolist():  # the surest ones choose first
            chosen = next(group for group in wishes[neuron] if room[group])
            group[neuron], room[chosen] = chosen, room[chosen] - 1
        centres = F.normalize(torch.stack([features[group == e].mean(0) for e in range(n)]), dim=1)
    return group


@torch.no_grad()
def split(mlp: FeedForward, x: Tensor, y: Tensor, mixture: Experts) -> None:
    """Fill a mixture from an MLP, its inputs x and its outputs y (N,D): the strongest neurons into the shared expert,
    the next ones into the first, the others told apart, and a gate that expects the long sums."""
    active = F.silu(mlp.w1(x)) * mlp.w3(x)  # (N,F)
    strength = (active * mlp.w2.weight.norm(dim=0)).abs()
    order = (strength / y.norm(dim=1, keepdim=True)).square().mean(0).argsort(descending=True)
    n, width, shared = len(mixture.experts), len(mixture.experts[0].w1.weight), len(mixture.shared.w1.weight)
    shared, first, rest = order.split([shared, width, (n - 1) * width])
    group = told_apart(strength[:, rest], n - 1)
    groups, spans = [first, *(rest[group == e] for e in range(n - 1))], []
    fill(mixture.shared, mlp, shared, 2.0)  # its gate's weights are 0, and sigmoid(0) = 1 / 2
    mixture.shared_gate.weight.zero_()
    for expert, mine in zip(mixture.experts, groups):
        fill(expert, mlp, mine, mixture.k)
        spans.append((active[:, mine] @ mlp.w2.weight[:, mine].T).norm(dim=1))
    target = torch.stack(spans, dim=1).clamp(min=1e-9).log()  # (N,E)
    target = target - target.mean(1, keepdim=True)
    kernel = x.T @ x + RIDGE * len(x) * x.square().mean() * torch.eye(x.shape[1])
    gate = torch.linalg.solve(kernel, x.T @ target)  # (D,E)
    mixture.gate.weight.copy_((gate * GATE_SPREAD / (x @ gate).std()).T)


def fill(expert: FeedForward, mlp: FeedForward, neurons: Tensor, scale: float) -> None:
    """Give an expert these neurons of an MLP, their outputs scaled."""
    expert.w1.weight.copy_(mlp.w1.weight[neurons])
    expert.w3.weight.copy_(mlp.w3.weight[neurons])
    expert.w2.weight.copy_(mlp.w2.weight[:, neurons] * scale)


@torch.no_grad()
def refit(mixture: Experts, x: Tensor, target: Tensor) -> tuple[float, float]:
    """Move the down projections so that the mixture of inputs x (N,D) comes closest to target (N,D), in closed form.

    Each token counts by its target's length; the ridge is the one that the last quarter of the tokens likes best.
    Returns the squared error there before and after.
    """
    weights, chosen = mixture.assign(x)
    shares = torch.zeros(len(x), len(mixture.experts)).scatter(1, chosen, weights)  # (N,E)
    shares = torch.cat((shares, torch.sigmoid(mixture.shared_gate(x))), dim=1)
    experts = [*mixture.experts, mixture.shared]
    parts = [F.silu(expert.w1(x)) * expert.w3(x) * share[:, None] for expert, share in zip(experts, shares.T)]
    features, down = torch.cat(parts, dim=1), torch.cat([expert.w2.weight for expert in experts], dim=1)  # (N,F), (D,F)
    scale = 1 / target.norm(dim=1, keepdim=True).clamp(min=1e-6)
    features, rest = features * scale, (target - features @ down.T) * scale
    fitted = len(x) * 3 // 4
    known, unknown, errors = features[:fitted], features[fitted:], {}
    kernel, pull = known.T @ known, known.T @ rest[:fitted]
    for ridge in RIDGES:
        eye = ridge * kernel.diagonal().mean() * torch.eye(len(kernel))
        move = torch.cholesky_solve(pull, torch.linalg.cholesky(kernel + eye))  # (F,D)
        errors[(rest[fitted:] - unknown @ move).square().sum(1).mean().item()] = move
    best = min(errors)
    for expert, piece in zip(experts, errors[best].split([part.shape[1] for part in parts])):
        expert.w2.weight += piece.T
    return rest[fitted:].square().sum(1).mean().item(), best


@torch.no_grad()
def upcycled(dense: Transformer, examples: list, cfg: UpcycleConfig) -> Transformer:
    """The mixture before its training, layer by layer: each sees what the mixtures below it make of the tokens, and is
    to lead them back to what the dense model makes of them."""
    layers = range(dense.config.n_layers)
    chosen = named_layers(cfg.layers, len(layers))
    width = (dense.config.hidden_dim - cfg.shared) // cfg.experts
    fields = dict(family="qwen2_moe", n_experts=cfg.experts, experts_per_token=cfg.active, expert_dim=width)
    fields |= dict(shared_dim=dense.config.hidden_dim - width * cfg.experts, norm_topk=True)
    fields["dense_layers"] = tuple(layer for layer in layers if layer not in chosen)
    mixture = Transformer(dataclasses.replace(dense.config, **fields))
    own = {name: value for name, value in dense.state_dict().items() if name in mixture.state_dict()}
    mixture.load_state_dict(own, strict=False)
    count = sum(read < cfg.tokens for read in accumulate((len(e.tokens) for e in examples), initial=0))
    begun = [dense.begin(torch.tensor([example.tokens])) for example in examples[:count]]
    calls, wanted = [call for _, call in begun], [x for x, _ in begun]
    streams = list(wanted)
    for number, (old, new) in enumerate(zip(dense.layers, mixture.layers)):
        same = number < min(chosen)  # nothing differs yet
        wanted = [old(x, call)[0] for x, call in zip(wanted, calls)]  # (1,T,D)
        if number not in chosen:
            streams = list(wanted) if same else [old(x, call)[0] for x, call in zip(streams, calls)]
            continue
        seen = []
        hook = old.feed_forward.register_forward_hook(lambda _, args, y: seen.append((args[0].clone(), y.clone())))
        whole = [old(x, call)[0][0] for x, call in zip(streams, calls)]  # (T,D)
        hook.remove()
        x, y = (torch.cat(part) for part in zip(*seen))
        middle = torch.cat(whole) - y  # (N,D) behind the attention
        split(old.feed_forward, x, y, new.feed_forward)
        before, after = refit(new.feed_forward, x, torch.cat([y[0] for y in wanted]) - middle)
        lengths = [len(y) for y in whole]
        streams = [y[None] for y in (middle + new.feed_forward(x)).split(lengths)]
        print0(f"layer {number}: squared error of an MLP's output {before:.3f}, refitted {after:.3f}")
    return mixture.eval()


# -----------------------------------------------------------------------------
# Training


@torch.no_grad()
def loss_of(model: Transformer, examples: list) -> float:
    """Mean loss of the answers' tokens."""
    total = count = 0
    for _, group in Workload(model, examples, CPU).groups():
        batch = collate(group, CPU.device)
        total += head_losses(model, states(model, batch, route="off")[0], batch.labels).sum().item()
        count += len(batch.labels)
    return total / count


def fit(mixture: Transformer, dense: Transformer, data: train.Data, cfg: UpcycleConfig) -> list[dict]:
    """Train experts and gates on KL to the dense model, over answer tokens; returns what was measured on the way."""
    mixture.requires_grad_(False)
    mixed = [block.feed_forward for block in mixture.layers if isinstance(block.feed_forward, Experts)]
    weights = [p for experts in mixed for p in experts.parameters()]
    for p in weights:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=cfg.lr, betas=(0.9, 0.98))
    goal, begun, path, step = loss_of(dense, data.select), time.perf_counter(), [], 0
    while True:
        minutes = (time.perf_counter() - begun) / 60
        if step % 20 == 0 or minutes > cfg.minutes:
            path.append({"step": step, "minutes": minutes, "loss": loss_of(mixture, data.select), "dense": goal})
            print0(f"step {step} | {minutes:.1f} min | selection loss {path[-1]['loss']:.4f} (dense {goal:.4f})")
            if path[-1]["loss"] - goal < cfg.gap or minutes > cfg.minutes:
                return path
        rows = [data.train[i] for i in train.global_batch(len(data.train), cfg.batch, cfg.seed, step)]
        batch = collate(sorted(rows, key=lambda row: -len(row.tokens)), CPU.device)
        with torch.no_grad():
            teacher = states(dense, batch, route="off")[0]
        h = states(mixture, batch, route="off")[0]
        _, dh = head_gradient(mixture, h, batch.labels, teacher, scale=1 / len(batch.labels))
        h.backward(dh)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / 20) * max(0.1, 1 - minutes / cfg.minutes)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def write(mixture: Transformer, cfg: UpcycleConfig, folder: Path) -> None:
    """The mixture's checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*token*", "generation_config.json"):
        for file in Path(cfg.model).glob(pattern):
            shutil.copy(file, folder)
    tensors = {name: value.contiguous() for name, value in mixture.state_dict().items()}
    runtime.write_atomic(folder / "model.safetensors", lambda path: save_file(tensors, path))
    runtime.write_json(folder / "config.json", asdict(mixture.config))


def base(cfg: UpcycleConfig, data: train.Data) -> Path:
    """The mixture's checkpoint folder, made where it is not there, and trained where it is not close enough yet."""
    folder, known = Path(cfg.out) / "base", Path(cfg.out) / "base.json"
    torch.manual_seed(cfg.seed)
    dense = load_model(cfg.model, dtype=torch.float32)
    if not (folder / "config.json").exists():
        write(upcycled(dense, data.train, cfg), cfg, folder)
    if not known.exists():
        mixture = load_model(folder, dtype=torch.float32)
        losses = {"dense": loss_of(dense, data.held), "mixture": loss_of(mixture, data.held)}
        print0(f"before training: held-out loss {losses['mixture']:.4f}, dense model {losses['dense']:.4f}")
        runtime.write_json(known, {"untrained": losses, "heldout": losses, "path": []})
    about = runtime.read_json(known)
    if cfg.minutes and about["heldout"]["mixture"] - about["heldout"]["dense"] > cfg.gap:
        mixture = load_model(folder, dtype=torch.float32)
        about["path"] += fit(mixture, dense, data, cfg)
        write(mixture, cfg, folder)
        about["heldout"]["mixture"] = loss_of(mixture, data.held)
        runtime.write_json(known, about)
    return folder


# -----------------------------------------------------------------------------
# What it is, and what routers are worth on it


@torch.no_grad()
def likeness(model: Transformer) -> list[float]:
    """Of each layer the greatest cosine between the weights of two experts."""
    found = []
    for block in (model.layers[layer] for layer in model.routing.layers):
        flat = [torch.cat([p.flatten() for p in expert.parameters()]) for expert in block.feed_forward.experts]
        flat = F.normalize(torch.stack(flat), dim=1)
        found.append((flat @ flat.T - 2 * torch.eye(len(flat))).max().item())
    return found


def by_layer(model: Transformer, values: list[float]) -> list[list[float]]:
    return [values[model.routing.rows_of(layer)] for layer in model.routing.layers]


def unevenness(rows: list[list[float]]) -> list[float]:
    """Busiest load / median load of each layer."""
    return [max(row) / statistics.median(row) for row in rows]


def started(cfg: UpcycleConfig, folder: Path, data: train.Data) -> dict:
    """The table of routers that are only fitted: to what pairs cost, or to what the gate says, without a step."""
    model = load_model(folder, dtype=torch.float32)
    model.add_routers(routing_of(model.config, "expert_token", range(model.config.n_layers)))
    measured = measure_costs(Workload(model, data.train[: cfg.samples], CPU), cfg.seed)
    orders = {"fisher": typical_costs(measured.costs).argsort(), "load": model.place_shares().argsort()}
    orders = {name: order.tolist() for name, order in orders.items()}
    trunk = TrunkCache(Path(cfg.out) / "trunk" / "start.bin", model, [*data.select, *data.held], 1e9)
    select, held = (Workload(model, examples, CPU, trunk) for examples in (data.select, data.held))
    fisher, gate = token_prior(measured.costs, measured.inputs), gate_start(model, measured.inputs)
    starts, tried = {"fisher": fisher, "gate": gate, "gate + fisher": gate + fisher}, {}
    for name, weights in starts.items():
        put(model, weights)
        settle(select, cfg.budget)
        tried[name] = evaluate(select)["loss"]
    best = min(tried, key=tried.get)
    print0("selection loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in tried.items()))
    put(model, starts[best])
    settle(select, cfg.budget)
    rows = Controls(held).rows({cfg.budget: evaluate(held)}, orders)
    return {"base": runtime.read_json(Path(cfg.out) / "base.json"), "best": best, "tried": tried, "report": rows,
            **measured_loads(cfg, model, held), "likeness": likeness(model)}


def put(model: Transformer, weights: Tensor) -> None:
    for router, row in zip(model.routers(), weights):
        router.weight.data.copy_(row[None])


def measured_loads(cfg: UpcycleConfig, model: Transformer, work: Workload) -> dict:
    """Loads by layer: with nothing skipped, with the routers as they stand, with the smallest gates skipped."""
    cuts, result = [router.cut.item() for router in model.routers()], {}
    for budget, now in ((1.0, -math.inf), (cfg.budget, cuts)):
        set_cuts(model, now)
        assigned, ran = loads(work)
        result[f"loads_at_{budget}"] = {"assigned": by_layer(model, assigned), "executed": by_layer(model, ran)}
    with reading_gates(model):
        settle(work, cfg.budget, rounds=3)
        result["loads_smallest_gate"] = {"executed": by_layer(model, loads(work)[1])}
    uneven = unevenness(result["loads_at_1.0"]["assigned"])
    return result | {"busiest_by_median": uneven, "mean_busiest_by_median": mean(uneven)}


def report(cfg: UpcycleConfig, folder: Path, summary: dict, held: list) -> dict:
    """The table: losses by budget, what the mixture is like, loads before and after tuning, speed."""
    model = load_model(folder, dtype=torch.float32)
    load_routers(model, summary["routers"], cfg.budget)
    result = measured_loads(cfg, model, Workload(model, held, CPU))
    result["likeness"] = likeness(model)
    longest = (min(512, model.config.max_seq_len // 2),)
    timed = bench.BenchConfig(model=str(folder), granularity="expert_token", budget=(cfg.budget, *cfg.report),
                              prefill=longest, decode=longest, batch=(1, 8), dtype="float32", threads=1)
    result["speed"] = bench.bench(timed)["rows"] if cfg.speed else []
    return {"base": runtime.read_json(Path(cfg.out) / "base.json"), "report": summary["report"], **result}


def figure(result: dict, budget: float, path: Path) -> None:
    """Load of each expert over the mean assigned load, the busiest first: assigned, and executed with routers."""
    try:
        import matplotlib
    except ImportError:
        print0("no matplotlib, so no figure: its numbers are in table.json")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    assigned = [load for row in result["loads_at_1.0"]["assigned"] for load in row]
    order, mean_load = sorted(range(len(assigned)), key=lambda i: -assigned[i]), mean(assigned)
    parts = (("routers", f"loads_at_{budget}"), ("smallest gate weights", "loads_smallest_gate"))
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, sharey=True)
    for axis, (name, key) in zip(axes, parts):
        executed = [load for row in result[key]["executed"] for load in row]
        axis.bar(range(len(order)), [assigned[i] / mean_load for i in order], width=1.0, color="#c6d4e1",
                 label="assigned, before tuning")
        axis.bar(range(len(order)), [executed[i] / mean_load for i in order], width=1.0, color="#2f6690",
                 label=f"executed at {budget:.0%} of pairs: {name}")
        axis.set_ylabel("load / mean assigned load")
        axis.legend(loc="upper right")
    axes[1].set_xlabel("experts of all layers, the busiest first")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    cfg = runtime.cli(UpcycleConfig)
    context = load_config(cfg.model).max_seq_len
    settings = train.TrainConfig(model=cfg.model, data=cfg.data, heldout=cfg.heldout, out=cfg.out, truncate=True,
                                 max_length=min(cfg.max_length, context), skip_bad=True, seed=cfg.seed, dtype="float32",
                                 cost_samples=cfg.samples, select_samples=cfg.samples, steps=cfg.steps,
                                 calibrate_samples=2 * cfg.samples, heldout_samples=cfg.heldout_samples)
    data = train.load_data(settings, load_tokenizer(cfg.model), context)
    folder = base(cfg, data)
    if cfg.tune == "no":
        return
    if cfg.tune == "start":
        result = started(cfg, folder, data)
        runtime.write_json(Path(cfg.out) / "table.json", result)
        figure(result, cfg.budget, Path(cfg.out) / "load.png")
        print(table(result["report"]))
        return
    tuning = dataclasses.replace(settings, model=str(folder), out=str(Path(cfg.out) / "tuned"), budget=cfg.budget,
                                 granularity="expert_token", kv=None, lr=None, reads=None, layers="all",
                                 report=cfg.report)
    summary = train.train(tuning)
    result = report(cfg, folder, summary, data.held)
    runtime.write_json(Path(cfg.out) / "table.json", result)
    figure(result, cfg.budget, Path(cfg.out) / "load.png")
    print(table(summary["report"]))
    about = result["base"]["heldout"]
    print(f"held-out loss {about['mixture']:.4f}, dense model {about['dense']:.4f}; greatest cosine "
          f"of two experts {max(result['likeness']):.3f}; busiest / median load {result['mean_busiest_by_median']:.2f}")
    for row in result["speed"]:
        print(f"{row['phase']} {row['context']} batch {row['batch']} capacity {row['capacity']:.2f}: "
              f"{row['seconds'] * 1e3:.1f} ms, speedup {row['speedup']:.3f}, ceiling {row['ceiling']:.3f}")


if __name__ == "__main__":
    runtime.run_main(main)
