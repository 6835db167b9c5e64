"""A module in shards over the processes of a launch (FSDP), and its state as files have it: whole, on the CPU.

So a checkpoint does not say how it was trained, and one launch goes on where another stopped. Of what is not in shards
all of this is a no-op. torch's part takes most of a second to import and is imported where it is used: a finished
pipeline needs none of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from training.stage import is_main_process

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

StateT = TypeVar("StateT")


def shard(module: nn.Module, parts: Iterable[nn.Module], device: torch.device, *, reshard_after_forward: bool) -> None:
    """Leave each process its share of every parameter, in place; a part is gathered whenever it runs, and let go after.

    What is in no part is gathered for the whole of the module's forward pass. Gradients are means over the processes.
    An optimiser is to be made afterwards: the parameters are new ones.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """What is in no part of a module in shards is whole for as long as the context: to use it outside of `forward`."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(state: StateT) -> StateT:
    """A state dict without shards, for the first process, which writes; but every process is to call it."""
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    joined: StateT = tree_map_only(DTensor, _joined, state)
    return joined


def as_held(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor on the device, and in the shards, in which this process holds `own`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(own, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return value.to(own.device)


def _joined(value: "DTensor") -> Tensor:
    tensor: Tensor = value.full_tensor()
    return tensor.cpu() if is_main_process() else tensor.new_empty(0)
