"""Convert a Hugging Face folder to a checkpoint of ours, or back: tensors are renamed.

    python convert_hf.py SRC OUT [--dtype=keep|float32|bfloat16|float16]
    python convert_hf.py SRC OUT --to_hf                # SRC is ours, OUT a folder for transformers
    python convert_hf.py SRC OUT [--adapter=DIR] [--skip=5,7.attn | --routers=FILE --skip=greedy --budget=0.75]
                                                        # SRC is ours, OUT too, or with --to_hf one for transformers:
                                                        # LoRA merged, a fixed route built in (recipe/fixed.py)

Families: Llama, Mistral, Qwen2, Qwen3, and the mixtures of experts Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE.
Everything is checked before the first byte is written: config, shard headers, names, shapes, tokenizer. The tensors
then stream through one buffer, source shard by source shard. A run that was killed goes on where it stopped: whatever
stands in OUT is compared byte by byte with what it should be, and config.json comes last, so that a folder without one
is not a checkpoint. The source's config.json is kept as hf_config.json, so that the way back restores every key, the
ones we do not model included. Stop ids that stand in config.json alone go into a generation_config.json.
File format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

import runtime
from model import ModelConfig, Transformer, load_model
from recipe.adapter import load_adapter
from recipe.base import save_base
from recipe.fixed import by_routers, fix_route, listed
from recipe.lora import changes, merge
from tokenizer import load_tokenizer

# Hugging Face name -> our name; None = left out on purpose. Both sides store RoPE half-split, so nothing is permuted.
KEY_MAP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.attention_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "layers.{i}.attention.wq.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "layers.{i}.attention.wk.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "layers.{i}.attention.wv.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.wo.weight",
    "model.layers.{i}.self_attn.q_proj.bias": "layers.{i}.attention.wq.bias",
    "model.layers.{i}.self_attn.k_proj.bias": "layers.{i}.attention.wk.bias",
    "model.layers.{i}.self_attn.v_proj.bias": "layers.{i}.attention.wv.bias",
    "model.layers.{i}.self_attn.q_norm.weight": "layers.{i}.attention.q_norm.weight",
    "model.layers.{i}.self_attn.k_norm.weight": "layers.{i}.attention.k_norm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.ffn_norm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "layers.{i}.feed_forward.w1.weight",
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.feed_forward.w2.weight",
    "model.layers.{i}.mlp.up_proj.weight": "layers.{i}.feed_forward.w3.weight",
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.feed_forward.gate.weight",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "layers.{i}.feed_forward.experts.{e}.w1.weight",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "layers.{i}.feed_forward.experts.{e}.w2.weight",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "layers.{i}.feed_forward.experts.{e}.w3.weight",
    "model.layers.{i}.mlp.shared_expert.gate_proj.weight": "layers.{i}.feed_forward.shared.w1.weight",
    "model.layers.{i}.mlp.shared_expert.down_proj.weight": "layers.{i}.feed_forward.shared.w2.weight",
    "model.layers.{i}.mlp.shared_expert.up_proj.weight": "layers.{i}.feed_forward.shared.w3.weight",
    "model.layers.{i}.mlp.shared_expert_gate.weight": "layers.{i}.feed_forward.shared_gate.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",  # with tied embeddings: compared with the embedding, then left out
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,  # a table in old Llama files; it follows from rope_theta
    "model.rotary_emb.inv_freq": None,
}
KEY_MAP_TO_HF = {ours: hf for hf, ours in KEY_MAP.items() if ours is not None}
MIXTRAL_MAP = {  # Mixtral's own names, beside these
    "model.layers.{i}.block_sparse_moe.gate.weight": "layers.{i}.feed_forward.gate.weight",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": "layers.{i}.feed_forward.experts.{e}.w1.weight",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": "layers.{i}.feed_forward.experts.{e}.w2.weight",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": "layers.{i}.feed_forward.experts.{e}.w3.weight",
}

# Hugging Face config key -> our field, the same value in both.
CONFIG_MAP = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",  # a scaling may allow more, see context_of
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# Per family: its class in transformers, and the keys that may be absent or null (transformers' own default is plain).
FAMILIES = {
    "llama": ("LlamaForCausalLM", ("tie_word_embeddings", "head_dim", "num_key_value_heads", "rope_theta")),
    "mistral": ("MistralForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen2": ("Qwen2ForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen3": ("Qwen3ForCausalLM", ("tie_word_embeddings",)),
    "mixtral": ("MixtralForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen2_moe": ("Qwen2MoeForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen3_moe": ("Qwen3MoeForCausalLM", ("tie_word_embeddings",)),
    "olmoe": ("OlmoeForCausalLM", ("tie_word_embeddings", "head_dim", "num_key_value_heads")),
}
QWEN = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
EXPERTS = ("num_local_experts", "num_experts")  # transformers writes either, and reads both
DEFAULT_THETA = 10000.0  # what transformers takes for Llama 1 and 2, whose config.json has no rope_theta
# Keys that change the function: the values that we compute (None: the key is absent or null).
SUPPORTED_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),  # a bias on o_proj too; Qwen2's on q, k, v is built in and not this key
    "mlp_bias": (None, False),
    "clip_qkv": (None,),  # OLMoE's
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# RoPE type -> (needed keys, optional keys); names as in transformers' modeling_rope_utils.
ROPE_KEYS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}
# What a value may be, if it is there and not null: an integer in a range, a number, or a JSON type.
SIZE, LENGTH = range(1, 2**20 + 1), range(1, 2**31)
INTEGERS = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), SIZE),
    **dict.fromkeys(("intermediate_size", "vocab_size"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "sliding_window"), LENGTH),
    **{"num_hidden_layers": range(1, 1001), "max_window_layers": range(1001)},
    **dict.fromkeys((*EXPERTS, "num_experts_per_tok", "decoder_sparse_step"), SIZE),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), SIZE),
}
NUMBERS = {  # the number that each must exceed
    **dict.fromkeys(("rms_norm_eps", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), 0),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), 0),
    "rope_theta": 1,
}
TYPES = {
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "truncate", "norm_topk_prob", "qkv_bias"), bool),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "text_config"), dict),
    **dict.fromkeys(("architectures", "layer_types", "mlp_only_layers"), list),
}

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
DTYPE_NAMES = {kind: name for name, kind in DTYPES.items()}
TOKENIZERS = ("tokenizer.model", "*.model.v*", "tokenizer.json", "vocab.json", "*.tiktoken")  # load_tokenizer reads one
SETTINGS = (
    *("merges.txt", "tekken.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OWN, OTHER = "take the model's own config.json", "choose another model"  # what the user can do
INDEX = "model.safetensors.index.json"
CHUNK = 4 << 20  # bytes of one tensor held at a time


# --------------------------------------------------------------------------------------------------------------- config


def config_from_hf(hf: dict) -> ModelConfig:
    """Our config for a Hugging Face config.json, written by transformers 4 or 5.

    Raises ValueError for what we do not compute, for a missing key and for a value that cannot be."""
    family = _family_of(hf)
    _check_values(hf)
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # transformers 4 writes the first, 5 the second
    theta = hf.get("rope_theta") if rope.get("rope_theta") is None else rope["rope_theta"]
    _check_missing(hf, family, theta)
    for key, supported in SUPPORTED_VALUES.items():
        ignored = key == "attention_bias" and family in ("qwen2", "qwen2_moe")  # transformers does not read it there
        if hf.get(key) not in supported and not ignored:
            raise ValueError(f"config.json: {key} is {_short(hf[key])}, supported is {supported[-1]!r}: {OTHER}")
    values = {ours: hf[key] for key, ours in CONFIG_MAP.items() if hf.get(key) is not None}
    values.setdefault("n_kv_heads", values["n_heads"])
    values.setdefault("head_dim", values["dim"] // values["n_heads"])
    scaling = _rope_from_hf(hf, rope)
    values["max_seq_len"] = context_of(values["max_seq_len"], scaling)
    window, window_layers = _window_from_hf(hf)
    return ModelConfig(
        **values,
        family=family,
        rope_theta=float(DEFAULT_THETA if theta is None else theta),
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or (family == "qwen2_moe" and hf.get("qkv_bias") is not False),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qk_norm_whole=family == "olmoe",
        sliding_window=window,
        window_layers=window_layers,
        **_experts_from_hf(hf),
    )


def _experts_from_hf(hf: dict) -> dict:
    """Our fields of a mixture of experts; none for other families.

    What matters to training alone (router_jitter_noise, router_aux_loss_coef, output_router_logits) is not read.
    """
    family, layers = hf["model_type"], range(hf["num_hidden_layers"])
    if family not in MIXTURES:
        return {}
    counts = {hf[key] for key in EXPERTS if hf.get(key) is not None}
    width = hf["moe_intermediate_size"] if family in QWEN else hf["intermediate_size"]
    if len(counts) != 1 or hf["num_experts_per_tok"] > max(counts):
        raise ValueError(f"config.json: {hf['num_experts_per_tok']} experts a token of {sorted(counts)}, expected one "
                         f"number of experts and no more of them a token: {OWN}")
    only, every = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step") or 1
    if not all(type(layer) is int and layer in layers for layer in only):
        raise ValueError(f"config.json: mlp_only_layers is {_short(only)}, expected layers of {len(layers)}: {OWN}")
    dense = [layer for layer in layers if layer in only or (layer + 1) % every] if family in QWEN else []
    if len(dense) == len(layers):
        raise ValueError(f"config.json: no layer of this {family} model has experts, expected one at least: {OTHER}")
    return {
        "n_experts": max(counts),
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_dim": width,
        "shared_dim": hf["shared_expert_intermediate_size"] if family == "qwen2_moe" else 0,
        "norm_topk": family == "mixtral" or bool(hf.get("norm_topk_prob")),
        "dense_layers": dense,
    }


def _family_of(hf: dict) -> str:
    family = hf.get("model_type")
    if family not in list(FAMILIES):
        raise ValueError(f"config.json: model_type is {_short(family)}, supported are {', '.join(FAMILIES)}: {OTHER}")
    name = FAMILIES[family][0]
    if (hf.get("architectures") or [name]) != [name]:
        raise ValueError(f"config.json: architectures is {_short(hf['architectures'])}, supported is {name}: {OTHER}")
    return family


def _check_values(values: dict) -> None:
    """Refuse what cannot be the value of its key, NaN and infinity among it."""
    for key, value in values.items():
        unused = key == "sliding_window" and value == 0 and values.get("use_sliding_window") is False
        if value is None or unused:  # as transformers writes Qwen2-MoE's
            continue
        allowed, kind = INTEGERS.get(key), TYPES.get(key)
        if allowed and not (type(value) is int and value in allowed):
            expected = f"an integer from {allowed[0]} to {allowed[-1]:,}"
        elif key in NUMBERS and not (type(value) in (int, float) and NUMBERS[key] < value < 1e15):
            expected = f"a number above {NUMBERS[key]}"
        elif kind and type(value) is not kind:
            expected = f"a {kind.__name__}"
        else:
            continue
        raise ValueError(f"config.json: {key} is {_short(value)}, expected {expected}: {OWN}")


def _check_missing(hf: dict, family: str, theta: float | None) -> None:
    needed = {*CONFIG_MAP, "hidden_act", "rope_theta"} - set(FAMILIES[family][1])
    if hf.get("use_sliding_window"):
        needed |= {"sliding_window"}
        if family != "qwen3_moe":  # whose window is every layer's
            needed |= {"layer_types" if hf.get("layer_types") else "max_window_layers"}
    missing = sorted(key for key in needed if {**hf, "rope_theta": theta}.get(key) is None)
    if family in MIXTURES:
        wanted = {"num_experts_per_tok"} | ({"moe_intermediate_size"} if family in QWEN else set())
        wanted |= {"shared_expert_intermediate_size"} if family == "qwen2_moe" else set()
        missing += sorted(key for key in wanted if hf.get(key) is None)
        missing += [] if any(hf.get(key) is not None for key in EXPERTS) else [EXPERTS[1]]
    if family == "mistral" and "sliding_window" not in hf:  # null: no window; no key: transformers would fill in 4096
        missing.append("sliding_window")
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}, expected in a {family} model: {OWN}")


def _rope_from_hf(hf: dict, rope: dict) -> dict | None:
    """The scaling part of transformers' RoPE keys, lengths and factor explicit; None for plain RoPE."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested or kind not in ("default", *ROPE_KEYS):
        found = f"one for each of {', '.join(nested)}" if nested else _short(kind)
        raise ValueError(f"config.json: RoPE type is {found}, supported are default, {', '.join(ROPE_KEYS)}: {OTHER}")
    part = rope.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {_short(part)}, supported is 1.0: {OTHER}")
    if kind == "default":
        return None
    _check_values(rope)
    longest, key = hf["max_position_embeddings"], "original_max_position_embeddings"
    values = {**rope, key: hf.get(key) or rope.get(key) or longest}  # in transformers' order
    if "truncate" in rope:
        values["truncate"] = bool(rope["truncate"])  # null means no, absence yes
    needed, optional = ROPE_KEYS[kind]
    values = {key: values[key] for key in (*needed, *optional) if values.get(key) is not None}
    if kind == "yarn" and "factor" not in values:
        values["factor"] = longest / values[key]
    missing = [key for key in needed if key not in values]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}, expected for RoPE type {kind}: {OWN}")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(f"config.json: low_freq_factor is not below high_freq_factor: {OWN}")
    ignored = sorted(rope.keys() - {"type", "rope_type", "rope_theta", "partial_rotary_factor", *needed, *optional})
    if ignored:
        _warn(f"config.json: RoPE type {kind} does not use {', '.join(ignored)}; ignored, as transformers does")
    return {"type": kind, **values}


