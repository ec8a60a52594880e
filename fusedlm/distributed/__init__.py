"""The processes of one run."""

from fusedlm.distributed.world import World

__all__ = ["World"]
