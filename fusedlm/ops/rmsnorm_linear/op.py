"""The entry to RMSNorm and the projection behind it."""

import torch

from fusedlm.ops.common import Implementation, Op, Setting, needs_triton
from fusedlm.ops.rmsnorm_linear import reference


def unaligned(dtype: torch.dtype, in_features: int, out_features: int) -> str | None:
    """Why rows of this many numbers cannot go through the tensor memory accelerator, or None."""
    for features in (in_features, out_features):
        if features * dtype.itemsize % 16:
            return f"needs rows of a multiple of 16 bytes, not {features} numbers of {dtype.itemsize}"
    return None


def _needs_tma(setting: Setting, in_features: int = 16, out_features: int = 16) -> str | None:
    if reason := needs_triton(setting):
        return reason
    if setting.capability < (9, 0):
        return f"needs compute capability 9.0, this is {'.'.join(map(str, setting.capability))}"
    return unaligned(setting.dtype, in_features, out_features)


RMSNORM_LINEAR = Op(
    "rmsnorm_linear",
    [
        Implementation(
            "packed",
            "fusedlm.ops.rmsnorm_linear.triton:packed_rmsnorm_linear",
            lambda setting, **shape: needs_triton(setting),
        ),
        Implementation("triton", "fusedlm.ops.rmsnorm_linear.triton:rmsnorm_linear", _needs_tma),
        Implementation("reference", reference.rmsnorm_linear, lambda setting, **shape: None),
    ],
)


def rmsnorm_linear(x_ND, gamma_D, weight_ED, *, eps: float = 1e-6, dtype=None, implementation=None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gamma times weight^T: RMSNorm (arXiv 1910.07467) and a projection without bias.

    Several projections of one norm are one weight, row under row. The backward pass keeps x and the weights, and
    normalises again.

    Args:
        x_ND: (N, D) of any float dtype, or with more dimensions in front; the norm is computed in float32 or better.
        gamma_D: (D,) gain of the norm; its gradient has its own dtype.
        weight_ED: (E, D), rounded to the dtype of the product; its gradient has its own dtype.
        eps: of the norm.
        dtype: of the product and the output; None: that of x.
        implementation: what `RMSNORM_LINEAR.choose(...).function` gave; None: the reference.

    Returns:
        (N, E), or with the dimensions in front of x.

    Raises:
        ValueError: the shapes do not go together, or the implementation cannot take them.
    """
    width = x_ND.shape[-1] if x_ND.ndim >= 2 else 0
    if width == 0 or gamma_D.shape != (width,) or weight_ED.ndim != 2 or weight_ED.shape[1] != width:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, gamma {tuple(gamma_D.shape)} and weight {tuple(weight_ED.shape)} must be "
            "(N, D), (D,) and (E, D) with D at least 1"
        )
    implementation = implementation or reference.rmsnorm_linear
    return implementation(x_ND, gamma_D, weight_ED, eps, dtype)