def context_of(longest: int, scaling: dict | None) -> int:
    """How many positions a model may have, from max_position_embeddings and what its scaling allows.

    YaRN and linear scaling stretch the original context by their factor. The factor of llama3 is no ratio of lengths
    (Llama 3.1 has 8 and 8,192 and reads 131,072 tokens): there max_position_embeddings counts alone.
    """
    if scaling is None or scaling["type"] == "llama3":
        return longest
    return max(longest, int(scaling["factor"] * scaling.get("original_max_position_embeddings", longest)))


def _window_from_hf(hf: dict) -> tuple[int | None, list[int] | None]:
    """Sliding window and the layers that have it (None: all of them)."""
    family, layers, window = hf["model_type"], hf["num_hidden_layers"], hf.get("sliding_window")
    if family in ("llama", "olmoe") and window is not None:
        raise ValueError(f"config.json: sliding_window is {window}, which a {family} model ignores: remove it")
    if family in QWEN and not hf.get("use_sliding_window"):
        window = None
    first, everywhere = hf.get("max_window_layers"), family in ("mistral", "mixtral", "qwen3_moe")
    if window is None or first is None:
        first = layers
    if window is not None and everywhere:
        first = 0
    usual = [LAYER_TYPES[layer >= first] for layer in range(layers)]
    if window is not None and family == "qwen2_moe":  # every other layer, of those before max_window_layers
        usual = [LAYER_TYPES[layer < first and layer % 2 == 0] for layer in range(layers)]
    types = hf.get("layer_types") or usual
    allowed = [usual]  # transformers applies Mistral's window to every layer, whatever layer_types says
    if window is not None and not everywhere and all(name in LAYER_TYPES for name in types):
        allowed.append(types)
    if len(types) != layers or types not in allowed:
        raise ValueError(f"config.json: layer_types is {_short(types)}, which a {family} model with {layers} layers "
                         f"and sliding window {window} does not compute: {OWN}")
    chosen = [layer for layer, name in enumerate(types) if name == "sliding_attention"]
    return (window if chosen else None), (None if len(chosen) in (0, layers) else chosen)


