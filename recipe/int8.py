"""A frozen base in int8, a byte a weight: per row symmetric, the largest absolute value at 127.

Int8Linear and Int8Embedding stand in for those of model.py. Products are in the dtype that the model computes in; a
checkpoint is rounded weight by weight, so that no more than one of them is there in another dtype.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from model import Embedding, Linear, Transformer, checkpoint_files, fused_linear

BLOCK = 2**18  # weights turned back at once on the CPU, 1 MiB in fp32; elsewhere 64 times that


def quantise(weight: Tensor, what: str = "the weight", most: int = 127) -> tuple[Tensor, Tensor]:
    """A weight (O,I) as int8 and its scale (O,) fp32: no element is off by more than scale / 2 = row's maximum / 254.

    most: the largest value that is used, 7 for 4 bits. Raises ValueError for a row that holds NaN or infinity; `what`
    names the weight.
    """
    table = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = rows_at_once(weight)
    wide = torch.empty(min(rows, len(weight)), weight.shape[1], device=weight.device)  # one for all: heaps fragment
    for part, rounded, own in zip(weight.split(rows), table.split(rows), scale.split(rows)):
        whole = wide[: len(part)]
        torch.amax(whole.copy_(part).abs_(), dim=1, out=own)
        own.div_(most).clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has one too
        rounded.copy_(whole.copy_(part).div_(own[:, None]).round_())
    if not torch.isfinite(scale).all():
        row = (~torch.isfinite(scale)).nonzero()[0].item()
        raise ValueError(f"{what}, row {row}, holds NaN or infinity; expected finite numbers for int8: convert the "
                         "model again, or load it without base_dtype")
    return table, scale


def plain_weight(module: nn.Module) -> Tensor:
    """The weight (O,I) of a projection in fp32, whatever it is held in."""
    weight = module.weight
    weight = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).float()  # one that is shared out
    return weight * module.scale[:, None] if isinstance(module, Int8) else weight


def rows_at_once(weight: Tensor) -> int:
    """How many rows (at least 1) are in floating point at once."""
    return max(1, BLOCK * (1 if weight.device.type == "cpu" else 64) // weight.shape[1])


class Int8Product(torch.autograd.Function):
    """x (...,I) with a weight (O,I) in int8 and its scale (O,). What is kept for the backward pass is no copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(rows) <= 8 and width % 64 == 0:
            y = torch._weight_int8pack_mm(rows.contiguous(), weight, torch.ones_like(scale, dtype=x.dtype))
            return y.mul_(scale).view(*x.shape[:-1], len(weight))
        parts = zip(weight.split(rows_at_once(weight)), scale.split(rows_at_once(weight)))
        if x.dtype == torch.float16:  # a sum of unscaled ones can be beyond it
            y = [F.linear(x, part.to(x.dtype).mul_(own[:, None])) for part, own in parts]
        else:
            y = [F.linear(x, part.to(x.dtype)).mul_(own) for part, own in parts]
        return y[0] if len(y) == 1 else torch.cat(y, dim=-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        rows, total = rows_at_once(weight), grad.new_zeros(*grad.shape[:-1], weight.shape[1])
        for part, own, above in zip(weight.split(rows), scale.split(rows), grad.split(rows, dim=-1)):
            total += (above * own).to(grad.dtype) @ part.to(grad.dtype)
        return total, None, None


class Int8(nn.Module):
    """The weight (O,I) of a module in int8, with a scale (O,)."""

    stored = torch.int8

    def __init__(self, plain: nn.Module):
        super().__init__()
        weight = torch.empty_like(plain.weight, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", weight.new_empty(len(weight), dtype=torch.float32))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (...,I) -> (...,O)"""
        if torch.compiler.is_compiling():  # turned back where it is used, by the compiler
            return fused_linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None], bias)
        y = Int8Product.apply(x, self.weight, self.scale)
        return y if bias is None else y + bias


class Int8Linear(Int8):
    def __init__(self, plain: Linear):
        super().__init__(plain)
        self.out_features, self.in_features = plain.weight.shape
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class Int8Embedding(Int8):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight) * self.scale[tokens][..., None]

    def logits(self, h: Tensor) -> Tensor:
        return self.product(h)


def rounded(model: Transformer, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype):
    """Put stand-ins into a model on the meta device; returns what fills it, of its `tensors`, each rounded as it comes.

    Embedding, head and every product of the layers are held in int8; norms, biases and gates of experts in dtype.
    """
    kinds = {Linear: Int8Linear, Embedding: Int8Embedding}
    plain = {f"{name}.weight": module for name, module in model.named_modules() if type(module) in kinds}
    for name, module in plain.items():
        model.set_submodule(name.removesuffix(".weight"), kinds[type(module)](module))

    def fillings() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if name in plain:
                tensor, scale = quantise(tensor, name)
                yield name.removesuffix("weight") + "scale", scale
            yield name, tensor if name in plain else tensor.to(dtype, copy=True)

    return fillings()


def read_int8(model: Transformer, folder: str | Path, device, dtype: torch.dtype):
    """What fills a model on the meta device from a checkpoint, for `load_model`.

    Each tensor comes from a mapping of its own, so that only what is kept of it stays in memory.
    """

    def stored() -> Iterator[tuple[str, Tensor]]:
        for path in checkpoint_files(folder):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
            for name in names:
                with safe_open(path, framework="pt") as file:  # closed before anything is made of it: heaps fragment
                    tensor = file.get_tensor(name)
                yield name, tensor.to(device)

    return rounded(model, stored(), dtype)
