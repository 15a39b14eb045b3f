"""Time prefill and decode, dense against routed in turn, beside the ceiling that FLOPs (prefill) or bytes (decode) allow.

    python bench.py --model=checkpoints/NAME --prefill=512,2048 --decode=512 --batch=1,16              forced routes at five budgets
    python bench.py --model=checkpoints/NAME --routers=OUT/routers.safetensors --budget=0.7 ...        a router file at one budget
    python bench.py --analytic                                           ceilings of well-known models on a well-known GPU, without weights

`speedup` is the median over rounds of dense seconds / routed seconds, the two timed one after the other; `ceiling` is the ratio of their
work (recipe/cost.py: prefill_flops, decode_bytes) at the realised capacity, the routers' own work left out; `ratio` = speedup / ceiling.
`seconds` are medians: of a prefill up to the logits of its last token, or of one decode step of the whole batch. kv_bytes are those in use at `context`. peak_bytes
is the allocator's peak in one run on CUDA, the whole process's so far on CPU. The last line printed is one JSON object.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

import runtime
from model import KVCache, ModelConfig, Transformer, compile_model, decode, load_model, load_routers
from recipe.cost import Executed, decode_bytes, decode_ceiling, prefill_ceiling, prefill_flops
from router import RouterConfig, capacity, cuts_for, deep_layers, parse_layers, set_cuts

BUDGETS = (0.0, 0.25, 0.5, 0.75, 1.0)

# For --analytic: sizes from the published configs, huggingface.co/{meta-llama/Meta-Llama-3-8B, mistralai/Mistral-7B-v0.3, Qwen/Qwen2.5-7B}/config.json
PUBLISHED = {
    "Llama-3-8B": ModelConfig(family="llama", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=128256,
                              max_seq_len=8192, norm_eps=1e-5, rope_theta=500000.0),
    "Mistral-7B": ModelConfig(family="mistral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32768,
                              max_seq_len=32768, norm_eps=1e-5, rope_theta=1000000.0),
    "Qwen2.5-7B": ModelConfig(family="qwen2", dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, hidden_dim=18944, vocab_size=152064,
                              max_seq_len=131072, norm_eps=1e-6, rope_theta=1000000.0, qkv_bias=True),
}
ANALYTIC_PREFILL = (512, 2048, 8192, 32768)
ANALYTIC_DECODE = ((1, 512), (1, 8192), (16, 2048), (16, 8192), (64, 2048), (64, 8192))  # (batch, context)


@dataclass
class BenchConfig:
    model: str | None = field(default=None, metadata={"help": "checkpoint folder"})
    routers: str | None = field(default=None, metadata={"help": "router file; none: forced routes"})
    granularity: str = field(default="attn_sequence", metadata={"help": "what forced routes gate: {attn,mlp,block,both}_{sequence,token}"})
    layers: str = field(default="deep:16", metadata={"help": "routed layers for forced routes: deep:N, all, or numbers such as 3,5,8-12"})
    kv: str = field(default="routed", metadata={"help": "attn_token, both_token: 'routed', a skipped token leaves no keys and values, or 'all', it does"})
    budget: tuple[float, ...] | None = field(default=None, metadata={"help": "shares of routed units that execute; none: 0,0.25,0.5,0.75,1, or a router file's own"})
    mixed: bool = field(default=False, metadata={"help": "unit sequence: each row of a batch takes its own forced route"})
    prefill: tuple[int, ...] = field(default=(), metadata={"help": "prompt lengths to time"})
    decode: tuple[int, ...] = field(default=(), metadata={"help": "context lengths at which to time decode steps"})
    batch: tuple[int, ...] = field(default=(1,), metadata={"help": "batch sizes"})
    compile: bool = field(default=False, metadata={"help": "time with torch.compile"})
    rounds: int = field(default=5, metadata={"help": "times each pair is measured in turn"})
    steps: int = field(default=8, metadata={"help": "decode steps in one measurement"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; none: torch's choice"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    seed: int = field(default=1337, metadata={"help": "seed of tokens and token routes"})
    out: str | None = field(default=None, metadata={"help": "write the JSON here too"})
    analytic: bool = field(default=False, metadata={"help": "print the ceiling table of published models and stop"})
    gpu: str = field(default="NVIDIA H100 80GB HBM3", metadata={"help": "device whose peaks --analytic uses"})


# ---------------------------------------------------------------------------------------------------------------------------------
# Routes and ceilings


def forced_gates(routing: RouterConfig, budget: float, batch: int, width: int, *, mixed: bool = False, seed: int = 0) -> torch.Tensor:
    """Gates (R,B) or (R,B,width) at a budget. Unit sequence: round(budget R) places of each target, evenly spread, row b shifted by b if mixed.
    Unit token: drawn."""
    if routing.unit == "token":
        return (torch.rand(len(routing.places), batch, width, generator=torch.Generator().manual_seed(seed)) < budget).float()
    gates = torch.zeros(len(routing.places), batch)
    for target in {place.target for place in routing.places}:
        mine = [row for row, place in enumerate(routing.places) if place.target == target]
        n, count = len(mine), round(budget * len(mine))
        pattern = torch.tensor([float((i + 1) * count // n > i * count // n) for i in range(n)])
        gates[mine] = torch.stack([pattern.roll(row if mixed else 0) for row in range(batch)], dim=1)  # (R, B)
    return gates


# ---------------------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass
class Sample:
    """One run: seconds (decode: of one step), realised gates of the context and of the steps, KV bytes in use at the context, peak bytes."""

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
def run_decode(model: Transformer, cache: KVCache, token: torch.Tensor, route: str, step_gates: list[torch.Tensor | None]) -> Sample:
    """Greedy steps from token (B,1) after a cached context, one per entry of step_gates; the cache is left at the context it came with."""
    lengths, kv_bytes, realised, left = list(cache.lengths), cache.used_bytes(), [], iter(step_gates)
    reset_peak(token.device)

    def choose(last: torch.Tensor | None, rows: list[int]) -> tuple[torch.Tensor, list[int]]:
        chosen = token[:, 0] if last is None else model.head(last).argmax(dim=-1)
        return chosen, rows if len(realised) < len(step_gates) else []

    def fn():
        for _, decided in decode(model, cache, None, choose, route=route, gates=lambda rows, lengths: next(left)):
            realised.append(decided)

    seconds, _ = timed(token.device, fn)
    cache.rewind(lengths)
    return Sample(seconds / len(step_gates), None, realised, kv_bytes, runtime.peak_memory_bytes(token.device))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def in_turn(dense: Callable[[], Sample], routed: Callable[[], Sample], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio dense / routed; whoever begins a round ends the next one."""
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            second, first = routed(), dense()
        else:
            first, second = dense(), routed()
        pairs.append((first.seconds, second.seconds))
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), statistics.median(a / b for a, b in pairs)


