"""Which of the processes that torchrun has started speaks to the user. Does not import torch."""

import os


def is_main() -> bool:
    """Whether this is the process that prints results; without torchrun, yes."""
    return _first("RANK")


def is_first_here() -> bool:
    """Whether this is the first process on this machine, which prints errors that all have in common."""
    return _first("LOCAL_RANK")


def _first(variable: str) -> bool:
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get(variable, "0") == "0"
