"""Routers beside their controls, as rows and in words."""

from recipe.controls import Controls
from recipe.lora import changes
from recipe.passes import Workload, evaluate
from recipe.run import Run
from recipe.speed import measure_prefill
from router import set_cuts
from runtime import Phases, device_name, print0

COLUMNS = ("dense", "routed", "greedy", "fisher", "similarity", "gate_norm", "load", "smallest_gate", "mean_route",
           "random")


def describe(run: Run) -> None:
    """Print each decision that was derived from the settings, once."""
    cfg, rt, model, routing = run.cfg, run.rt, run.model, run.model.routing
    trainable, total = run.state.trainable, sum(p.numel() for p in model.parameters())
    dtype, per_rank = str(rt.dtype).removeprefix("torch."), cfg.batch_size // rt.world_size
    dtype = f"int8, computing in {dtype}" if cfg.base_dtype == "int8" else dtype
    print0(f"device: {device_name(rt.device)} x {rt.world_size}, base in {dtype}, compile {run.compiled}")
    print0(f"parameters: {trainable:,} trainable ({cfg.train}), {total - trainable:,} frozen, optimizer "
           f"{run.state.optimizer_bytes / 2**20:,.1f} MiB; base fingerprint {model.fingerprint}")
    if cfg.train == "lora":
        print0(f"LoRA: {len(changes(model))} projections, rank {cfg.lora_rank}, lr {cfg.lora_lr}; no routers")
        return
    print0(f"routed places: {', '.join(routing.names)} of {model.config.n_layers} layers; {routing.granularity}, pool "
           f"{routing.pool}, kv {routing.kv}, reads {routing.reads}; budget {cfg.budget}")
    print0(f"steps: {cfg.steps} of {cfg.batch_size} examples ({per_rank} a rank, {cfg.micro_batch} at a time); recipe "
           f"{cfg.recipe}, objective {cfg.objective}, lr {cfg.lr}, lambda {cfg.lambda_}")


def show_step(row: dict, steps: int, best: bool) -> None:
    """Print a step's line. best: the router tried after it is the best so far."""
    if row["bad"]:
        print0(f"iter {row['step']}/{steps} | step skipped, nothing moved: {row['bad']}")
        return
    parts = [
        f"iter {row['step']}/{steps}",
        f"loss {row['loss']:.4f}",
        f"capacity {row['capacity']:.3f} (budget {row['budget']:.3f})",
        f"lr {row['lr']:.1e}",
        f"gnorm {row['grad_norm']:.2e}",
        f"{row['milliseconds']:,.0f} ms",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"mfu {row['mfu']:.1%}" if row["mfu"] else "mfu n/a",
    ]
    if row["select_loss"] is not None:
        parts.append(f"selection loss {row['select_loss']:.4f}{' (best)' if best else ''}")
    if Phases.active is not None:
        parts.append(Phases.active.eta(row["step"] / steps))
    print0(" | ".join(parts))


def compare(held: Workload, cuts: dict[float, list[float]], orders: dict[str, list[int]]) -> list[dict]:
    """A row for each budget: losses beside those of the controls and, on the first rank, the speed of prompts.

    cuts: those (R) that realise it; the model is left at the last one's.
    """
    routed = {}
    for budget, values in cuts.items():
        set_cuts(held.model, values)
        found = routed[budget] = evaluate(held)
        print0(f"held out at budget {budget:.3f}: capacity {found['capacity']:.3f}, loss {found['loss']:.4f}")
    rows = Controls(held).rows(routed, orders)
    if held.rt.is_master:
        speed = measure_prefill(held, cuts)
        rows = [row | speed[row["budget"]] for row in rows]
    return rows


def table(rows: list[dict]) -> str:
    """The rows as lines of text, under a head."""
    columns = [name for name in COLUMNS if name in rows[0]]
    names = " ".join(f"{name.replace('_', ' ')[:10]:>10}" for name in columns)
    lines = [f"budget capacity  ceiling {names} gap closed"]
    for row in rows:
        closed = "n/a" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
        losses = " ".join(f"{row[name]:10.4f}" for name in columns)
        lines.append(f"{row['budget']:6.3f} {row['capacity']:8.3f} {row['ceiling']:8.3f} {losses}{closed:>11}")
    return "\n".join(lines)


def show(summary: dict) -> str:
    """The summary of a run in words."""
    s = summary
    layers = ", ".join(f"{layer}: {share:.2f}" for layer, share in zip(s["layers"], s["capacity_per_layer"]))
    return f"""
{s["granularity"]}, recipe {s["recipe"]}, {s["steps"]} steps, {s["tokens_per_second"]:,.0f} tok/s, \
{s["seconds"]:,.0f} s in all, peak {s["peak_memory_bytes"] / 2**20:,.0f} MiB on {s["device"]}
held-out loss on {s["heldout_tokens"]:,} answer tokens, routers beside their controls at equal capacity
(greedy, fisher, similarity, gate norm: static lists, which skip the same places for everyone)
{table(s["report"])}
capacity by place  {layers}
prefill            {s["prefill_speedup"]:.3f}x of dense at {s["prefill_context"]} tokens, batch 1, capacity \
{s["prefill_capacity"]:.2f} there; FLOPs allow {s["prefill_ceiling"]:.3f}x
routers            {s["routers"]}"""


def verdict(row: dict) -> str:
    """What a user gains and loses at the budget of a row, in a sentence."""
    to_dense, to_list = row["routed"] - row["dense"], row["routed"] - row["static_at_equal_ceiling"]
    return (
        f"At budget {row['budget']:g}, {1 - row['capacity']:.0%} of what is routed is skipped: prompts of "
        f"{row['prefill_context']} tokens run at {row['prefill_speedup']:.2f}x of dense (FLOPs allow "
        f"{row['prefill_ceiling']:.2f}x), and answers lose {to_dense:.3f} nats a token to dense, {abs(to_list):.3f} "
        f"{'less' if to_list < 0 else 'more'} than the best fixed list that saves as many FLOPs."
    )
