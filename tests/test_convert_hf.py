"""convert_hf: tiny random models of transformers' own classes go there and back; bad input has its one clear error.

Run: python -m pytest tests/test_convert_hf.py
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf
import runtime
from convert_hf import KEY_MAP, config_from_hf, config_to_hf, convert
from model import load_model, rope_frequencies
from tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
ROOT = Path(convert_hf.__file__).parent
INDEX = "model.safetensors.index.json"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=101,
    max_position_embeddings=128,
)
ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
    "llama3": {
        **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6},
    "yarn-all": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6},
        **{"attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    },
}
MODELS = {  # name -> (model_type, settings on top of TINY)
    "llama": ("llama", {"rope_parameters": ROPES["llama3"], "pretraining_tp": 2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": ROPES["linear"], "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": ROPES["yarn-all"]}),
}


def hf_config(name: str = "llama", **extra):
    family, settings = MODELS[name]
    return transformers.AutoConfig.for_model(family, **{**TINY, **settings, **extra})


def save_hf(folder: Path, name: str = "llama", *, dtype=torch.float32, shards: bool = False, **extra) -> Path:
    """A Hugging Face folder with a random model, as transformers itself writes it; `shards`: several files and an
    index."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(name, **extra)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: an exchange of two zeros would go unseen
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_bits(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_identical(tmp_path, name, shards):
    dtype = torch.bfloat16 if shards else torch.float32
    src = save_hf(tmp_path / "hf", name, dtype=dtype, shards=shards)
    config = convert(src, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert (tmp_path / "back" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert (tmp_path / "back" / "generation_config.json").read_bytes() == (src / "generation_config.json").read_bytes()
    assert_same_bits(tensors(src), tensors(tmp_path / "back"))
    assert len(list(src.glob("*.safetensors"))) == len(list((tmp_path / "ours").glob("*.safetensors")))
    assert (tmp_path / "ours" / INDEX).is_file() == shards
    ours = tensors(tmp_path / "ours")
    assert all(value.dtype == dtype for value in ours.values())
    assert ("output.weight" in ours) != config.tie_embeddings
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.model_type == MODELS[name][0]


@pytest.mark.parametrize("name", MODELS)
def test_back_without_the_kept_config(tmp_path, name):
    """Without hf_config.json the exported config is built from ours; transformers reads it and computes the same
    logits."""
    src = save_hf(tmp_path / "hf", name)
    config = convert(src, tmp_path / "ours")
    (tmp_path / "ours" / "hf_config.json").unlink()
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert_same_bits(tensors(src), tensors(tmp_path / "back"))
    tokens = torch.arange(40)[None] % 101
    logits = []
    for folder in (src, tmp_path / "back"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert config_from_hf(model.config.to_dict()) == config
        logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_every_tensor_lands_under_its_name(tmp_path):
    src = save_hf(tmp_path / "hf", "qwen3")
    convert(src, tmp_path / "ours")
    theirs, ours = tensors(src), tensors(tmp_path / "ours")
    assert torch.equal(theirs["model.layers.2.self_attn.k_norm.weight"], ours["layers.2.attention.k_norm.weight"])
    assert torch.equal(theirs["model.layers.1.mlp.gate_proj.weight"], ours["layers.1.feed_forward.w1.weight"])
    assert torch.equal(theirs["model.layers.0.post_attention_layernorm.weight"], ours["layers.0.ffn_norm.weight"])
    assert len(theirs) == len(ours)


def test_key_map_is_total_and_one_to_one():
    kept = [ours for ours in KEY_MAP.values() if ours is not None]
    assert len(kept) == len(set(kept))
    for name in MODELS:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(hf_config(name))
        ours = {convert_hf.rename(key, KEY_MAP) for key in model.state_dict()}
        assert ours - {"output.weight"} == convert_hf.expected_shapes(config_from_hf(model.config.to_dict())).keys() - {
            "output.weight"
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    src = save_hf(tmp_path / "hf", "qwen2")
    convert(src, tmp_path / "ours", dtype=dtype)
    kind = getattr(torch, dtype)
    expected = {convert_hf.rename(name, KEY_MAP): value.to(kind) for name, value in tensors(src).items()}
    assert_same_bits(expected, tensors(tmp_path / "ours"))
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == kind


def test_a_tensor_longer_than_one_chunk(tmp_path, monkeypatch):
    src = save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    convert(src, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr(convert_hf, "CHUNK", 56)  # no tensor is a multiple of it
    convert(src, tmp_path / "pieces", dtype="float32")
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "pieces")


def test_progress_counts_every_piece(tmp_path, monkeypatch):
    """The line that shows in a long conversion ends at its total, with several shards and pieces."""
    src, ends = save_hf(tmp_path / "hf", shards=True), []

    class Watched(runtime.Progress):
        def __exit__(self, *error):
            ends.append((self.done, self.total))
            super().__exit__(*error)

    monkeypatch.setattr(runtime, "Progress", Watched)
    monkeypatch.setattr(convert_hf, "CHUNK", 64)
    convert(src, tmp_path / "ours")
    size = sum(value.nbytes for value in tensors(src).values())
    assert len(ends) == 1 and ends[0][0] == ends[0][1] > size // 64


SMALL_FILES = {  # what a folder may hold beside weights and config, with content that conversion must not look into
    **{name: "{}" for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "tekken.json")},
    **{"chat_template.json": '{"chat_template": "{{ messages }}"}', "chat_template.jinja": "{{ messages }}"},
    **{"additional_chat_templates/tool_use.jinja": "{{ tools }}", "merges.txt": "#version: 0.2\n"},
}


def test_files_beside_the_weights_are_copied_there_and_back(tmp_path):
    """Every file that AutoTokenizer may read; nothing else."""
    src = save_hf(tmp_path / "hf", vocab_size=300)
    write_tokenizer(src, 290)
    (src / "additional_chat_templates").mkdir()
    for name, text in SMALL_FILES.items():
        (src / name).write_text(text)
    (src / "README.md").write_text("not ours")
    convert(src, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", *SMALL_FILES):
        for folder in ("ours", "back"):
            assert (tmp_path / folder / name).read_bytes() == (src / name).read_bytes()
    assert not (tmp_path / "ours" / "README.md").exists()


def test_a_tokenizer_that_transformers_saved_is_the_same_after_the_way_back(tmp_path):
    """With several chat templates, as save_pretrained lays them out: transformers reads the same ids and templates."""
    src = save_hf(tmp_path / "hf", vocab_size=300)
    write_tokenizer(src, 290)
    tokenizer = transformers.AutoTokenizer.from_pretrained(src)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}{{ messages }}"}
    tokenizer.save_pretrained(src)
    convert(src, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.chat_template == tokenizer.chat_template and again.get_vocab() == tokenizer.get_vocab()
    assert list((tmp_path / "ours" / "additional_chat_templates").iterdir())


EOS = 257  # of write_tokenizer


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 270}, None),
        ({"eos_token_id": [270, 271], "bos_token_id": 256, "pad_token_id": 0}, None),
        ({"eos_token_id": None}, None),
        ({"eos_token_id": [270, 271]}, {"eos_token_id": [272], "bos_token_id": 256}),
        ({"eos_token_id": None}, {"eos_token_id": 272}),
    ],
)
def test_stop_ids_are_those_of_transformers(tmp_path, config, generation):
    """They may stand in config.json alone; generation_config.json counts where it is there. The tokenizer's EOS is one.

    Before, those of config.json were lost, and a text ran to its limit."""
    src = save_hf(tmp_path / "hf", vocab_size=300)
    write_tokenizer(src, 290)
    edit_json(src / "config.json", **config)
    (src / "generation_config.json").unlink()
    if generation is not None:
        (src / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(src).generation_config
    ids = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    expected = {EOS, *(i for i in ids if i is not None)}
    convert(src, tmp_path / "ours")
    assert set(load_tokenizer(tmp_path / "ours").stop_ids) == expected
    convert(src, tmp_path / "ours")  # a second run finds what it would write
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").generation_config
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(theirs, name)


def test_stop_ids_of_a_nested_config(tmp_path):
    hf = {"eos_token_id": None, "text_config": {"eos_token_id": [3, 4], "pad_token_id": 0}}
    theirs = transformers.GenerationConfig.from_model_config(dict(hf))
    ours = json.loads(convert_hf.stop_ids(hf, tmp_path)["generation_config.json"])
    assert ours == {"eos_token_id": theirs.eos_token_id, "pad_token_id": theirs.pad_token_id}


@pytest.mark.parametrize("value", ["2", [1, "2"], 2.0, True, {"a": 1}, [[1]]])
def test_stop_ids_that_are_none(tmp_path, value):
    src = save_hf(tmp_path / "hf")
    (src / "generation_config.json").unlink()
    edit_json(src / "config.json", eos_token_id=value)
    refused(ValueError, "expected a token id or a list of them", src, tmp_path / "out")


KINDS = (torch.float32, torch.bfloat16, torch.float16)
MIXES = {  # which tensors are stored in another dtype than the rest
    "norms": lambda name: "norm" in name,
    "embedding": lambda name: "embed" in name,
    "one layer": lambda name: ".1." in name,
    "queries": lambda name: "q_proj" in name,
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes(tmp_path, capsys, mix):
    """keep makes them one, that of most values, says so, and the result can be run. Before, load_model could not."""
    src = save_hf(tmp_path / "hf", "qwen2-window")
    weights = tensors(src)
    for rest, some in itertools.permutations(KINDS, 2):
        stored = {name: value.to(some if MIXES[mix](name) else rest) for name, value in weights.items()}
        save_file(stored, src / "model.safetensors", {"format": "pt"})
        capsys.readouterr()
        ours = tmp_path / f"{rest}{some}"
        convert(src, ours)
        assert f"all are written in {rest}" in capsys.readouterr().err
        expected = {convert_hf.rename(name, KEY_MAP): value.to(rest) for name, value in stored.items()}
        assert_same_bits(expected, tensors(ours))
        logits, _ = load_model(ours)(torch.arange(30)[None])
        assert logits.isfinite().all()


def test_tied_head_that_was_stored_is_compared_and_dropped(tmp_path):
    src = save_hf(tmp_path / "hf", "llama-tied")
    weights = tensors(src)
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        src / "model.safetensors",
        {"format": "pt"},
    )
    convert(src, tmp_path / "ours")
    assert "output.weight" not in tensors(tmp_path / "ours")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1},
        src / "model.safetensors",
        {"format": "pt"},
    )
    refused(ValueError, "lm_head.weight is not model.embed_tokens.weight", src, tmp_path / "other")


