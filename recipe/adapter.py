"""Adapter folders: the changes of recipe/lora.py in peft's file format, ours and peft's alike.

adapter_model.safetensors holds lora_A and lora_B of each projection, adapter_config.json what scales them. peft loads
what `save_adapter` writes and `load_adapter` what peft writes; our own files also name the base that they change.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import runtime
from model import Transformer
from recipe.lora import TARGETS, changes, projections, put_lora
from router import RouterMeta, check_fingerprint

# Settings of peft's that change the function, or the base itself: what each must be, or else be empty
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}
EMPTY = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "velora_config", "monteclora_config", "target_parameters"),
)
PARTS = ("lora_A", "lora_B")


def save_adapter(model: Transformer, folder: str | Path, base: str) -> None:
    """Write all changes of a model as peft does, with the fingerprint of their base beside. base: name or folder."""
    folder, held = Path(folder), changes(model)
    layers = sorted({int(name.split(".")[4]) for name in held})
    first = next(iter(held.values()))
    rank = len(first.lora_A)
    tensors = {f"{name}.{part}.weight": getattr(lora, part).detach().cpu().contiguous()
               for name, lora in held.items() for part in PARTS}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name in held}),
        "layers_to_transform": None if len(layers) == len(model.layers) else layers,
        "bias": "none",
        "inference_mode": True,
    }
    data = save(tensors, metadata={"format": "pt", "base_fingerprint": model.fingerprint or ""})
    runtime.write_atomic(folder / "adapter_model.safetensors", lambda path: path.write_bytes(data))
    runtime.write_json(folder / "adapter_config.json", settings)


def lacks_adapter(model: Transformer, meta: RouterMeta) -> bool:
    """Whether routers were tuned on changes that this model has neither around its projections nor merged."""
    on_changes = "lora" in str(meta.config.get("train")) or meta.config.get("adapter") is not None
    return on_changes and not changes(model) and meta.base_fingerprint == model.fingerprint


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor], str]:
    """Settings, tensors and the base's fingerprint ("" in peft's own files). Raises ValueError for what LoRA is not."""
    path = folder / "adapter_model.safetensors"
    for name in ("adapter_config.json", path.name):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; expected an adapter that train.py --train=lora or peft "
                                    "wrote: check --adapter")
    settings = runtime.read_json(folder / "adapter_config.json")
    if not isinstance(settings, dict) or type(settings.get("r")) is not int or settings["r"] < 1:
        raise ValueError(f"{folder / 'adapter_config.json'} gives no rank r; expected the settings of a LoRA: copy the "
                         "adapter again")
    wrong = [name for name in EMPTY if settings.get(name)]
    wrong += [name for name, values in PLAIN.items() if settings.get(name, values[0]) not in values]
    if wrong:
        found = ", ".join(f"{name} {settings[name]!r:.60}" for name in wrong)
        raise ValueError(f"{folder / 'adapter_config.json'} has {found}; expected a plain LoRA: merge it with peft")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return settings, tensors, (file.metadata() or {}).get("base_fingerprint", "")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); it is truncated or something else: copy the adapter "
                         "again") from None


@torch.no_grad()
def load_adapter(model: Transformer, folder: str | Path) -> None:
    """Put the changes of a folder, ours or peft's, around a loaded base's projections, frozen.

    Raises ValueError for a change that does not fit, one around what is no projection, or another base.
    """
    folder = Path(folder)
    settings, tensors, base = read_adapter(folder)
    if base:  # the parent of a merged base does not count: its changes are merged already
        check_fingerprint(folder, base, model.fingerprint, model.exact_fingerprint)
    rank, alpha = settings["r"], settings.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    digest = hashlib.sha256(json.dumps([base, scale]).encode())
    for name, block, place in projections(model):
        pair = {part: tensors.pop(f"{name}.{part}.weight", None) for part in PARTS}
        if all(tensor is None for tensor in pair.values()):
            continue
        lora = put_lora(model, block, place, rank, scale, settings.get("lora_dropout", 0.0))
        for part, tensor in pair.items():
            own = getattr(lora, part)
            if tensor is None or tensor.shape != own.shape or not torch.isfinite(tensor).all():
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}, or not only finite numbers"
                raise ValueError(f"{folder}: {name}.{part} has {found}; expected {tuple(own.shape)}: load the base "
                                 "that it was trained on, or copy the adapter again")
            own.copy_(tensor)
            digest.update(own.cpu().numpy().tobytes())
    if tensors or not changes(model):
        raise ValueError(f"{folder} holds {next(iter(tensors), 'no change')}; expected changes of "
                         f"{', '.join(TARGETS)} in {len(model.layers)} layers: load the base that it was trained on")
    if model.exact_fingerprint:  # what is stored of this model's activations is this model's alone
        digest.update(model.exact_fingerprint.encode())
        model.exact_fingerprint = digest.hexdigest()[:32]
