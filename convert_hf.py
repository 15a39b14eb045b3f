"""Convert a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3) to a checkpoint of ours, or back: a rename, tensor by tensor.

    python convert_hf.py SRC OUT [--dtype=keep|float32|bfloat16|float16]
    python convert_hf.py SRC OUT --to_hf                # SRC is ours, OUT a folder for transformers

Everything is checked before the first byte is written: config, shard headers, names, shapes, tokenizer size. The tensors then
stream through one buffer, source shard by source shard. A run that was killed goes on where it stopped: whatever stands in OUT
is compared byte by byte with what it should be, and config.json comes last, so that a folder without one is not a checkpoint.
The source's config.json is kept as hf_config.json, so that the way back restores every key, the ones we do not model included.
File format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

import runtime
from model import ModelConfig, Transformer, safetensors_header
from tokenizer import load_tokenizer

# Hugging Face name -> our name; None = dropped on purpose. Both sides store RoPE half-split, so nothing is permuted.
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
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",  # with tied embeddings: compared with the embedding, then dropped
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,  # a table in old Llama files; it follows from rope_theta
    "model.rotary_emb.inv_freq": None,
}
KEY_MAP_TO_HF = {ours: hf for hf, ours in KEY_MAP.items() if ours is not None}

# Hugging Face config key -> our field, the same value in both.
CONFIG_MAP = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# Per family: its class in transformers, and the keys that may be absent or null because transformers' own default is plain.
FAMILIES = {
    "llama": ("LlamaForCausalLM", ("tie_word_embeddings", "head_dim", "num_key_value_heads", "rope_theta")),
    "mistral": ("MistralForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen2": ("Qwen2ForCausalLM", ("tie_word_embeddings", "head_dim")),
    "qwen3": ("Qwen3ForCausalLM", ("tie_word_embeddings",)),
}
DEFAULT_THETA = 10000.0  # what transformers takes for Llama 1 and 2, whose config.json has no rope_theta
# Keys that change the function: the values that we compute (None: the key is absent or null).
SUPPORTED_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),  # it would add a bias to o_proj; Qwen2's bias on q, k, v is built in and not this key
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
# RoPE type -> (needed keys, optional keys); names as in transformers' modeling_rope_utils.
ROPE_KEYS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
DTYPE_NAMES = {kind: name for name, kind in DTYPES.items()}
TOKENIZER_FILES = ("tokenizer.model", "*.model.v*", "tokenizer.json", "vocab.json", "merges.txt", "*.tiktoken")
SETTINGS_FILES = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHUNK = 4 << 20  # bytes of one tensor held at a time


# ---------------------------------------------------------------------------------------------------------------- config


def config_from_hf(hf: dict) -> ModelConfig:
    """Our config for a Hugging Face config.json, written by transformers 4 or 5. Raises ValueError for what we do not compute."""
    family, known = hf.get("model_type"), ", ".join(name for name, _ in FAMILIES.values())
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}, supported are {', '.join(FAMILIES)} ({known}): choose another model")
    name, optional = FAMILIES[family]
    if (hf.get("architectures") or [name]) != [name]:
        raise ValueError(f"config.json: architectures is {hf['architectures']}, supported are {known}, here {name}: choose another model")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # transformers 4 writes the first, 5 the second
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    needed = {*CONFIG_MAP, "rope_theta", "hidden_act"} - set(optional)
    if hf.get("use_sliding_window"):
        needed |= {"sliding_window", "layer_types" if hf.get("layer_types") else "max_window_layers"}
    missing = sorted(key for key in needed if (theta if key == "rope_theta" else hf.get(key)) is None)
    if family == "mistral" and "sliding_window" not in hf:  # null means no window; transformers fills in 4096 where there is no key
        missing.append("sliding_window")
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}, expected in a {family} model: take the model's own config.json")
    for key, supported in SUPPORTED_VALUES.items():
        if hf.get(key) not in supported and (key, family) != ("attention_bias", "qwen2"):  # transformers' Qwen2 does not read it
            raise ValueError(f"config.json: {key} is {hf[key]!r}, supported is {supported[-1]!r}: this variant cannot be converted")
    values = {ours: hf[key] for key, ours in CONFIG_MAP.items() if hf.get(key) is not None}
    values.setdefault("n_kv_heads", values["n_heads"])
    values.setdefault("head_dim", values["dim"] // values["n_heads"])
    window, window_layers = _window_from_hf(hf)
    return ModelConfig(
        **values,
        family=family,
        rope_theta=float(DEFAULT_THETA if theta is None else theta),
        rope_scaling=_rope_from_hf(hf, rope),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        window_layers=window_layers,
    )


def _rope_from_hf(hf: dict, rope: dict) -> dict | None:
    """The scaling part of transformers' RoPE keys, lengths and factor explicit; None for plain RoPE."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested or (kind != "default" and kind not in ROPE_KEYS):
        found = f"one for each of {', '.join(nested)}" if nested else repr(kind)
        raise ValueError(f"config.json: RoPE type is {found}, supported are default, {', '.join(ROPE_KEYS)}: choose another model")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}, supported is 1.0: choose another model")
    if kind == "default":
        return None
    longest = hf["max_position_embeddings"]
    original = hf.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))  # order as in transformers
    values = {**rope, "original_max_position_embeddings": original}
    if kind == "yarn" and values.get("factor") is None:
        values["factor"] = longest / original
    needed, optional = ROPE_KEYS[kind]
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}, expected for RoPE type {kind}: take the model's own config.json")
    ignored = sorted(rope.keys() - {"type", "rope_type", "rope_theta", "partial_rotary_factor", *needed, *optional})
    if ignored:
        _warn(f"config.json: RoPE type {kind} does not use {', '.join(ignored)}; ignored, as transformers does")
    return {"type": kind, **{key: values[key] for key in (*needed, *optional) if values.get(key) is not None}}


