"""Public function of the SwiGLU feed-forward."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.swiglu import reference

SWIGLU_MLP = Op(
    "swiglu_mlp",
    [
        Backend("triton", "fusedlm.ops.swiglu.triton:swiglu_mlp", needs_triton),
        Backend("reference", reference.swiglu_mlp, fused=False),
    ],
)


def swiglu_mlp(x_ND, w_gate_up_2HD, w_down_DH, *, backend: str = "auto") -> torch.Tensor:
    """(silu(x w_gate^T) * (x w_up^T)) w_down^T (arXiv 2002.05202, eq. 6).

    Args:
        x_ND: (N, D) of any float dtype, in which the matrix products are computed. Autocast does not apply: cast x.
        w_gate_up_2HD, w_down_DH: (2 H, D), the rows of w_gate first, and (D, H), cast to the dtype of x; their
            gradients have their own dtype.
        backend: auto, triton or reference.

    Returns:
        (N, D), the dtype of x; the activation is computed in float32 or better.

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    shapes = f"x {tuple(x_ND.shape)}, w_gate_up {tuple(w_gate_up_2HD.shape)} and w_down {tuple(w_down_DH.shape)}"
    if x_ND.ndim != 2 or w_gate_up_2HD.ndim != 2 or x_ND.shape[1] != w_gate_up_2HD.shape[1]:
        raise ValueError(f"{shapes} must be (N, D), (2 H, D) and (D, H)")
    if w_down_DH.ndim != 2 or (2 * w_down_DH.shape[1], w_down_DH.shape[0]) != w_gate_up_2HD.shape:
        raise ValueError(f"{shapes} must be (N, D), (2 H, D) and (D, H)")
    return resolve("swiglu_mlp", backend, x_ND)(x_ND, w_gate_up_2HD, w_down_DH)
