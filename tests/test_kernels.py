"""Section "Kernels" of model.py: whatever is chosen, results stay what the plain operators give, and memory is bounded.

Run: python -m pytest tests/test_kernels.py
"""

import copy
import pickle
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import CONFIG, write_base

import model as core
from model import KVCache, Linear, Product, Transformer, load_model, rows_to_pack
from recipe.speed import compile_model
from router import RouterConfig

ROOT = Path(__file__).resolve().parent.parent
can_pack = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")),
    reason="this torch cannot reorder weights",
)


@pytest.fixture
def packing(monkeypatch):
    """Every frozen float32 weight is packed, for any number of rows."""
    monkeypatch.setattr(core, "PACKED_LEAST", 1)
    monkeypatch.setattr(core, "PACKED_LEAST_ALONE", 1)
    monkeypatch.setattr(core, "rows_to_pack", lambda dtype, threads: 1 if dtype == torch.float32 else None)


def frozen_linear(width: int = 24, out: int = 40, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    linear = Linear(width, out, bias=bias).requires_grad_(False)
    linear.copies = {}
    return linear


def plain(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)


def copies(model: torch.nn.Module) -> list[torch.Tensor]:
    """All copies that a model holds."""
    return [made for module in core.products_of(model) for made in (module.copies or {}).values()]


@can_pack
@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (24,), (3, 24), (2, 5, 24), (130, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_product_and_its_gradient_are_the_plain_ones(packing, shape, bias):
    linear = frozen_linear(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    wanted = plain(linear, x)
    grad = torch.randn_like(wanted)
    found = linear(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, wanted)))
    assert len(linear.copies) == min(2, 2 * x.numel())  # no rows read no weight


@can_pack
@pytest.mark.parametrize("change", ["in place", "loaded", "assigned", "wider", "replaced"])
def test_a_changed_weight_is_packed_anew(packing, change):
    linear, x = frozen_linear(), torch.randn(3, 24)
    linear(x)
    state = {"weight": torch.randn(40, 24), "bias": torch.randn(40)}
    if change == "in place":
        with torch.no_grad():
            linear.weight.mul_(2)
    elif change == "wider":
        linear.double()
        x = x.double()
    elif change == "replaced":
        linear.weight = torch.nn.Parameter(state["weight"], requires_grad=False)
    else:
        linear.load_state_dict(state, assign=change == "assigned")
    linear.requires_grad_(False)
    torch.testing.assert_close(linear(x), plain(linear, x))


@can_pack
def test_a_model_that_is_loaded_in_inference_mode_sees_changes_too(packing, folder):
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        model = load_model(folder)
        before = model(tokens)[0]
        assert copies(model)
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight.mul_(2)
    after = model(tokens)[0]
    core.unpack_weights(model)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(tokens)[0], rtol=1e-4, atol=1e-4)


@can_pack
@pytest.mark.parametrize("asked", ["weight", "state_dict", "deepcopy", "to", "requires_grad", "load"])
def test_a_weight_that_was_given_up_is_there_for_whoever_asks(packing, asked):
    """Its own memory is free while only its copy is needed; every public way to the values finds them."""
    linear, x = frozen_linear(), torch.randn(3, 24)
    values, wanted = linear.weight.clone(), plain(linear, x)
    torch.testing.assert_close(linear(x), wanted)
    hidden = linear._parameters["weight"]
    assert hidden.isnan().all() and hidden.untyped_storage().nbytes() == hidden.element_size()
    if asked == "weight":
        assert linear.weight is hidden
    elif asked == "state_dict":
        assert torch.equal(linear.state_dict()["weight"], values)
    elif asked == "deepcopy":
        assert torch.equal(copy.deepcopy(linear).weight, values)
    elif asked == "to":
        assert torch.equal(linear.double().weight, values.double())
        linear.float()
    elif asked == "requires_grad":
        linear.requires_grad_(True)
        torch.testing.assert_close(linear(x), wanted)
    else:
        linear.load_state_dict({"weight": values, "bias": linear.bias.clone()})
    assert torch.equal(linear.weight, values)
    torch.testing.assert_close(linear(x), wanted)


@can_pack
def test_an_edit_through_data_is_seen(packing):
    linear, x = frozen_linear(), torch.randn(3, 24)
    linear(x)
    linear.weight.data.mul_(2)
    torch.testing.assert_close(linear(x), plain(linear, x))


@can_pack
def test_a_weight_that_trains_is_not_packed(packing):
    linear, x = frozen_linear(), torch.randn(3, 24)
    linear.weight.requires_grad_(True)
    linear(x).sum().backward()
    assert linear.weight.grad is not None and not linear.copies
    linear.requires_grad_(False).bias.requires_grad_(True)
    linear(x).sum().backward()
    assert linear.bias.grad is not None and not linear.copies


@can_pack
def test_copies_are_no_part_of_what_is_saved_or_copied(packing):
    linear, x = frozen_linear(), torch.randn(3, 24)
    assert list(linear.state_dict()) == ["weight", "bias"]
    wanted = linear(x)
    assert linear.copies
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert not other.copies
        assert torch.equal(other(x), wanted)