def _window_from_hf(hf: dict) -> tuple[int | None, list[int] | None]:
    """Sliding window and the layers that have it (None: all of them)."""
    family, layers, window = hf["model_type"], hf["num_hidden_layers"], hf.get("sliding_window")
    if family == "llama" and window is not None:
        raise ValueError(f"config.json: sliding_window is {window}, which transformers ignores in a llama model: remove it")
    if family in ("qwen2", "qwen3") and not hf.get("use_sliding_window"):
        window = None
    first = layers if window is None else 0 if family == "mistral" else hf.get("max_window_layers", layers)
    usual = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    types = hf.get("layer_types") or usual
    free = window is not None and family != "mistral"  # transformers applies Mistral's window to every layer, whatever layer_types says
    if len(types) != layers or not (set(types) <= {"full_attention", "sliding_attention"} if free else types == usual):
        raise ValueError(
            f"config.json: layer_types is {types}, which a {family} model with {layers} layers and sliding window {window} "
            "does not compute: take the model's own config.json"
        )
    chosen = [layer for layer, name in enumerate(types) if name == "sliding_attention"]
    return (window if chosen else None), (None if len(chosen) in (0, layers) else chosen)


def config_to_hf(config: ModelConfig) -> dict:
    """A Hugging Face config.json that transformers 4 and 5 both read. Raises ValueError when the family has no room for a setting."""
    if config.family not in FAMILIES:
        raise ValueError(f"config.json: family is {config.family!r}, supported are {', '.join(FAMILIES)}: set it to one of these")
    ours, layers, scaling = asdict(config), range(config.n_layers), config.rope_scaling
    hf = {
        "architectures": [FAMILIES[config.family][0]],
        "model_type": config.family,
        **{key: ours[name] for key, name in CONFIG_MAP.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": scaling["type"], **{key: value for key, value in scaling.items() if key != "type"}},
    }
    if config.family != "llama":
        hf["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        windowed = [layer for layer in layers if config.window(layer) is not None]
        hf["use_sliding_window"] = config.sliding_window is not None
        hf["max_window_layers"] = min(windowed, default=config.n_layers)  # for versions that do not read layer_types
        hf["layer_types"] = ["sliding_attention" if layer in windowed else "full_attention" for layer in layers]
    again = asdict(config_from_hf(hf))
    lost = ", ".join(f"{key}={value!r}" for key, value in ours.items() if value != again[key])
    if lost:
        raise ValueError(f"config.json has {lost}, which {FAMILIES[config.family][0]} cannot express: export it as another family")
    return hf


# ----------------------------------------------------------------------------------------------------- safetensors files


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
    """The tensors of a safetensors file in file order, none of them read. Raises ValueError unless they fill the file exactly."""
    header, first = safetensors_header(path)
    tensors, end = [], first
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {entry['dtype']}, supported are {', '.join(DTYPES)}: take one not quantised")
        dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
        tensors.append(Stored(name, path, dtype, tuple(entry["shape"]), first + start, stop - start))
        if tensors[-1].start != end or stop - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{path}: the bytes of {name} are not where its shape puts them: the file is damaged, fetch it again")
        end = first + stop
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


def shard_chunks(tensors: list[tuple[str, Stored]], dtype: torch.dtype | None) -> Iterator[bytes]:
    """The bytes of a safetensors file that holds `tensors` under their new names, cast to `dtype` (None: as stored)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this format
    for name, tensor in tensors:
        kind = dtype or tensor.dtype
        size = math.prod(tensor.shape) * kind.itemsize
        header[name] = {"dtype": DTYPE_NAMES[kind], "shape": tensor.shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start on a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in tensors:
        bad = overflown = 0
        for chunk in read_chunks(tensor):
            cast = chunk.to(dtype or tensor.dtype)
            if not all(x.isfinite() for x in torch.aminmax(cast)):  # NaN goes through min and max; counted only when there is one
                bad += int((~chunk.isfinite()).sum())
                overflown += int((chunk.isfinite() & ~cast.isfinite()).sum())
            yield cast.view(torch.uint8).numpy()
        if bad:
            _warn(f"{tensor.path.name}: {tensor.name} holds {bad:,} NaN or infinite values of {math.prod(tensor.shape):,}: fetch it again")
        if overflown:
            _warn(f"{tensor.path.name}: {overflown:,} values of {tensor.name} became infinite in {dtype}: use bfloat16 or float32")


def list_shards(src: Path) -> list[list[Stored]]:
    """The headers of all weight files of a folder, in the order of their names. Raises an error that says what the folder has instead."""
    single, index = src / "model.safetensors", src / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{src} has both {single.name} and {index.name}, expected one of them: remove the one that is out of date")
    if single.is_file():
        return [read_header(single)]
    if not index.is_file():
        found = sorted(p.name for p in src.iterdir() if p.is_file())
        pickles = sorted(p.name for pattern in PICKLES for p in src.glob(pattern))
        if pickles and not list(src.glob("*.safetensors")):
            raise ValueError(f"{src} has pickle files only ({_some(pickles)}), expected safetensors: save it again with save_pretrained")
        raise FileNotFoundError(f"{src} has neither {single.name} nor {index.name}, found {_some(found)}: fetch the whole folder")
    where = runtime.read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(Path(str(name)).name == name for name in where.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names beside it: fetch it again")
    files = sorted(set(where.values()))
    missing = [name for name in files if not (src / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{src} lacks {_some(missing)} of the {len(files)} shards that {index.name} names: fetch the missing ones")
    shards = [read_header(src / name) for name in files]
    home = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        if tensor.name in home:
            raise ValueError(f"{src}: {tensor.name} is in two shards, {home[tensor.name]} and {tensor.path.name}: fetch the folder afresh")
        home[tensor.name] = tensor.path.name
    for name, file in where.items():
        if home.get(name) != file:
            raise ValueError(f"{src}: {index.name} puts {name} into {file}, which does not hold it: fetch index and shards of one version")
    return shards


# ------------------------------------------------------------------------------------------------------------ conversion


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our tensor names and their shapes, from the model itself (on the meta device: no memory)."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}


def rename(name: str, key_map: dict[str, str | None]) -> str | None:
    """Translate one tensor name; None = dropped on purpose. Raises KeyError for a name that is not in the map."""
    layer = re.fullmatch(r"(.*\blayers\.)(\d+)(\..*)", name)
    if layer is None:
        return key_map[name]
    target = key_map[f"{layer[1]}{{i}}{layer[3]}"]
    return target and target.format(i=layer[2])


def plan(shards: list[list[Stored]], config: ModelConfig, to_hf: bool) -> list[list[tuple[str, Stored]]]:
    """What each output file holds: (new name, tensor) pairs, one file for each source file that has something to keep.

    Raises ValueError unless every source tensor has a place, every expected tensor a source, and all shapes agree with the config.
    """
    expected = expected_shapes(config)
    key_map = KEY_MAP_TO_HF if to_hf else KEY_MAP
    files, used, strange, head = [], {}, [], None
    for shard in shards:
        kept = []
        for tensor in shard:
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
            elif tensor.shape != expected[ours]:
                raise ValueError(
                    f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, expected {list(expected[ours])} from config.json: "
                    "weights and config.json are not of one model, fetch both again"
                )
            else:
                used[ours] = tensor
                kept.append((target, tensor))
        if kept:
            files.append(kept)
    missing = [name if to_hf else rename(name, KEY_MAP_TO_HF) for name in expected if name not in used]
    if missing or strange:
        wrong = {"lack": missing, "add": strange}
        found = " and ".join(f"{verb} {len(names)} tensors ({_some(names)})" for verb, names in wrong.items() if names)
        hint = " (tie_word_embeddings is false)" if "lm_head.weight" in missing else ""
        raise ValueError(f"the weights {found} of the model that config.json describes{hint}: fetch both from one place")
    if head is not None:
        table = used["tok_embeddings.weight"]
        if (head.dtype, head.shape) != (table.dtype, table.shape) or not all(map(torch.equal, *map(_bits, (head, table)))):
            raise ValueError(f"{head.path}: {head.name} is not {table.name}, though config.json ties them: set tie_word_embeddings=false")
    return files


def _bits(tensor: Stored) -> Iterator[torch.Tensor]:
    return (chunk.view(torch.uint8) for chunk in read_chunks(tensor))  # as bytes: NaN equals itself


def check_tokenizer(src: Path, config: ModelConfig) -> None:
    """Load the tokenizer, which refuses what it cannot reproduce exactly, and compare its size with the embedding's."""
    if not any(path for pattern in TOKENIZER_FILES for path in src.glob(pattern)):
        return _warn(f"{src} has no tokenizer ({', '.join(TOKENIZER_FILES)}): the converted model will not read text")
    ids = load_tokenizer(src).vocab_size
    if ids > config.vocab_size:  # fewer is usual: embeddings are padded to a round number
        raise ValueError(f"{src}: the tokenizer has {ids:,} ids, the embedding {config.vocab_size:,} rows: take the model's own tokenizer")


def convert(src: str | Path, out: str | Path, *, dtype: str = "keep", to_hf: bool = False) -> ModelConfig:
    """Convert the folder `src` into the folder `out`, and check the result. `dtype`: keep, or a name in runtime.DTYPES."""
    start = time.perf_counter()
    src, out = Path(src), Path(out)
    if not src.is_dir():
        raise FileNotFoundError(f"SRC {src} is not a folder, expected one with config.json and safetensors: check the path")
    if out.exists() and (not out.is_dir() or out.resolve() == src.resolve()):
        raise ValueError(f"OUT {out} is {'SRC itself' if out.is_dir() else 'a file'}, expected a new folder: choose another one")
    cast = None if dtype == "keep" else runtime.DTYPES[dtype]
    config, documents = read_configs(src, dtype, to_hf)
    shards = list_shards(src)
    files = plan(shards, config, to_hf)
    check_tokenizer(src, config)

    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)] if len(files) > 1 else ["model.safetensors"]
    copies = sorted({path.name for pattern in (*TOKENIZER_FILES, *SETTINGS_FILES) for path in src.glob(pattern)})
    clean(out, {*names, *copies, *documents, "model.safetensors.index.json"})
    memory = runtime.peak_memory_bytes("cpu")
    for i, (name, tensors) in enumerate(zip(names, files), 1):
        done = put(out / name, shard_chunks(tensors, cast))
        runtime.print0(f"shard {i}/{len(files)} | {name} | {len(tensors)} tensors | {(out / name).stat().st_size / 1e6:,.1f} MB | {done}")
    written = check_output(out, names, config, to_hf)
    if len(files) > 1:
        total = sum(tensor.size for tensor in written)
        where = {tensor.name: tensor.path.name for tensor in sorted(written, key=lambda tensor: tensor.name)}
        put(out / "model.safetensors.index.json", [_json({"metadata": {"total_size": total}, "weight_map": where})])
    for name in copies:
        put(out / name, [(src / name).read_bytes()])
    for name, text in documents.items():  # config.json is the last one
        put(out / name, [text])

    sources, largest = sum(map(len, shards)), max(sum(tensor.size for tensor in shard) for shard in shards)
    runtime.print0(
        f"{config.family} | {sources} tensors read, {len(written)} written, {sources - len(written)} dropped | "
        f"peak memory +{(runtime.peak_memory_bytes('cpu') - memory) / 1e6:,.1f} MB (largest shard {largest / 1e6:,.1f} MB) | "
        f"{time.perf_counter() - start:.1f} s | {out}"
    )
    return config


