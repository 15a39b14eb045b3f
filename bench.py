"""Time prefill and decode, dense against routed in turn, beside the ceiling that FLOPs or bytes allow.

    python bench.py --model=checkpoints/NAME --prefill=512,2048 --decode=512 --batch=1,16    forced routes, five budgets
    python bench.py --model=checkpoints/NAME --routers=OUT/routers.safetensors --budget=0.7 --prefill=512    router file
    python bench.py --shape=llama3-8b --shape_layers=2 --prefill=512      random weights of real widths, no checkpoint
    python bench.py --analytic             ceilings of well-known models on a well-known GPU, from published sizes alone

`speedup` is the median over rounds of dense seconds / routed seconds, the two timed one after the other; `ceiling` is
the ratio of their work (recipe/cost.py: FLOPs of a prefill, bytes of a decode step) at the realised capacity, the
routers' own work left out; `ratio` is speedup / ceiling. `seconds` are medians: of a prefill up to the logits of its
last token, or of one decode step of the whole batch. kv_bytes are those in use at `context`. peak_bytes is the
allocator's peak in one run on CUDA, the whole process's so far on CPU. The last line printed is one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import runtime
from model import KVCache, ModelConfig, Transformer, fill, kernels, load_routers
from recipe.base import load_base
from recipe.cost import Executed, ItemSize, decode_bytes, decode_ceiling, prefill_ceiling, prefill_flops
from recipe.int8 import rounded
from recipe.places import named_layers, random_route, routing_of
from recipe.speed import compile_model
from router import RouterConfig, capacity, cuts_for, set_cuts
from runtime import setting

BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Sizes from huggingface.co/{meta-llama/Meta-Llama-3-8B, mistralai/Mistral-7B-v0.3, Qwen/Qwen2.5-7B}/config.json
PUBLISHED = {
    "Llama-3-8B": ModelConfig(
        family="llama", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336,
        vocab_size=128256, max_seq_len=8192, norm_eps=1e-5, rope_theta=500000.0),
    "Mistral-7B": ModelConfig(
        family="mistral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336,
        vocab_size=32768, max_seq_len=32768, norm_eps=1e-5, rope_theta=1000000.0),
    "Qwen2.5-7B": ModelConfig(
        family="qwen2", dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944,
        vocab_size=152064, max_seq_len=131072, norm_eps=1e-6, rope_theta=1000000.0, qkv_bias=True),
}
COMMON = dict(max_seq_len=4096, norm_eps=1e-5, rope_theta=10000.0, head_dim=128)
# Mixtures of experts: the same of {allenai/OLMoE-1B-7B-0924, mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen1.5-MoE-A2.7B,
# Qwen/Qwen3-30B-A3B}
MIXTURES = {
    "OLMoE-1B-7B": ModelConfig(
        family="olmoe", dim=2048, n_layers=16, n_heads=16, n_kv_heads=16, hidden_dim=1024, vocab_size=50304,
        n_experts=64, experts_per_token=8, expert_dim=1024, qk_norm_whole=True, **COMMON),
    "Mixtral-8x7B": ModelConfig(
        family="mixtral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=32000,
        n_experts=8, experts_per_token=2, expert_dim=14336, norm_topk=True, **COMMON),
    "Qwen1.5-MoE-A2.7B": ModelConfig(
        family="qwen2_moe", dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5632, vocab_size=151936,
        n_experts=60, experts_per_token=4, expert_dim=1408, shared_dim=5632, qkv_bias=True, **COMMON),
    "Qwen3-30B-A3B": ModelConfig(
        family="qwen3_moe", dim=2048, n_layers=48, n_heads=32, n_kv_heads=4, hidden_dim=6144, vocab_size=151936,
        n_experts=128, experts_per_token=8, expert_dim=768, qk_norm=True, norm_topk=True, **COMMON),
}
SHAPES = {"llama3-8b": "Llama-3-8B", "mistral-7b": "Mistral-7B", "qwen2.5-7b": "Qwen2.5-7B",
          "olmoe-1b-7b": "OLMoE-1B-7B"}
ANALYTIC_PREFILL = (512, 2048, 8192, 32768)
ANALYTIC_DECODE = ((1, 512), (1, 8192), (16, 2048), (16, 8192), (64, 2048), (64, 8192))  # (batch, context)


@dataclass
class BenchConfig:
    model: str | None = setting(None, "checkpoint folder")
    shape: Literal["llama3-8b", "mistral-7b", "qwen2.5-7b", "olmoe-1b-7b"] | None = setting(
        None, "in place of --model: random weights of this model's widths")
    shape_layers: int = setting(2, "layers of a --shape")
    routers: str | None = setting(None, "router file; none: forced routes")
    granularity: str = setting(
        "attn_sequence", "what forced routes gate: {attn,mlp,block,both,expert}_{sequence,token}")
    layers: str | None = setting(
        None, "routed layers of forced routes: deep:N, all, or 3,5,8-12; none: deep:16, of a --shape all")
    kv: str = setting("routed", "attn_token, both_token: 'routed', a skipped token leaves no keys and values, or 'all'")
    budget: tuple[float, ...] | None = setting(
        None, "shares of routed units that execute; none: 0,0.25,0.5,0.75,1, or a router file's own")
    mixed: bool = setting(False, "unit sequence: each row of a batch takes its own forced route")
    prefill: tuple[int, ...] = setting((), "prompt lengths to time")
    decode: tuple[int, ...] = setting((), "context lengths at which to time decode steps")
    batch: tuple[int, ...] = setting((1,), "batch sizes")
    compile: bool = setting(False, "time with torch.compile")
    rounds: int = setting(5, "times each pair is measured in turn")
    steps: int = setting(8, "decode steps in one measurement")
    threads: int | None = setting(None, "CPU threads; none: torch's choice")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16")
    base_dtype: Literal["int8"] | None = setting(None, "int8: weights rounded to a byte each; none: in dtype")
    seed: int = setting(1337, "seed of tokens, of token routes and of a --shape's weights")
    out: str | None = setting(None, "write the JSON here too")
    analytic: bool = setting(False, "print the ceiling table of published models and stop")
    gpu: str = setting("NVIDIA H100 80GB HBM3", "device whose peaks --analytic uses")


@dataclass(frozen=True)
class Point:
    """One cell of the grid: a prompt of `context` tokens, or decode steps behind as many; `batch` rows."""

    phase: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.phase} | batch {self.batch} | context {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens that one prefill, or one decode step, processes."""
        return self.batch * (self.context if self.phase == "prefill" else 1)


