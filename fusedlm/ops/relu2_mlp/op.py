"""The entry to the squared leaky ReLU feed-forward."""

import math

import torch

from fusedlm.ops.common import Implementation, Op, Setting, needs_triton
from fusedlm.ops.relu2_mlp import reference


def _supports(setting: Setting, *, dim: int, hidden: int) -> str | None:
    if reason := needs_triton(setting):
        return reason
    if setting.dtype == torch.float32:
        return "needs bfloat16 or float16, whose products have tensor cores"
    if setting.capability[0] not in (9, 10):
        return f"tuned for compute capability 9 and 10, this is {'.'.join(map(str, setting.capability))}"
    if dim % 8 or hidden % 8:
        return f"needs widths that are multiples of 8, not {dim} and {hidden}"
    return None


RELU2_MLP = Op(
    "relu2_mlp",
    [
        Implementation("triton", "fusedlm.ops.relu2_mlp.triton:relu2_mlp", _supports),
        Implementation("reference", reference.relu2_mlp, lambda setting, **shape: None),
    ],
    dim=1024,
    hidden=4096,
)


def relu2_mlp(x_ND, w_up_HD, w_down_DH, *, slope: float = 0.0, implementation=None) -> torch.Tensor:
    """leaky_relu(x w_up^T, slope)^2 w_down^T (arXiv 2109.08668, where the slope is 0).

    Args:
        x_ND: (N, D) of any float dtype, which is that of the products; under autocast to be given in its dtype.
        w_up_HD, w_down_DH: (H, D) and (D, H), rounded to the dtype of x; their gradients have their own dtype.
        slope: of the leaky ReLU below zero; the arithmetic of the activation is float32 or better.
        implementation: what `RELU2_MLP.choose(...).function` gave; None: the reference.

    Returns:
        (N, D), the dtype of x.

    Raises:
        ValueError: the shapes do not go together, or the slope is not finite.
    """
    shapes = f"x {tuple(x_ND.shape)}, w_up {tuple(w_up_HD.shape)} and w_down {tuple(w_down_DH.shape)}"
    if x_ND.ndim != 2 or w_up_HD.ndim != 2 or x_ND.shape[1] != w_up_HD.shape[1]:
        raise ValueError(f"{shapes} must be (N, D), (H, D) and (D, H)")
    if w_down_DH.shape != w_up_HD.shape[::-1]:
        raise ValueError(f"{shapes} must be (N, D), (H, D) and (D, H)")
    if not math.isfinite(slope):
        raise ValueError(f"slope={slope} must be finite")
    return (implementation or reference.relu2_mlp)(x_ND, w_up_HD, w_down_DH, float(slope))