def bench_point(model: Transformer, config: BenchConfig, phase: str, batch: int, context: int, budgets: tuple[float | None, ...],
                calibration: dict | None) -> list[dict]:
    """Rows of one grid point: dense, then each budget against it. calibration: the router file's; None: forced routes."""
    device, itemsize = model.tok_embeddings.weight.device, model.tok_embeddings.weight.element_size()
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)

    @torch.inference_mode()
    def prepare(route: str, budget: float | None) -> tuple[Callable[[], Sample], torch.Tensor | None]:
        """A repeatable run of one variant, and the gates of its context."""
        gates, steps = None, [None] * config.steps
        if route == "gather" and calibration is None:
            gates = forced_gates(model.routing, budget, batch, context, mixed=config.mixed, seed=config.seed).to(device)
            if model.routing.unit == "token":
                steps = list(forced_gates(model.routing, budget, batch, config.steps, seed=config.seed + 1).to(device).split(1, dim=2))
        elif route == "gather" and budget is not None:
            set_cuts(model, cuts_for(budget, calibration))
        if phase == "prefill":
            return lambda: run_prefill(model, tokens, route, gates), None
        cache = KVCache(model, batch, max_len=context + config.steps)
        _, realised = model.hidden(tokens, cache=cache, route=route, gates=gates)
        return lambda: run_decode(model, cache, tokens[:, -1:], route, steps), realised

    def realised_capacity(gates: torch.Tensor) -> float:
        return capacity(gates, weights=model.place_weights()).item()

    work = f"{prefill_flops(model.config, context) * batch / 1e9:,.1f} GFLOP" if phase == "prefill" else (
        f"{decode_bytes(model.config, batch, context, itemsize) / 1e6:,.1f} MB a step")
    print(f"\n{phase} | batch {batch} | context {context:,} | dense {work}", flush=True)
    dense, _ = prepare("off", None)
    dense()
    rows, dense_seconds = [], []
    for budget in budgets:
        routed, gates = prepare("gather", budget)
        sample = routed()  # warms up, and tells which route was realised
        if phase == "prefill":
            realised = realised_capacity(sample.gates)
            ceiling = prefill_ceiling(model.config, model.routing, sample.gates, context)
        else:
            realised = statistics.mean(realised_capacity(step) for step in sample.steps)
            ceiling = decode_ceiling(model.config, model.routing, itemsize, context, gates, sample.steps)
        shown = "own" if budget is None else f"{budget:.2f}"
        print(f"  budget {shown} | capacity {realised:.3f} | ceiling {ceiling:.3f} |", end=" ", flush=True)
        off_seconds, seconds, speedup = in_turn(dense, routed, config.rounds)
        done = batch * (context if phase == "prefill" else 1)
        rows.append(dict(phase=phase, batch=batch, context=context, granularity=model.routing.granularity, route="gather", budget=budget, capacity=realised,
                         seconds=seconds, tokens_per_second=done / seconds, speedup=speedup, ceiling=ceiling, ratio=speedup / ceiling,
                         kv_bytes=sample.kv_bytes, peak_bytes=routed().peak_bytes))
        dense_seconds.append(off_seconds)
        print(f"{seconds * 1e3:9.2f} ms (dense {off_seconds * 1e3:9.2f}) | {done / seconds:9,.1f} tok/s | speedup {speedup:.3f} | "
              f"speedup/ceiling {speedup / ceiling:.3f} | KV {sample.kv_bytes / 1e6:,.1f} MB | peak {rows[-1]['peak_bytes'] / 1e6:,.0f} MB", flush=True)
    sample, seconds = dense(), statistics.median(dense_seconds)
    off = dict(phase=phase, batch=batch, context=context, granularity=None, route="off", budget=None, capacity=1.0, seconds=seconds,
               tokens_per_second=batch * (context if phase == "prefill" else 1) / seconds, speedup=1.0, ceiling=1.0, ratio=1.0, kv_bytes=sample.kv_bytes,
               peak_bytes=sample.peak_bytes)
    print(f"  dense       | {seconds * 1e3:9.2f} ms | {off['tokens_per_second']:9,.1f} tok/s | KV {sample.kv_bytes / 1e6:,.1f} MB | "
          f"peak {sample.peak_bytes / 1e6:,.0f} MB", flush=True)
    return [off, *rows]


