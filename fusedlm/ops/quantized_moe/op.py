"""Public function of routed experts with weights in few bits."""

import math
from typing import Literal

import torch

from fusedlm.ops.common import Backend, Op, resolve
from fusedlm.ops.experts.op import ROWS, check_slots
from fusedlm.ops.quantized.op import needs_bfloat16
from fusedlm.ops.quantized.reference import QuantizedWeight
from fusedlm.ops.quantized_moe import reference

QUANTIZED_EXPERTS = Op(
    "quantized_experts",
    [
        Backend("triton", "fusedlm.ops.quantized_moe.triton:quantized_experts", needs_bfloat16),
        Backend("reference", reference.quantized_experts, fused=False),
    ],
)


def quantized_experts(
    x_ND: torch.Tensor,
    up: QuantizedWeight,
    down: QuantizedWeight,
    indices_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    *,
    activation: Literal["swiglu", "relu2"] = "swiglu",
    slope: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """As `routed_experts`, where both stacks of weights stay in few bits in memory.

    Args:
        x_ND: (N, D) of any float dtype, in which hidden activations are stored between the two products.
        up: the up-projections of all E experts one after the other: of E * 2 H rows, of each expert those of the gate
            first, for swiglu, or E * H for relu2, and D columns.
        down: of E * D rows and H columns. Its format may be another.
        indices_NK, weights_NK, activation, slope: as of `routed_experts`.
        backend: auto, triton or reference. The kernels of triton take up to 32 tokens, 32 experts per token and 256
            pairs of both in bfloat16 or float32, decode the weights in registers and have no backward pass. For more,
            and with gradients, all experts are decoded to memory in the dtype of x, and `routed_experts` runs.

    Returns:
        (N, D) in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, the activation or the slope do not fit, or the backend cannot run this call.
    """
    if activation not in ROWS:
        raise ValueError(f"activation={activation!r} is unknown; one of {', '.join(ROWS)}")
    n_up, n_down, hidden = len(up.codes), len(down.codes), down.width
    shapes = f"x {tuple(x_ND.shape)}, up {(n_up, up.width)} and down {(n_down, hidden)}"
    expected = f"(N, D), (E * {'2 H' if activation == 'swiglu' else 'H'}, D) and (E * D, H)"
    if x_ND.ndim != 2 or not x_ND.shape[1] or up.width != x_ND.shape[1] or n_down % x_ND.shape[1] or not n_down:
        raise ValueError(f"{shapes} must be {expected}")
    n_experts = n_down // x_ND.shape[1]
    if n_up != n_experts * ROWS[activation] * hidden:
        raise ValueError(f"{shapes} must be {expected}")
    check_slots(x_ND, indices_NK, weights_NK, n_experts)
    if not -math.inf < slope < math.inf:
        raise ValueError(f"slope={slope} must be finite")
    run = resolve("quantized_experts", backend, x_ND)
    return run(x_ND, up, down, indices_NK, weights_NK, activation, float(slope))
