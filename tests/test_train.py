"""Tuning: the frozen base stays frozen, batches and ranks do not matter, runs go on bit for bit.  Run: python -m pytest
tests/test_train.py
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tuning import CPU, begun, selection, settings

import eval as scoring
import router
import runtime
import train
from model import load_model
from recipe import controls, passes
from recipe.base import load_base
from recipe.passes import Workload
from recipe.settings import EFFORTS
from recipe.start import candidates
from router import capacity
from tiny import CONFIG
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def gradients(run) -> torch.Tensor:
    """Gradient of the step just done: AdamW's first moment holds a tenth of it."""
    return torch.cat([run.optimizers[0].state[w]["exp_avg"] for w in run.weights.values()]) * 10


def stacked(run) -> torch.Tensor:
    """Its routers (R,D), copied."""
    return torch.cat([w.detach() for w in run.weights.values()])


def file_tensors(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# ------------------------------------------------------------------------------------------------------------ pure
# functions


def test_global_batches_are_a_function_of_seed_and_step():
    stream = [i for step in range(6) for i in train.global_batch(10, 4, 7, step)]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert train.global_batch(10, 4, 7, 3) == stream[12:16] and train.global_batch(10, 4, 8, 3) != stream[12:16]
    assert len(train.global_batch(3, 8, 7, 0)) == 8  # a batch may be larger than the data


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.lr_at(step, 100, 1.0, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[3] == 1.0
    assert (
        all(a >= b for a, b in zip(rates[3:], rates[4:])) and rates[-1] < 1e-3 and train.lr_at(0, 1, 1.0, 0.03) == 1.0
    )


# ----------------------------------------------------------------------------------------------------------------------
# data


# -----------------------------------------------------------------------------------------------------------------
# semantics


@pytest.mark.parametrize("granularity", router.GRANULARITIES)
def test_paper_recipe_begins_dense(base, granularity):
    """Zero routers and a threshold of 0.5 execute everything: the first step's model is the base model, bit for bit."""
    run = begun(base, recipe="paper", granularity=granularity)
    batch = passes.collate(run.data.train[:4], CPU.device)
    h, gates, _ = passes.states(run.model, batch, route="mask")
    dense, _, _ = passes.states(run.model, batch, route="off")
    assert capacity(gates, torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]) == 1.0
    assert (
        torch.equal(h, dense)
        if granularity != "block_sequence" and granularity != "block_token"
        else torch.allclose(h, dense, atol=1e-5)
    )


@pytest.mark.parametrize(
    "granularity, recipe",
    [("attn_sequence", "paper"), ("attn_sequence", "default"), ("mlp_token", "default"), ("block_sequence", "paper")],
)
def test_only_routers_change(base, granularity, recipe):
    run = begun(base, recipe=recipe, granularity=granularity)
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if "router" not in name}
    before = stacked(run)
    train.step(run)
    assert not torch.equal(before, stacked(run))
    for name, p in run.model.named_parameters():
        assert "router" in name or (torch.equal(p, frozen[name]) and p.grad is None and not p.requires_grad)


def test_no_graph_below_the_lowest_router(base):
    run = begun(base, layers="2,3", recipe="paper")
    grads = {}
    for layer, block in enumerate(run.model.layers):
        block.register_forward_hook(
            lambda _, args, out, layer=layer: grads.setdefault(layer, []).append(out[0].requires_grad)
        )
    train.step(run)
    assert not any(grads[0] + grads[1]) and any(grads[2]) and any(grads[3])


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "paper", "budget": 0.3, "lambda_": 0.5},
        # at 0.5 the cut falls among equal bytes, whose logits differ in the last bit alone
        {"recipe": "default", "granularity": "attn_token", "kv": "routed", "budget": 0.45},
        {"recipe": "default", "granularity": "mlp_sequence"},
        {"recipe": "default", "granularity": "both_sequence"},
        {"recipe": "paper", "granularity": "both_sequence", "budget": 0.3, "lambda_": 0.5},
    ],
)
def test_accumulation_does_not_change_the_gradient(base, changes):
    run = [begun(base, micro_batch=n, batch_tokens=tokens, **changes) for n, tokens in ((8, 8192), (8, 80), (1, 8192))]
    rows = [train.step(m) for m in run]
    for m, row in zip(run[1:], rows[1:]):
        torch.testing.assert_close(gradients(m), gradients(run[0]), rtol=2e-4, atol=1e-6)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["capacity"] == pytest.approx(
            rows[0]["capacity"], abs=1e-6
        )
        assert m.state.cut == pytest.approx(run[0].state.cut, abs=1e-6)


