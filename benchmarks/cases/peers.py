"""Kernels of other libraries, where they are installed."""

import importlib
from collections.abc import Callable


def peer(module: str, make: Callable, *, waits_for_device: bool = False) -> Callable | None:
    """make(module), or None where it cannot be imported. waits_for_device: it cannot be captured in a CUDA graph."""
    try:
        contender = make(importlib.import_module(module))
    except ImportError:
        return None
    contender.waits_for_device = waits_for_device
    return contender


def available(**contenders: Callable | None) -> dict[str, Callable]:
    """The contenders that are not None, by names with spaces for underscores."""
    return {name.replace("_", " "): function for name, function in contenders.items() if function is not None}