# -----------------------------------------------------------------------------
# One run


@dataclass
class Sample:
    """One run: seconds (decode: of one step), realised gates of the context and of the steps, bytes."""

    seconds: float
    gates: torch.Tensor | None
    steps: list[torch.Tensor]
    kv_bytes: int
    peak_bytes: int


def timed(device: torch.device, fn: Callable[[], object]) -> tuple[float, object]:
    """Seconds that fn takes on the device, and its result: events on CUDA, the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = fn()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000, result
    begin = time.perf_counter()
    result = fn()
    return time.perf_counter() - begin, result


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@torch.inference_mode()
def run_prefill(model: Transformer, tokens: torch.Tensor, route: str, gates: torch.Tensor | None) -> Sample:
    """Process a prompt (B,T) into a fresh cache, up to the logits of its last token."""
    reset_peak(tokens.device)

    def fn():
        cache = KVCache(model, tokens.shape[0])
        h, realised = model.hidden(tokens, cache=cache, route=route, gates=gates)
        return cache, realised, model.head(h[:, -1])

    seconds, (cache, realised, _) = timed(tokens.device, fn)
    return Sample(seconds, realised, [], cache.used_bytes(), runtime.peak_memory_bytes(tokens.device))


@torch.inference_mode()
def run_decode(model: Transformer, cache: KVCache, token: torch.Tensor, route: str,
               gates: list[torch.Tensor | None]) -> Sample:
    """Greedy steps from token (B,1) after a cached context, one for each entry of gates; the cache ends as it came."""
    lengths, kv_bytes, realised = list(cache.lengths), cache.used_bytes(), []
    reset_peak(token.device)

    def fn():
        last = token
        for forced in gates:
            h, decided = model.hidden(last, cache=cache, route=route, gates=forced)
            last = model.head(h[:, -1]).argmax(dim=-1, keepdim=True)
            realised.append(decided)

    seconds, _ = timed(token.device, fn)
    cache.rewind(lengths)
    return Sample(seconds / len(gates), None, realised, kv_bytes, runtime.peak_memory_bytes(token.device))


# -----------------------------------------------------------------------------
# One point of the grid


def forced_gates(routing: RouterConfig, budget: float, batch: int, width: int, *, mixed: bool = False,
                 seed: int = 0) -> torch.Tensor:
    """Gates (R,B) or (R,B,width) at a budget.

    Unit sequence: round(budget R) places of each target, evenly spread, row b shifted by b if mixed. Unit token: drawn.
    """
    places = len(routing.places)
    if routing.unit == "token":
        rows = [random_route(torch.ones(places), budget, runtime.generator(seed, row), width) for row in range(batch)]
        return torch.stack(rows, dim=1)  # (R, B, width)
    gates = torch.zeros(places, batch)
    for target in {place.target for place in routing.places}:
        mine = [row for row, place in enumerate(routing.places) if place.target == target]
        n, count = len(mine), round(budget * len(mine))
        pattern = torch.tensor([float((i + 1) * count // n > i * count // n) for i in range(n)])
        gates[mine] = torch.stack([pattern.roll(row if mixed else 0) for row in range(batch)], dim=1)  # (R, B)
    return gates


@dataclass
class Subject:
    """What is measured. calibration: the router file's; None: forced routes."""

    model: Transformer
    config: BenchConfig
    calibration: dict | None
    device: torch.device