def config_to_hf(config: ModelConfig) -> dict:
    """A Hugging Face config.json that transformers 4 and 5 both read.

    Raises ValueError when the family has no room for a setting."""
    if config.family not in list(FAMILIES):
        raise ValueError(f"config.json: family is {_short(config.family)}, expected {', '.join(FAMILIES)}: mend it")
    ours, scaling = asdict(config), config.rope_scaling
    hf = {
        "architectures": [FAMILIES[config.family][0]],
        "model_type": config.family,
        **{key: ours[name] for key, name in CONFIG_MAP.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if scaling is not None:
        hf["rope_scaling"] = {"rope_type": scaling["type"], **scaling}
        del hf["rope_scaling"]["type"]
    _check_values(hf)
    if scaling is not None and scaling["type"] == "linear":
        hf["max_position_embeddings"] = round(config.max_seq_len / scaling["factor"])
    if config.family not in ("llama", "olmoe"):
        hf["sliding_window"] = config.sliding_window
    if config.family in MIXTURES:
        hf |= _experts_to_hf(config)
    if config.family in QWEN:
        windowed = [layer for layer in range(config.n_layers) if config.window(layer) is not None]
        hf["use_sliding_window"] = config.sliding_window is not None
        hf["max_window_layers"] = min(windowed, default=config.n_layers)  # for versions that do not read layer_types
        hf["layer_types"] = [LAYER_TYPES[layer in windowed] for layer in range(config.n_layers)]
        if config.family == "qwen3_moe":  # which has no such keys
            del hf["layer_types"], hf["max_window_layers"]
    again = asdict(config_from_hf(hf))
    lost = ", ".join(f"{key}={_short(value)}" for key, value in ours.items() if value != again[key])
    if lost:
        raise ValueError(f"config.json has {lost}, which {hf['architectures'][0]} cannot express: change the family")
    return hf


def _experts_to_hf(config: ModelConfig) -> dict:
    hf = {EXPERTS[config.family != "mixtral"]: config.n_experts, "num_experts_per_tok": config.experts_per_token}
    if config.family != "mixtral":
        hf["norm_topk_prob"] = config.norm_topk
    if config.family in QWEN:
        hf |= {"moe_intermediate_size": config.expert_dim, "decoder_sparse_step": 1}
        hf["mlp_only_layers"] = list(config.dense_layers)
    if config.family == "qwen2_moe":
        hf |= {"shared_expert_intermediate_size": config.shared_dim, "qkv_bias": config.qkv_bias}
    return hf


# ---------------------------------------------------------------------------------------------------- safetensors files


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: bytes [start, start + size) of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> list[Stored]:
    """The tensors of a safetensors file in file order, none of them read. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, framework="pt"):  # the library checks that the tensors fill the file exactly
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short, damaged or no safetensors file ({error}): fetch it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is in {entry['dtype']}, supported are {', '.join(DTYPES)}: {OTHER}")
        low, high = entry["data_offsets"]
        stored = Stored(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + low, high - low)
        tensors.append(stored)
    return tensors


def read_chunks(tensor: Stored) -> Iterator[torch.Tensor]:
    """The elements of one tensor, in flat pieces of at most CHUNK bytes; each piece is overwritten by the next one."""
    buffer = bytearray(min(CHUNK, tensor.size))
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.start)
        for start in range(0, tensor.size, CHUNK):
            view = memoryview(buffer)[: min(CHUNK, tensor.size - start)]
            if file.readinto(view) != len(view):
                raise ValueError(f"{tensor.path} became shorter while it was read: convert again")
            yield torch.frombuffer(view, dtype=tensor.dtype)


def shard_chunks(tensors: list[tuple[str, Stored]], dtype: torch.dtype) -> Iterator[bytes]:
    """The bytes of a safetensors file that holds `tensors` under their new names, cast to `dtype`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this format
    for name, tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": tensor.shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start on a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        yield from _cast_chunks(tensor, dtype)


def counted(chunks: Iterable[bytes], progress: runtime.Progress) -> Iterator[bytes]:
    """The chunks; each is a step of the progress line."""
    for chunk in chunks:
        yield chunk
        progress.step()


def _cast_chunks(tensor: Stored, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of one tensor in another dtype; values that are not finite are counted and told."""
    bad = overflown = 0
    for chunk in read_chunks(tensor):
        cast = chunk.to(dtype)
        if not all(x.isfinite() for x in torch.aminmax(cast)):  # NaN goes through min and max
            bad += int((~chunk.isfinite()).sum())
            overflown += int((chunk.isfinite() & ~cast.isfinite()).sum())
        yield cast.view(torch.uint8).numpy()
    where = f"{tensor.path.name}: {tensor.name}"
    if bad:
        _warn(f"{where} holds {bad:,} NaN or infinite values of {math.prod(tensor.shape):,}: fetch it again")
    if overflown:
        _warn(f"{where} has {overflown:,} values that became infinite in {dtype}: use bfloat16 or float32")


def list_shards(src: Path) -> list[list[Stored]]:
    """The headers of all weight files of a folder, in the order of their names; an error says what it has instead."""
    single, index = src / "model.safetensors", src / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{src} has both {single.name} and {INDEX}, expected one of them: remove the older one")
    if single.is_file():
        return [read_header(single)]
    if not index.is_file():
        pickles = [path.name for pattern in PICKLES for path in src.glob(pattern)]
        if pickles and not list(src.glob("*.safetensors")):
            raise ValueError(f"{src} has pickle files only ({_some(sorted(pickles))}), expected safetensors: "
                             "save it again with save_pretrained")
        found = sorted(path.name for path in src.iterdir() if path.is_file())
        raise FileNotFoundError(f"{src} has neither {single.name} nor {INDEX}, found {_some(found)}: fetch all of it")
    where = _read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(re.fullmatch(r"[\w.-]{1,200}", str(name)) for name in where.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names beside it: fetch it again")
    files = sorted(set(map(str, where.values())))
    missing = [name for name in files if not (src / name).is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{src} lacks {_some(missing)} of the {len(files)} shards of {INDEX}: fetch the rest")
    shards = [read_header(src / name) for name in files]
    _check_index(index, where, shards)
    return shards


def _check_index(index: Path, where: dict[str, str], shards: list[list[Stored]]) -> None:
    """Every tensor is in one shard, in the one that the index names."""
    home = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        if tensor.name in home:
            raise ValueError(f"{index.parent}: {tensor.name} is in two shards, {home[tensor.name]} and "
                             f"{tensor.path.name}: fetch the folder afresh")
        home[tensor.name] = tensor.path.name
    for name, file in where.items():
        if home.get(name) != file:
            raise ValueError(f"{index} puts {name} into {file}, which does not hold it: fetch the folder afresh")


# ----------------------------------------------------------------------------------------------------------- conversion


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our tensor names and their shapes, from the model itself (on the meta device: no memory)."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}


def rename(name: str, key_map: dict[str, str | None]) -> str | None:
    """Translate one tensor name; None = left out on purpose. Raises KeyError for a name that is not in the map."""
    numbers = {}
    for key, parent in (("i", "layers"), ("e", "experts")):
        found = re.fullmatch(rf"(.*\b{parent}\.)(\d+)(\..*)", name)
        if found:
            numbers[key], name = found[2], f"{found[1]}{{{key}}}{found[3]}"
    target = key_map[name]
    return target and target.format(**numbers)


def names_of(family: str) -> tuple[dict[str, str | None], dict[str, str]]:
    """Maps of a family's tensor names from Hugging Face to ours, and back."""
    if family != "mixtral":
        return KEY_MAP, KEY_MAP_TO_HF
    return KEY_MAP | MIXTRAL_MAP, KEY_MAP_TO_HF | {ours: hf for hf, ours in MIXTRAL_MAP.items()}


def unfused(tensor: Stored) -> list[Stored]:
    """The tensors of single experts in one that transformers fused, as its own modules hold them; else the tensor.

    gate_up_proj (E,2F,D) is each expert's w1 over its w3, down_proj (E,D,F) its w2: every part lies in one piece.
    """
    found = re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)", tensor.name)
    if found is None or len(tensor.shape) != 3:
        return [tensor]
    count, rows, columns = tensor.shape
    parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
    size, shape = tensor.size // (count * len(parts)), (rows // len(parts), columns)
    names = [f"{found[1]}{e}.{part}.weight" for e in range(count) for part in parts]
    starts = range(tensor.start, tensor.start + tensor.size, size) if size else [tensor.start] * len(names)
    return [replace(tensor, name=name, shape=shape, start=at, size=size) for name, at in zip(names, starts)]


def plan(shards: list[list[Stored]], config: ModelConfig, to_hf: bool) -> list[list[tuple[str, Stored]]]:
    """What each output file holds: (new name, tensor) pairs, one file for each source file that has something to keep.

    Raises ValueError unless every source tensor has a place, every expected tensor a source, and all shapes agree with
    the config.
    """
    expected = expected_shapes(config)
    read, back = names_of(config.family)
    key_map = back if to_hf else read
    files, used, strange, head = [], {}, [], None
    for shard in shards:
        kept = []
        for tensor in (part for tensor in shard for part in unfused(tensor)):
            try:
                target = rename(tensor.name, key_map)
            except KeyError:
                strange.append(tensor.name)
                continue
            ours = tensor.name if to_hf else target
            if ours is None:
                continue
            if ours == "output.weight" and config.tie_embeddings:
                head = tensor
            elif ours not in expected:
                strange.append(tensor.name)
            else:
                _check_shape(tensor, expected[ours])
                used[ours] = tensor
                kept.append((target, tensor))
        if kept:
            files.append(kept)
    missing = [name if to_hf else rename(name, back) for name in expected if name not in used]
    if missing or strange:
        wrong = {"lack": missing, "add": strange}
        found = " and ".join(f"{verb} {len(names)} tensors ({_some(names)})" for verb, names in wrong.items() if names)
        hint = " (tie_word_embeddings is false)" if "lm_head.weight" in missing else ""
        raise ValueError(f"the weights {found} of the model in config.json{hint}: fetch both from one place")
    if head is not None:
        _check_tied(head, used["tok_embeddings.weight"])
    return files


def _check_shape(tensor: Stored, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)} from "
                         "config.json: weights and config.json are not of one model, fetch both again")


