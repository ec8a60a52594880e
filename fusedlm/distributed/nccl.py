"""How many multiprocessors NCCL takes from a GPU that computes at the same time."""

import os

_BLOCKS = 8  # one multiprocessor each; on an H100 they move about 200 GB/s by NVLink
_VARIABLE = "NCCL_MAX_CTAS"


def limit_blocks() -> None:
    """Before the group is initialised: limit NCCL's blocks, unless NCCL_MAX_CTAS does."""
    os.environ.setdefault(_VARIABLE, str(_BLOCKS))


def n_blocks() -> int:
    """At most."""
    return int(os.environ.get(_VARIABLE, _BLOCKS))
