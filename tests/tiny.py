"""Small made-up models, tokenizers and files that the tests share."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import ModelConfig, Transformer

CONFIG = ModelConfig(
    family="llama",
    dim=32,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    vocab_size=258,
    max_seq_len=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    tie_embeddings=True,
)


def byte_tokenizer(merges: tuple[str, ...] = (), special: tuple[str, ...] = ("<s>", "</s>")) -> dict:
    """A tokenizer.json that knows every byte, these merges ("h e") and, behind them, these special tokens."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # these bytes name themselves
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {spelled[byte]: byte for byte in range(256)}
    vocab |= {merge.replace(" ", ""): 256 + i for i, merge in enumerate(merges)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "fuse_unk": False}
    bpe |= {"end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": len(vocab) + i, "content": content, **flags} for i, content in enumerate(special)],
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {**bpe, "vocab": vocab, "merges": list(merges)},
    }


def write_tokenizer(folder: Path, **settings) -> None:
    """Files of a byte tokenizer; settings go to tokenizer_config.json."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, **settings}
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_base(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """A checkpoint folder of a random model with a byte tokenizer; its layers differ in how much they matter."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Transformer(config)
    for layer, block in enumerate(model.layers):
        block.attention.wo.weight.data *= 2.0 + layer % 3
    model.tok_embeddings.weight.data.normal_(std=0.5)  # a new model holds no values yet
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    write_tokenizer(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