def read_configs(src: Path, dtype: str, to_hf: bool) -> tuple[ModelConfig, dict[str, bytes]]:
    """Our config of `src`, and the JSON files of the output by name, config.json last."""
    found = runtime.read_json(src / "config.json")
    if not isinstance(found, dict) or ("family" in found) != to_hf:
        kind = "a checkpoint of ours" if to_hf else "a Hugging Face folder"
        raise ValueError(f"{src / 'config.json'} is not the config of {kind}: {'drop' if to_hf else 'add'} --to_hf if it is the other kind")
    if not to_hf:
        config = config_from_hf(found)
        kept = (src / "config.json").read_bytes() if dtype == "keep" else _json(_with_dtype(found, dtype))
        return config, {"hf_config.json": kept, "config.json": _json(asdict(config))}
    config, kept = ModelConfig.from_dict(found), src / "hf_config.json"
    if not kept.is_file():
        return config, {"config.json": _json(_with_dtype(config_to_hf(config), dtype))}
    hf = runtime.read_json(kept)
    if config_from_hf(hf) != config:
        raise ValueError(f"{kept} and config.json describe different models: remove {kept.name} to export what config.json says")
    return config, {"config.json": kept.read_bytes() if dtype == "keep" else _json(_with_dtype(hf, dtype))}


