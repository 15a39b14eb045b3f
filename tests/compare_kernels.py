"""Time what model.py's section "Kernels" puts in the place of a plain operator, old and new in turn, on this machine.

Run: python tests/compare_kernels.py --shape=576,9,3,64,1536,49152 --threads=2 [--what=products,attention]
     python tests/compare_kernels.py --model=checkpoints/NAME --what=model --prefill=512,2048 --decode=1x512,8x512

`products` multiplies rows by the weights of `copies` layers, each in turn, so that they come from memory as in a model;
`backward` is the gradient of the input. `attention` is one layer's, causal: what the model takes is `plain` there, and
the candidate `blocked` below, which the model does not take, is `chosen`. `model` is the whole model, prefill up to the
last token's logits, and a decode step. `ratio` is the median over rounds of plain seconds / seconds of the model's own
choice, whose `low` and `high` hold 95 % of such medians (by order statistics); where the choice is the plain operator
itself it is about 1. The last line is JSON.

Plain seconds / the model's, on one thread of an AMD EPYC (Zen 3, AVX2) with torch 2.13 and float32, sizes of
SmolLM2-135M, medians of 21 alternated pairs:
  RMSNorm               6.9 at 512 tokens, 6.4 at 2,048; but 0.7 at 8, hence torch's own for few
  SwiGLU, in place      1.08 at 512 tokens
  Product.packed        head 2.0 to 2.7 at 2 to 16 rows, 1.7 at 64, 1.3 at 512; w1, w3 1.1 to 1.4; w2, wq, wo 0.8 to
                        1.1; wk, wv 0.7 to 1.0: hence larger weights alone on one thread. On two 1.3 to 2.5 at 2 to 16
                        rows, 0.9 to 1.2 from 64 on; at 1 row head 1.7, w1, w3 1.5, wq, wo 1.2. With
                        AVX-512 (another EPYC, two threads) 2.4 at 512 rows, 3.7 for one row of the head
  fused_linear          1.27 for a compiled decode step of 30 layers, batch 1; torch.mv in eager code 0.97: left out
  sdpa, lone query      1.04 at batch 8 over 256 slots, 1.08 over 1,024
  apply_rope            1.8 at 512 tokens
  Selection.add         1.6 at 512 tokens; index_add_ for half of them 4.0 beside index_copy_ of sums
  Selection.rows        rows met before in a call: 1 us in place of 57
  Selection.take        index_select: 4.3 beside x[index] at 512 tokens
  Selection.add         addcmul: 3.9 beside x + gate * out at 512 tokens
  lone_queries          2.6 at batch 8 over 520 slots where half of the rows run, 1.6 where 6 do; 1.0 where all do
One mask for all layers of a call (16 us a layer, 0.4 % of a decode step of batch 8) does not pay and is left out.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as core  # noqa: E402
import runtime  # noqa: E402
from bench import run_decode, run_prefill, timed  # noqa: E402
from recipe.cost import prefill_flops  # noqa: E402
from runtime import setting  # noqa: E402

CPU = torch.device("cpu")


@dataclass
class KernelConfig:
    what: tuple[str, ...] = setting(("products", "attention"), "products, backward, attention, model")
    shape: tuple[int, ...] = setting(
        (576, 9, 3, 64, 1536, 49152), "width, heads, kv heads, head width, hidden width, vocabulary: SmolLM2-135M's")
    rows: tuple[int, ...] = setting((1, 2, 4, 8, 16, 64, 512, 2048), "rows of a product")
    copies: int = setting(30, "weights that a product goes through")
    tokens: tuple[int, ...] = setting((512, 2048, 8192), "tokens that attention is timed at")
    blocks: tuple[int, ...] = setting((128, 256), "queries at a time of the candidate for attention")
    model: str | None = setting(None, "checkpoint folder, for --what=model")
    prefill: tuple[int, ...] = setting((512, 2048), "prompt lengths of the model")
    decode: tuple[str, ...] = setting(("1x512", "8x512"), "batch x context of the model's decode steps")
    steps: int = setting(8, "decode steps in one measurement")
    rounds: int = setting(9, "times each pair is measured in turn")
    threads: int | None = setting(None, "CPU threads; none: torch's choice")
    dtype: str = setting("float32", "float32 or bfloat16")
    out: str | None = setting(None, "write the JSON here too")


def in_turn(plain: Callable, chosen: Callable, rounds: int) -> dict:
    """Median seconds of both, their ratio's median and interval, after one warm-up of each; the first alternates."""
    plain(), chosen()
    old, new = [], []
    for turn in range(rounds):
        order = ((plain, old), (chosen, new))
        for fn, seconds in order if turn % 2 else order[::-1]:
            seconds.append(timed(CPU, fn)[0])
    ratios = sorted(a / b for a, b in zip(old, new))
    tail = max(0, int(rounds / 2 - 0.98 * rounds**0.5))
    medians = dict(plain=statistics.median(old), chosen=statistics.median(new), ratio=statistics.median(ratios))
    return {**medians, "low": ratios[tail], "high": ratios[-1 - tail]}


