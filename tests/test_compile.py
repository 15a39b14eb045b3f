"""torch.compile and host syncs: one graph per block, few compilations whatever the route, the same results, and no
hidden wait for the device.

Run: python -m pytest tests/test_compile.py

Graphs are counted with the backend "eager" (tracing only); one test builds real code with inductor and needs a C++
compiler.
"""

import dataclasses
import shutil

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import KVCache, ModelConfig, Transformer, generate
from recipe.speed import compile_model
from router import GRANULARITIES, RouterConfig

CONFIG = dataclasses.replace(tiny.CONFIG, n_layers=6, vocab_size=61)
LAYERS = (1, 2, 3, 4)
KEEPS = ("attn_token", "both_token")
CASES = [(g, kv) for g in GRANULARITIES for kv in (("routed", "all") if g in KEEPS else ("routed",))]
CASES += [
    (g, "first") for g in ("attn_sequence", "both_sequence")
]  # kv routed, all routers decide at the first routed layer
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=5),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tie_embeddings=False),
}


def build(granularity: str, kv: str = "routed", family: str = "llama") -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**{**vars(CONFIG), "family": family, **FAMILIES[family]})
    more = {"reads": "first"} if kv == "first" else {"kv": kv}
    model = Transformer(config, RouterConfig.of(granularity, LAYERS, **more))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


def tokens_of(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, width), generator=torch.Generator().manual_seed(seed))


def gates_of(model: Transformer, batch: int, width: int, seed: int, share: float = 0.5) -> torch.Tensor:
    shape = (len(model.routing.places), batch) + ((width,) if model.routing.unit == "token" else ())
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).float()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# -----------------------------------------------------------------------------
# Graphs and compilations


@pytest.mark.parametrize("granularity, kv", CASES)
def test_mask_is_one_graph_per_block_for_any_shape(granularity, kv):
    """fullgraph=True forbids breaks; the counter shows that layers share code: two kinds of block, with and without
    padding.
    """
    model, counter = build(granularity, kv), CompileCounterWithBackend("eager")
    calls = [
        (tokens_of(3, 16), {}),
        (tokens_of(2, 9), {}),
        (tokens_of(5, 12), dict(lengths=torch.tensor([3, 12, 5, 9, 1]))),
        (tokens_of(2, 7), dict(lengths=torch.tensor([7, 2]))),
    ]
    wanted = [model(tokens, route="mask", **settings) for tokens, settings in calls]
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for (tokens, settings), (logits, gates) in zip(calls, wanted):
        found, found_gates = model(tokens, route="mask", **settings)
        torch.testing.assert_close(found, logits)
        assert torch.equal(found_gates, gates)
        counts.append(counter.frame_count)
    assert counts[1] == counts[0] == 2 and counts[3] == counts[2] <= 4


