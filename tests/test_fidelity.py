"""How far a routed model is from the dense one, against plain definitions on a tiny base.

Run: python -m pytest tests/test_fidelity.py
"""

import json
import math
from dataclasses import replace

import pytest
import torch

import eval as scoring
from data.records import Example
from model import generate, load_model
from recipe import fidelity as F
from recipe.forced import Control
from router import RouterConfig, RouterMeta, save_routers, threshold_of
from tiny import write_jsonl
from tuning import CPU


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(F, "ANSWER_TOKENS", 12)
    monkeypatch.setattr(scoring, "ANSWER_TOKENS", 12)


def routed_model(base, granularity: str):
    model = load_model(base)
    model.add_routers(RouterConfig.of(granularity, (1, 2, 3)))
    torch.manual_seed(1)
    for router in model.routers():
        torch.nn.init.normal_(router.weight)
    return model.requires_grad_(False)


def texts(n: int = 11) -> list[Example]:
    rng = torch.Generator().manual_seed(3)
    examples = []
    for i in range(n):
        tokens = torch.randint(0, 256, (12 + i % 5,), generator=rng).tolist()
        examples.append(Example(tokens, 6 + i % 3, list(range(6 + i % 3, len(tokens))), "ab"[i % 2]))
    return examples


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_measures_equal_their_definitions_example_by_example(base, granularity):
    model, examples = routed_model(base, granularity), texts()
    dense, routed = F.Variant("dense", model), F.Variant("routed", model, "gather")
    found = F.read(dense, [routed], examples, CPU)
    for example, measures in zip(examples, found):
        tokens = torch.tensor([example.tokens])
        at = [position - 1 for position in example.targets]
        p = model(tokens)[0][0, at].double().softmax(-1)
        q = model(tokens, route="mask", prompt_lengths=[example.prompt])[0][0, at].double().softmax(-1)
        kl, same = (p * (p / q).log()).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()
        wanted = torch.stack([kl, same, 0.5 * (2 - (p - q).abs().sum(-1))])  # min(p, q) sums to 1 less half of |p - q|
        torch.testing.assert_close(measures[0].double(), wanted, atol=1e-5, rtol=1e-4)


def test_dense_beside_itself_loses_nothing_and_repetition_counts_runs_met_before(base):
    model, examples = routed_model(base, "attn_token"), texts()
    dense = F.Variant("dense", model)
    result = F.fidelity([dense, replace(dense, name="again")], examples, (), CPU)["variants"]["again"]
    for kind in ("file", "own"):
        assert result[kind]["kl"] == result[kind]["kl_p999"] == 0.0 and result[kind]["same_top"] == 1.0
        assert math.isclose(result[kind]["acceptance"], 1.0, abs_tol=1e-6)
    assert result["answers"]["same"] == len(examples) and result["answers"]["agreement"] == 12.0
    assert result["answers"]["cut"] == len(examples) and result["own"]["tokens"] == 12 * len(examples)
    assert F.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 / 5 and F.repetition([1, 2, 3]) == 0.0
    assert F.repetition([7] * 10) == 6 / 7


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token"])
def test_answers_are_those_of_generate_whatever_the_batch(base, granularity):
    model, prompts = routed_model(base, granularity), [example.tokens[: example.prompt] for example in texts()]
    variant = F.Variant("routed", model, "gather")
    stop = tuple(range(0, 256, 7))
    wanted = [generate(model, [prompt], 12, stop_tokens=stop)[0] for prompt in prompts]
    assert F.answer(variant, prompts, stop, CPU) == wanted
    forced = F.Variant("list", model, "gather", Control(model.place_weights(), lists={F.TASK: ([0, 1, 2], 1 / 3)}))
    gates = torch.tensor([0.0, 0.0, 1.0])

    def once(rows, starts, width):
        return None if starts[0] else gates[:, None]

    wanted = [generate(model, [prompt], 12, stop_tokens=stop, gates=once)[0] for prompt in prompts]
    assert F.answer(forced, prompts, stop, CPU) == wanted


def test_rounding_keeps_what_fits_and_errs_by_half_a_step(base):
    model = load_model(base)
    with torch.no_grad():
        model.layers[0].attention.wq.weight.copy_(torch.randint(-127, 128, (32, 32)).float() / 64)
        model.layers[0].attention.wq.weight[:, 0] = 127 / 64
    whole, grouped = F.rounded(model, 8), F.rounded(model, 4, 16)
    assert torch.equal(whole.layers[0].attention.wq.weight, model.layers[0].attention.wq.weight)
    weight = model.layers[1].feed_forward.w2.weight
    steps = weight.unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True) / 7
    error = (grouped.layers[1].feed_forward.w2.weight - weight).unflatten(1, (-1, 16)).abs()
    assert (error <= steps / 2 + 1e-6).all() and error.max() > 0


@pytest.mark.parametrize("granularity", ["attn_sequence", "both_token"])
def test_eval_writes_the_report(base, tmp_path, granularity, monkeypatch, capsys):
    places = RouterConfig.of(granularity, (1, 2, 3)).places
    model = routed_model(base, granularity)
    names = list(model.routing.names)
    meta = RouterMeta(model.routing, [threshold_of(0.0)] * len(places), model.fingerprint, orders={"greedy": names})
    save_routers(tmp_path / "routers.safetensors", model, meta)
    rows = [{"prompt": f"say {'x' * i}", "response": "yes " * (1 + i % 3), "domain": "ab"[i % 2]} for i in range(9)]
    path, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    words = ["eval.py", f"--model={base}", f"--routers={tmp_path / 'routers.safetensors'}", f"--fidelity={path}",
             f"--out={out}", "--yardstick", "--dtype=float32", "--chat=plain", "--limit=7"]
    monkeypatch.setattr("sys.argv", words)
    scoring.main()
    report = json.loads(out.read_text())["fidelity"]
    variants = report["variants"]
    assert list(variants) == ["dense", "routed", "greedy", "mean_route", "random", "int8", "int4"]
    assert report["items"] == 7 and variants["int8"]["file"]["kl"] < variants["int4"]["file"]["kl"]
    assert 0 < variants["routed"]["capacity"] < 1 and variants["greedy"]["capacity"] == variants["routed"]["capacity"]
    paired = variants["random"]["file"]["paired"]["kl"]["difference"]
    assert math.isclose(paired, variants["routed"]["file"]["kl"] - variants["random"]["file"]["kl"], abs_tol=1e-6)
    assert set(variants["routed"]["own"]["domains"]) == {"a", "b"}
    assert "same top" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", words[:2] + words[3:])
    with pytest.raises(ValueError, match="give --routers"):
        scoring.main()
