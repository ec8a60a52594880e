"""Public function of the feed-forward of routed experts."""

import math
from typing import Literal

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.experts import reference

ROUTED_EXPERTS = Op(
    "routed_experts",
    [
        Backend("triton", "fusedlm.ops.experts.triton:routed_experts", needs_triton),
        Backend("reference", reference.routed_experts, fused=False),
    ],
)
ROWS = {"swiglu": 2, "relu2": 1}  # rows of w_up per hidden element


def routed_experts(
    x_ND,
    w_up_EHD,
    w_down_EDH,
    indices_NK,
    weights_NK,
    *,
    activation: Literal["swiglu", "relu2"] = "swiglu",
    slope: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """The sum over the k experts of each token of weight * expert(x) (arXiv 1701.06538), without dropped tokens.

    Args:
        x_ND: (N, D) of any float dtype, in which the matrix products are computed. Autocast does not apply: cast x.
        w_up_EHD, w_down_EDH: (E, 2 H, D), the rows of the gate first, for swiglu, (E, H, D) for relu2; and (E, D, H).
            Cast to the dtype of x; their gradients have their own dtype, and are zero for experts without tokens.
        indices_NK: (N, k) int64 in [0, E): the experts of each token, all different.
        weights_NK: (N, k) of any float dtype, usually float32: the factors of their outputs.
        activation: swiglu: silu(gate) * up (arXiv 2002.05202); relu2: leaky_relu(up, slope)^2 (arXiv 2109.08668).
            Computed in float32 or better.
        slope: of the leaky ReLU below zero.
        backend: auto, triton or reference, which on a GPU waits for the device.

    Returns:
        (N, D), the dtype of x; summed in float32 or better.

    Raises:
        ValueError: shapes, dtypes, the activation or the slope do not fit, or the backend cannot run this call.
    """
    if activation not in ROWS:
        raise ValueError(f"activation={activation!r} is unknown; one of {', '.join(ROWS)}")
    shapes = f"x {tuple(x_ND.shape)}, w_up {tuple(w_up_EHD.shape)} and w_down {tuple(w_down_EDH.shape)}"
    expected = f"(N, D), (E, {'2 H' if activation == 'swiglu' else 'H'}, D) and (E, D, H)"
    if x_ND.ndim != 2 or w_up_EHD.ndim != 3 or w_down_EDH.ndim != 3:
        raise ValueError(f"{shapes} must be {expected}")
    n_experts, dim, hidden = w_down_EDH.shape
    if n_experts < 1 or x_ND.shape[1] != dim or w_up_EHD.shape != (n_experts, ROWS[activation] * hidden, dim):
        raise ValueError(f"{shapes} must be {expected}")
    check_slots(x_ND, indices_NK, weights_NK, n_experts)
    if not -math.inf < slope < math.inf:  # isfinite does not compile for a symbolic slope
        raise ValueError(f"slope={slope} must be finite")
    run = resolve("routed_experts", backend, x_ND)
    return run(x_ND, w_up_EHD, w_down_EDH, indices_NK, weights_NK, activation, float(slope))


def check_slots(x_ND: torch.Tensor, indices_NK: torch.Tensor, weights_NK: torch.Tensor, n_experts: int) -> None:
    """Raises ValueError unless indices and weights are those of the tokens x."""
    slots = f"indices {tuple(indices_NK.shape)} {indices_NK.dtype}, weights {tuple(weights_NK.shape)}"
    slots = f"{slots} {weights_NK.dtype}"
    if indices_NK.ndim != 2 or indices_NK.shape[0] != x_ND.shape[0] or weights_NK.shape != indices_NK.shape:
        raise ValueError(f"{slots} must be (N, k) with N={x_ND.shape[0]}")
    if not 1 <= indices_NK.shape[1] <= n_experts:
        raise ValueError(f"{slots} must be (N, k) with k from 1 to {n_experts}, the number of experts")
    if indices_NK.dtype != torch.int64 or not weights_NK.is_floating_point():
        raise ValueError(f"{slots} must be int64 and of a float dtype")
