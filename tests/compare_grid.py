"""Does routing ever lose? Time dense and routed in turn over a grid of granularities, batches, contexts and shares.

Run: python tests/compare_grid.py --model=checkpoints/smollm2-135m-instruct --threads=2 --out=grid.json --seconds=90
     python tests/compare_grid.py --shape=llama3-8b --prefill=512,2048 --decode= --batch=1 --skipped=0.5 --out=wide.json
     python tests/compare_grid.py --out=grid.json --report --crossover=crossover.json --figure=docs/figures/grid.png

Not part of the test command: it needs minutes of an idle machine; the figure needs matplotlib. A call measures until
`seconds` are over and adds its samples to --out; the same command given again goes on, until every cell has `rounds` of
them. Each round draws other gates and other tokens. One unit of work is a dense run and the routed runs of some cells
beside it, in an order that turns from round to round; a sample is dense / routed seconds of one unit. Contexts of
decode steps are made without products, so that keys are zeros: they take the same time to read. Where other work shares
the machine, --clock=processor counts the processor seconds of one thread. The table gives the median of each
cell's samples with a 95 % interval (of the median: bootstrap, 2,000 draws, seed 0), the ceiling (recipe/cost.py, mean
over rounds), and whether the cell meets both bars: no interval of routed / dense wholly above 1.02; where the ceiling
is 1.10 or more, a speed-up of at least 1 + (ceiling - 1) / 2. Fewer than 5 samples decide nothing.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as model_module  # noqa: E402
import runtime  # noqa: E402
from bench import Point, itemsize_of, random_model, run_decode, run_prefill  # noqa: E402
from model import KVCache, load_model  # noqa: E402
from recipe.cost import decode_ceiling, prefill_ceiling  # noqa: E402
from recipe.places import deep_layers, random_route  # noqa: E402
from router import RouterConfig  # noqa: E402
from runtime import setting  # noqa: E402

VARIANTS = ("attn_sequence", "attn_token kv=all", "mlp_token", "block_token", "both_sequence")
SKIPPED = (0.25, 0.5)  # shares of routed units
DRAWS = 2000
BARS = ("never_loses", "half_gained")
ENOUGH = 5  # samples that decide about a cell


@dataclass
class GridConfig:
    model: str | None = setting(None, "checkpoint folder")
    shape: str | None = setting(None, "in place of --model: two routed layers of this model's widths (bench.py)")
    routed: int = setting(16, "deep layers of --model that own a router")
    variants: tuple[str, ...] = setting(VARIANTS, "granularities, with their kv policy")
    skipped: tuple[float, ...] = setting(SKIPPED, "shares of routed units that are skipped")
    prefill: tuple[int, ...] = setting((64, 512, 2048), "prompt lengths")
    decode: tuple[int, ...] = setting((512,), "contexts of decode steps")
    batch: tuple[int, ...] = setting((1, 8), "batch sizes")
    at_once: int = setting(2, "routed runs beside one dense run")
    rounds: int = setting(15, "samples of each cell")
    least: int = setting(3, "samples of a cell whose dense run takes more than 5 seconds")
    steps: int = setting(8, "decode steps in one measurement")
    seconds: float = setting(90.0, "stop before a unit of work that would not end within so many seconds")
    threads: int | None = setting(None, "CPU threads; none: torch's choice")
    clock: Literal["wall", "processor"] = setting("wall", "what counts: time passed, or one thread's processor time")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    out: str = setting("grid.json", "samples; a later call adds to them")
    report: bool = setting(False, "measure nothing: print the table of --out")
    crossover: str | None = setting(None, "with --figure: what tests/measure_costs.py wrote")
    figure: str | None = setting(None, "with --report: draw it all into this PNG, with its JSON beside it")


@dataclass(frozen=True)
class Variant:
    """What a routed run skips."""

    name: str
    skipped: float

    def routing(self, layers: tuple[int, ...]) -> RouterConfig:
        granularity, _, kv = self.name.partition(" kv=")
        return RouterConfig.of(granularity, layers, kv=kv or "routed")

    def gates(self, routing: RouterConfig, rows: int, width: int, seed: int) -> torch.Tensor:
        """Gates (R,B), or (R,B,width) of tokens, drawn at a share; each row its own."""
        tokens, places = width if routing.unit == "token" else None, len(routing.places)
        alike, drawn = torch.ones(places) / places, []
        for row in range(rows):
            drawn.append(random_route(alike, 1 - self.skipped, runtime.generator("grid", seed, row), tokens))
        return torch.stack(drawn, dim=1)


# -----------------------------------------------------------------------------
# Measuring


@contextmanager
def without_products() -> Iterator[None]:
    """Matrix products and attention give zeros: a cache is filled in its right shape, in no time."""

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)

    with patch.object(model_module.Linear, "forward", linear):
        with patch.object(model_module, "sdpa", lambda q, *_, **__: torch.zeros_like(q)):
            yield


class Grid:
    """The model, what remains to be measured, and the samples so far."""

    def __init__(self, cfg: GridConfig):
        if (cfg.model is None) == (cfg.shape is None):
            raise ValueError("nothing to measure; give --model=DIR or --shape=NAME, one of them, or --report")
        if cfg.clock == "processor":
            torch.set_num_threads(1)
        self.cfg, self.rt = cfg, runtime.setup("cpu", cfg.dtype)
        if cfg.shape is None:
            self.model = load_model(cfg.model, dtype=self.rt.dtype)
            self.layers = deep_layers(cfg.routed, self.model.config.n_layers)
        else:
            self.model = random_model(cfg.shape, 2, 0, self.rt)
            self.layers = (0, 1)
        self.samples = runtime.read_json(cfg.out)["samples"] if Path(cfg.out).exists() else []

    def units(self) -> list[tuple[int, Point, tuple[Variant, ...]]]:
        """What remains: round by round, each point with some variants."""
        cfg, n, done = self.cfg, self.cfg.at_once, {(*sample["unit"], sample["round"]) for sample in self.samples}
        points = [Point("decode", batch, n) for n in cfg.decode for batch in cfg.batch]
        points += [Point("prefill", batch, n) for n in cfg.prefill for batch in cfg.batch]
        variants, left = [Variant(*pair) for pair in product(cfg.variants, cfg.skipped)], []
        for turn, point in product(range(cfg.rounds), points):
            seconds = [sample["dense"] for sample in self.samples if sample["unit"][:3] == [*asdict(point).values()]]
            if turn >= cfg.least and seconds and min(seconds) > 5:
                continue
            missing = [v for v in variants if (*asdict(point).values(), v.name, v.skipped, turn) not in done]
            left += [(turn, point, tuple(missing[i : i + n])) for i in range(0, len(missing), n)]
        return left

    @torch.inference_mode()
    def run(self, point: Point, variant: Variant | None, turn: int) -> tuple[float, float]:
        """Seconds of one run (decode: of a step), and its ceiling."""
        model, steps = self.model, self.cfg.steps
        clock = time.perf_counter if self.cfg.clock == "wall" else time.process_time
        shape = (point.batch, point.context)
        tokens = torch.randint(model.config.vocab_size, shape, generator=runtime.generator("grid tokens", turn))
        route, gates, later = "off", None, [None] * steps
        if variant is not None:
            model.add_routers(variant.routing(self.layers))
            route, gates = "gather", variant.gates(model.routing, *shape, turn)
            if point.phase == "decode" and model.routing.unit == "token":
                later = list(variant.gates(model.routing, point.batch, steps, turn + 1000).split(1, dim=2))
        if point.phase == "prefill":
            begin = clock()
            run_prefill(model, tokens, route, gates)
            seconds = clock() - begin
            if variant is None:
                return seconds, 1.0
            return seconds, prefill_ceiling(model.config, model.routing, gates, point.context)
        cache = KVCache(model, point.batch, max_len=point.context + steps)
        with without_products():
            _, context = model.hidden(tokens, cache=cache, route=route, gates=gates)
        run_decode(model, cache, tokens[:, -1:], route, later[:1])  # warms up
        begin = clock()
        sample = run_decode(model, cache, tokens[:, -1:], route, later)
        seconds = (clock() - begin) / steps
        if variant is None:
            return seconds, 1.0
        return seconds, decode_ceiling(
            model.config, model.routing, itemsize_of(model), point.context, context, sample.steps
        )

    def measure(self, turn: int, point: Point, variants: tuple[Variant, ...]) -> None:
        """One unit of work."""
        order = [None, *variants]
        first = turn % len(order)
        results = {variant: self.run(point, variant, turn) for variant in order[first:] + order[:first]}
        dense = results[None][0]
        for variant in variants:
            seconds, ceiling = results[variant]
            unit = [*asdict(point).values(), variant.name, variant.skipped]
            self.samples.append(dict(unit=unit, round=turn, dense=dense, routed=seconds, ceiling=ceiling))

    def write(self) -> None:
        machine = dict(device=runtime.device_name(self.rt.device), threads=torch.get_num_threads())
        machine |= dict(torch=torch.__version__, dtype=str(self.rt.dtype), clock=self.cfg.clock)
        runtime.write_json(self.cfg.out, dict(**machine, samples=self.samples))


def measure(cfg: GridConfig) -> None:
    """Measure until the time is over or nothing remains."""
    started, grid, took = time.monotonic(), Grid(cfg), {}
    grid.run(Point("prefill", 1, 64), None, 0)  # warms up
    for turn, point, variants in grid.units():
        known = [sample["dense"] for sample in grid.samples if sample["unit"][:3] == [*asdict(point).values()]]
        guess = took.get(point, 1.2 * (len(variants) + 1) * min(known, default=0.0))
        if time.monotonic() - started + guess > cfg.seconds:
            continue
        begun = time.monotonic()
        grid.measure(turn, point, variants)
        took[point] = time.monotonic() - begun
        grid.write()
    print(f"{len(grid.units())} units remain")


# -----------------------------------------------------------------------------
# The report


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median, and its 95 % interval."""
    values = torch.tensor(ratios, dtype=torch.float64)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    ends = values[drawn].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return statistics.median(ratios), *ends.tolist()