def test_rotary_tables_of_old_files_are_dropped(tmp_path):
    src = save_hf(tmp_path / "hf")
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file({**tensors(src), **table}, src / "model.safetensors", {"format": "pt"})
    convert(src, tmp_path / "ours")
    assert not any("inv_freq" in name for name in tensors(tmp_path / "ours"))


# --------------------------------------------------------------------------------------------------------------- config


PUBLISHED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
)


def published(model_type: str, *values, **more) -> dict:
    """A config.json with the values of PUBLISHED; None: the key is not there."""
    given = {key: value for key, value in zip(PUBLISHED, values, strict=True) if value is not None}
    return {"model_type": model_type, **given, "hidden_act": "silu", **more}


LLAMA3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32768)
QWEN25 = dict(rope_theta=1000000.0, max_window_layers=25)
REAL = {  # the keys of published config.json files that matter, as transformers 4 wrote them, and what they mean
    "Llama-2-7B": (
        published("llama", 4096, 11008, 32, 32, None, 32000, 4096, 1e-5, rope_scaling=None, tie_word_embeddings=False),
        dict(
            n_kv_heads=32,
            head_dim=128,
            rope_theta=10000.0,
            rope_scaling=None,
            sliding_window=None,
            tie_embeddings=False,
        ),
    ),
    "Llama-3.2-1B": (
        published(
            *("llama", 2048, 8192, 16, 32, 8, 128256, 131072, 1e-5),
            **dict(head_dim=64, rope_theta=500000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
            rope_scaling={**LLAMA3, "rope_type": "llama3"},
        ),
        dict(
            n_kv_heads=8,
            head_dim=64,
            rope_theta=500000.0,
            tie_embeddings=True,
            rope_scaling={"type": "llama3", **LLAMA3},
        ),
    ),
    "Mistral-7B-v0.1": (
        published("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, 1e-5, rope_theta=10000.0, sliding_window=4096),
        dict(sliding_window=4096, window_layers=None, head_dim=128, rope_theta=10000.0),
    ),
    "Mistral-Nemo": (
        published(
            "mistral",
            5120,
            14336,
            40,
            32,
            8,
            131072,
            131072,
            1e-5,
            head_dim=128,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        dict(sliding_window=None, head_dim=128, rope_theta=1000000.0),
    ),
    "Qwen2.5-7B": (
        published(
            "qwen2",
            3584,
            18944,
            28,
            28,
            4,
            152064,
            131072,
            1e-6,
            **QWEN25,
            use_sliding_window=False,
            sliding_window=131072,
        ),
        dict(sliding_window=None, window_layers=None, qkv_bias=True, head_dim=128),
    ),
    "Qwen2.5 with YaRN and a window": (
        published(
            *("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768, 1e-6),
            **dict(**QWEN25, use_sliding_window=True, sliding_window=4096, rope_scaling=YARN),
        ),
        dict(sliding_window=4096, window_layers=(25, 26, 27), rope_scaling=YARN),
    ),
    "Qwen3-0.6B": (
        published(
            *("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, 1e-6),
            **dict(head_dim=128, rope_theta=1000000, rope_scaling=None, tie_word_embeddings=True, attention_bias=False),
            **dict(use_sliding_window=False, sliding_window=None, max_window_layers=28),
        ),
        dict(qk_norm=True, qkv_bias=False, head_dim=128, tie_embeddings=True, sliding_window=None),
    ),
}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, "rope_theta": 1e4}  # changes to Llama-2-7B's config
QWEN2 = {**MISTRAL, "model_type": "qwen2"}


@pytest.mark.parametrize("name", REAL)
def test_published_configs(name):
    """A published config gives the fields it should, the same ones after transformers 5 has rewritten it, and
    survives our own export."""
    hf, expected = REAL[name]
    config = config_from_hf(hf)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config_from_hf(transformers.AutoConfig.for_model(**hf).to_dict()) == config
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(transformers.AutoConfig.for_model(**config_to_hf(config)).to_dict()) == config


def test_yarn_factor_follows_from_the_lengths_when_it_is_null():
    hf = {
        **REAL["Qwen3-0.6B"][0],
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 10240},
    }
    assert config_from_hf(hf).rope_scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10240}


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),  # no original length: transformers takes max_position_embeddings
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 100}, 250),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 2.5}, 320),
        ({**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 32}, 128),
    ],
)
def test_context_is_what_the_scaling_allows(rope, context):
    """Of the config as it stands, as transformers 5 rewrites it, and of our own export, which transformers reads
    alike."""
    hf = {**REAL["Qwen3-0.6B"][0], "max_position_embeddings": 128, "rope_scaling": rope}
    config = config_from_hf(hf)
    assert config.max_seq_len == context
    assert config_from_hf(transformers.AutoConfig.for_model(**hf).to_dict()) == config
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(transformers.AutoConfig.for_model(**config_to_hf(config)).to_dict()) == config