@pytest.mark.parametrize("granularity, micro", [("attn_sequence", 1), ("attn_sequence", 8), ("both_sequence", 1)])
def test_penalty_is_one_number_over_layers_and_the_global_batch(base, monkeypatch, granularity, micro):
    """A penalty per micro-batch or per layer would push although the capacity of the whole batch is within the budget.
    MLPs count by their compute. A step of one pass needs no other to know its capacity.
    """
    if micro == 8:
        monkeypatch.setattr(train, "capacity_of", None)

    def first_gradient(budget, lambda_):
        run = begun(base, recipe="paper", budget=budget, lambda_=lambda_, micro_batch=micro, granularity=granularity)
        torch.manual_seed(6)
        for w in run.weights.values():  # routes that differ by layer and sequence
            w.data.normal_(std=2.0)
        weights = stacked(run)
        row = train.step(run)
        return gradients(run), row["capacity"], run, weights

    without, kept, _, _ = first_gradient(0.5, 0.0)
    assert 0.2 < kept < 0.8
    within, _, _, _ = first_gradient(kept + 0.01, 3.0)
    over, _, run, weights = first_gradient(kept - 0.01, 3.0)
    torch.testing.assert_close(within, without)
    train.put(run.weights.values(), weights)  # reference: autograd of lambda * capacity over the whole batch at once
    whole = sorted(
        (run.data.train[i] for i in train.global_batch(len(run.data.train), 8, run.cfg.seed, 0)),
        key=lambda e: -len(e.tokens),
    )
    gates = passes.states(run.model, passes.collate(whole, CPU.device), route="mask")[1]
    penalty = 3.0 * capacity(gates, weights=run.model.place_weights())
    expected = torch.cat(torch.autograd.grad(penalty, list(run.weights.values())))
    torch.testing.assert_close(over - without, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token", "both_sequence"])
def test_tuning_starts_at_the_budget_and_no_worse_than_the_static_orders(base, granularity):
    run = begun(base, granularity=granularity, layers="0-3", budget=0.5, bare=0.0)  # a router can say the same of all
    z, weights = passes.route_logits(selection(run)), run.model.place_weights()
    near = 0.04 if granularity == "both_sequence" else 0.02  # two rows with one prompt, at 0.15 / 8 each
    assert (capacity((z >= run.state.cut).float(), weights=weights) - 0.5).abs() < near
    beside = controls.Controls(selection(run))
    static = [beside.static(order, 0.5) for order in run.state.orders.values()]
    # first tokens always execute, so a token router at the same capacity skips a few units of the next layer instead
    assert run.state.best_loss <= min(static) + (1e-3 if granularity == "attn_sequence" else 0.03)
    names = {"greedy", "fisher", "similarity"} | ({"gate_norm"} if granularity.startswith("attn") else set())
    assert set(run.state.orders) == names
    assert all(sorted(order) == list(range(len(weights))) for order in run.state.orders.values())


# --------------------------------------------------------------------------------------------------------------- whole
# runs


@pytest.mark.parametrize("granularity, most, of", [("attn_token", 4, "4 places"), ("both_sequence", 8, "8 places"),
                                                   ("expert_token", 2, "2 layers with experts")])
def test_as_many_places_as_there_are_can_be_chosen(base, tmp_path, granularity, most, of):
    """auto:N counts places, of which `both` has two a layer, and of experts the layers that have any."""
    sizes = {"family": "mixtral", "n_experts": 3, "experts_per_token": 2, "expert_dim": 16, "dense_layers": (0, 2)}
    config = replace(CONFIG, **sizes) if granularity == "expert_token" else CONFIG
    found, kept = candidates(settings(base, tmp_path, granularity=granularity, layers=f"auto:{most}"), config)
    assert kept == most == (len(found.layers) if found.experts else len(found.places))
    with pytest.raises(ValueError, match=f"has {of} in this model: ask for 1 to {most}"):
        candidates(settings(base, tmp_path, granularity=granularity, layers=f"auto:{most + 1}"), config)


@pytest.mark.parametrize("granularity", ["attn_sequence", "both_sequence"])
def test_run_writes_what_it_promises(base, tmp_path, granularity):
    cfg = settings(base, tmp_path / "run", layers="auto:3", granularity=granularity)
    summary = train.train(cfg)
    promised = {
        "heldout_loss_dense",
        "heldout_loss_routed",
        "capacity",
        "budget",
        "capacity_per_layer",
        "granularity",
        "layers",
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds",
        "prefill_speedup",
        "prefill_ceiling",
    }
    assert promised <= set(summary) and summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["layers"]) == 3 == len(summary["capacity_per_layer"]) and all(
        math.isfinite(summary[k]) for k in promised if k.startswith(("held", "prefill"))
    )
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert list(log[0]) == [
        "step",
        "loss",
        "capacity",
        "lr",
        "grad_norm",
        "budget",
        "cut",
        "bad",
        "select_loss",
        "milliseconds",
        "tokens_per_second",
        "mfu",
    ]
    assert "held-out loss" in train.show(summary)
    model = load_model(base, routers=tmp_path / "run/routers.safetensors")  # what was written is what was measured
    held = train.load_data(cfg, load_tokenizer(base), 128).held
    again = passes.evaluate(Workload(model, held, CPU))
    assert (
        again["loss"] == pytest.approx(summary["heldout_loss_routed"], abs=1e-6)
        and again["capacity"] == summary["capacity"]
    )
    assert (
        load_model(base, routers=tmp_path / "run/routers.safetensors", budget=0.9).routers()[0].cut
        < model.routers()[0].cut
    )
    written = {"checkpoint.safetensors", "log.jsonl", "routers.safetensors", "summary.json", "tokens"}
    assert {*os.listdir(tmp_path / "run")} - {"trunk"} == written  # trunk: where no place stands in the first layer


