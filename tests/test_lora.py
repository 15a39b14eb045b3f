"""LoRA and full tuning: nothing changes at birth, what is frozen stays, adapters are peft's.  Run: python -m pytest
tests/test_lora.py
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG, write_base
from tuning import begun, settings

import convert_hf
import model as model_module
import train
from model import Transformer, fingerprint, load_model
from recipe import passes
from recipe.adapter import lacks_adapter, load_adapter, save_adapter
from recipe.base import load_base, save_base
from recipe.fidelity import rounded
from recipe.lora import PROJECTIONS, TARGETS, LoRA, LoRAConfig, add_lora, changes, merge
from router import GRANULARITIES, RouterConfig, read_router_file
from runtime import ALONE

TOKENS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))


def changed(model: Transformer, config: LoRAConfig = LoRAConfig(rank=4)) -> Transformer:
    """The model with changes that matter."""
    add_lora(model, config)
    torch.manual_seed(9)
    for lora in changes(model).values():
        lora.lora_B.normal_(std=0.1)
    return model


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **kwargs)[0]


@pytest.fixture
def adapter(base, tmp_path):
    """A folder with changes of the base, and that model."""
    model = changed(load_model(base))
    save_adapter(model, tmp_path / "adapter", str(base))
    return tmp_path / "adapter", model


# -----------------------------------------------------------------------------
# The module


def test_nothing_changes_at_birth(base):
    dense, model = load_model(base), load_model(base)
    add_lora(model, LoRAConfig())
    assert len(changes(model)) == 4 * 7 and torch.equal(logits(dense), logits(model))


def test_places_are_those_of_the_conversion():
    """Query and key rows lie half-split in both: the conversion is a rename, so a change needs no permutation."""
    for name, place in PROJECTIONS.items():
        assert convert_hf.KEY_MAP[f"model.layers.{{i}}.{name}.weight"] == f"layers.{{i}}.{place}.weight"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_routes_compute_the_same_function_with_lora(base, granularity):
    model = changed(load_model(base))
    model.add_routers(RouterConfig.of(granularity, (0, 2, 3)))
    torch.manual_seed(3)
    for router in model.routers():
        torch.nn.init.normal_(router.weight, std=0.5)
    torch.testing.assert_close(logits(model, route="mask"), logits(model, route="gather"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "k_proj"), ("down_proj",)])
def test_merged_weights_are_the_same_function(base, targets):
    model = changed(load_model(base), LoRAConfig(4, 8.0, targets=targets))
    before = logits(model)
    assert (before - logits(load_model(base))).abs().max() > 0.05
    merge(model)
    assert not changes(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(load_model(base)), logits(load_model(base)))  # the file itself is untouched


def test_experts_stay_as_they_are():
    sizes = {"n_experts": 3, "experts_per_token": 2, "expert_dim": 16, "dense_layers": (1,)}
    model = Transformer(replace(CONFIG, family="mixtral", **sizes))
    assert len(changes(changed(model))) == 4 * 4 + 3  # of each layer's attention, and of the one dense MLP
    before = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    everywhere = Transformer(replace(CONFIG, family="mixtral", **{**sizes, "dense_layers": ()}))
    with pytest.raises(ValueError, match="mixtures of experts"):
        add_lora(everywhere, LoRAConfig(targets=("up_proj",)))


def test_lora_around_a_base_in_int8_has_the_gradients_of_the_rounded_one(base):
    """And is not merged: what it adds is less than a step of int8."""
    grads = []
    for model in (load_base(base, ALONE, base_dtype="int8"), rounded(load_model(base), 8)):
        torch.manual_seed(4)
        changed(model)
        for lora in changes(model).values():
            lora.lora_A.requires_grad_(True)
        model(TOKENS)[0].logsumexp(-1).sum().backward()
        grads.append(torch.cat([lora.lora_A.grad.flatten() for lora in changes(model).values()]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="int8.*without --base_dtype"):
        merge(changed(load_base(base, ALONE, base_dtype="int8")))


# -----------------------------------------------------------------------------
# Files


def test_files_have_pefts_names(adapter):
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    of_layer = [
        "self_attn.q_proj.lora_A.weight", "self_attn.q_proj.lora_B.weight",
        "self_attn.k_proj.lora_A.weight", "self_attn.k_proj.lora_B.weight",
        "self_attn.v_proj.lora_A.weight", "self_attn.v_proj.lora_B.weight",
        "self_attn.o_proj.lora_A.weight", "self_attn.o_proj.lora_B.weight",
        "mlp.gate_proj.lora_A.weight", "mlp.gate_proj.lora_B.weight",
        "mlp.up_proj.lora_A.weight", "mlp.up_proj.lora_B.weight",
        "mlp.down_proj.lora_A.weight", "mlp.down_proj.lora_B.weight",
    ]  # fmt: skip
    names = {f"base_model.model.model.layers.{layer}.{name}" for layer in range(4) for name in of_layer}
    assert set(tensors) == names
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 48)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (16, 4)
    said = json.loads((adapter[0] / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["bias"]) == ("LORA", 4, 16.0, "none")


def test_an_adapter_comes_back_whole(base, adapter):
    folder, model = adapter
    other = load_model(base)
    load_adapter(other, folder)
    assert torch.equal(logits(model), logits(other))
    assert other.exact_fingerprint != load_model(base).exact_fingerprint  # stored activations are not the base's
    assert other.fingerprint == load_model(base).fingerprint  # its routers stay valid


def test_peft_loads_ours_and_we_load_pefts(base, adapter, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    convert_hf.convert(base, tmp_path / "hf", to_hf=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(reference, adapter[0])
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits(adapter[1]), rtol=0, atol=1e-4)
    theirs = theirs.unload()
    chosen = peft.LoraConfig(r=6, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "k_proj", "up_proj"],
                             layers_to_transform=[1, 3], init_lora_weights=False, task_type="CAUSAL_LM")
    made = peft.get_peft_model(theirs, chosen)
    made.save_pretrained(tmp_path / "peft")
    model = load_model(base)
    load_adapter(model, tmp_path / "peft")
    assert len(changes(model)) == 6
    save_adapter(model, tmp_path / "again", "base")  # and back: only the layers that were changed
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["layers_to_transform"] == [1, 3]
    with torch.no_grad():
        torch.testing.assert_close(made(TOKENS).logits, logits(model), rtol=0, atol=1e-4)


def test_a_merged_base_keeps_its_routers_and_refuses_its_adapter(base, adapter, tmp_path):
    folder, model = adapter
    merge(model)
    save_base(model, base, tmp_path / "merged", model.fingerprint)
    merged = load_model(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model)) and merged.parent == model.fingerprint
    assert merged.fingerprint != model.fingerprint
    with pytest.raises(ValueError, match="fingerprint"):  # its changes would count twice
        load_adapter(merged, folder)


@pytest.mark.parametrize(
    "change, part",
    [
        (dict(r=3), "shape"),
        (dict(r="many"), "no rank"),
        (dict(use_dora=True), "use_dora"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(bias="all"), "bias"),
        (dict(peft_type="IA3"), "peft_type"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
    ],
)
def test_settings_that_we_do_not_compute_are_refused(base, adapter, change, part):
    path = adapter[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=part):
        load_adapter(load_model(base), adapter[0])


def test_files_that_do_not_fit_are_refused(base, adapter, tmp_path):
    folder, path = adapter[0], adapter[0] / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    first = next(iter(tensors))
    for wrong, part in [
        ({**tensors, first: torch.full_like(tensors[first], math.nan)}, "finite"),
        ({name: tensor for name, tensor in tensors.items() if name != first}, "nothing"),
        ({**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, "lm_head"),
        ({}, "no change"),
    ]:
        save_file(wrong, path)
        with pytest.raises(ValueError, match=part):
            load_adapter(load_model(base), folder)
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="truncated"):
        load_adapter(load_model(base), folder)
    path.write_bytes(whole)
    other = write_base(tmp_path / "other", replace(CONFIG, norm_eps=1e-6))
    with pytest.raises(ValueError, match="fingerprint"):
        load_adapter(load_model(other), folder)
    with pytest.raises(FileNotFoundError, match="--adapter"):
        load_adapter(load_model(base), tmp_path / "nowhere")


# -----------------------------------------------------------------------------
# Tuning


def tuning(base, what: str, **more) -> train.Run:
    """A run before its first step."""
    torch.manual_seed(1)  # LoRA is drawn
    return begun(base, train=what, lora_first=False, recipe="paper" if what == "full" else "default", **more)


@pytest.mark.parametrize("what", ["routers", "lora", "routers+lora", "full"])
def test_what_is_frozen_stays_bit_for_bit(base, what):
    run = tuning(base, what)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    for _ in range(2):  # B moves A in the second step
        train.step(run)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    expected = {"routers": ("router",), "lora": ("lora_",), "routers+lora": ("router", "lora_"), "full": ("",)}[what]
    assert set(run.weights) == {name for name in before if any(part in name for part in expected)}
    assert moved <= set(run.weights)  # LoRA around what everybody skips has no gradient
    assert all(any(part in name for name in moved) for part in expected)


@pytest.mark.parametrize("what", ["lora", "routers+lora", "full"])
def test_accumulation_does_not_change_the_gradient(base, what):
    runs = [tuning(base, what, micro_batch=n) for n in (8, 3)]
    for run in runs:
        train.step(run)
    first, second = (run.optimizers[-1] for run in runs)
    for a, b in zip(first.param_groups[-1]["params"], second.param_groups[-1]["params"]):
        torch.testing.assert_close(first.state[a]["exp_avg"], second.state[b]["exp_avg"], rtol=2e-4, atol=1e-7)


def test_full_tuning_sees_every_gradient(base):
    """Beside autograd of the whole loss at once, the tied head included."""
    run = tuning(base, "full", batch_size=8)
    whole = [run.data.train[i] for i in train.global_batch(len(run.data.train), 8, run.cfg.seed, 0)]
    whole.sort(key=lambda example: -len(example.tokens))
    batch = passes.collate(whole, run.rt.device)
    h = passes.states(run.model, batch, route="mask")[0]
    loss = passes.token_losses(run.model.head(h), batch.labels).mean()
    base_weights = {name: w for name, w in run.weights.items() if "router" not in name}
    expected = torch.autograd.grad(loss, list(base_weights.values()))
    train.step(run)
    for w, gradient in zip(base_weights.values(), expected):
        torch.testing.assert_close(run.optimizers[0].state[w]["exp_avg"] * 10, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("more", [
    {"lora_first": True, "lora_dropout": 0.1},
    {"lora_first": False, "evaluations": 0},  # the last weights are kept, not the best of so few steps
])
def test_a_run_writes_an_adapter_beside_its_routers(base, tmp_path, more):
    summary = train.train(settings(base, tmp_path, train="routers+lora", steps=3, **more))
    model = load_model(base, routers=tmp_path / "routers.safetensors")
    load_adapter(model, tmp_path)
    assert any(router.weight.any() for router in model.routers())
    meta = read_router_file(tmp_path / "routers.safetensors")[1]
    assert lacks_adapter(load_model(base), meta) and not lacks_adapter(model, meta)
    assert any(lora.lora_B.any() for lora in changes(model).values())
    assert summary["trainable_parameters"] > 0 and summary["optimizer_bytes"] > 0
    assert (tmp_path / "lora").is_dir() == more["lora_first"]
    assert not (tmp_path / "trunk").exists() or more["lora_first"]  # a trunk that trains is never stored


def test_full_tuning_writes_a_base_of_its_own(base, tmp_path):
    train.train(settings(base, tmp_path, train="full", recipe="paper", steps=2))
    model = load_model(tmp_path / "base", routers=tmp_path / "routers.safetensors")
    assert model.fingerprint == fingerprint(tmp_path / "base") != fingerprint(base) and model.parent is None
    with pytest.raises(ValueError, match="fingerprint"):
        load_model(base, routers=tmp_path / "routers.safetensors")


@pytest.mark.parametrize("what", ["lora", "routers+lora", "full"])
def test_killed_and_continued_ends_in_the_same_files(base, tmp_path, monkeypatch, what):
    more = {"train": what, "lora_first": False, "steps": 4, "save_every": 1, "lora_dropout": 0.2 * ("lora" in what)}
    more |= {"recipe": "paper"} if what == "full" else {}
    train.train(settings(base, tmp_path / "whole", **more))
    step = train.step

    def killed(run):
        if run.state.step == 2:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(train, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings(base, tmp_path / "torn", **more))
    monkeypatch.setattr(train, "step", step)
    train.train(settings(base, tmp_path / "torn", **more))
    made = {"lora": ["adapter_model"], "routers+lora": ["adapter_model", "routers"], "full": ["base/model", "routers"]}
    for name in made[what]:
        whole, torn = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("whole", "torn"))
        assert all(torch.equal(whole[key], torn[key]) for key in whole) and whole.keys() == torn.keys()
    finished = train.train(settings(base, tmp_path / "torn", **more))
    assert finished["identity"]["train"] == what  # recognised as done


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(train="full", dtype="bfloat16"), "float32"),
        (dict(train="full", base_dtype="int8"), "int8"),
        (dict(train="lora", objective="distill"), "distill"),
        (dict(lora_rank=0), "rank"),
        (dict(lora_dropout=1.0), "dropout"),
        (dict(lora_targets=("lm_head",)), "q_proj"),
        (dict(lora_lr=-1.0), "lora_lr"),
    ],
)
def test_wrong_settings_are_told(base, tmp_path, changes, part):
    with pytest.raises(ValueError, match=part):
        settings(base, tmp_path, **changes)


def test_no_weight_is_read_from_an_old_copy(base, monkeypatch):
    """The CPU may keep frozen weights in another order: what trains or is merged is never read from there."""
    for name in ("PACKED_LEAST", "PACKED_LEAST_ALONE"):
        monkeypatch.setattr(model_module, name, 1, raising=False)
    run = tuning(base, "full", batch_size=4)
    merged = changed(load_model(base))
    for model, change in ((run.model, lambda: train.step(run)), (merged, lambda: merge(merged))):
        before = logits(model.requires_grad_(model is run.model))
        change()
        model.requires_grad_(False)
        model.add_routers(None)
        plain = Transformer(model.config)
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
        assert model is merged or not torch.equal(logits(model), before)


def test_the_summary_of_lora_counts_the_rows_that_were_left_out(base, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text((base / "data.jsonl").read_text() + '{"messages": [{"role": "user", "content": "x"}]}\n')
    summary = train.train(settings(base, tmp_path / "out", train="lora", steps=1, data=(str(data),), skip_bad=True))
    assert summary["data"]["rows"] == 45 and summary["data"]["used"] == 44
    ((reason, count),) = summary["data"]["left_out"].items()
    assert count == 1 and "assistant" in reason
    assert json.loads((tmp_path / "out/summary.json").read_text())["data"] == summary["data"]


def test_full_tuning_leaves_the_file_of_its_base_alone(base, tmp_path):
    """Weights are mapped from disk: they are copied before anything writes to them."""
    before = (base / "model.safetensors").read_bytes()
    train.train(settings(base, tmp_path, train="full", recipe="paper", steps=1))
    assert (base / "model.safetensors").read_bytes() == before
    model = load_model(base)
    assert not model.routers()


def test_a_changed_projection_says_what_it_multiplies_by():
    """Whatever the base is held in: an order by weights alone ranks the model that is served."""
    torch.manual_seed(0)
    changed = LoRA(torch.nn.Linear(12, 20, bias=False), 3, 0.5, 0.0, None)
    torch.nn.init.normal_(changed.lora_B)
    x = torch.randn(5, 12)
    assert torch.allclose(x @ changed.weight.T, changed(x), atol=1e-5)
