"""Shared by the tests of optimizers."""

from tests.ops.conftest import poisoned

__all__ = ["poisoned"]