class Report:
    """Rows so far; each is printed as it comes."""

    def __init__(self, cfg: KernelConfig):
        self.cfg, self.rows = cfg, []

    def add(self, what: str, work: float, plain: Callable, chosen: Callable) -> None:
        """Time a pair. work: FLOPs of one call."""
        row = {"what": what, **in_turn(plain, chosen, self.cfg.rounds)}
        row["gflops"] = work / row["chosen"] / 1e9
        self.rows.append(row)
        print(f"{what:<44} plain {row['plain'] * 1e3:10.3f} ms | chosen {row['chosen'] * 1e3:10.3f} ms "
              f"({row['gflops']:6.1f} GFLOP/s) | ratio {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
              flush=True)


def weights_of(cfg: KernelConfig) -> dict[str, tuple[int, int]]:
    """Shapes (O,I) of the products of a layer, and of the head."""
    width, heads, kv_heads, head, hidden, vocabulary = cfg.shape
    return {
        "wq": (heads * head, width),
        "wk": (kv_heads * head, width),
        "w1": (hidden, width),
        "w2": (width, hidden),
        "head": (vocabulary, width),
    }


def mapped(weight: torch.Tensor) -> torch.Tensor:
    """The weight in memory that is not torch's own, as if mapped from disk: it is not given up for its copy."""
    with torch.inference_mode(False):  # or it would have no copy
        data = bytearray(weight.view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(data, dtype=weight.dtype).view_as(weight)


def layer_of(weight: torch.Tensor, copies: dict | None) -> core.Linear:
    """A layer with a frozen weight (O,I) that may keep copies of it, or (None) may not."""
    layer = core.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.copies = torch.nn.Parameter(weight, requires_grad=False), copies
    return layer


def frozen(cfg: KernelConfig, dtype: torch.dtype, least: int = 1) -> Iterator[tuple]:
    """Name, rows (from `least` on), layers with frozen weights (O,I), and such as keep copies of the same ones."""
    for name, (out, width) in weights_of(cfg).items():
        n = 1 if name == "head" else cfg.copies
        weights = [mapped(torch.randn(out, width).mul_(width**-0.5).to(dtype)) for _ in range(n)]
        plain, packed = ([layer_of(weight, copies) for weight in weights] for copies in (None, {}))
        for rows in cfg.rows:
            if rows >= least and (name != "head" or rows <= 512):
                yield f"{name} {width} -> {out}, {rows} rows", rows, plain, packed


@torch.inference_mode()
def products(report: Report, dtype: torch.dtype) -> None:
    """Rows times frozen weights."""
    for what, rows, plain, packed in frozen(report.cfg, dtype):
        x = torch.randn(rows, plain[0].in_features).to(dtype)

        def all_of(layers: list) -> None:
            for layer in layers:
                layer(x)

        work = 2 * rows * sum(layer.weight.numel() for layer in plain)
        report.add(what, work, partial(all_of, plain), partial(all_of, packed))


def backward(report: Report, dtype: torch.dtype) -> None:
    """Gradients of the rows that were multiplied by frozen weights, the product itself included."""
    for what, rows, plain, packed in frozen(report.cfg, dtype, least=64):
        out, width = plain[0].weight.shape
        x, grad = torch.randn(rows, width).to(dtype).requires_grad_(), torch.randn(rows, out).to(dtype)

        def all_of(layers: list) -> None:
            for layer in layers:
                torch.autograd.grad(layer(x), x, grad)

        work = 4 * rows * sum(layer.weight.numel() for layer in plain)
        report.add(f"{what}, and gradient", work, partial(all_of, plain), partial(all_of, packed))


def blocked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> torch.Tensor:
    """A candidate: causal attention by blocks of queries, q (1,H,T,h), k and v (1,K,T,h).

    Batched products, softmax in float32, keys behind a block left out, the heads of a group folded into its queries.
    """
    _, heads, tokens, width = q.shape
    groups, keys, values = k.shape[1], k[0], v[0]  # (K,T,h)
    q = (q[0] * width**-0.5).unflatten(0, (groups, -1))  # (K,G,T,h)
    out = torch.empty_like(q)
    for a in range(0, tokens, block):
        b = min(a + block, tokens)
        later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        scores = torch.bmm(q[:, :, a:b].flatten(1, 2), keys[:, :b].mT).float().unflatten(1, (-1, b - a))  # (K,G,M,S)
        scores[..., a:b].masked_fill_(later, -torch.inf)
        shares = scores.softmax(-1).to(q.dtype).flatten(1, 2)
        out[:, :, a:b] = torch.bmm(shares, values[:, :b]).unflatten(1, (-1, b - a))
    return out.flatten(0, 1)[None]


@torch.inference_mode()
def attention(report: Report, dtype: torch.dtype) -> None:
    """Causal attention of one layer: scaled_dot_product_attention, which the model takes, beside the candidate."""
    _, heads, kv_heads, head, *_ = report.cfg.shape
    for tokens in report.cfg.tokens:
        q = torch.randn(1, tokens, heads, head).to(dtype).transpose(1, 2)
        k, v = (torch.randn(1, tokens, kv_heads, head).to(dtype).transpose(1, 2) for _ in range(2))
        plain = partial(core.sdpa, q, k, v, causal=True)
        for block in report.cfg.blocks:
            chosen = partial(blocked, q, k, v, block)
            torch.testing.assert_close(chosen(), plain(), rtol=2e-2, atol=2e-2)
            what = f"attention of {tokens:,} tokens, blocks of {block}"
            report.add(what, 2 * heads * head * tokens**2, plain, chosen)


def whole_model(report: Report, dtype: torch.dtype) -> None:
    """The model without its choices and with them, on the same tensors."""
    cfg = report.cfg
    if cfg.model is None:
        raise ValueError("--what=model needs a checkpoint folder: give --model")
    chosen = core.load_model(cfg.model, dtype=dtype)
    with torch.device("meta"):
        plain = core.Transformer(chosen.config)
    plain.load_state_dict(chosen.state_dict(), assign=True)
    plain = plain.to("cpu").eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for length in cfg.prefill:
        tokens = torch.randint(0, chosen.config.vocab_size, (1, length), generator=draw)
        runs = [partial(run_prefill, each, tokens, "off", None) for each in (plain, chosen)]
        report.add(f"prefill 1 x {length:,}", prefill_flops(chosen.config, length), *runs)
    for point in cfg.decode:
        batch, context = map(int, point.split("x"))
        tokens = torch.randint(0, chosen.config.vocab_size, (batch, context), generator=draw)
        runs = []
        for each in (plain, chosen):
            cache = core.KVCache(each, batch, max_len=context + cfg.steps)
            with torch.inference_mode():
                each.hidden(tokens, cache=cache)
            runs.append(partial(run_decode, each, cache, tokens[:, -1:], "off", [None] * cfg.steps))
        work = 2 * batch * cfg.steps * sum(p.numel() for p in plain.parameters())
        report.add(f"{cfg.steps} decode steps {batch} x {context:,}", work, *runs)


PARTS = {"products": products, "backward": backward, "attention": attention, "model": whole_model}


def processor() -> str:
    """The processor's name and what it multiplies with."""
    has = torch.cpu.get_capabilities()
    sets = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16") if has.get(name)]
    return f"{has.get('cpu_name', has.get('architecture', 'unknown'))} ({', '.join(sets)})"


def compare(cfg: KernelConfig) -> dict:
    """Time everything asked for; returns what --out holds."""
    if unknown := sorted(set(cfg.what) - set(PARTS)):
        raise ValueError(f"what is {unknown}; expected some of {', '.join(PARTS)}: change --what")
    if len(cfg.shape) != 6:
        raise ValueError(f"shape has {len(cfg.shape)} numbers; expected 6: width, heads, kv heads, head width, hidden "
                         "width, vocabulary")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    dtype, report = runtime.DTYPES[cfg.dtype], Report(cfg)
    machine = dict(processor=processor(), threads=torch.get_num_threads(), torch=torch.__version__, dtype=cfg.dtype)
    print(" | ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    for what in cfg.what:
        PARTS[what](report, dtype)
    return {**machine, "rows": report.rows}


def main() -> None:
    cfg = runtime.cli(KernelConfig)
    found = compare(cfg)
    if cfg.out is not None:
        runtime.write_json(cfg.out, found)
    print(json.dumps(found))


if __name__ == "__main__":
    runtime.run_main(main)
