"""Public function of the gated scan."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.common.states import check_in_place
from fusedlm.ops.scan import reference

GATED_SCAN = Op(
    "gated_scan",
    [
        Backend("triton", "fusedlm.ops.scan.triton:gated_scan", needs_triton),
        Backend("reference", reference.gated_scan, fused=False),
    ],
)


def gated_scan(
    gate_BTC, input_BTC, *, state_BC=None, reset_BT=None, in_place: bool = False, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (1 - g_t) h_{t-1} + u_t, the gate independent of h (arXiv 1709.04057).

    Args:
        gate_BTC: (B, T, C), g_t in [0, 1], T at least 1.
        input_BTC: (B, T, C), u_t.
        state_BC: (B, C) float32 before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        in_place: without gradients, write the last state into state_BC, which must be contiguous and of the returned
            state's dtype, and return it.
        backend: auto, triton or reference.

    Returns:
        (B, T, C), all h_t, and (B, C), the last one; float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not match, the backend cannot run this call, or in_place comes without such a state or
            with gradients.
    """
    shape = input_BTC.shape
    if len(shape) != 3 or gate_BTC.shape != shape or not shape[1]:
        raise ValueError(f"gate {tuple(gate_BTC.shape)} and input {tuple(shape)} must be (B, T, C), T at least 1")
    if state_BC is not None and state_BC.shape != (shape[0], shape[2]):
        raise ValueError(f"state {tuple(state_BC.shape)} must be {(shape[0], shape[2])}, (B, C)")
    if reset_BT is not None and (reset_BT.dtype != torch.bool or reset_BT.shape not in ((1, shape[1]), shape[:2])):
        raise ValueError(f"reset {tuple(reset_BT.shape)} of {reset_BT.dtype} must be bool and (B or 1, T)")
    run = resolve("gated_scan", backend, input_BTC)
    if in_place:
        check_in_place(state_BC, input_BTC)
        return run(gate_BTC, input_BTC, state_BC, reset_BT, in_place=True)
    return run(gate_BTC, input_BTC, state_BC, reset_BT)