def _check_tied(head: Stored, table: Stored) -> None:
    """A tied head that is stored all the same must be the embedding, bit for bit (as bytes: NaN equals itself)."""
    pairs = zip(read_chunks(head), read_chunks(table))
    same = (head.dtype, head.shape) == (table.dtype, table.shape)
    if not same or not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
        raise ValueError(f"{head.path}: {head.name} is not {table.name}, though config.json ties them: "
                         "set tie_word_embeddings=false")


def main_dtype(planned: list[list[tuple[str, Stored]]]) -> torch.dtype:
    """The dtype in which most values are stored. A model computes in one; transformers casts the others on loading."""
    values = dict.fromkeys(DTYPES.values(), 0)
    for tensor in (tensor for tensors in planned for _, tensor in tensors):
        values[tensor.dtype] += math.prod(tensor.shape)
    most = max(values, key=values.get)
    if sum(map(bool, values.values())) > 1:
        found = ", ".join(f"{n:,} values in {kind}" for kind, n in values.items() if n).replace("torch.", "")
        _warn(f"the weights are stored as {found}: all are written in {most}; --dtype=float32 keeps every digit")
    return most


def check_tokenizer(src: Path, config: ModelConfig) -> list[str]:
    """The names of the small files that go with a model, checked.

    The tokenizer is loaded, which refuses what cannot be reproduced exactly; it may not have more ids than the
    embedding has rows (fewer are usual: embeddings are padded to a round number).
    """
    names = sorted(p.relative_to(src).as_posix() for pattern in (*TOKENIZERS, *SETTINGS) for p in src.glob(pattern))
    for name in names:
        if not (src / name).is_file():
            raise ValueError(f"{src / name} is a folder or a broken link, expected a file: fetch it again")
        if name.endswith(".json"):
            _read_object(src / name)
    if not any(path for pattern in TOKENIZERS for path in src.glob(pattern)):
        _warn(f"{src} has no tokenizer ({', '.join(TOKENIZERS)}): the converted model will not read text")
        return names
    ids = load_tokenizer(src).vocab_size
    if ids > config.vocab_size:
        raise ValueError(f"{src}: the tokenizer has {ids:,} ids, the embedding {config.vocab_size:,}: take its own")
    return names


