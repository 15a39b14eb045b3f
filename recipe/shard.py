"""A base larger than one device: every rank holds a share of each block, and gathers a block when it runs (FSDP2).

The embedding, the head and the norms around them stay whole on every rank, as do routers and LoRA. A block that one
rank runs must run on all of them, as often and in the same order: what is measured or scored therefore runs over all
examples on every rank (`everything`), and only tuning steps, whose batches are alike in number, are shared out.
"""

from dataclasses import replace

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from model import Transformer, load_model, open_checkpoint, unpack_weights
from runtime import Runtime, sum_over_ranks


def load_shared(folder: str, rt: Runtime, routers: str | None = None) -> Transformer:
    """As load_model, with blocks that are shared out over the ranks.

    Weights are mapped from their files, then converted and cut block by block: no rank ever holds them all.
    """
    model = load_model(folder, routers=routers)
    unpack_weights(model)  # a copy would be another whole weight, and of one that is gone after its block
    small = {parameter for router in model.routers() for parameter in router.parameters()}
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    for block in model.layers:
        for parameter in block.parameters():
            if parameter not in small:
                parameter.data = parameter.data.to(rt.device, rt.dtype)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=small)
        for method in ("eager", "read"):
            register_fsdp_forward_method(block, method)
    for name, tensor in open_checkpoint(folder).items():
        if not name.startswith("layers."):  # mapped anew, so that nothing holds the pages that blocks were cut from
            model.get_parameter(name).data = tensor.to(rt.device, rt.dtype)
    model.rope.to(rt.device)
    for router in model.routers():
        router.to(rt.device)
    return model


def shared(wanted: bool, rt: Runtime) -> bool:
    """Whether blocks are shared out: on one process there is nobody to share with."""
    return wanted and rt.world_size > 1


def everything(rt: Runtime) -> Runtime:
    """The runtime of passes in which every rank runs all examples, and measures what the master would measure alone."""
    return replace(rt, rank=0, world_size=1, is_master=True)


def even(groups: list[list], n: int) -> list[list]:
    """Groups, cut further until their number is a multiple of n, as that of their members is: each rank has as many."""
    groups = list(groups)
    while len(groups) % n:
        longest = max(range(len(groups)), key=lambda number: len(groups[number]))
        group = groups[longest]
        groups[longest : longest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


def average(gradients: list[Tensor], rt: Runtime) -> None:
    """Replace each rank's gradients by the mean over ranks, as DistributedDataParallel does."""
    for gradient in gradients:
        sum_over_ranks(gradient, rt).div_(rt.world_size)