def test_summary_ends_with_what_each_budget_gives_and_takes(base, tmp_path):
    """Three budgets unless others are asked for, and the run's own, which the file is left at."""
    cfg = settings(base, tmp_path, budget=0.6, steps=1, report=train.TrainConfig().report)
    summary = train.train(cfg)
    rows = summary["report"]
    assert [row["budget"] for row in rows] == [0.25, 0.5, 0.6, 0.75]
    assert summary["heldout_loss_routed"] == rows[2]["routed"]
    assert summary["prefill_ceiling"] == rows[2]["prefill_ceiling"]
    ceilings = [row["prefill_ceiling"] for row in rows]
    assert ceilings == sorted(ceilings, reverse=True) and len({row["dense"] for row in rows}) == 1
    for row in rows:  # as in a report of this budget alone
        model = load_model(base, routers=summary["routers"], budget=row["budget"])
        held = Workload(model, train.load_data(cfg, load_tokenizer(base), 128).held, CPU)
        alone = controls.Controls(held).rows({row["budget"]: passes.evaluate(held)}, read_orders(summary["routers"]))[0]
        for name in ("capacity", "dense", "routed", "greedy", "similarity", "mean_route", "random", "ceiling"):
            assert alone[name] == pytest.approx(row[name], rel=1e-6)
    row = {"budget": 0.5, "capacity": 0.51, "dense": 2.0, "routed": 2.125, "static_at_equal_ceiling": 2.25}
    row |= {"prefill_context": 512, "prefill_speedup": 1.09, "prefill_ceiling": 1.1}
    said = train.verdict(row)
    assert "49% of what" in said and "1.09x" in said and "lose 0.125" in said and "0.125 less than the best" in said
    assert "0.025 more than" in train.verdict(row | {"static_at_equal_ceiling": 2.1})