@pytest.mark.parametrize(
    "granularity, kv", [("attn_sequence", "routed"), ("both_sequence", "first"), ("block_token", "routed")]
)
def test_mask_keeps_its_gradient(granularity, kv):
    """The training path: gradient through the routers, ahead-of-time autograd; equal to eager."""
    gradients = []
    for compiled in (False, True):
        model = build(granularity, kv)
        if compiled:
            for block in model.layers:
                block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
        for router in model.routers():
            router.requires_grad_(True)
        logits, gates = model(tokens_of(2, 9), route="mask")
        (logits.square().mean() + gates.mean()).backward()
        gradients.append(torch.cat([router.weight.grad for router in model.routers()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_compiles_a_bounded_number_of_times(family):
    """Routes, batches, prompt lengths and steps change; after one run with several rows and one with a single row
    nothing is compiled again.
    """
    model, counter = build("attn_sequence", family=family), CompileCounterWithBackend("eager")
    runs = [([5, 5], 1), ([4], 2), ([9, 3, 6], 3), ([7, 7, 7, 7], 4), ([2], 5), ([11, 4], 6), ([3, 3, 8, 1, 5], 7)]

    def run(lengths: list[int], seed: int) -> list[list[int]]:
        prompts = [tokens_of(1, length, seed).tolist()[0] for length in lengths]
        gates = gates_of(model, len(lengths), 0, seed)
        return generate(
            model, prompts, 5, gates=lambda rows, starts, width: None if starts[0] else gates, route="gather"
        )

    wanted = [run(*settings) for settings in runs]
    compile_model(model, backend=counter)
    counts = []
    for settings, tokens in zip(runs, wanted):
        assert run(*settings) == tokens
        counts.append(counter.frame_count)
    assert counts[-1] <= 14  # head, and enter, close, feed, leave, project of a block: one token, several tokens
    assert counts[1:] == counts[1:2] * (len(runs) - 1)


@pytest.mark.parametrize("granularity, kv", CASES)
def test_gather_compiles_the_same_code_for_every_route(granularity, kv):
    model, counter = build(granularity, kv), CompileCounterWithBackend("eager")
    calls = [
        (tokens_of(3, 12, seed), gates_of(model, 3, 12, seed, share))
        for seed, share in enumerate((0.5, 0.5, 0.2, 0.8, 1.0, 0.0, 0.5))
    ]
    with torch.inference_mode():
        wanted = [model(tokens, route="gather", gates=gates)[0] for tokens, gates in calls]
        compile_model(model, backend=counter)
        for (tokens, gates), logits in zip(calls, wanted):
            torch.testing.assert_close(
                model(tokens, route="gather", gates=gates)[0], logits, rtol=1e-4, atol=1e-4
            )  # sums in another order
    assert counter.frame_count <= 8


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_code_agrees_with_eager():
    """Real code: a lone token goes through the sum of products that replaces a matrix product."""
    model = build("block_sequence", family="qwen2")  # few kernels: a layer that runs is entered and left as a whole
    tokens, cache = tokens_of(1, 5), KVCache(model, 1)
    with torch.inference_mode():
        model.hidden(tokens[:, :4], cache=cache, route="gather")
        wanted = model(tokens[:, 4:], cache=cache.clone(), route="gather")[0]
        compile_model(model)
        torch.testing.assert_close(model(tokens[:, 4:], cache=cache, route="gather")[0], wanted, rtol=1e-5, atol=1e-5)


def test_many_models_of_one_process_are_compiled():
    """torch counts the codes of a function over all models, and refuses more than its limit where none may break."""
    torch._dynamo.config.recompile_limit = 8
    for seed in range(6):
        model, counter = build("attn_sequence" if seed % 2 else "mlp_token"), CompileCounterWithBackend("eager")
        wanted = model(tokens_of(2, 9, seed), route="mask")[0]
        compile_model(model, backend=counter)
        for lengths in (None, [9, 9]):
            found = model(tokens_of(2, 9, seed), lengths=lengths, route="mask")[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            model(tokens_of(2, 9, seed), lengths=lengths)
        assert counter.frame_count


def test_compiling_changes_no_name_and_no_weight():
    model = build("attn_sequence")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = compile_model(model, backend="eager").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# -----------------------------------------------------------------------------
# Host syncs


class OnDevice(torch.Tensor):
    """A tensor that counts how often the host would wait for it. What is computed from one is one; a copy on the host
    is not.
    """

    waits = 0
    WAITING = {
        "tolist",
        "item",
        "cpu",
        "numpy",
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "equal",
        "allclose",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    }

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        to_host = name == "to" and any(str(value) == "cpu" for value in (*args[1:], *(kwargs or {}).values()))
        if name in cls.WAITING or by_mask or to_host:
            OnDevice.waits += 1
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if name == "cpu" else result


def waits(fn) -> int:
    """Host waits during fn()."""
    OnDevice.waits = 0
    with torch.inference_mode():
        fn()
    return OnDevice.waits


def test_the_counter_counts():
    x = torch.ones(3).as_subclass(OnDevice)
    assert [
        waits(fn)
        for fn in (
            x.sum().item,
            x.tolist,
            x.cpu,
            x.nonzero,
            lambda: x[x > 0],
            lambda: bool(x.sum()),
            lambda: (x.cpu() + 1).tolist(),
            lambda: (x + 1).exp() * torch.ones(3),
        )
    ] == [1, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("granularity, kv", CASES)
@pytest.mark.parametrize("lengths", [None, [9, 4, 6]])
def test_host_waits(granularity, kv, lengths):
    """None for off and mask; for gather one per router and prompt (one where all decide together), and for later tokens
    none where one decision serves a sequence.
    """
    model, tokens = build(granularity, kv), tokens_of(3, 9).as_subclass(OnDevice)
    routers, by_token = 1 if kv == "first" else len(model.routing.places), granularity.endswith("token")
    assert waits(lambda: model(tokens, lengths=lengths)) == 0
    assert waits(lambda: model(tokens, lengths=lengths, route="mask")) == 0
    for route, first, later in (("off", 0, 0), ("gather", routers, routers if by_token else 0)):
        cache = KVCache(model, 3)
        assert waits(lambda: model(tokens, lengths=lengths, cache=cache, route=route)) == first
        for _ in range(3):
            assert waits(lambda: model(tokens[:, :1], cache=cache, route=route)) == later
        assert waits(lambda: model(tokens[:, :4], cache=cache, route=route)) == later