def routes(subject: Subject, point: Point, budget: float | None) -> tuple[torch.Tensor | None, list]:
    """Forced gates of a context and of each step; None for what routers decide, at the cuts that a budget sets."""
    model, config, free = subject.model, subject.config, [None] * subject.config.steps
    if subject.calibration is not None:
        if budget is not None:
            set_cuts(model, cuts_for(budget, subject.calibration))
        return None, free
    context = forced_gates(model.routing, budget, point.batch, point.context, mixed=config.mixed, seed=config.seed)
    if model.routing.unit == "sequence":
        return context.to(subject.device), free
    steps = forced_gates(model.routing, budget, point.batch, config.steps, seed=config.seed + 1)
    return context.to(subject.device), list(steps.to(subject.device).split(1, dim=2))


@torch.inference_mode()
def prepare(subject: Subject, point: Point, route: str, budget: float | None = None):
    """A repeatable run of one variant, and (decode) the gates of its context."""
    model, config = subject.model, subject.config
    shape = (point.batch, point.context)
    tokens = torch.randint(model.config.vocab_size, shape, generator=runtime.generator(config.seed, "tokens"))
    tokens = tokens.to(subject.device)
    gates, steps = routes(subject, point, budget) if route == "gather" else (None, [None] * config.steps)
    if point.phase == "prefill":
        return lambda: run_prefill(model, tokens, route, gates), None
    cache = KVCache(model, point.batch, max_len=point.context + config.steps)
    _, realised = model.hidden(tokens, cache=cache, route=route, gates=gates)
    return lambda: run_decode(model, cache, tokens[:, -1:], route, steps), realised


def expected(subject: Subject, point: Point, sample: Sample, context: torch.Tensor | None) -> tuple[float, float]:
    """Realised capacity and ceiling of a run; context: gates of a decode run's context."""
    model = subject.model

    def realised(gates: torch.Tensor) -> float:
        return capacity(gates, weights=model.place_weights()).item()

    if point.phase == "prefill":
        ceiling = prefill_ceiling(model.config, model.routing, sample.gates, point.context)
        return realised(sample.gates), ceiling
    itemsize = itemsize_of(model)
    ceiling = decode_ceiling(model.config, model.routing, itemsize, point.context, context, sample.steps)
    return statistics.mean(map(realised, sample.steps)), ceiling