def test_a_folder_from_before_the_scaling_counted_is_exported(tmp_path):
    """Its max_seq_len is max_position_embeddings; it is the same model."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 128}
    src = save_hf(tmp_path / "hf", "qwen2", rope_parameters=rope)
    assert convert(src, tmp_path / "ours").max_seq_len == 512
    edit_json(tmp_path / "ours" / "config.json", max_seq_len=128)
    convert(tmp_path / "ours", tmp_path / "back", to_hf=True)
    assert (tmp_path / "back" / "config.json").read_bytes() == (src / "config.json").read_bytes()


def test_unused_rope_keys_are_ignored_with_a_warning(capsys):
    config_from_hf({**REAL["Llama-2-7B"][0], "rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}})
    assert "does not use finetuned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2', supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None, supported are llama"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures is ['LlamaForSequenceClassification'], supported is LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "RoPE type is 'dynamic', supported are default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "RoPE type is 'longrope'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "RoPE type is one for each of full_attention, supported are",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "has no low_freq_factor, high_freq_factor, expected for RoPE",
        ),
        ({"sliding_window": 4096}, "which a llama model ignores"),
        ({"num_key_value_heads": 5}, "cannot share 5 kv heads"),
        (MISTRAL, "no sliding_window"),
        ({**MISTRAL, "num_key_value_heads": None}, "no num_key_value_heads"),
        ({**QWEN2, "rope_theta": None}, "no rope_theta"),
        ({**QWEN2, "model_type": "qwen3"}, "no head_dim"),
        (
            {**MISTRAL, "sliding_window": 8, "layer_types": ["full_attention"] * 32},
            "with 32 layers and sliding window 8 does not compute",
        ),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 32}, "and sliding window None does not compute"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "with 32 layers"),
        (
            {**QWEN2, "layer_types": ["chunked_attention"] * 32, "use_sliding_window": True, "sliding_window": 8},
            "does not compute",
        ),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8}, "no max_window_layers"),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 8}, "no sliding_window"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, words):
    with pytest.raises(ValueError) as error:
        config_from_hf({**REAL["Llama-2-7B"][0], "num_key_value_heads": None, **change})
    assert words in str(error.value)


@pytest.mark.parametrize(
    "key", [key for key in REAL["Llama-2-7B"][0] if key not in ("model_type", "rope_scaling", "tie_word_embeddings")]
)
def test_each_needed_key_is_named_when_it_is_missing(key):
    with pytest.raises(ValueError, match=f"config.json has no {key}, expected in a llama model"):
        config_from_hf({name: value for name, value in REAL["Llama-2-7B"][0].items() if name != key})


NONSENSE = [None, 0, -1, 1, 1.5, float("nan"), float("inf"), 10**30, "7", "", True, [], [1], [[]], {}, {"a": 1}]


@pytest.mark.parametrize("key", [key for key in REAL["Qwen3-0.6B"][0]] + ["architectures", "layer_types"])
def test_values_that_cannot_be_are_refused_by_key(key):
    """Whatever stands at a key, there is one sentence of ours or a config: never another exception."""
    for value in NONSENSE:
        try:
            config = config_from_hf({**REAL["Qwen3-0.6B"][0], key: value})
        except ValueError as error:
            assert any(word in str(error) for word in (key, "heads", "head_dim", "sliding_window")), error
            assert "\n" not in str(error) and len(str(error)) < 400
            continue
        convert_hf.expected_shapes(replace(config, n_layers=1, window_layers=None))
        assert all(x == x for x in asdict(config).values()), "NaN went through"


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "yarn-all"])
def test_rope_values_that_cannot_be_are_refused(kind):
    for key, value in itertools.product(ROPES[kind], NONSENSE):
        try:
            config = config_from_hf({**REAL["Qwen3-0.6B"][0], "rope_scaling": {**ROPES[kind], key: value}})
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("config.json")
            continue
        frequencies, factor = rope_frequencies(config)
        assert frequencies.isfinite().all() and factor < 1e15


def test_export_refuses_what_the_family_cannot_say():
    config = config_from_hf(REAL["Llama-2-7B"][0])
    with pytest.raises(ValueError, match="qkv_bias=True, which LlamaForCausalLM cannot express"):
        config_to_hf(replace(config, qkv_bias=True))
    with pytest.raises(ValueError, match="sliding_window=8, which LlamaForCausalLM cannot express"):
        config_to_hf(replace(config, sliding_window=8))
    with pytest.raises(ValueError, match="family is 'bert'"):
        config_to_hf(replace(config, family="bert"))


def test_export_refuses_two_different_configs(tmp_path):
    convert(save_hf(tmp_path / "hf"), tmp_path / "ours")
    edit_json(tmp_path / "ours" / "config.json", max_seq_len=64)
    refused(
        ValueError, "describe different models: remove hf_config.json", tmp_path / "ours", tmp_path / "back", to_hf=True
    )


# ------------------------------------------------------------------------------------------------------ kill and resume

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import convert_hf
left, chunks = [{after}], convert_hf.read_chunks
def dying(tensor):
    for chunk in chunks(tensor):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
convert_hf.read_chunks = dying
convert_hf.convert({src!r}, {out!r})
"""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    src, out = save_hf(tmp_path / "hf", shards=True), tmp_path / "out"
    convert(src, tmp_path / "whole")
    code = KILLED.format(root=str(ROOT), src=str(src), out=str(out), after=9)
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = sorted(path.name for path in out.iterdir())
    done = [name for name in left if name.endswith(".safetensors")]
    assert 0 < len(done) < len(list(src.glob("*.safetensors"))) and any(name.endswith(".tmp") for name in left)
    assert "config.json" not in left
    stamps = {name: (out / name).stat().st_mtime_ns for name in done}
    convert(src, out)
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in done}  # verified, not written again


