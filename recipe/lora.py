"""LoRA: small changes of a frozen base's projections, trained alone or beside routers.

    y = W x + (alpha / rank) B A x        A (rank, inputs) is drawn, B (outputs, rank) is zero: at birth nothing changes

A change is kept in fp32 and stands around its linear layer, whatever that stores. Source: arXiv 2106.09685.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Block, Experts, Transformer
from recipe.int8 import plain_weight
from router import routers_of

# peft's name of a projection -> where it stands in a Block. Both keep q and k half-split, so rows need no permutation
PROJECTIONS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
TARGETS = tuple(name.split(".")[1] for name in PROJECTIONS)


@dataclass(frozen=True)
class LoRAConfig:
    """Sizes of all changes of a model."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if not 1 <= self.rank or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA has rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}; expected a "
                             "rank of 1 or more, alpha above 0, dropout from 0 to below 1")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"LoRA targets are {', '.join(self.targets) or 'none'}; expected some of "
                             f"{', '.join(TARGETS)}")


class LoRA(nn.Module):
    """A linear layer and its change; a Block calls it in the layer's place."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, device):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.out_features = base.out_features
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device), requires_grad=False)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft draws it

    @property
    def stored(self) -> torch.dtype:
        """What the base's weight is kept in."""
        return self.base.stored

    @property
    def weight(self) -> Tensor:
        """What it multiplies by (O,I), in fp32."""
        return plain_weight(self.base) + self.scale * self.lora_B.float() @ self.lora_A.float()

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (...,I) -> (...,rank)
        return self.base(x) + F.linear(low, self.scale * self.lora_B.to(x.dtype))


def projections(model: Transformer) -> Iterator[tuple[str, Block, str]]:
    """Of every projection: peft's name of it in a whole model, its block, and where it stands there.

    Experts have none: transformers stores them fused, where peft has no name for one.
    """
    for layer, block in enumerate(model.layers):
        for name, place in PROJECTIONS.items():
            if not (isinstance(block.feed_forward, Experts) and place.startswith("feed_forward")):
                yield f"base_model.model.model.layers.{layer}.{name}", block, place


def changes(model: Transformer) -> dict[str, LoRA]:
    """All changes of a model, by peft's name of the projection."""
    found = {name: block.get_submodule(place) for name, block, place in projections(model)}
    return {name: part for name, part in found.items() if isinstance(part, LoRA)}


def put_lora(model: Transformer, block: Block, place: str, rank: int, scale: float, dropout: float) -> LoRA:
    """Put a fresh change around the linear layer at this place of a block."""
    lora = LoRA(block.get_submodule(place), rank, scale, dropout, model.tok_embeddings.weight.device).eval()
    block.set_submodule(place, lora)
    return lora


def add_lora(model: Transformer, config: LoRAConfig) -> None:
    """Put a fresh change around each target projection of every layer; experts stay as they are."""
    for name, block, place in projections(model):
        if name.rpartition(".")[2] in config.targets:
            put_lora(model, block, place, config.rank, config.alpha / config.rank, config.dropout)
    if not changes(model):
        raise ValueError(f"none of {', '.join(config.targets)} is in this model, whose feed-forwards are mixtures of "
                         "experts; expected some of its attention: change --lora_targets")


def let_train(model: Transformer, what: str) -> None:
    """Let routers, lora, routers+lora or full (everything) require gradients, and nothing else."""
    model.requires_grad_(what == "full")
    for router in routers_of(model):
        router.requires_grad_(what != "lora")
    if "lora" in what:
        for lora in changes(model).values():
            lora.lora_A.requires_grad_(True)
            lora.lora_B.requires_grad_(True)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """All parameters that require gradients, by name: what an optimizer and a checkpoint see."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Add every change to the weight that it stands around, and take it away: the same function without LoRA."""
    held = changes(model)
    for name, block, place in projections(model):
        if name in held:
            lora = held[name]
            weight = lora.base.weight
            if not weight.is_floating_point():
                raise ValueError(f"{name} changes a weight in {str(weight.dtype).removeprefix('torch.')}; expected "
                                 "floating-point ones to merge into: load the base without --base_dtype")
            lora.base.weight = nn.Parameter(lora.weight.to(weight.dtype), requires_grad=False)
            block.set_submodule(place, lora.base)