# ---------------------------------------------------------------------------------------------------------------------------------
# Ceilings without weights


def roofline(config: ModelConfig, phase: str, batch: int, context: int, flops: float, bandwidth: float, skipped: dict[str, int]) -> tuple[float, str]:
    """Least seconds of a 16-bit pass in which `skipped` layers (spread over the model, same for all rows) lose attn or mlp, and what binds: flops or bytes.

    A pass takes at least FLOPs / peak and at least bytes / bandwidth; prefill reads the weights once.
    """
    executed = Executed(**{target: [float(layer >= n) for layer in range(config.n_layers)] for target, n in skipped.items()})
    if phase == "prefill":
        work = batch * prefill_flops(config, context, executed)
        read = decode_bytes(config, 0, context, 2, executed)
    else:  # one token more than a prompt of `context` tokens
        work = batch * (prefill_flops(config, context + 1, executed) - prefill_flops(config, context, executed, logits=0))
        read = decode_bytes(config, batch, context, 2, executed)
    return max((work / flops, "flops"), (read / bandwidth, "bytes"))


def analytic(gpu: str) -> list[dict]:
    """Print, per published model, the best speed-up that skipping a quarter or a half of the layers' targets allows, and return the rows."""
    flops, bandwidth = runtime.peak_flops(gpu), runtime.peak_bandwidth(gpu)
    if flops is None or bandwidth is None:
        raise ValueError(f"gpu is {gpu!r}, whose peaks are unknown; expected a name that runtime.PEAKS lists, such as 'NVIDIA H100 80GB HBM3'")
    print(f"Best possible speed-up on {gpu}: {flops / 1e12:,.0f} TFLOP/s (16 bit), {bandwidth / 1e12:.2f} TB/s; bf16 weights and KV, every row the same route")
    rows = []
    for name, config in PUBLISHED.items():
        quarter, half = config.n_layers // 4, config.n_layers // 2
        columns = {f"attn {quarter}/{config.n_layers}": dict(attn=quarter), f"attn {half}/{config.n_layers}": dict(attn=half),
                   f"mlp {quarter}/{config.n_layers}": dict(mlp=quarter), f"block {quarter}/{config.n_layers}": dict(attn=quarter, mlp=quarter)}
        print(f"\n| {name} | bound by | dense ms | weights + KV GB | " + " | ".join(columns) + " |\n|---|---|---|---|" + "---|" * len(columns))
        for phase, batch, context in [("prefill", 1, n) for n in ANALYTIC_PREFILL] + [("decode", *point) for point in ANALYTIC_DECODE]:
            seconds, binds = roofline(config, phase, batch, context, flops, bandwidth, {})
            ceilings = {title: seconds / roofline(config, phase, batch, context, flops, bandwidth, skipped)[0] for title, skipped in columns.items()}
            memory = decode_bytes(config, batch, context, 2) / 1e9
            print(f"| {phase} batch {batch} x {context:,} | {binds} | {seconds * 1e3:,.2f} | {memory:.1f} | " + " | ".join(f"{value:.3f}" for value in ceilings.values()) + " |")
            rows.append(dict(model=name, phase=phase, batch=batch, context=context, binds=binds, seconds=seconds, gigabytes=memory,
                             ceilings=ceilings))
    return rows