def itemsize_of(model: Transformer) -> ItemSize:
    return ItemSize(model.tok_embeddings.weight.element_size(), model.dtype.itemsize)


def in_turn(dense: Callable[[], Sample], routed: Callable[[], Sample], rounds: int) -> list[tuple[Sample, Sample]]:
    """Samples of both, round by round; whoever begins a round ends the next one."""
    pairs = []
    for turn in runtime.track(range(rounds), "  rounds"):
        if turn % 2:
            second, first = routed(), dense()
        else:
            first, second = dense(), routed()
        pairs.append((first, second))
    return pairs


def bench_point(subject: Subject, point: Point, budgets: tuple[float | None, ...]) -> list[dict]:
    """Rows of one grid point: dense, then each budget against it."""
    config = subject.model.config
    work = f"{prefill_flops(config, point.context) * point.batch / 1e9:,.1f} GFLOP"
    if point.phase == "decode":
        itemsize = itemsize_of(subject.model)
        work = f"{decode_bytes(config, point.batch, point.context, itemsize) / 1e6:,.1f} MB a step"
    runtime.print0(f"\n{point} | dense {work}")
    dense, _ = prepare(subject, point, "off")
    dense()  # warms up
    rows, dense_samples = [], []
    for budget in budgets:
        routed, context = prepare(subject, point, "gather", budget)
        share, ceiling = expected(subject, point, routed(), context)  # warms up, and tells which route was realised
        pairs = in_turn(dense, routed, subject.config.rounds)
        off, on = [first for first, _ in pairs], [second for _, second in pairs]
        variant = dict(granularity=subject.model.routing.granularity, route="gather", budget=budget, capacity=share)
        speedup = statistics.median(first.seconds / second.seconds for first, second in pairs)
        rows.append(row_of(point, variant, on, speedup, ceiling))
        show(rows[-1], statistics.median(sample.seconds for sample in off))
        dense_samples += off
    variant = dict(granularity=None, route="off", budget=None, capacity=1.0)
    rows.insert(0, row_of(point, variant, dense_samples, 1.0, 1.0))
    show(rows[0])
    return rows


def row_of(point: Point, variant: dict, samples: list[Sample], speedup: float, ceiling: float) -> dict:
    """One row of the report."""
    seconds = statistics.median(sample.seconds for sample in samples)
    return {
        **asdict(point),
        **variant,
        "seconds": seconds,
        "tokens_per_second": point.tokens / seconds,
        "speedup": speedup,
        "ceiling": ceiling,
        "ratio": speedup / ceiling,
        "kv_bytes": samples[-1].kv_bytes,
        "peak_bytes": samples[-1].peak_bytes,
    }


def show(row: dict, dense_seconds: float | None = None) -> None:
    """Print a row; dense_seconds: of the dense runs beside it."""
    parts = [f"{row['seconds'] * 1e3:9.2f} ms", f"{row['tokens_per_second']:9,.1f} tok/s"]
    name = "  dense      "
    if dense_seconds is not None:
        budget = "own" if row["budget"] is None else f"{row['budget']:.2f}"
        name = f"  budget {budget} | capacity {row['capacity']:.3f} | ceiling {row['ceiling']:.3f}"
        parts[0] += f" (dense {dense_seconds * 1e3:9.2f})"
        parts += [f"speedup {row['speedup']:.3f}", f"speedup/ceiling {row['ratio']:.3f}"]
    parts += [f"KV {row['kv_bytes'] / 1e6:,.1f} MB", f"peak {row['peak_bytes'] / 1e6:,.0f} MB"]
    runtime.print0(" | ".join([name, *parts]))


# -----------------------------------------------------------------------------
# The grid


