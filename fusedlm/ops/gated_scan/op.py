"""The entry to the gated scan."""

import torch

from fusedlm.ops.common import Implementation, Op
from fusedlm.ops.gated_scan import reference

GATED_SCAN = Op(
    "gated_scan",
    [Implementation("reference", reference.gated_scan, lambda setting, **shape: None)],
)


def gated_scan(
    gate_BTC, input_BTC, *, state_BC=None, reset_BT=None, implementation=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = (1 - g_t) h_{t-1} + u_t, the gate independent of h (arXiv 1709.04057).

    Args:
        gate_BTC: (B, T, C), g_t in [0, 1].
        input_BTC: (B, T, C), u_t.
        state_BC: (B, C) float32 before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is emptied; None: none.
        implementation: what `GATED_SCAN.choose(...).function` gave; None: the reference.

    Returns:
        (B, T, C) of all h_t and (B, C) of the last, float32 (float64 for float64 inputs).
    """
    implementation = implementation or reference.gated_scan
    return implementation(gate_BTC, input_BTC, state_BC, reset_BT)