def main() -> None:
    config = runtime.cli(BenchConfig)
    if config.analytic:
        report = dict(gpu=config.gpu, analytic=analytic(config.gpu))
    else:
        report = bench(config)
    if config.out is not None:
        runtime.write_json(config.out, report)
    print("\n" + json.dumps(report))


def bench(config: BenchConfig) -> dict:
    """Measure the grid. Returns the report: settings, device and rows."""
    if config.model is None or not (config.prefill or config.decode):
        raise ValueError("nothing to measure; give --model=DIR with --prefill=N,... or --decode=N,..., or --analytic alone")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rt = runtime.setup(config.device, config.dtype, config.seed)
    model, calibration = load_model(config.model, device=rt.device, dtype=rt.dtype), None
    if config.routers is not None:
        calibration = load_routers(model, config.routers).calibration
    else:
        kind, which = parse_layers(config.layers, model.config.n_layers)
        if kind == "auto":
            raise ValueError(f"layers is {config.layers!r}; a forced route has no measurements to choose by: give deep:N, all, or numbers")
        layers = deep_layers(which, model.config.n_layers) if kind == "deep" else which
        model.add_routers(RouterConfig.of(config.granularity, layers, kv=config.kv))
    if config.compile:
        compile_model(model)
    budgets = config.budget or (BUDGETS if config.routers is None else (None,))
    print(f"{runtime.device_name(rt.device)} | {str(rt.dtype).removeprefix('torch.')} | {torch.get_num_threads()} CPU threads | "
          f"{'compiled' if config.compile else 'eager'} | {model.routing.granularity} on layers {','.join(model.routing.names)} | "
          f"median of {config.rounds} rounds in turn")
    points = [("prefill", batch, n) for n in config.prefill for batch in config.batch] + [("decode", batch, n) for n in config.decode for batch in config.batch]
    rows = [row for point in points for row in bench_point(model, config, *point, budgets, calibration)]
    return dict(settings=asdict(config), device=runtime.device_name(rt.device), threads=torch.get_num_threads(), torch=torch.__version__,
                rows=[dict(row, compiled=config.compile) for row in rows])


if __name__ == "__main__":
    runtime.run_main(main)
