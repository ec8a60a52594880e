"""Public function of the gated scan."""

import torch

from fusedlm.ops.common import Backend, Op, resolve
from fusedlm.ops.scan import reference

GATED_SCAN = Op("gated_scan", [Backend("reference", reference.gated_scan, fused=False)])


def gated_scan(
    gate_BTC, input_BTC, *, state_BC=None, reset_BT=None, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (1 - g_t) h_{t-1} + u_t, the gate independent of h (arXiv 1709.04057).

    Args:
        gate_BTC: (B, T, C), g_t in [0, 1].
        input_BTC: (B, T, C), u_t.
        state_BC: (B, C) float32 before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        backend: auto or reference.

    Returns:
        (B, T, C), all h_t, and (B, C), the last one; float32 (float64 for float64 inputs).
    """
    run = resolve("gated_scan", backend, input_BTC)
    return run(gate_BTC, input_BTC, state_BC, reset_BT)
