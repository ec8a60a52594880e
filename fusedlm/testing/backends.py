"""Backends that a test adds."""

import contextlib
from collections.abc import Callable, Iterator

from fusedlm.ops.common import OPS, Backend
from fusedlm.ops.common.dispatch import forget


@contextlib.contextmanager
def backend_of(op: str, function: Callable, *, name: str = "test", fused: bool = True) -> Iterator[None]:
    """A context in which the op has one more backend, its first choice, which runs anywhere."""
    before = OPS[op].backends
    OPS[op].backends = {name: Backend(name, function, fused=fused)} | before
    forget()
    try:
        yield
    finally:
        OPS[op].backends = before
        forget()