def read_orders(path) -> dict[str, list[int]]:
    meta = router.read_router_file(path)[1]
    return {name: [meta.routing.names.index(place) for place in order] for name, order in meta.orders.items()}


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_base_in_int8_is_tuned_and_its_routers_serve_the_base_in_float32(base, tmp_path, recipe):
    cfg = settings(base, tmp_path / "run", recipe=recipe, base_dtype="int8", steps=2)
    summary = train.train(cfg)
    assert math.isfinite(summary["heldout_loss_routed"])
    for base_dtype in (None, "int8"):
        model = load_base(base, CPU, tmp_path / "run/routers.safetensors", base_dtype=base_dtype)
        held = train.load_data(cfg, load_tokenizer(base), 128).held
        loss = passes.evaluate(Workload(model, held, CPU))["loss"]
        assert loss == pytest.approx(summary["heldout_loss_routed"], rel=0.05 if base_dtype is None else 1e-6)
    with pytest.raises(ValueError, match="base_dtype \\('int8' there, None now\\)"):
        train.train(replace(cfg, base_dtype=None))


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_compiled_steps_end_as_eager_ones(base, tmp_path, recipe, monkeypatch):
    """The whole run with blocks compiled for its steps: what stands before and after them looks into the blocks, and
    must not meet compiled ones.
    """
    ends, plain = {}, torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: plain(self, backend="eager", **options)
    )  # traced, not built: no C++ needed
    for compiled in (False, True):
        torch.compiler.reset()
        ends[compiled] = train.train(settings(base, tmp_path / str(compiled), recipe=recipe, steps=3, compile=compiled))
    for name in ("heldout_loss_dense", "heldout_loss_routed", "heldout_loss_static", "capacity"):
        assert ends[True][name] == pytest.approx(ends[False][name], rel=1e-4)


def test_finished_run_is_recognised_and_another_refused(base, tmp_path, capsys):
    cfg = settings(base, tmp_path, steps=1)
    first = train.train(cfg)
    written = (tmp_path / "routers.safetensors").read_bytes()
    assert train.train(cfg) == first and "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"lr \(0.01 there, 0.5 now\), seed \(1337 there, 3 now\).*--overwrite"):
        train.train(settings(base, tmp_path, steps=1, lr=0.5, seed=3))
    (tmp_path / "summary.json").unlink()  # an unfinished one is refused by its checkpoint
    with pytest.raises(ValueError, match=r"budget \(0.5 there, 0.4 now\)"):
        train.train(settings(base, tmp_path, steps=1, budget=0.4))
    assert (tmp_path / "routers.safetensors").read_bytes() == written
    assert train.train(settings(base, tmp_path, steps=1, budget=0.4, overwrite=True))["budget"] == 0.4


