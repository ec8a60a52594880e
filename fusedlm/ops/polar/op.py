"""Public function that orthogonalises stacks of matrices."""

import torch

from fusedlm.ops.common import AUTO, Backend, Call, Op, needs_hopper_matmul, resolve
from fusedlm.ops.polar import reference
from fusedlm.ops.polar.schemes import scheme_of

_MIN_SIDE = 128  # of the shorter side, below which a product does not fill a tile


def _supports(call: Call, *, rows: int, columns: int) -> str | None:
    if reason := needs_hopper_matmul(call):
        return reason
    if min(rows, columns) < _MIN_SIDE:
        return f"needs a shorter side of at least {_MIN_SIDE}, not {min(rows, columns)}"
    return None


ORTHOGONALIZE = Op(
    "orthogonalize",
    [
        Backend("triton", "fusedlm.ops.polar.triton:orthogonalize", _supports),
        Backend("reference", reference.orthogonalize, fused=False),
    ],
    rows=1024,
    columns=1024,
)


def runs_kernel(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether "auto" is the kernel for matrices of this size, multiplied in this dtype."""
    return ORTHOGONALIZE.select(AUTO, Call(device, dtype), rows=rows, columns=columns).backend == "triton"


def orthogonalize(
    x: torch.Tensor, scheme: str = "polar_express", *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Approximately U V^T of each matrix U S V^T of a stack, by polynomials that bring its singular values near 1.

    Args:
        x: (..., M, N) of any float dtype, of finite values.
        scheme: "quintic" (Muon's five equal steps), "polar_express" (arXiv 2505.16932, five steps) or "turbo"
            (arXiv 2512.04632, four steps after a diagonal preconditioning).
        dtype: of the products, whose sums are float32 or better; None: that of x.
        backend: auto, triton or reference.

    Returns:
        (..., M, N), the dtype of x. Matrices of zeros stay zero. With quintic and polar_express the output of a matrix
        whose Frobenius norm is not far above 1e-7 and 1e-6 has smaller singular values, down to 0, which in float16 it
        reaches sooner; with turbo it is 0 up to a norm of 1e-15. No gradients.

    Raises:
        ValueError: x is no stack of matrices, the scheme is unknown, a dtype is not a float, or the backend cannot run
            this call.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} of {x.dtype} must be (..., M, N) of a float dtype")
    scheme_of(scheme)
    dtype = dtype or x.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be a float dtype, such as torch.bfloat16")
    run = resolve("orthogonalize", backend, x, dtype=dtype, rows=x.shape[-2], columns=x.shape[-1])
    if not x.numel():
        return torch.empty_like(x)
    with torch.no_grad():
        return run(x.detach(), scheme, dtype)
