"""What every op shares: how an implementation is chosen."""

from fusedlm.ops.common.dispatch import OPS, Choice, Implementation, Op, Setting, needs_triton

__all__ = ["OPS", "Choice", "Implementation", "Op", "Setting", "needs_triton"]
