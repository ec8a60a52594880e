"""Tensors that processes hold in shards (DTensors): this process's part, where it is, and back.

Plain tensors pass through unchanged, so that callers need not tell the two apart.
"""

from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, in the memory of the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Full values as a tensor on the device of `like`, and sharded as it is. Nothing is communicated: every process
    gives the same values. Those of another shape that begins with the sharded dimension, such as one element per row,
    are sharded as rows are; scalars are not."""
    values = values.to(like.device)
    if not isinstance(like, DTensor) or values.dim() == 0:
        return values
    placed = distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
    # A part of its own memory: a view would keep the full tensor alive.
    return from_local(placed._local_tensor.clone(), like, values.shape)


def from_local(part: torch.Tensor, like: DTensor, shape: tuple[int, ...]) -> DTensor:
    """The tensor of that shape, sharded as `like` is, of which each process gives its part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def zeros_by_rows(like: torch.Tensor, n_dims: int) -> torch.Tensor:
    """Zeros with the first dimensions of `like`, sharded as it is by one of them."""
    part = local(like)
    zeros = part.new_zeros(part.shape[:n_dims])
    return from_local(zeros, like, like.shape[:n_dims]) if isinstance(like, DTensor) else zeros


@dataclass(frozen=True)
class Position:
    """Which part of a sharded tensor this process has.

    Attributes:
        starts: where it begins, along each dimension.
        is_first: whether it is the first of the parts.
        copy, copies: index among the processes that have the same part, and their number.
    """

    starts: tuple[int, ...]
    is_first: bool
    copy: int
    copies: int


def position(tensor: DTensor) -> Position:
    """The part of this process, for tensors of which no dimension is sharded twice. Nothing is communicated."""
    mesh, at = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    starts, is_first, copy, copies = [0] * tensor.dim(), True, 0, 1
    for index, placement in enumerate(tensor.placements):
        if placement.is_shard():
            dim, size = placement.dim, tensor.shape[placement.dim]
            # As torch.chunk cuts: the last shards may be smaller, or empty.
            starts[dim] = min(at[index] * -(-size // mesh.size(index)), size)
            is_first &= at[index] == 0
        else:
            copy, copies = copy * mesh.size(index) + at[index], copies * mesh.size(index)
    return Position(tuple(starts), is_first, copy, copies)


def forget_gathered(model: torch.nn.Module) -> None:
    """Free gathered parameters of a model that FSDP has sharded, which evaluation leaves behind: the next pass gathers
    them anew, from shards that may have changed, and `named_parameters` names the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_group(tensor: DTensor) -> tuple[torch.distributed.ProcessGroup | None, int]:
    """The processes that hold the other shards, None if there are none; and the sharded dimension."""
    for index, placement in enumerate(tensor.placements):
        if placement.is_shard():
            return _group(tensor, index), placement.dim
    return None, 0


def held_range(tensor: DTensor) -> range:
    """The indices along the first dimension that the processes of the shards hold together: those of some experts
    where experts are divided over a further dimension of the mesh, the last one; else all."""
    n, mesh = tensor.shape[0], tensor.device_mesh
    last = mesh.ndim - 1
    if last < 2 or not tensor.placements[last].is_shard(0):
        return range(n)
    size = n // mesh.size(last)
    first = mesh.get_local_rank(last) * size
    return range(first, first + size)


def replica_group(tensor: DTensor) -> torch.distributed.ProcessGroup | None:
    """The processes that hold the same shard; None if there are no others."""
    for index, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            return _group(tensor, index)
    return None


def _group(tensor: DTensor, index: int) -> torch.distributed.ProcessGroup | None:
    mesh = tensor.device_mesh
    return mesh.get_group(index) if mesh.size(index) > 1 else None