def random_model(name: str, layers: int, seed: int, rt: runtime.Runtime, base_dtype: str | None = None) -> Transformer:
    """A frozen model of published widths with so many layers, whose weights nobody trained.

    Its head is tied, which saves memory and changes no time. Raises ValueError for more layers than the model has.
    """
    config = (PUBLISHED | MIXTURES)[SHAPES[name]]
    if not 1 <= layers <= config.n_layers:
        raise ValueError(f"shape_layers is {layers}, expected 1 to the {config.n_layers} layers of {name}")
    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=layers, tie_embeddings=True))
    rng, empty = torch.Generator(rt.device).manual_seed(seed), model.state_dict()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in empty.items():
            values = torch.ones(tensor.shape, dtype=rt.dtype, device=rt.device)
            if tensor.dim() > 1:  # a norm's weights stay 1
                values.normal_(std=config.dim**-0.5, generator=rng)
            yield key, values

    return fill(model, rounded(model, weights(), rt.dtype) if base_dtype else weights()).to(rt.device)


def check(config: BenchConfig) -> None:
    """Refuse settings under which nothing, or nothing sensible, would be measured."""
    grid = config.batch and (config.prefill or config.decode)
    if (config.model is None) == (config.shape is None) or not grid:
        raise ValueError("nothing to measure; give --model=DIR or --shape=NAME, one of them, with --prefill=N,... or "
                         "--decode=N,..., or --analytic alone")
    if config.routers is not None and config.shape is not None:
        raise ValueError("routers belong to the checkpoint they were tuned on; give --model=DIR in place of --shape")
    if config.routers is not None and config.layers is not None:
        raise ValueError("layers are those of the router file; leave out --layers or --routers")
    counts = [*config.prefill, *config.decode, *config.batch, config.rounds, config.steps]
    if config.threads is not None:
        counts.append(config.threads)
    if min(counts) < 1:
        raise ValueError(f"{min(counts)} was found among prefill, decode, batch, rounds, steps and threads, expected 1 "
                         "or more of each")
    for budget in config.budget or ():
        if not 0 <= budget <= 1:
            raise ValueError(f"budget is {budget}, expected a share between 0 and 1: give --budget=0.5")


def subject_of(config: BenchConfig, rt: runtime.Runtime) -> Subject:
    """The model to measure, with its routers."""
    if config.shape is not None:
        model = random_model(config.shape, config.shape_layers, config.seed, rt, config.base_dtype)
    else:
        model = load_base(config.model, rt, base_dtype=config.base_dtype)
    n_layers, calibration = model.config.n_layers, None
    longest = max((*config.prefill, *(context + config.steps for context in config.decode)))
    if longest > model.config.max_seq_len:
        raise ValueError(f"{longest} tokens were asked for, expected at most the context of the model, "
                         f"{model.config.max_seq_len}: lower --prefill, --decode or --steps")
    if config.routers is not None:
        calibration = load_routers(model, config.routers).calibration
    else:
        text = config.layers or ("deep:16" if config.shape is None else "all")
        layers = named_layers(text, n_layers)
        model.add_routers(routing_of(model.config, config.granularity, layers, kv=config.kv))
    if config.compile:
        compile_model(model)
    return Subject(model, config, calibration, rt.device)


def bench(config: BenchConfig) -> dict:
    """Measure the grid. Returns the report: settings, device and rows."""
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rt = runtime.setup(config.device, config.dtype, config.seed)
    subject, device = subject_of(config, rt), runtime.device_name(rt.device)
    budgets = config.budget or (BUDGETS if config.routers is None else (None,))
    routing = subject.model.routing
    runtime.print0(f"{device} | {str(rt.dtype).removeprefix('torch.')} | {torch.get_num_threads()} CPU threads | "
                   f"{'compiled' if config.compile else 'eager'} | {routing.granularity} on layers "
                   f"{','.join(routing.names)} | median of {config.rounds} rounds in turn")
    points = [Point("prefill", batch, n) for n in config.prefill for batch in config.batch]
    points += [Point("decode", batch, n) for n in config.decode for batch in config.batch]
    rows = [row | {"compiled": config.compile} for point in points for row in bench_point(subject, point, budgets)]
    ran = kernels(subject.model)
    runtime.print0("kernels: " + ", ".join(f"{what} {name}" for what, name in ran.items()))
    return dict(settings=asdict(config), device=device, threads=torch.get_num_threads(), torch=torch.__version__,
                kernels=ran, rows=rows)