def test_every_prefix_of_the_output_can_be_completed(tmp_path, capsys):
    """Killed between any two files, at the end included: the second run completes it, and a complete folder is only
    verified."""
    src = save_hf(tmp_path / "hf", shards=True, vocab_size=300)
    write_tokenizer(src, 290)
    convert(src, tmp_path / "whole")
    expected = snapshot(tmp_path / "whole")
    order = sorted(expected, key=lambda name: (tmp_path / "whole" / name).stat().st_mtime_ns)
    assert order[-1] == "config.json"
    for count in range(0, len(order) + 1, 3):
        part = tmp_path / f"part{count}"
        part.mkdir()
        for name in order[:count]:
            shutil.copy(tmp_path / "whole" / name, part)
        convert(src, part)
        assert snapshot(part) == expected
    capsys.readouterr()
    convert(src, tmp_path / "whole")
    assert "written" not in capsys.readouterr().out.split("llama |")[0]


@pytest.mark.parametrize("damage", ["other dtype", "other weights", "cut off"])
def test_a_resumed_run_refuses_what_it_would_not_have_written(tmp_path, damage):
    src, out = save_hf(tmp_path / "hf", shards=True), tmp_path / "out"
    convert(src, out)
    (out / "config.json").unlink()
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    if damage == "other weights":
        data[-1] ^= 1
    elif damage == "cut off":
        data = data[:-1]
    shard.write_bytes(data)
    before = snapshot(out)
    with pytest.raises(ValueError, match="is not what this conversion writes"):
        convert(src, out, dtype="bfloat16" if damage == "other dtype" else "keep")
    assert snapshot(out) == before