def convert(src: str | Path, out: str | Path, *, dtype: str = "keep", to_hf: bool = False) -> ModelConfig:
    """Convert the folder `src` into the folder `out`.

    dtype: keep (as the weights are stored, or as most of them are), or a name in runtime.DTYPES. Raises ValueError and
    FileNotFoundError.
    """
    start, memory = time.perf_counter(), runtime.peak_memory_bytes("cpu")
    src, out = Path(src), Path(out)
    if not src.is_dir():
        raise FileNotFoundError(f"SRC {src} is not a folder, expected one that holds a model: check the path")
    if out.exists() and (not out.is_dir() or out.resolve() == src.resolve()):
        raise ValueError(f"OUT {out} is {'SRC itself' if out.is_dir() else 'a file'}, expected a new folder: change it")
    config, documents = read_configs(src, dtype, to_hf)
    shards = list_shards(src)
    planned = plan(shards, config, to_hf)
    names = [f"model-{i:05}-of-{len(planned):05}.safetensors" for i in range(1, len(planned) + 1)]
    files = dict(zip(names if len(names) > 1 else ["model.safetensors"], planned))
    copies = check_tokenizer(src, config)
    clean(out, {*files, *copies, *documents, INDEX})
    cast = main_dtype(planned) if dtype == "keep" else runtime.DTYPES[dtype]

    pieces = sum(1 + sum(len(range(0, tensor.size, CHUNK)) for _, tensor in tensors) for tensors in planned)
    with runtime.Progress("convert", pieces) as progress:
        for i, (name, tensors) in enumerate(files.items(), 1):
            done = put(out / name, counted(shard_chunks(tensors, cast), progress))
            size = (out / name).stat().st_size / 1e6
            runtime.print0(f"shard {i}/{len(files)} | {name} | {len(tensors)} tensors | {size:,.1f} MB | {done}")
    if len(files) > 1:
        put(out / INDEX, [_json(index_of(files, cast))])
    for name in copies:
        put(out / name, [(src / name).read_bytes()])
    for name, text in documents.items():  # config.json is the last one
        put(out / name, [text])

    read, written = sum(map(len, shards)), sum(map(len, planned))
    largest = max(sum(tensor.size for tensor in shard) for shard in shards)
    runtime.print0(
        f"{config.family} | {read} tensors read, {written} written, {read - written} left out | "
        f"peak memory +{(runtime.peak_memory_bytes('cpu') - memory) / 1e6:,.1f} MB "
        f"(largest shard {largest / 1e6:,.1f} MB) | {time.perf_counter() - start:.1f} s | {out}"
    )
    return config


