"""Fixed routes built into a checkpoint: the function of the forced route, here and in transformers.  Run: python -m
pytest tests/test_fixed.py
"""

import json
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, write_base
from tuning import settings

import convert_hf
import train
from model import load_model
from recipe.fixed import by_routers, fix_route, listed
from router import RouterConfig

TOKENS = torch.randint(3, 250, (2, 15), generator=torch.Generator().manual_seed(7))
ROUTES = ["2", "0,3", "1.attn", "2.mlp,3.mlp", "0,1.attn,2.mlp", "1,2,3"]
QWEN = replace(CONFIG, family="qwen2", qkv_bias=True, sliding_window=4, window_layers=(1, 3))


def forced(folder, text: str) -> torch.Tensor:
    """Logits of the whole model where this route is forced upon everybody."""
    model = load_model(folder)
    model.add_routers(RouterConfig.of("both_sequence", range(4)))
    skipped = listed(text, 4)
    gates = [float((place.layer, place.target) not in skipped) for place in model.routing.places]
    with torch.no_grad():
        return model(TOKENS, route="gather", gates=torch.tensor(gates)[:, None].expand(-1, 2))[0]


@pytest.mark.parametrize("text", ROUTES)
def test_a_fixed_route_is_the_forced_one(base, text):
    model = load_model(base)
    fix_route(model, listed(text, 4))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS)[0], forced(base, text), rtol=0, atol=1e-5)
    assert model.config.n_layers == len(model.layers) == 4 - sum("." not in name for name in text.split(","))


@pytest.mark.parametrize("config", [CONFIG, QWEN, replace(CONFIG, family="mistral", sliding_window=5)])
def test_transformers_computes_an_exported_route(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    folder = write_base(tmp_path / "base", config)
    for number, text in enumerate(["2", "0,1.attn,2.mlp"]):
        hf = tmp_path / f"hf{number}"
        convert_hf.rebuild(convert_hf.ConvertConfig(str(folder), str(hf), to_hf=True, skip=text))
        reference = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        assert reference.config.num_hidden_layers == 3
        with torch.no_grad():
            theirs = reference(TOKENS, use_cache=False).logits
        torch.testing.assert_close(theirs, forced(folder, text), rtol=0, atol=1e-4)


def test_transformers_does_not_skip_by_its_config_yet():
    """Why single sublayers are exported as zeros: `per_layer_config` takes a skip that no Llama model reads."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config = transformers.LlamaConfig(**sizes, per_layer_config={0: {"skip": ["attention"]}})
    model = transformers.LlamaForCausalLM(config)
    assert config.per_layer_config[0].skip == ["attention"] and model.model.layers[0].self_attn.q_proj is not None


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train.train(settings(base, out, steps=2, layers="0-3"))


def test_routes_of_a_router_file(base, run):
    """Its orders at a budget skip the first ones; its mean route is that of the summary."""
    out, summary = run
    path = str(out / "routers.safetensors")
    model = load_model(base)
    assert by_routers("greedy", model, path, 1.0) == set()
    assert len(by_routers("greedy", model, path, 0.5)) == 2 and len(by_routers("fisher", model, path, 0.25)) == 3
    rarest = min(range(4), key=lambda place: summary["capacity_per_layer"][place])
    assert by_routers(f"mean:{out / 'summary.json'}", model, path, 0.75) == {(rarest, "attn")}
    report = out / "one.json"
    report.write_text(json.dumps({"results": {"arc_easy": {"capacity_per_layer": summary["capacity_per_layer"]}}}))
    assert by_routers(f"mean:{report}", model, path, 0.75) == {(rarest, "attn")}


def test_other_routes_are_told(base, run, tmp_path):
    path, model = str(run[0] / "routers.safetensors"), load_model(base)
    for text in ("", "4", "1.both", "x", "-1", "greedy"):
        with pytest.raises(ValueError, match="expected layers from 0 to 3"):
            listed(text, 4)
    with pytest.raises(ValueError, match="one that stays"):
        fix_route(load_model(base), listed("0,1,2,3", 4))
    for text, budget in [("greedy", None), ("greedy", 1.5), ("best", 0.5)]:
        with pytest.raises(ValueError, match="greedy, fisher, similarity"):
            by_routers(text, model, path, budget)
    for found in ([], {"results": {"a": {}, "b": {}}}, {"capacity_per_layer": [1, 1, 1]}, {"capacity_per_layer": 3}):
        (tmp_path / "x.json").write_text(json.dumps(found))
        with pytest.raises(ValueError, match="capacity_per_layer of 4"):
            by_routers(f"mean:{tmp_path / 'x.json'}", model, path, None)


def test_a_merged_and_exported_adapter(base, run, tmp_path):
    """One command merges; the base's routers stay valid for what it writes, and transformers computes its export."""
    transformers = pytest.importorskip("transformers")
    from recipe.adapter import load_adapter, save_adapter
    from test_lora import changed

    own = changed(load_model(base))
    save_adapter(own, tmp_path / "adapter", "base")
    for out, to_hf in (("merged", False), ("hf", True)):
        more = {"to_hf": to_hf, "adapter": str(tmp_path / "adapter")}
        convert_hf.rebuild(convert_hf.ConvertConfig(str(base), str(tmp_path / out), **more))
    merged = load_model(tmp_path / "merged", routers=run[0] / "routers.safetensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = own(TOKENS)[0]
        torch.testing.assert_close(merged(TOKENS)[0], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(reference(TOKENS).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="fingerprint"):
        load_adapter(load_model(tmp_path / "merged"), tmp_path / "adapter")
