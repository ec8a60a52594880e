"""The processes of one run."""

from fusedlm.distributed.launch import processes
from fusedlm.distributed.tensors import Position, forget_gathered, from_local, local, position, shard_like
from fusedlm.distributed.world import OneProcessFailed, World

__all__ = [
    "OneProcessFailed",
    "Position",
    "World",
    "forget_gathered",
    "from_local",
    "local",
    "position",
    "processes",
    "shard_like",
]
