"""What ops share: backend selection, and helpers of kernels."""

from fusedlm.ops.common.dispatch import (
    AUTO,
    OPS,
    Backend,
    BackendSelection,
    Call,
    Op,
    check_backends,
    explain,
    needs_hopper_matmul,
    needs_triton,
    resolve,
    runs_fused,
)

__all__ = [
    "AUTO",
    "OPS",
    "Backend",
    "BackendSelection",
    "Call",
    "Op",
    "check_backends",
    "explain",
    "needs_hopper_matmul",
    "needs_triton",
    "resolve",
    "runs_fused",
]
