"""Public function of the squared leaky ReLU feed-forward."""

import math

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_hopper_matmul, resolve
from fusedlm.ops.relu2 import reference


def _supports(call: Call, *, dim: int, hidden: int) -> str | None:
    if reason := needs_hopper_matmul(call):
        return reason
    if dim % 8 or hidden % 8:
        return f"needs dim and hidden that are multiples of 8, not {dim} and {hidden}"
    return None


RELU2_MLP = Op(
    "relu2_mlp",
    [
        Backend("triton", "fusedlm.ops.relu2.triton:relu2_mlp", _supports),
        Backend("reference", reference.relu2_mlp, fused=False),
    ],
    dim=1024,
    hidden=4096,
)


def relu2_mlp(x_ND, w_up_HD, w_down_DH, *, slope: float = 0.0, backend: str = "auto") -> torch.Tensor:
    """leaky_relu(x w_up^T, slope)^2 w_down^T (arXiv 2109.08668, where the slope is 0).

    Args:
        x_ND: (N, D) of any float dtype, in which the matrix products are computed. Autocast does not apply: cast x.
        w_up_HD, w_down_DH: (H, D) and (D, H), cast to the dtype of x; their gradients have their own dtype.
        slope: of the leaky ReLU below zero; the activation is computed in float32 or better.
        backend: auto, triton or reference.

    Returns:
        (N, D), the dtype of x.

    Raises:
        ValueError: the shapes do not match, the slope is not finite, or the backend cannot run this call.
    """
    shapes = f"x {tuple(x_ND.shape)}, w_up {tuple(w_up_HD.shape)} and w_down {tuple(w_down_DH.shape)}"
    if x_ND.ndim != 2 or w_up_HD.ndim != 2 or x_ND.shape[1] != w_up_HD.shape[1]:
        raise ValueError(f"{shapes} must be (N, D), (H, D) and (D, H)")
    if w_down_DH.shape != w_up_HD.shape[::-1]:
        raise ValueError(f"{shapes} must be (N, D), (H, D) and (D, H)")
    if not -math.inf < slope < math.inf:  # isfinite does not compile for a symbolic slope
        raise ValueError(f"slope={slope} must be finite")
    run = resolve("relu2_mlp", backend, x_ND, dim=x_ND.shape[1], hidden=w_up_HD.shape[0])
    return run(x_ND, w_up_HD, w_down_DH, float(slope))