def _with_dtype(hf: dict, dtype: str) -> dict:
    return hf if dtype == "keep" else {**hf, "dtype" if "dtype" in hf else "torch_dtype": dtype}  # transformers 5 and 4


def clean(out: Path, ours: set[str]) -> None:
    """Refuse a folder with files that this conversion does not write; remove what a killed run left half written."""
    present = {path.name: path for path in out.iterdir()} if out.is_dir() else {}
    halves = {name for name in present if (half := re.fullmatch(r"\.(.+)\.\d+\.tmp", name)) and half[1] in ours}
    strangers = sorted(present.keys() - ours - halves)
    if strangers:
        raise ValueError(f"OUT {out} is not empty: it has {_some(strangers)}, which this conversion does not write: choose a new folder")
    for name in halves:
        present[name].unlink()


def put(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file atomically, or compare the one that is there. Returns written or verified; ValueError when it has other bytes."""
    if not path.exists():

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)

        runtime.write_atomic(path, write)
        return "written"
    with open(path, "rb") as file:
        same = all([file.read(len(chunk)) == memoryview(chunk) for chunk in chunks])  # a list: read to the end, for the warnings
        if not same or file.read(1):
            raise ValueError(f"{path} is not what this conversion writes (other weights or dtype): remove {path.parent} and convert again")
    return "verified"


def check_output(out: Path, names: list[str], config: ModelConfig, to_hf: bool) -> list[Stored]:
    """Read the headers back: every expected tensor is there once, with the right shape."""
    written = [tensor for name in names for tensor in read_header(out / name)]
    expected = {(rename(name, KEY_MAP_TO_HF) if to_hf else name): shape for name, shape in expected_shapes(config).items()}
    assert len(written) == len(expected) and {tensor.name: tensor.shape for tensor in written} == expected
    return written


def _json(obj) -> bytes:
    return (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


@dataclass
class ConvertConfig:
    src: str = field(metadata={"help": "folder to convert", "positional": True})
    out: str = field(metadata={"help": "folder to write: new, or of a run that was killed", "positional": True})
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = field(default="keep", metadata={"help": "cast each tensor, or keep it"})
    to_hf: bool = field(default=False, metadata={"help": "from a checkpoint of ours to a Hugging Face folder"})


def main() -> None:
    c = runtime.cli(ConvertConfig)
    convert(c.src, c.out, dtype=c.dtype, to_hf=c.to_hf)


if __name__ == "__main__":
    runtime.run_main(main)