# -----------------------------------------------------------------------------
# Ceilings without weights


def roofline(config: ModelConfig, point: Point, peaks: tuple[float, float],
             skipped: dict[str, int]) -> tuple[float, str]:
    """Least seconds of a 16-bit pass, and what binds: flops or bytes. peaks: FLOP/s and bytes/s.

    It takes at least FLOPs / peak and at least bytes / bandwidth; prefill reads the weights once. skipped: in so many
    layers, spread over the model and the same for all rows, attn or mlp is skipped.
    """
    layers = range(config.n_layers)
    executed = Executed(**{target: [float(layer >= n) for layer in layers] for target, n in skipped.items()})
    flops = prefill_flops(config, point.context, executed)
    if point.phase == "decode":  # one token more than a prompt of `context` tokens
        before = prefill_flops(config, point.context, executed, logits=0)
        flops = prefill_flops(config, point.context + 1, executed) - before
    rows = point.batch if point.phase == "decode" else 0  # a prefill reads no keys and values
    read = decode_bytes(config, rows, point.context, ItemSize(2, 2), executed)
    return max((point.batch * flops / peaks[0], "flops"), (read / peaks[1], "bytes"))


def analytic(gpu: str) -> list[dict]:
    """Print, per published model, the best speed-up that skipping a quarter or a half of the layers' targets allows."""
    peaks = runtime.peak_flops(gpu), runtime.peak_bandwidth(gpu)
    if None in peaks:
        raise ValueError(f"gpu is {gpu!r}, whose peaks are unknown; expected a name that runtime.PEAKS lists, such as "
                         "'NVIDIA H100 80GB HBM3'")
    print(f"Best possible speed-up on {gpu}: {peaks[0] / 1e12:,.0f} TFLOP/s (16 bit), {peaks[1] / 1e12:.2f} TB/s; "
          "bf16 weights and KV, every row the same route")
    points = [Point("prefill", 1, context) for context in ANALYTIC_PREFILL]
    points += [Point("decode", batch, context) for batch, context in ANALYTIC_DECODE]
    rows = []
    for name, config in PUBLISHED.items():
        n, quarter, half = config.n_layers, config.n_layers // 4, config.n_layers // 2
        columns = {f"attn {quarter}/{n}": dict(attn=quarter), f"attn {half}/{n}": dict(attn=half),
                   f"mlp {quarter}/{n}": dict(mlp=quarter), f"block {quarter}/{n}": dict(attn=quarter, mlp=quarter)}
        print(f"\n| {name} | bound by | dense ms | weights + KV GB | {' | '.join(columns)} |")
        print("|---|---|---|---|" + "---|" * len(columns))
        for point in points:
            rows.append(analytic_row(name, point, peaks, columns))
    return rows


def analytic_row(name: str, point: Point, peaks: tuple[float, float], columns: dict[str, dict[str, int]]) -> dict:
    """Print and return one row: the dense pass, and the ceiling of each column's skipped layers."""
    config = PUBLISHED[name]
    seconds, binds = roofline(config, point, peaks, {})
    ceilings = {title: seconds / roofline(config, point, peaks, skipped)[0] for title, skipped in columns.items()}
    memory = decode_bytes(config, point.batch, point.context, ItemSize(2, 2)) / 1e9
    shown = " | ".join(f"{value:.3f}" for value in ceilings.values())
    print(f"| {point.phase} batch {point.batch} x {point.context:,} | {binds} | {seconds * 1e3:,.2f} | {memory:.1f} | "
          f"{shown} |")
    return {"model": name, **asdict(point), "binds": binds, "seconds": seconds, "gigabytes": memory,
            "ceilings": ceilings}


def main() -> None:
    config = runtime.cli(BenchConfig)
    if config.analytic:
        report = dict(gpu=config.gpu, analytic=analytic(config.gpu))
    else:
        report = bench(config)
    if config.out is not None:
        runtime.write_json(config.out, report)
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    runtime.run_main(main)
