"""A changed model as a checkpoint folder of its own: what merged LoRA, fixed routes and full tuning write."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

import runtime
from model import Transformer, load_config

KINDS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}  # suffixes of tokenizer files and settings


def save_base(model: Transformer, source: str | Path, out: str | Path, parent: str | None = None) -> None:
    """Write a model's weights, without routers, as the folder `out`, beside the small files of its `source`.

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
