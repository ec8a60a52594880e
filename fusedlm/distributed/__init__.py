"""The processes of one run."""

from fusedlm.distributed.launch import processes
from fusedlm.distributed.tensors import forget_gathered, from_local, gathered, local, shard_like
from fusedlm.distributed.world import OneProcessFailed, World

__all__ = ["OneProcessFailed", "World", "forget_gathered", "from_local", "gathered", "local", "processes", "shard_like"]
