"""The entry to the SwiGLU feed-forward."""

import torch

from fusedlm.ops.common import Implementation, Op, needs_triton
from fusedlm.ops.swiglu_mlp import reference

SWIGLU_MLP = Op(
    "swiglu_mlp",
    [
        Implementation(
            "triton", "fusedlm.ops.swiglu_mlp.triton:swiglu_mlp", lambda setting, **shape: needs_triton(setting)
        ),
        Implementation("reference", reference.swiglu_mlp, lambda setting, **shape: None),
    ],
)


def swiglu_mlp(x_ND, w_gate_up_2HD, w_down_DH, *, implementation=None) -> torch.Tensor:
    """(silu(x w_gate^T) * (x w_up^T)) w_down^T (arXiv 2002.05202, eq. 6).

    Args:
        x_ND: (N, D) of any float dtype, which is that of the products; under autocast to be given in its dtype.
        w_gate_up_2HD, w_down_DH: (2 H, D), w_gate above w_up, and (D, H), rounded to the dtype of x; their gradients
            have their own dtype.
        implementation: what `SWIGLU_MLP.choose(...).function` gave; None: the reference.

    Returns:
        (N, D), the dtype of x; the arithmetic between the products is float32 or better.

    Raises:
        ValueError: the shapes do not go together.
    """
    shapes = f"x {tuple(x_ND.shape)}, w_gate_up {tuple(w_gate_up_2HD.shape)} and w_down {tuple(w_down_DH.shape)}"
    if x_ND.ndim != 2 or w_gate_up_2HD.ndim != 2 or x_ND.shape[1] != w_gate_up_2HD.shape[1]:
        raise ValueError(f"{shapes} must be (N, D), (2 H, D) and (D, H)")
    if w_down_DH.ndim != 2 or (2 * w_down_DH.shape[1], w_down_DH.shape[0]) != w_gate_up_2HD.shape:
        raise ValueError(f"{shapes} must be (N, D), (2 H, D) and (D, H)")
    return (implementation or reference.swiglu_mlp)(x_ND, w_gate_up_2HD, w_down_DH)