def read_configs(src: Path, dtype: str, to_hf: bool) -> tuple[ModelConfig, dict[str, bytes]]:
    """Our config of `src`, and the JSON files of the output by name, config.json last."""
    path, kept = src / "config.json", src / "hf_config.json"
    found = _read_object(path)
    if ("family" in found) != to_hf:
        kind = "a checkpoint of ours" if to_hf else "a Hugging Face folder"
        raise ValueError(f"{path} is not the config of {kind}: {'drop' if to_hf else 'add'} --to_hf if it is the other")
    if not to_hf:
        config = config_from_hf(found)
        theirs = path.read_bytes() if dtype == "keep" else _json(_with_dtype(found, dtype))
        return config, {**stop_ids(found, src), "hf_config.json": theirs, "config.json": _json(asdict(config))}
    try:
        config = ModelConfig.from_dict(found)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as convert_hf.py writes it ({error}): convert the model again") from None
    if not kept.is_file():
        return config, {"config.json": _json(_with_dtype(config_to_hf(config), dtype))}
    hf = _read_object(kept)
    theirs = config_from_hf(hf)
    older = replace(theirs, max_seq_len=hf["max_position_embeddings"])  # written before a scaling counted
    if config not in (theirs, older):
        raise ValueError(f"{kept} and config.json describe different models: remove {kept.name} to export the latter")
    return config, {"config.json": kept.read_bytes() if dtype == "keep" else _json(_with_dtype(hf, dtype))}