def test_without_the_operators_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(core, "PACKED_LEAST", 1)
    monkeypatch.setattr(core, "PACKED_LEAST_ALONE", 1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    rows_to_pack.cache_clear()
    linear, x = frozen_linear(), torch.randn(3, 24)
    assert torch.equal(linear(x), plain(linear, x)) and not linear.copies
    rows_to_pack.cache_clear()


@can_pack
def test_an_embedder_pays_nothing(packing):
    """A Transformer that load_model did not make holds no copies, frozen or not."""
    model = Transformer(CONFIG).eval().requires_grad_(False)
    model(torch.tensor([[1, 2, 3]]))
    assert copies(model) == []


# -----------------------------------------------------------------------------
# Whole models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("kernels"), replace(CONFIG, qkv_bias=True))


@can_pack
@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "both_token"])
def test_a_packed_model_computes_what_the_plain_one_does(packing, folder, granularity):
    """Logits of all routes, cached steps, and the routers' gradients."""
    packed, unpacked = load_model(folder), load_model(folder)
    for module in core.products_of(unpacked):
        module.copies = None
    tokens, results = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0)), []
    for model in (packed, unpacked):
        torch.manual_seed(1)
        model.add_routers(RouterConfig.of(granularity, (1, 2)))
        for router in model.routers():
            torch.nn.init.normal_(router.weight, std=0.3)
        with torch.inference_mode():
            cache = KVCache(model, 3)
            first = model(tokens[:, :6], cache=cache, route="gather")[0]
            later = model(tokens[:, 6:], cache=cache, route="gather")[0]
            off = model(tokens)[0]
        logits, gates = model(tokens, route="mask")
        (logits.square().mean() + gates.mean()).backward()
        gradient = torch.cat([router.weight.grad for router in model.routers()])
        results.append((first, later, off, logits.detach(), gradient))
    assert copies(packed) and not copies(unpacked)
    assert "reordered" in core.kernels(packed)["products"] and "own" in core.kernels(unpacked)["products"]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@can_pack
@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "mlp_token", "both_token", "block_token"])
def test_copies_are_made_once_and_kept_by_every_route(packing, folder, granularity, monkeypatch):
    model, made, real = load_model(folder), [], Product.packed
    kv = "all" if granularity in ("attn_token", "both_token") else "routed"
    model.add_routers(RouterConfig.of(granularity, (1, 2, 3), kv=kv))
    for router in model.routers():
        torch.nn.init.normal_(router.weight)
    model.requires_grad_(False)

    def count(self, transposed=False):
        before = len(self.copies) if self.seen == core.identity(self._parameters["weight"]) else 0
        copy = real(self, transposed)
        made.append(len(self.copies) > before)
        return copy

    monkeypatch.setattr(Product, "packed", count)
    tokens = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for route in ("off", "mask", "gather", "gather"):
            made.clear()
            cache = None if route == "mask" else KVCache(model, 3)
            model(tokens, route=route, cache=cache)
            model(tokens[:, :1], route=route, cache=cache)
    assert len(made) > 20 and not any(made)


@can_pack
def test_rows_run_alone_as_in_a_batch(packing, folder):
    model = load_model(folder)
    model.add_routers(RouterConfig.of("attn_sequence", (1, 2)))
    tokens = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    together = model(tokens, route="gather")[0]
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1], route="gather")[0][0], together[row])


@can_pack
def test_parameters_of_a_packed_model(packing, folder):
    """Converted weights lie in private memory, so their copies stand in for them; parameters() finds the values."""
    model, tokens = load_model(folder, dtype=torch.float64).float(), torch.arange(8)[None]
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(tokens)[0]
    assert model.layers[0].attention.wq._parameters["weight"].isnan().all()
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(tokens)[0], logits) and torch.equal(copy.deepcopy(model)(tokens)[0], logits)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@can_pack
def test_a_packed_model_can_be_compiled(packing, folder):
    model = load_model(folder)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    wanted = model(tokens)[0]
    for block in model.layers:
        block.compile(fullgraph=True, backend="eager")  # mapped weights are there beside their copies
    torch.testing.assert_close(model(tokens)[0], wanted)
    torch._dynamo.reset()
    converted = load_model(folder, dtype=torch.float64).float()
    converted(tokens)
    compile_model(converted, backend="eager")  # takes the copies away
    torch.testing.assert_close(converted(tokens)[0], wanted)
    assert not copies(converted)
    torch._dynamo.reset()


PRIVATE = """
import ctypes, sys, torch
sys.path[:0] = [{root!r}]
import model as core
core.rows_to_pack = lambda dtype, threads: 1

def private():
    ctypes.CDLL(None).malloc_trim(0)  # what is free already goes back to the system
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024

torch.set_num_threads(1)
core.PACKED_LEAST_ALONE = 1
core.F.linear(torch.randn(64, 64), torch.randn(64, 64))
x = torch.arange(8)[None]
before = private()
model = core.load_model({folder!r}, dtype=torch.float32)
with torch.inference_mode():
    model(x)
inference = private() - before
model.add_routers(core.RouterConfig.of("attn_sequence", (0,)))
model(x, route="mask")[0].sum().backward()
print(inference, private() - before)
"""


@can_pack
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs malloc_trim")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_private_memory(tmp_path, dtype):
    """At most the weights and a tied head in inference, twice the weights in tuning, in bytes that the system counts,
    whether the file's tensors are mapped or converted.
    """
    config = replace(CONFIG, dim=512, n_heads=8, n_kv_heads=8, head_dim=64, n_layers=2, vocab_size=4096)
    config = replace(config, hidden_dim=1536)
    folder = write_base(tmp_path / "wide", config)
    tensors = load_file(folder / "model.safetensors")
    whole, head = sum(tensor.nbytes for tensor in tensors.values()), tensors["tok_embeddings.weight"].nbytes
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    code = PRIVATE.format(root=str(ROOT), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inference, tuning = map(int, done.stdout.split())
    buffers = 8 * 2**20  # of the operators themselves, and gaps in the heap
    assert 0.8 * whole < inference < whole + head + buffers
    assert inference < tuning < 2 * whole + buffers