def test_memory_stays_below_the_largest_shard(tmp_path):
    """Two shards of 32 MB: a process that holds one tensor piece at a time grows by far less than one of them."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=32768
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "hf")
    names = convert_hf.expected_shapes(config_from_hf(json.loads((tmp_path / "hf" / "config.json").read_text())))
    weights = {convert_hf.rename(name, convert_hf.KEY_MAP_TO_HF): torch.ones(shape) for name, shape in names.items()}
    rest = [name for name in weights if name != "lm_head.weight"]
    files = {"model-00001-of-00002.safetensors": ["lm_head.weight"], "model-00002-of-00002.safetensors": rest}
    for file, members in files.items():
        save_file({name: weights[name] for name in members}, tmp_path / "hf" / file, {"format": "pt"})
    (tmp_path / "hf" / INDEX).write_text(
        json.dumps({"weight_map": {name: file for file, members in files.items() for name in members}})
    )
    largest = max(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    # VmHWM is the peak of this process alone; ru_maxrss would start at the peak of the pytest process that forked it
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import convert_hf
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
config, _ = convert_hf.read_configs(convert_hf.Path({str(tmp_path / "hf")!r}), "keep", False)
convert_hf.expected_shapes(config)  # torch's late imports
before = peak()
convert_hf.convert({str(tmp_path / "hf")!r}, {str(tmp_path / "out")!r}, dtype="bfloat16")
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=single)
    assert largest > 32e6 and int(result.stdout.splitlines()[-1]) < 1.1 * largest
    assert "largest shard 3" in result.stdout and "peak memory +" in result.stdout


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(kind: type, words: str, src: Path, out: Path, **options) -> None:
    """convert raises `kind` with `words` in it and leaves OUT as it was."""
    before = snapshot(out) if out.is_dir() else out.exists()
    with pytest.raises(kind) as error:
        convert(src, out, **options)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert (snapshot(out) if out.is_dir() else out.exists()) == before


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer with `size` ids, in the format of tokenizer.json: the 256 bytes and special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes name themselves
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": f"<|{i}|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in range(256, size)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {letter: i for i, letter in enumerate(letters)},
            "merges": [],
            "ignore_merges": True,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|256|>", "eos_token": "<|257|>"}))


JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
BROKEN = {
    "empty": b"",
    "cut short": b'{"a": ',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"3",
    "huge number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_that_are_none(tmp_path, name):
    """Also as the kept config of a checkpoint of ours."""
    src, ours = save_hf(tmp_path / "hf", vocab_size=300), tmp_path / "ours"
    write_tokenizer(src, 290)
    convert(src, ours)
    for content in BROKEN.values():
        (src / name).write_bytes(content)
        refused(ValueError, name, src, tmp_path / "out")
        (ours / ("hf_config.json" if name == "config.json" else name)).write_bytes(content)
        refused(ValueError, name, ours, tmp_path / "out", to_hf=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_in_place_of_a_file(tmp_path, name):
    src = save_hf(tmp_path / "hf", vocab_size=300)
    write_tokenizer(src, 290)
    (src / name).unlink(missing_ok=True)
    (src / name).mkdir()
    refused((ValueError, FileNotFoundError), name, src, tmp_path / "out")


def test_header_that_is_no_header(tmp_path):
    """Lengths that lie, text that is not JSON, entries of other types: the library says no, we say where."""
    src = save_hf(tmp_path / "hf")
    headers = [b"{", b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}']
    headers += [b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', b'{"a": {}}', b"\xff\xff"]
    files = [len(text).to_bytes(8, "little") + text + bytes(8) for text in headers]
    files += [length.to_bytes(8, "little") + b"{}" for length in (0, 2**40, 2**63, 2**64 - 1)] + [b"", b"\0" * 7]
    for content in files:
        (src / "model.safetensors").write_bytes(content)
        refused(ValueError, "model.safetensors", src, tmp_path / "out")


def test_index_with_other_things_in_it(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    names = [3, "x" * 300, "a/b", "\ud800", "", "\0", None, ["a"]]
    for where in ([], 3, {}, *({"a": name} for name in names)):
        edit_json(src / INDEX, weight_map=where)
        refused((ValueError, FileNotFoundError), INDEX, src, tmp_path / "out")
    for content in ([], 3, {}, {"a": 1}):
        (src / INDEX).write_text(json.dumps(content))
        refused(ValueError, INDEX, src, tmp_path / "out")


def test_a_checkpoint_of_ours_with_other_things_in_its_config(tmp_path):
    ours, out = tmp_path / "ours", tmp_path / "out"
    convert(save_hf(tmp_path / "hf"), ours)
    (ours / "hf_config.json").unlink()
    good = json.loads((ours / "config.json").read_text())
    for key, value in itertools.product(good, NONSENSE):
        (ours / "config.json").write_text(json.dumps({**good, key: value}))
        try:
            convert(ours, out, to_hf=True)
        except ValueError as error:
            assert "config" in str(error) and "\n" not in str(error) and not out.exists()
        else:
            shutil.rmtree(out)


def test_missing_shard(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    sorted(src.glob("*.safetensors"))[1].unlink()
    refused(FileNotFoundError, "lacks model-00002-of-", src, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(tmp_path, keep):
    src = save_hf(tmp_path / "hf", shards=True)
    shard = sorted(src.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(ValueError, f"{shard}", src, tmp_path / "out")


def test_shard_with_something_behind_its_tensors(tmp_path):
    src = save_hf(tmp_path / "hf")
    with open(src / "model.safetensors", "ab") as file:
        file.write(b"more")
    refused(ValueError, "is cut short, damaged or no safetensors file", src, tmp_path / "out")


def test_tensors_that_overlap(tmp_path):
    src = save_hf(tmp_path / "hf")
    data = (src / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.layers.1.mlp.up_proj.weight"]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"][
        "data_offsets"
    ]
    text = json.dumps(header).encode()
    (src / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(ValueError, "is cut short, damaged or no safetensors file", src, tmp_path / "out")


def test_duplicate_tensor_in_two_shards(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    first, last = sorted(src.glob("*.safetensors"))[0], sorted(src.glob("*.safetensors"))[-1]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: value}, last, {"format": "pt"})
    refused(ValueError, f"{name} is in two shards, {first.name} and {last.name}", src, tmp_path / "out")


def test_index_that_does_not_fit_its_shards(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    where = json.loads((src / INDEX).read_text())["weight_map"]
    name = next(iter(where))
    edit_json(src / INDEX, weight_map={**where, name: next(file for file in where.values() if file != where[name])})
    refused(ValueError, f"puts {name} into", src, tmp_path / "out")
    edit_json(src / INDEX, weight_map={**where, name: "../elsewhere.safetensors"})
    refused(ValueError, "no weight_map", src, tmp_path / "out")
    (src / INDEX).write_text("{")
    refused(ValueError, "is not JSON", src, tmp_path / "out")


def test_single_file_and_index_together(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    shutil.copy(next(src.glob("*.safetensors")), src / "model.safetensors")
    refused(ValueError, "has both model.safetensors and", src, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 31)}, "has shape [48, 31], expected [48, 32]"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "lack 1 tensors (model.layers.1.mlp.up_proj.weight)"),
        ({"lm_head.weight": None}, "tie_word_embeddings is false"),
        (
            {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)},
            "add 1 tensors (model.layers.0.self_attn.o_proj.bias)",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
            "add 1 tensors (model.layers.0.self_attn.q_proj.bias)",
        ),
        (
            {"model.layers.3.mlp.up_proj.weight": torch.zeros(48, 32)},
            "add 1 tensors (model.layers.3.mlp.up_proj.weight)",
        ),
        ({"score.weight": torch.zeros(2, 32)}, "add 1 tensors (score.weight)"),
        (
            {"model.norm.weight": torch.zeros(32, dtype=torch.int8)},
            "model.norm.weight is in I8, supported are F32, BF16, F16",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path, change, words):
    src = save_hf(tmp_path / "hf")
    weights = {name: value for name, value in {**tensors(src), **change}.items() if value is not None}
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    refused(ValueError, words, src, tmp_path / "out")


def test_weights_that_are_not_finite_are_named(tmp_path, capsys):
    src = save_hf(tmp_path / "hf")
    weights = tensors(src)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    weights["model.norm.weight"][5:7] = float("inf")
    weights["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(weights, src / "model.safetensors", {"format": "pt"})
    convert(src, tmp_path / "keep")
    errors = capsys.readouterr().err
    assert (
        "model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 1,536" in errors
        and "model.norm.weight holds 2" in errors
    )
    assert "embed_tokens" not in errors
    assert_same_bits(tensors(src), back(tmp_path / "keep", tmp_path / "back"))
    capsys.readouterr()
    convert(src, tmp_path / "half", dtype="float16")
    assert "model.embed_tokens.weight has 1 values that became infinite in torch.float16" in capsys.readouterr().err


def back(ours: Path, out: Path) -> dict[str, torch.Tensor]:
    convert(ours, out, to_hf=True)
    return tensors(out)


def test_pickle_files_only(tmp_path):
    src = save_hf(tmp_path / "hf")
    torch.save({}, src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    refused(ValueError, "pickle files only (pytorch_model.bin), expected safetensors", src, tmp_path / "out")


def test_no_weights_at_all(tmp_path):
    src = save_hf(tmp_path / "hf")
    (src / "model.safetensors").rename(src / "adapter_model.safetensors")
    refused(
        FileNotFoundError,
        f"has neither model.safetensors nor {INDEX}, found adapter_model.safetensors",
        src,
        tmp_path / "out",
    )


def test_folders(tmp_path):
    src = save_hf(tmp_path / "hf")
    refused(FileNotFoundError, "is not a folder", tmp_path / "nowhere", tmp_path / "out")
    refused(ValueError, "is SRC itself", src, src)
    refused(ValueError, "is SRC itself", src, src / ".." / "hf")
    refused(ValueError, "is a file", src, src / "config.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    refused(ValueError, "is not empty: it has thesis.tex", src, tmp_path / "full")
    (src / "config.json").unlink()
    refused(FileNotFoundError, "config.json was not found", src, tmp_path / "out")


def test_the_wrong_direction(tmp_path):
    src = save_hf(tmp_path / "hf")
    convert(src, tmp_path / "ours")
    refused(ValueError, "is not the config of a Hugging Face folder: add --to_hf", tmp_path / "ours", tmp_path / "out")
    refused(ValueError, "is not the config of a checkpoint of ours: drop --to_hf", src, tmp_path / "out", to_hf=True)


def test_tokenizer_size(tmp_path, capsys):
    """The embedding may be padded beyond the tokenizer; a tokenizer with more ids than rows would index out of it."""
    src = save_hf(tmp_path / "hf", vocab_size=300)
    convert(src, tmp_path / "bare")
    assert "has no tokenizer" in capsys.readouterr().err
    write_tokenizer(src, 300)
    convert(src, tmp_path / "equal")
    write_tokenizer(src, 290)
    convert(src, tmp_path / "padded")
    assert capsys.readouterr().err == ""
    write_tokenizer(src, 301)
    refused(ValueError, "the tokenizer has 301 ids, the embedding 300", src, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- command line


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "convert_hf.py"), *map(str, arguments)], capture_output=True, text=True
    )


def test_command_line(tmp_path):
    src = save_hf(tmp_path / "hf", shards=True)
    convert(src, tmp_path / "ours", dtype="bfloat16")
    wrong = run(tmp_path / "ours", tmp_path / "back")
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: ")
        and wrong.stderr.count("\n") == 1
        and wrong.stdout == ""
    )
    done = run(tmp_path / "ours", tmp_path / "back", "--to_hf", "--dtype=float32")
    assert (
        done.returncode == 0
        and "30 tensors read, 30 written, 0 left out" in done.stdout
        and "peak memory +" in done.stdout
    ), done.stderr
    assert_same_bits(
        {name: value.bfloat16().float() for name, value in tensors(src).items()}, tensors(tmp_path / "back")
    )