def test_damaged_checkpoint_is_named(base, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint.safetensors cannot be read.*--overwrite"):
        train.train(settings(base, tmp_path))


def test_official_router_file_becomes_ours(base, tmp_path):
    torch.manual_seed(2)
    weights = {f"model.layers.{i}.router.weight": torch.randn(1, 32) for i in (1, 3)}
    save_file(weights, tmp_path / "official.safetensors")
    summary = train.train(
        settings(base, tmp_path / "out", import_official=str(tmp_path / "official.safetensors"), recipe="paper")
    )
    assert summary["layers"] == [1, 3] and summary["steps"] == 0
    for name, tensor in file_tensors(tmp_path / "out/routers.safetensors").items():
        assert torch.equal(tensor, weights[name])
    assert load_model(base, routers=tmp_path / "out/routers.safetensors").routers()[0].cut == 0.0


def test_a_finished_file_is_calibrated_on_other_data(base, tmp_path):
    """Weights, granularity and orders stay, cuts follow the new examples; the settings of the command line have no say
    in what the file decides.
    """
    train.train(settings(base, tmp_path / "a", granularity="mlp_sequence", layers="0,2,3"))
    lines = [
        {
            "messages": [
                {"role": "user", "content": "sum " * (1 + i % 5)},
                {"role": "assistant", "content": "no " * (1 + i % 4)},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    old = tmp_path / "a/routers.safetensors"
    summary = train.train(
        settings(base, tmp_path / "b", recalibrate=str(old), data=(str(tmp_path / "other.jsonl"),), select_samples=30)
    )
    new = tmp_path / "b/routers.safetensors"
    assert (summary["granularity"], summary["layers"], summary["steps"]) == ("mlp_sequence", [0, 2, 3], 0)
    assert all(torch.equal(tensor, file_tensors(new)[name]) for name, tensor in file_tensors(old).items())
    before, after = router.read_router_file(old)[1], router.read_router_file(new)[1]
    assert before.orders == after.orders and before.calibration != after.calibration
    with pytest.raises(ValueError, match="import_official and --recalibrate"):
        settings(base, tmp_path / "c", recalibrate=str(old), import_official=str(old))


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_running_quantile_holds_the_budget(base, granularity):
    """Every gate that opens lowers the loss, so all logits rise while tuning; the cut rises with them."""
    run = begun(base, layers="0-3", granularity=granularity, steps=30, lr=0.05, batch_size=16)
    kept = [train.step(run)["capacity"] for _ in range(30)]
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.05) and run.state.cut > 0.0


def test_damaged_stores_of_activations_are_computed_again(base, tmp_path):
    """Cut, emptied or altered while a run is interrupted: the same losses, whatever the file holds."""
    cfg = settings(base, tmp_path / "whole", layers="2-3", steps=2)
    whole = train.train(cfg)
    stored = tmp_path / "whole/trunk/rank0.bin"
    content = stored.read_bytes()
    for damage in (content[: len(content) // 2], b"", bytes(len(content)), content[:-8] + b"\x01" * 8):
        stored.write_bytes(damage)
        again = train.train(settings(base, tmp_path / "whole", layers="2-3", steps=2, overwrite=True))
        for name in ("heldout_loss_dense", "heldout_loss_routed", "capacity"):
            assert again[name] == pytest.approx(whole[name], abs=1e-6)


def test_a_torn_line_of_the_log_is_done_again(base, tmp_path):
    train.train(settings(base, tmp_path / "run"))
    log = tmp_path / "run/log.jsonl"
    (tmp_path / "run/summary.json").unlink()  # killed before the end
    log.write_text(log.read_text() + '{"step": 9, "lo')
    train.train(settings(base, tmp_path / "run"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_keeps_the_dtype_that_auto_stood_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train.train(settings(base, tmp_path / "run", dtype="auto", steps=1))
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # another processor
    assert train.stored_dtype(settings(base, tmp_path / "run", dtype="auto")) == "bfloat16"
    assert train.stored_dtype(settings(base, tmp_path / "new", dtype="auto")) == "auto"
    assert train.train(settings(base, tmp_path / "run", dtype="auto", steps=1))["steps"] == 1


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_sets_what_is_not_set(base, tmp_path, effort):
    cfg = train.TrainConfig(effort=effort, cost_samples=5)
    assert cfg.cost_samples == 5 and cfg.benefit_samples == EFFORTS[effort]["benefit_samples"]


@pytest.mark.parametrize(
    "changes, share",
    [({}, 0.25), (dict(granularity="both_sequence"), 0.25), (dict(bare=0.0), 0.0), (dict(bare=0.5), 0.5),
     (dict(granularity="attn_token"), 0.0), (dict(recipe="paper"), 0.0),
     (dict(granularity="expert_sequence"), 0.0), (dict(train="routers+lora"), 0.0),
     (dict(recalibrate="routers.safetensors"), 0.0)],
)  # fmt: skip
def test_rows_without_a_chat_form_belong_to_sequence_routers_that_are_fitted(changes, share):
    assert train.TrainConfig(**changes).bare == share


def test_not_finite_outputs_of_the_base_are_told_with_a_remedy(tmp_path, base):
    """One projection too large for float16: measuring stops with a sentence."""
    folder = tmp_path / "large"
    shutil.copytree(base, folder)
    weights = file_tensors(folder / "model.safetensors")
    weights["layers.1.feed_forward.w2.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite numbers in float16; .*--dtype=float32"):
        train.train(settings(folder, tmp_path / "out", dtype="float16"))


def test_auto_may_leave_mlps_alone(base, tmp_path):
    """both_token keeps keys and values of skipped tokens; where only MLPs are routed there are none to keep."""
    for layers in ("auto:1", "auto:2", "auto:3", "auto:4"):
        run = begun(base, granularity="both_token", layers=layers, steps=0)
        kinds = {place.target for place in run.model.routing.places}
        assert run.model.routing.kv == ("all" if "attn" in kinds else "routed")


def run_cli(arguments, *, ranks=None, prelude=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if ranks:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            str(ROOT / "train.py"),
        ]
    elif prelude:
        command = [sys.executable, "-c", f"{prelude}\nimport runtime, train\nruntime.run_main(train.main)"]
    else:
        command = [sys.executable, str(ROOT / "train.py")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=env, timeout=300)


def flags(base, out, **changes):
    cfg = {
        "model": base,
        "data": base / "data.jsonl",
        "out": out,
        "dtype": "float32",
        "layers": "1-3",
        "batch_size": 8,
        "micro_batch": 2,
        "steps": 8,
        "select_samples": 12,
        "cost_samples": 8,
        "save_every": 3,
        "lr": 0.1,
        **changes,
    }
    return [f"--{name}={value}" for name, value in cfg.items()]


KILLS = {
    "in step 5": "import os, train\nstep = train.step\ntrain.step = lambda run: os.kill(os.getpid(), 9) if "
                 "run.state.step == 4 else step(run)",
    "while writing the second checkpoint": "import os, runtime\nrename, count = os.replace, []\n"
    "def replace(a, b):\n    count.append(b)\n    os.kill(os.getpid(), 9) if sum('checkpoint' in str(p) for p in "
    "count) == 2 else rename(a, b)\nos.replace = replace",
    "before the summary": "import os, runtime\nruntime.write_json = lambda *a: os.kill(os.getpid(), 9)",
}


def test_killed_and_continued_equals_uninterrupted(base, tmp_path):
    """SIGKILL in a step, in the middle of a checkpoint and before the summary: the same command ends in the same
    bytes.
    """
    train.train(runtime.cli(train.TrainConfig, flags(base, tmp_path / "whole")))
    for prelude in KILLS.values():
        killed = run_cli(flags(base, tmp_path / "killed"), prelude=prelude)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    continued = run_cli(flags(base, tmp_path / "killed"))
    assert continued.returncode == 0 and "going on from step" in continued.stdout, continued.stderr
    whole, killed = (tmp_path / name / "routers.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert sorted(os.listdir(tmp_path / "killed")) == [
        "checkpoint.safetensors",
        "log.jsonl",
        "routers.safetensors",
        "summary.json",
        "tokens",
        "trunk",
    ]
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "killed")
    ]
    timeless = [
        [{k: v for k, v in row.items() if k not in ("milliseconds", "tokens_per_second")} for row in log]
        for log in logs
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 8


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_two_ranks_equal_one(base, tmp_path, recipe):
    changes = {
        "recipe": recipe,
        "budget": 0.4,
        "granularity": "attn_token" if recipe == "default" else "attn_sequence",
        "lr": 0.02,
    }
    train.train(runtime.cli(train.TrainConfig, flags(base, tmp_path / "one", **changes)))
    two = run_cli(flags(base, tmp_path / "two", **changes), ranks=2)
    assert two.returncode == 0, two.stderr
    a, b = (file_tensors(tmp_path / run / "routers.safetensors") for run in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and two.stdout.count("iter 1/8") == 1


# -------------------------------------------------------------------------------------------------------------------
# errors


def good_line() -> str:
    return json.dumps({"prompt": "q", "response": "a"}) + "\n"


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"budget": 1.5}, "budget is 1.5, expected a share between 0 and 1"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"layers": "9"}, "this model has layers 0 to 3"),
        ({"layers": "deep:9"}, "deep:9"),
        ({"layers": "some"}, "'some'"),
        ({"granularity": "attention"}, "granularity is 'attention'"),
        ({"granularity": "mlp_token", "kv": "all"}, "kv is 'all'"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"lambda_": -1.0}, "lambda is -1.0, expected 0 or more: change --lambda"),
        ({"heldout": 1.0}, "heldout is 1.0"),
        ({"max_length": 1000}, "max_length is 1,000, expected at most the model's context of 128"),
        ({"max_length": 12}, "data.jsonl, line .*tokens, expected at most 12"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl was not found"),
        ({"heldout": "nowhere.jsonl", "max_samples": 4}, "nowhere.jsonl was not found"),
        ({"max_samples": 1}, "max_samples is 1"),
        ({"import_official": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_wrong_settings_are_told_and_nothing_is_written(base, tmp_path, changes, part):
    with pytest.raises((ValueError, FileNotFoundError), match=part):
        train.train(settings(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, part",
    [
        ("{not json}\n", "line 2 is not JSON"),
        ('{"question": "q"}\n', r"line 2 has the keys \['question'\]; expected messages"),
        ('{"messages": "text"}\n', "line 2: messages is not a list of turns"),
        ('{"messages": [{"role": "tool", "content": "x"}]}\n', "line 2: no turn of the assistant"),
        (
            '{"messages": [{"role": "user", "content": null}]}\n',
            "line 2, turn 1 has role 'user' and content of type NoneType",
        ),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "line 2: no turn of the assistant"),
        ('{"text": ""}\n', "line 2: no loss-carrying token"),
    ],
)
def test_bad_lines_are_named(base, tmp_path, line, part):
    (tmp_path / "data.jsonl").write_text(good_line() + line + good_line() * 9)
    with pytest.raises(ValueError, match=part):
        train.train(settings(base, tmp_path / "out", data=(str(tmp_path / "data.jsonl"),), heldout=0.2))
    assert not (tmp_path / "out").exists()


def test_user_errors_end_with_status_two_and_one_line(base, tmp_path):
    weights = (base / "model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((base / name).read_bytes())
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = run_cli(flags(base, tmp_path / "out", model=broken))
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and "model.safetensors" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert os.listdir(tmp_path / "out") == ["tokens"]  # which the mended run finds there


def test_ranks_must_share_a_batch_evenly(base, tmp_path):
    cfg, three = settings(base, tmp_path / "out", batch_size=8), runtime.Runtime(0, 3, 0, CPU.device, CPU.dtype, True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="batch_size is 8 on 3 ranks"):
        patch.setattr(runtime, "setup", lambda *a: three)
        train.train(cfg)


def write_rows(path, rows) -> tuple[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def test_all_bad_rows_are_listed_and_may_be_left_out(base, tmp_path, capsys):
    good = [json.loads(good_line()) for _ in range(12)]
    bad = [{"foo": 1}, {"text": ""}, {"prompt": "q" * 500, "response": "a"}]
    data = write_rows(tmp_path / "data.jsonl", [*good, *bad])
    with pytest.raises(ValueError, match="3 rows cannot be used") as error:
        train.train(settings(base, tmp_path / "out", data=data, heldout=0.3))
    assert all(f"line {number}" in str(error.value) for number in (13, 14, 15)) and not (tmp_path / "out").exists()
    train.train(settings(base, tmp_path / "out", data=data, heldout=0.3, skip_bad=True, steps=0))
    assert "3 bad rows are left out" in capsys.readouterr().out


def test_held_out_texts_that_are_tuned_on_are_counted(base, tmp_path, capsys):
    rows = [{"prompt": "q" * (1 + i), "response": "a"} for i in range(24)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    load = lambda **changes: train.load_data(  # noqa: E731
        settings(base, tmp_path / "out", data=data, **changes), load_tokenizer(base), 128
    )
    load()
    assert "also tuned on" not in capsys.readouterr().out
    load(heldout=data[0])
    assert "24 of 24 held-out texts are also tuned on" in capsys.readouterr().out
    write_rows(tmp_path / "data.jsonl", rows + rows[:8])
    data_set = load(heldout=0.5)  # a draw keeps rows with one prompt on one side
    tuned = {tuple(example.tokens) for example in data_set.train + data_set.select}
    assert not any(tuple(example.tokens) in tuned for example in data_set.held) and len(data_set.all) == 32
    assert "also tuned on" not in capsys.readouterr().out


@pytest.mark.parametrize("split", ["test", "validation", "Heldout"])
def test_other_splits_are_refused_with_their_counts(base, tmp_path, split):
    rows = [{"prompt": "q", "response": "a", "split": name} for name in ["train"] * 8 + ["heldout"] * 8 + [split] * 8]
    data = write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=f"'{split}'.*'heldout' 8.*'{split}' 8|'{split}' 8.*'heldout' 8"):
        train.train(settings(base, tmp_path / "out", data=data))


FORMS = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "pairs": lambda q, a: {"query": q, "response": a},
    "text": lambda q, a: {"text": q + a},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_command_printed_as_next_scores_what_was_held_out(base, tmp_path, form):
    """For every form of rows that train.py reads, chat form and truncation included: the same loss, by eval.py."""
    rows = [FORMS[form]("say " + "x" * i, "yes " * (2 + i % 3)) for i in range(12)]
    data, held = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[::2])
    more = {"max_length": 40, "truncate": True, **({} if form == "text" else {"chat": "plain"})}
    cfg = settings(base, tmp_path / "out", data=data, heldout=held[0], steps=0, **more)
    summary = train.train(cfg)
    program, script, *words = train.next_command(cfg, summary).split()
    assert (program, script) == ("python", "eval.py")
    report = scoring.evaluate(runtime.cli(scoring.EvalConfig, [*words, "--dtype=float32"]), CPU)
    found = report["results"]["perplexity"]
    assert found["tokens"] == summary["heldout_tokens"]
    assert found["loss"] == pytest.approx(summary["heldout_loss_routed"], abs=1e-4)
    assert found["capacity"] == pytest.approx(summary["capacity"], abs=1e-6)
