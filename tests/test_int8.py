"""A base in int8: within half a step of every weight, the products of what was rounded, and still the same base.

Run: python -m pytest tests/test_int8.py    (routes and caches of such a base: tests/test_model.py)
"""

from dataclasses import replace

import pytest
import torch
from test_model import FAMILIES, build, routers_for, stored, tokens_of

from model import Embedding, Linear, generate, load_model
from recipe import int8
from recipe.base import load_base
from recipe.int8 import quantise
from runtime import ALONE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_int8_is_within_half_a_step_of_every_weight(dtype):
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-5  # rows of very different sizes
    before = weight.clone()
    table, scale = quantise(weight)
    assert torch.equal(weight, before)  # it may be a mapped file's
    assert table.dtype == torch.int8 and scale.dtype == torch.float32 and table.min() >= -127
    assert torch.equal(table[3], torch.zeros(24, dtype=torch.int8))
    error = (table.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert (scale[:3].double() <= weight[:3].double().abs().amax(1) / 126.9).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.2.feed_forward.w2.weight", "tok_embeddings.weight"])
def test_int8_refuses_a_row_that_is_not_finite_by_name(tmp_path, value, name):
    net = build()
    net.get_parameter(name)[5, 7] = value
    with pytest.raises(ValueError, match=f"{name}, row 5, holds NaN or infinity"):
        load_base(stored(tmp_path, net), ALONE, base_dtype="int8")
    load_model(tmp_path)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize("width", [24, 33, 128])
def test_int8_products_are_those_of_the_rounded_weight(monkeypatch, dtype, tolerance, width):
    """In blocks too, with gradients, for widths that torch's own int8 operator reads beyond (it crashed at 33)."""
    monkeypatch.setattr(int8, "BLOCK", 5 * width)
    table, scale = quantise(torch.randn(17, width, generator=torch.Generator().manual_seed(1)))
    plain = (table.double() * scale.double()[:, None])
    for rows in (0, 1, 8, 9):
        x = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype).requires_grad_()
        y = int8.Int8Product.apply(x, table, scale)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ plain.T, atol=10 * tolerance, rtol=tolerance)
        above = torch.randn(2, rows, 17, generator=torch.Generator().manual_seed(9)).to(dtype)
        gradient = torch.autograd.grad(y, x, above)[0]
        torch.testing.assert_close(gradient.double(), above.double() @ plain, atol=10 * tolerance, rtol=tolerance)


def test_int8_in_float16_does_not_overflow_where_the_result_does_not():
    table, scale = quantise(torch.full((3, 512), 0.01))
    y = int8.Int8Product.apply(torch.full((1, 512), 20.0, dtype=torch.float16), table, scale)
    torch.testing.assert_close(y.float(), torch.full((1, 3), 102.4), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("parts", [torch.float16, torch.bfloat16, torch.float32])
def test_a_base_in_int8_holds_a_byte_a_weight_and_is_still_that_base(tmp_path, family, parts):
    folder = stored(tmp_path, build(family), parts)
    plain, small = load_base(folder, ALONE), load_base(folder, ALONE, base_dtype="int8")
    for name, module in small.named_modules():
        assert not isinstance(module, (Linear, Embedding)), name
        if isinstance(module, int8.Int8):
            assert module.weight.dtype == torch.int8 and module.scale.shape == module.weight.shape[:1], name
    assert small.dtype == small.norm.weight.dtype == torch.float32 and small.fingerprint == plain.fingerprint
    logits, other = plain(tokens_of(2, 9))[0], small(tokens_of(2, 9))[0]
    assert 0 < (logits - other).norm() < 0.1 * logits.norm()
    file = routers_for(tmp_path / "routers", small, small.fingerprint)
    for base_dtype in (None, "int8"):
        assert load_base(folder, ALONE, file, base_dtype=base_dtype).routing == small.routing


def test_int8_generates_as_it_scores(tmp_path):
    model = load_base(stored(tmp_path, build()), ALONE, base_dtype="int8")
    prompt = tokens_of(1, 6)[0].tolist()
    new = generate(model, [prompt], 8)[0]
    assert new == model(torch.tensor([prompt + new]))[0].argmax(-1)[0, 5:-1].tolist()


@pytest.mark.parametrize("wrong", [dict(dtype=torch.int8), dict(base_dtype="int4"), dict(base_dtype=torch.int8)])
def test_other_integers_are_refused(tmp_path, wrong):
    folder = stored(tmp_path, build())
    rt = replace(ALONE, dtype=wrong.get("dtype", ALONE.dtype))
    with pytest.raises(ValueError, match="int8"):
        load_base(folder, rt, base_dtype=wrong.get("base_dtype"))