def stop_ids(hf: dict, src: Path) -> dict[str, bytes]:
    """A generation_config.json for a folder that has none: the ids of config.json, which transformers takes then."""
    both = {**(hf.get("text_config") or {}), **{key: value for key, value in hf.items() if value is not None}}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: both[name] for name in names if both.get(name) is not None}
    for name, value in ids.items():
        if not all(type(i) is int for i in (value if isinstance(value, list) else [value])):
            raise ValueError(f"config.json: {name} is {_short(value)}, expected a token id or a list of them: mend it")
    if "eos_token_id" not in ids or (src / "generation_config.json").exists():
        return {}
    return {"generation_config.json": _json(ids)}


def _with_dtype(hf: dict, dtype: str) -> dict:
    return hf if dtype == "keep" else {**hf, "dtype" if "dtype" in hf else "torch_dtype": dtype}  # transformers 5 and 4


def index_of(files: dict[str, list[tuple[str, Stored]]], dtype: torch.dtype) -> dict:
    """The index of several weight files: which tensor is where."""
    where = {name: file for file, tensors in files.items() for name, _ in tensors}
    sizes = (math.prod(t.shape) * dtype.itemsize for tensors in files.values() for _, t in tensors)
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}


def clean(out: Path, ours: set[str]) -> None:
    """Refuse a folder with files that this conversion does not write; remove what a killed run left half written."""
    present = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if not path.is_dir()}
    halves = {name for name in present if re.fullmatch(r"\..+\.\d+\.tmp", present[name].name)}  # runtime.write_atomic
    strangers = sorted(present.keys() - ours - halves)
    if strangers:
        raise ValueError(f"OUT {out} is not empty: it has {_some(strangers)}, which this conversion does not write: "
                         "choose a new folder")
    for name in halves:
        present[name].unlink()


