"""Every family computes what transformers computes, on tiny random models: logits, bf16, caches, padding, tokens.

Run: python -m pytest tests/test_families.py
"""

import copy
import functools
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf
from model import KVCache, Transformer, generate, load_model, rope_frequencies

transformers = pytest.importorskip("transformers")

TINY = dict(
    **dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2),
    **dict(vocab_size=131, max_position_embeddings=192),
)
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 48},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "rope_theta": 1000.0}
PLAIN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}  # as our config has it
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2}
SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
WINDOW = {"use_sliding_window": True, "sliding_window": 12}

# name -> (model_type, settings on top of TINY); prompts are longer than every window and every original context here
CASES = {
    "llama": ("llama", {}),
    "llama-mha-odd": ("llama", {"num_key_value_heads": 6, "vocab_size": 97, "rms_norm_eps": 1e-3}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 20, "vocab_size": 1009}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "head_dim": 32}),
    "llama-yarn-factor": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.8, "truncate": False}, "head_dim": 32},
    ),
    "llama-yarn-short": ("llama", {"rope_parameters": {**YARN, "factor": 1.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("mistral", {"sliding_window": 12}),
    "mistral-window-2": ("mistral", {"sliding_window": 2, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen2-window-all": ("qwen2", {**WINDOW, "max_window_layers": 0, "rope_parameters": YARN}),
    "qwen2-window-mixed": (
        "qwen2",
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-window": (
        "qwen3",
        {**WINDOW, "head_dim": 16, "max_window_layers": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mixtral": ("mixtral", {**MIXTURE, "num_local_experts": 5}),
    "mixtral-window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 12}),
    "qwen2-moe": ("qwen2_moe", {**MIXTURE, **SHARED}),
    "qwen2-moe-dense": ("qwen2_moe", {**MIXTURE, **SHARED, "mlp_only_layers": [1], "qkv_bias": False}),
    "qwen2-moe-window": ("qwen2_moe", {**MIXTURE, **SHARED, **WINDOW, "max_window_layers": 2, "norm_topk_prob": True}),
    "qwen3-moe": ("qwen3_moe", {**MIXTURE, "moe_intermediate_size": 24, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-step": (
        "qwen3_moe",
        {**MIXTURE, **WINDOW, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 2},
    ),
    "olmoe": ("olmoe", {**MIXTURE, "num_key_value_heads": 6}),
    "olmoe-normalised": ("olmoe", {**MIXTURE, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"head_dim": 32, "rope_parameters": {**YARN, "rope_theta": 1e6}}),
}
NAMES = list(CASES)


@functools.cache
def pair(name: str):
    """(transformers' model, ours with the same weights) in fp32, with weights large enough that every setting shows
    in the logits."""
    torch.manual_seed(NAMES.index(name))
    family, settings = CASES[name]
    config = transformers.AutoConfig.for_model(
        family, **{**TINY, **settings}, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    theirs = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    )
    for key, value in theirs.named_parameters():
        if key == "model.norm.weight":
            value.normal_(0.0, 1.0)  # of both signs: a tied model would only repeat its last token otherwise
        else:
            value.normal_(*((1.0, 0.3) if "norm" in key else (0.0, 0.18) if "embed" in key else (0.0, 0.11)))
    ours = Transformer(convert_hf.config_from_hf(theirs.config.to_dict())).eval().requires_grad_(False)
    weights = {convert_hf.rename(key, convert_hf.KEY_MAP): value for key, value in single(theirs.state_dict())}
    if config.tie_word_embeddings:
        del weights["output.weight"]
    ours.load_state_dict(weights)
    return theirs, ours


def single(weights: dict):
    """Names and tensors of a state dict of transformers, in which experts are fused, with each expert by itself."""
    for key, value in weights.items():
        path, _, fused = key.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(fused, ())
        for e, expert in enumerate(value if parts else ()):
            for part, matrix in zip(parts, expert.chunk(len(parts))):
                yield f"{path}.experts.{e}.{part}.weight", matrix
        if not parts:
            yield key, value


def tokens_for(name: str, *shape: int) -> torch.Tensor:
    return torch.randint(pair(name)[1].config.vocab_size, shape, generator=torch.Generator().manual_seed(7))


def error(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name):
    theirs, ours = pair(name)
    tokens = tokens_for(name, 2, 80)
    expected = theirs(tokens).logits
    logits, gates = ours(tokens)
    assert expected.abs().max() > 2 and gates is None and logits.dtype == torch.float32
    assert error(logits, expected) < 1e-4


SCALED = {  # name -> (model_type, rope_parameters, the context they allow where max_position_embeddings is 128)
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    "yarn without a length": ("qwen2", {"rope_type": "yarn", "factor": 4.0}, 512),
    "yarn, shorter original": (
        "llama",
        {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 64},
        384,
    ),
    "yarn, wide heads": ("qwen3", {"rope_type": "yarn", "factor": 2.5, "attention_factor": 1.1}, 320),
    "linear": ("mistral", {"rope_type": "linear", "factor": 3.0}, 384),
}


@pytest.mark.parametrize("name", SCALED)
def test_beyond_max_position_embeddings(name, tmp_path):
    """The context is what the scaling allows, and up to it the logits and the tokens are transformers'.

    Before, every script refused what is longer than max_position_embeddings."""
    family, rope, context = SCALED[name]
    rope = {"rope_theta": 10000.0, **rope}
    window = {"sliding_window": None} if family == "mistral" else {}
    settings = {**TINY, **window, "max_position_embeddings": 128, "rope_parameters": rope}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings, pad_token_id=None, eos_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for key, value in theirs.named_parameters():
        value.data.normal_(*((1.0, 0.3) if "norm" in key else (0.0, 0.15)))
    theirs.save_pretrained(tmp_path / "hf")
    assert convert_hf.convert(tmp_path / "hf", tmp_path / "ours").max_seq_len == context
    ours = load_model(tmp_path / "ours")
    tokens = torch.randint(131, (1, context), generator=torch.Generator().manual_seed(7))
    expected = theirs(tokens).logits
    assert expected.abs().max() > 2 and error(ours(tokens)[0], expected) < 1e-4
    prompt = tokens[:, : context - 20]
    whole = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    assert prompt[0].tolist() + generate(ours, prompt.tolist(), 20)[0] == whole


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("llama-linear", {"rope_scaling": None}),
        ("llama-llama3", {"rope_scaling": None}),
        ("llama-yarn", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama-yarn-factor", {"rope_scaling": {**PLAIN_YARN, "beta_fast": 8.0, "beta_slow": 2.0}}),
        ("llama-yarn-factor", {"rope_scaling": {**PLAIN_YARN, "attention_factor": 0.7}}),
        ("llama-yarn-mscale", {"rope_scaling": {**PLAIN_YARN, "truncate": False}}),
        ("llama-yarn-mscale", {"rope_scaling": {**PLAIN_YARN, "mscale": 1.5, "mscale_all_dim": 0.8}}),
        ("llama-mha-odd", {"norm_eps": 1e-6}),
        ("mistral-window", {"sliding_window": None}),
        ("mistral-window", {"sliding_window": 13}),
        ("qwen2-window", {"window_layers": None}),
        ("qwen2-window-mixed", {"window_layers": [0, 1]}),
        ("qwen3", {"rope_theta": 5000.0}),
        ("mixtral", {"norm_topk": False}),
        ("olmoe", {"experts_per_token": 3}),
    ],
)
def test_each_setting_matters(name, neutral):
    """The test above could not pass with this setting ignored: its neutral value moves the logits by far more than
    1e-4."""
    _, ours = pair(name)
    other = Transformer(replace(ours.config, **neutral)).eval()
    other.load_state_dict(ours.state_dict())
    tokens = tokens_for(name, 1, 80)
    assert error(ours(tokens)[0], other(tokens)[0]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_exact_as_transformers(name):
    """Against the fp32 logits our bf16 is at most 2 bf16 ulps worse than transformers' bf16, and no worse on the
    whole. With experts, where rounding chooses between nearly equal ones, half of the logits are."""
    theirs, ours = (model.bfloat16() for model in map(copy.deepcopy, pair(name)))
    tokens = tokens_for(name, 2, 80)
    exact = pair(name)[0](tokens).logits
    their_error, our_error = ((logits.float() - exact).abs() for logits in (theirs(tokens).logits, ours(tokens)[0]))
    ulp = 2.0 ** (exact.abs().max().log2().floor().item() - 7)  # bf16 keeps 8 significant bits
    if pair(name)[1].config.n_experts:
        assert our_error.median() <= 1.5 * their_error.median()
        return
    assert our_error.max() <= their_error.max() + 2 * ulp
    assert our_error.square().mean().sqrt() <= 1.2 * their_error.square().mean().sqrt()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(80,), (1,) * 20, (5, 1, 17, 30, 2), (12, 13, 25)])
def test_cached_chunks_equal_one_full_pass(name, sizes):
    _, ours = pair(name)
    tokens = tokens_for(name, 2, sum(sizes))
    cache, pieces = KVCache(ours, 2), []
    for piece in tokens.split(sizes, dim=1):
        pieces.append(ours(piece, cache=cache)[0])
    assert cache.lengths == [sum(sizes)] * 2
    assert error(torch.cat(pieces, dim=1), ours(tokens)[0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_equal_rows_alone(name):
    """Right padding, first without a cache, then in a cached prompt of ragged rows that goes on in ragged steps."""
    _, ours = pair(name)
    lengths, more = [31, 1, 13, 60], [2, 3, 1, 3]
    tokens, steps = tokens_for(name, 4, 60), tokens_for(name, 4, 3)
    padded, cache = ours(tokens, lengths=lengths)[0], KVCache(ours, 4)
    prompt, step = ours(tokens, lengths=lengths, cache=cache)[0], ours(steps, lengths=more, cache=cache)[0]
    last = ours(steps[:, :1], cache=cache)[0]
    for row, (n, m) in enumerate(zip(lengths, more)):
        whole = torch.cat([tokens[row, :n], steps[row, :m], steps[row, :1]])[None]
        alone = ours(whole)[0][0]
        assert error(padded[row, :n], alone[:n]) < 1e-5 and error(prompt[row, :n], alone[:n]) < 1e-5
        assert error(step[row, :m], alone[n : n + m]) < 1e-5 and error(last[row], alone[n + m :]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name):
    """64 tokens each for prompts of several lengths: together with us, one by one with transformers."""
    theirs, ours = pair(name)
    prompts = [tokens_for(name, n).tolist() for n in (30, 3, 1)]
    whole = [
        theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0].tolist() for prompt in prompts
    ]
    assert [prompt + new for prompt, new in zip(prompts, generate(ours, prompts, 64))] == whole
    assert [len(row) for row in whole] == [94, 67, 65]


FILES = ["llama-llama3", "mistral-window", "qwen2-window", "qwen3-window"]
FILES += ["mixtral", "qwen2-moe-dense", "qwen2-moe-window", "qwen3-moe-step", "olmoe"]


@pytest.mark.parametrize("name", FILES)
def test_through_files(name, tmp_path):
    """The way a user goes: save_pretrained in shards, convert, load_model, same logits; and back into transformers,
    the same bits."""
    theirs, _ = pair(name)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    convert_hf.convert(tmp_path / "hf", tmp_path / "ours")
    tokens = tokens_for(name, 2, 80)
    assert error(load_model(tmp_path / "ours")(tokens)[0], theirs(tokens).logits) < 1e-4
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "olmoe"])
def test_fused_experts_through_files(name, tmp_path):
    """Experts stored as transformers' modules hold them, fused, are told apart bit for bit; the way back writes each
    by itself, as published checkpoints are, and restores the config."""
    theirs, ours = pair(name)
    theirs.save_pretrained(tmp_path / "hf")
    fused = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    save_file(fused, tmp_path / "hf" / "model.safetensors")
    convert_hf.convert(tmp_path / "hf", tmp_path / "ours")
    found = load_model(tmp_path / "ours")
    assert found.config == ours.config
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in ours.state_dict().items())
    convert_hf.convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    theirs.save_pretrained(tmp_path / "published")
    back, published = (load_file(tmp_path / folder / "model.safetensors") for folder in ("back", "published"))
    assert back.keys() == published.keys() and all(torch.equal(back[key], published[key]) for key in back)


@pytest.mark.parametrize("name", [name for name in NAMES if "moe" in name or "mixtral" in name])
def test_mixtures_survive_an_export_without_their_own_config(name):
    """Ours, written as a new config.json, is read by transformers and by us as the same model."""
    _, ours = pair(name)
    hf = convert_hf.config_to_hf(ours.config)
    again = transformers.AutoConfig.for_model(**copy.deepcopy(hf)).to_dict()
    assert convert_hf.config_from_hf(hf) == convert_hf.config_from_hf(again) == ours.config


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmoe", {"num_experts_per_tok": 7}, "7 experts a token"),
        ("olmoe", {"num_experts": None}, "num_experts"),
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("mixtral", {"num_experts": 4}, "experts"),
        ("qwen2-moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("qwen2-moe", {"mlp_only_layers": [3]}, "mlp_only_layers"),
        ("qwen2-moe", {"mlp_only_layers": [0, 1, 2]}, "no layer"),
        ("qwen3-moe", {"decoder_sparse_step": 4}, "no layer"),
        ("qwen3-moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ("qwen3-moe", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_a_mixture_cannot_be(name, change, told):
    theirs, _ = pair(name)
    with pytest.raises(ValueError, match=told):
        convert_hf.config_from_hf({**theirs.config.to_dict(), **change})


def test_what_matters_to_training_alone_is_not_read():
    hf = pair("mixtral")[0].config.to_dict()
    changed = {**hf, "router_jitter_noise": 0.1, "router_aux_loss_coef": 1.0, "output_router_logits": True}
    assert convert_hf.config_from_hf(changed) == convert_hf.config_from_hf(hf)


def drawn_rope(draw: random.Random) -> dict:
    """A config's RoPE keys as people write them: old or new names, lengths here or there, null, or nothing."""
    kind = draw.choice(["yarn", "yarn", "linear", "llama3", "default"])
    choices = {
        "factor": [1.0, 2.5, 4, 40.0],
        "original_max_position_embeddings": [16, 48, 192],
        "beta_fast": [None, 8, 32.0],
        "beta_slow": [None, 1, 2.0],
        "attention_factor": [None, 0.7, 1.25],
        "mscale": [None, 0.707, 1.0],
        "mscale_all_dim": [None, 0.5, 1.0],
        "truncate": [None, True, False],
        "low_freq_factor": [1, 1.5],
        "high_freq_factor": [4.0, 8],
    }
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}.get(kind, [])
    optional = {"yarn": list(choices)[:8], "llama3": ["original_max_position_embeddings"]}.get(kind, [])
    keys = [*needed, *(key for key in optional if draw.random() < 0.5)]
    rope = {draw.choice(["type", "rope_type"]): kind, **{key: draw.choice(choices[key]) for key in keys}}
    if kind == "yarn":
        rope.setdefault("factor", draw.choice([None, 3.0]))
    hf = {draw.choice(["rope_scaling", "rope_parameters"]): rope}
    draw.choice([hf, rope])["rope_theta"] = draw.choice([500.0, 10000, 1e6])
    if draw.random() < 0.2:
        hf["original_max_position_embeddings"] = draw.choice([32, 96])
    return hf


def test_drawn_rope_settings_equal_transformers():
    """The frequencies and the factor on cos and sin of transformers' own module, before and after our export."""
    draw = random.Random(0)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for _ in range(300):
        rope = drawn_rope(draw)
        hf = {**TINY, "model_type": "llama", "rms_norm_eps": 1e-6, "hidden_act": "silu", **copy.deepcopy(rope)}
        theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**copy.deepcopy(hf)))
        config = convert_hf.config_from_hf(hf)
        again = convert_hf.config_from_hf(
            transformers.AutoConfig.for_model(**convert_hf.config_to_hf(config)).to_dict()
        )
        assert again == config, rope
        frequencies, factor = rope_frequencies(config)
        torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-5, atol=0, msg=str(rope))
        assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6), rope
