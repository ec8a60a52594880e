"""Public function of RMSNorm fused with the projection that follows it."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.norm_linear import reference


def unaligned(dtype: torch.dtype, in_features: int, out_features: int) -> str | None:
    """Why the tensor memory accelerator (TMA) cannot load rows of this many elements, or None."""
    for features in (in_features, out_features):
        if features * dtype.itemsize % 16:
            return f"needs rows of a multiple of 16 bytes, not {features} elements of {dtype.itemsize} bytes"
    return None


def _needs_tma(call: Call, *, in_features: int, out_features: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if call.capability < (9, 0):
        return f"needs compute capability 9.0, this is {'.'.join(map(str, call.capability))}"
    return unaligned(call.dtype, in_features, out_features)


RMSNORM_LINEAR = Op(
    "rmsnorm_linear",
    [
        Backend("packed", "fusedlm.ops.norm_linear.triton:packed_rmsnorm_linear", needs_triton),
        Backend("triton", "fusedlm.ops.norm_linear.triton:rmsnorm_linear", _needs_tma),
        Backend("reference", reference.rmsnorm_linear, fused=False),
    ],
    in_features=1024,
    out_features=1024,
)


def rmsnorm_linear(
    x_ND, gamma_D, weight_ED, *, eps: float = 1e-6, dtype: torch.dtype | None = None, backend: str = "auto"
) -> torch.Tensor:
    """(x / sqrt(mean(x^2) + eps) * gamma) weight^T: RMSNorm (arXiv 1910.07467) and a projection without bias.

    Several projections of one norm are concatenated into one weight. x and the weights are saved for backward; the
    normalised x is recomputed.

    Args:
        x_ND: (N, D) or (..., D) of any float dtype; the norm is computed in float32 or better.
        gamma_D: (D,) gain of the norm; its gradient has its own dtype.
        weight_ED: (E, D), cast to the dtype of the product; its gradient has its own dtype.
        eps: of the norm.
        dtype: of the product and the output; None: that of x.
        backend: auto, packed, triton or reference.

    Returns:
        (N, E) or (..., E).

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    width = x_ND.shape[-1] if x_ND.ndim >= 2 else 0
    if width == 0 or gamma_D.shape != (width,) or weight_ED.ndim != 2 or weight_ED.shape[1] != width:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, gamma {tuple(gamma_D.shape)} and weight {tuple(weight_ED.shape)} must be "
            "(N, D), (D,) and (E, D) with D at least 1"
        )
    run = resolve("rmsnorm_linear", backend, x_ND, dtype=dtype, in_features=width, out_features=weight_ED.shape[0])
    return run(x_ND, gamma_D, weight_ED, eps, dtype)
