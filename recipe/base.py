"""A base as the scripts load it: in int8, shared out over ranks, with an adapter; and a changed one as a folder."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

import runtime
from model import Transformer, load_config, load_model
from recipe.adapter import load_adapter
from recipe.int8 import read_int8
from recipe.shard import load_shared, shared

KINDS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # suffixes of tokenizer files and settings


def load_base(folder: str | Path, rt: runtime.Runtime, routers: str | Path | None = None, base_dtype: str | None = None,
              adapter: str | Path | None = None, shard: bool = False) -> Transformer:
    """As `load_model`, on the device of a runtime and in its dtype.

    base_dtype int8: matrices, embedding and head are held in int8 with a scale per row (recipe/int8.py). adapter:
    folder of the LoRA around its projections. shard: its blocks are shared out over the ranks (recipe/shard.py).
    """
    if base_dtype not in (None, "int8"):
        raise ValueError(f"base_dtype is {base_dtype!r}; expected 'int8', or None for weights in the model's own dtype")
    if shard and rt.world_size == 1:
        runtime.print0("--shard on one process holds the whole base: run it under torchrun --nproc_per_node=N")
    if shared(shard, rt):
        model = load_shared(folder, rt, routers)
    else:
        read = read_int8 if base_dtype else None
        model = load_model(folder, routers, device=rt.device, dtype=rt.dtype, read=read)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def save_base(model: Transformer, source: str | Path, out: str | Path, parent: str | None = None) -> None:
    """Write a model's weights, without routers, as the folder `out`, beside the small files of its `source`: what
    merged LoRA, fixed routes and full tuning make.

    parent: fingerprint of the base whose routers stay valid for this one. config.json comes last: a folder that was
    only begun is no checkpoint.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the base itself, expected another folder: change it")
    (out / "config.json").unlink(missing_ok=True)
    left_out = {"config.json", "model.safetensors.index.json"}
    if model.config != load_config(source):
        left_out.add("hf_config.json")  # it tells of another model
    for path in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
        if path.is_file() and KINDS & set(path.suffixes) and path.name not in left_out:
            copy = out / path.relative_to(source)
            runtime.write_atomic(copy, lambda part, path=path: shutil.copyfile(path, part))
    with torch.device("meta"):
        names = Transformer(model.config).state_dict().keys()
    held = model.state_dict()
    tensors = {name: held[name].detach().cpu().contiguous() for name in names}
    runtime.write_atomic(out / "model.safetensors", lambda part: save_file(tensors, part))
    config = asdict(model.config) | ({} if parent is None else {"parent": parent})
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    runtime.write_atomic(out / "config.json", lambda part: part.write_text(text, encoding="utf-8"))