def put(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file atomically, or compare the one that is there: returns written or verified.

    Raises ValueError when the file has other bytes.
    """
    if not path.exists():

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)

        runtime.write_atomic(path, write)
        return "written"
    with open(path, "rb") as file:
        same = [file.read(len(chunk)) == memoryview(chunk) for chunk in chunks]  # to the end, for the warnings
        if not all(same) or file.read(1):
            raise ValueError(f"{path} is not what this conversion writes (other weights, dtype): remove {path.parent}")
    return "verified"


def _read_object(path: Path) -> dict:
    value = runtime.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object: fetch it again")
    return value


def _json(obj) -> bytes:
    return (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _warn(text: str) -> None:
    runtime.Progress.wipe()
    print(f"warning: {text}", file=sys.stderr, flush=True)


@dataclass
class ConvertConfig:
    src: str = field(metadata={"help": "folder to convert", "positional": True})
    out: str = field(metadata={"help": "folder to write: new, or of a run that was killed", "positional": True})
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = field(
        default="keep", metadata={"help": "cast every tensor, or keep what they are stored in"}
    )
    to_hf: bool = field(default=False, metadata={"help": "from a checkpoint of ours to a Hugging Face folder"})
    adapter: str | None = runtime.setting(None, "LoRA adapter folder to merge into a checkpoint of ours")
    skip: str | None = runtime.setting(
        None, "build a route in: layers such as 5,7.attn,9.mlp; with --routers one of its orders, or mean:FILE.json"
    )
    routers: str | None = runtime.setting(None, "router file whose orders or mean route --skip names")
    budget: float | None = runtime.setting(None, "capacity that such an order leaves; none: the mean route's own")


def rebuild(c: ConvertConfig) -> None:
    """Write a checkpoint of ours with an adapter merged and a fixed route built in, or with --to_hf its export."""
    src, out = Path(c.src), Path(c.out)
    model = load_model(src, dtype=None if c.dtype == "keep" else runtime.DTYPES[c.dtype])
    parent = model.fingerprint
    if c.adapter is not None:
        load_adapter(model, c.adapter)
        runtime.print0(f"merged: {len(changes(model))} projections | routers of {parent} stay valid for the result")
        merge(model)
    if c.skip is not None:
        n_layers, parent = model.config.n_layers, None  # routers of the base have no place here
        given = c.routers is not None
        skipped = by_routers(c.skip, model, c.routers, c.budget) if given else listed(c.skip, n_layers)
        fix_route(model, skipped)
        gone, names = n_layers - model.config.n_layers, sorted(f"{layer}.{kind}" for layer, kind in skipped)
        runtime.print0(f"skipped: {', '.join(names) or 'nothing'} | {gone} of {n_layers} layers left out, later ones "
                       f"move up | {len(skipped) - 2 * gone} sublayers stay, with a last projection of zeros: the same "
                       "function, not faster, since transformers runs every sublayer of a layer")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / "base" if c.to_hf else out
        if not c.to_hf:
            clean(out, {path.name for path in src.iterdir()} | {"model.safetensors"})
        save_base(model, src, made, parent)
        if c.to_hf:
            convert(made, out, to_hf=True)


def main() -> None:
    c = runtime.cli(ConvertConfig)
    if c.routers is not None and c.skip is None:
        raise ValueError(f"--routers={c.routers} without --skip; expected the route to build in: "
                         "--skip=mean:FILE.json, or an order of the file with --budget")
    if c.adapter is None and c.skip is None:
        convert(c.src, c.out, dtype=c.dtype, to_hf=c.to_hf)
    else:
        rebuild(c)


if __name__ == "__main__":
    runtime.run_main(main)