def rows_of(samples: list[dict]) -> list[dict]:
    """One row a cell: median speed-up, interval, ceiling, and whether both bars are met."""
    cells = {}
    for sample in samples:
        cells.setdefault(tuple(sample["unit"]), []).append(sample)
    rows = []
    for (phase, batch, context, name, skipped), found in cells.items():
        speedup, low, high = interval([sample["dense"] / sample["routed"] for sample in found])
        ceiling = statistics.mean(sample["ceiling"] for sample in found)
        row = dict(phase=phase, batch=batch, context=context, variant=name, skipped=skipped, rounds=len(found))
        row |= dict(dense=statistics.median(sample["dense"] for sample in found), speedup=speedup, low=low, high=high)
        row |= dict(ceiling=ceiling, never_loses=1 / high <= 1.02)
        row["half_gained"] = ceiling < 1.10 or speedup >= 1 + (ceiling - 1) / 2
        rows.append(row)
    return rows


def place_of(row: dict) -> tuple:
    """Where a row stands in the table."""
    return row["phase"], row["context"], row["batch"], row["variant"], row["skipped"]


def show(rows: list[dict]) -> None:
    print("| regime | dense ms | variant | skipped | speed-up | 95 % interval | ceiling | rounds | bars |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=place_of):
        regime = f"{row['phase']} {row['batch']} x {row['context']:,}"
        spread = f"{row['low']:.3f} to {row['high']:.3f}"
        bars = " ".join(bar for bar in BARS if not row[bar]) or "met"
        bars = bars if row["rounds"] >= ENOUGH else "undecided"
        print(
            f"| {regime} | {row['dense'] * 1e3:,.1f} | {row['variant']} | {row['skipped']:.0%} | "
            f"{row['speedup']:.3f} | {spread} | {row['ceiling']:.3f} | {row['rounds']} | {bars} |"
        )


def draw_regime(axis, rows: list[dict]) -> None:
    """Speed-ups of one regime with their intervals, beside ceilings."""
    names = [(name, skipped) for name in VARIANTS for skipped in SKIPPED]
    found = {(row["variant"], row["skipped"]): row for row in rows}
    for at, name in enumerate(names):
        if row := found.get(name):
            spread = [[row["speedup"] - row["low"]], [row["high"] - row["speedup"]]]
            axis.errorbar(row["speedup"], at, xerr=spread, fmt="o", color="tab:blue", ms=4, capsize=2)
            axis.plot(row["ceiling"], at, "|", color="tab:red", ms=12, mew=2)
    axis.axvline(1, color="gray", lw=0.8)
    axis.set_yticks(range(len(names)), [f"{name} {skipped:.0%}" for name, skipped in names], fontsize=7)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title("{phase}, batch {batch}, {context:,} tokens".format(**rows[0]), fontsize=9)
    axis.set_xlabel("dense / routed time (red: ceiling)", fontsize=8)


def draw_crossover(axis, rows: list[dict]) -> None:
    """Where computing everybody begins to take less time than picking who runs, and what the model chooses."""
    for tokens in sorted({row["tokens"] for row in rows}):
        line = [row for row in rows if row["tokens"] == tokens]
        axis.plot([row["share"] for row in line], [row["ratio"] for row in line], label=f"{tokens:,} tokens")
        for row in line:
            axis.plot(row["share"], row["ratio"], "s" if row["chosen"] == "everybody" else "o", color="black", ms=4)
    axis.axhline(1, color="gray", lw=0.8)
    axis.set_title(f"{rows[0]['what']}: picked / everybody", fontsize=9)
    axis.set_xlabel("share that runs (square: everybody chosen)", fontsize=8)
    axis.legend(fontsize=7)


def figure(rows: list[dict], crossover: list[dict], path: Path) -> None:
    """A panel for each regime, and one for each kind of crossover."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    regimes, kinds = {}, {}
    for row in sorted(rows, key=place_of):
        regimes.setdefault((row["phase"], row["context"], row["batch"]), []).append(row)
    for row in crossover:
        kinds.setdefault(row["what"], []).append(row)
    panels = [(draw_regime, found) for found in regimes.values()]
    panels += [(draw_crossover, found) for found in kinds.values()]
    columns = -(-len(panels) // 2)
    fig, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 9), squeeze=False)
    for axis, (draw, found) in zip(axes.flat, panels):
        draw(axis, found)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    fig.tight_layout()
    runtime.write_atomic(path, lambda temporary: fig.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))


def main() -> None:
    cfg = runtime.cli(GridConfig)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if not cfg.report:
        measure(cfg)
    report = runtime.read_json(cfg.out)
    rows = rows_of(report.pop("samples"))
    show(rows)
    decided = [row for row in rows if row["rounds"] >= ENOUGH]
    missed = {f"not_{bar}": sum(not row[bar] for row in decided) for bar in BARS}
    print(json.dumps(dict(cells=len(rows), decided=len(decided), **missed)))
    if cfg.figure is not None:
        crossover = [] if cfg.crossover is None else runtime.read_json(cfg.crossover)
        runtime.write_json(Path(cfg.figure).with_suffix(".json"), dict(**report, rows=rows, crossover=crossover))
        figure(rows, crossover, Path(cfg.figure))


if __name__ == "__main__":
    runtime.run_main(main)
