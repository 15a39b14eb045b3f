"""The constants by which model.py picks the tokens that run or computes everybody, and where the two cross over.

Run: python tests/measure_costs.py --out=crossover.json

Not part of the test command: it needs a minute of an idle processor. Prints a line for model.COSTS, then, for MLPs and
for the scores of attention with kv=all, seconds of picking / seconds of computing everybody at shares of tokens that
run, and which of the two the model chooses. Times are processor seconds of one thread, the least of several runs of
layers as wide as SmolLM2-135M's, so many that no cache holds their weights.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as model_module  # noqa: E402
import runtime  # noqa: E402
from model import Costs, ModelConfig, Transformer, costs_of  # noqa: E402
from router import RouterConfig  # noqa: E402
from runtime import setting  # noqa: E402

WIDTHS = ModelConfig(
    family="llama", dim=576, n_layers=8, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=64,
    max_seq_len=4096, norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True)
TILES = (1, 2, 4, 6, 8, 12, 16)
FEW = tuple(range(1, 33))  # rows at which a tile shows
SHARES = (0.25, 0.5, 0.75, 0.875, 0.9375)
POINTS = (("mlp_token", "routed", 8), ("mlp_token", "routed", 64), ("mlp_token", "routed", 512),
          ("attn_token", "all", 64), ("attn_token", "all", 512), ("attn_token", "all", 1024))


@dataclass
class CostConfig:
    dtype: str = setting("float32", "float32 or bfloat16")
    repeats: int = setting(7, "runs of which the least counts")
    out: str | None = setting(None, "write the crossover here")


def least(fn, repeats: int, calls: int = 1) -> float:
    """Least processor seconds of a call."""
    fn()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(calls):
            fn()
        seconds.append((time.process_time() - begin) / calls)
    return min(seconds)


def random_model(dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(WIDTHS)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=WIDTHS.dim**-0.5)
    model = model.to(dtype).eval().requires_grad_(False)
    model_module.pack_weights(model)
    return model


def fitted_tile(seconds: dict[int, float]) -> int:
    """The tile under which seconds by rows are closest to a straight line in whole tiles."""
    times = torch.tensor([seconds[rows] for rows in FEW], dtype=torch.float64)

    def misfit(tile: int) -> float:
        steps = torch.tensor([-(-rows // tile) for rows in FEW], dtype=torch.float64)
        design = torch.stack([torch.ones_like(steps), steps], dim=1)
        return (design @ torch.linalg.lstsq(design, times[:, None]).solution - times[:, None]).square().sum().item()

    return min(TILES, key=misfit)


def measured(model: Transformer, repeats: int) -> Costs:
    """The constants of this machine."""
    dtype, mlps = model.norm.weight.dtype, [block.feed_forward for block in model.layers]
    few, many = torch.randn(8, 8, dtype=dtype), torch.randn(512, WIDTHS.dim, dtype=dtype)
    index, rows = torch.arange(8), torch.arange(0, 512, 2)
    call = least(lambda: few.index_select(0, index), repeats, 200)
    moved = least(lambda: many.index_add_(0, rows, many.index_select(0, rows)), repeats, 20)
    move = moved / (2 * len(rows) * WIDTHS.dim)

    def products(n: int) -> float:
        x = torch.randn(n, WIDTHS.dim, dtype=dtype)
        return least(lambda: [mlp(x) for mlp in mlps], repeats) / len(mlps)

    flop = (products(512) - products(128)) / (384 * 6 * WIDTHS.dim * WIDTHS.hidden_dim)
    tile = fitted_tile({n: products(n) for n in FEW})
    return Costs(*(float(f"{seconds:.1e}") for seconds in (call, move, flop)), tile)


def crossover(model: Transformer, repeats: int) -> Iterator[dict]:
    """Seconds of picking / of computing everybody, forced one and the other, over shares; and the model's choice."""
    for granularity, kv, tokens in POINTS:
        model.add_routers(RouterConfig.of(granularity, range(WIDTHS.n_layers), kv=kv))
        x = torch.randn(1, tokens, WIDTHS.dim, dtype=model.norm.weight.dtype)
        for share in SHARES:
            gates = torch.zeros(WIDTHS.n_layers, 1, tokens)
            for gate in gates:
                gate[0, torch.randperm(tokens)[: round(share * tokens)]] = 1
            gates[:, :, 0] = 1
            seconds, chosen, real = {}, [True], model_module.cheaper_whole

            def picked(n_run: int, n_all: int, *more) -> bool:
                chosen.append(real(n_run, n_all, *more))
                return n_run == n_all

            for name, choice in (("picked", picked), ("whole", lambda *_: True)):
                model_module.cheaper_whole = choice
                run = lambda: model.hidden(None, x=x, route="gather", gates=gates)
                seconds[name] = least(run, repeats)
            model_module.cheaper_whole = real
            what = "MLP" if granularity == "mlp_token" else "scores, kv=all"
            ratio, name = seconds["picked"] / seconds["whole"], "everybody" if chosen[-1] else "picked"
            yield dict(what=what, tokens=tokens, share=share, ratio=ratio, chosen=name)


@torch.inference_mode()
def main() -> None:
    cfg = runtime.cli(CostConfig)
    torch.set_num_threads(1)
    dtype = getattr(torch, cfg.dtype)
    model = random_model(dtype)
    print(f"measured {measured(model, cfg.repeats)}\nin use   {costs_of('cpu', dtype)}", flush=True)
    rows = []
    for row in crossover(model, cfg.repeats):
        print("{what:<15} {tokens:>5} tokens | share {share:.3f} | picked / everybody {ratio:.3f} | "
              "chosen: {chosen}".format(**row), flush=True)
        rows.append(row)
        if cfg.out is not None:
            runtime.write_json(cfg.out, rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    runtime.run_main(main)
