"""Public function of the gated delta rule."""

import torch

from fusedlm.ops.common import Backend, Op, resolve
from fusedlm.ops.delta_rule import reference

GATED_DELTA_RULE = Op("gated_delta_rule", [Backend("reference", reference.gated_delta_rule, fused=False)])


def gated_delta_rule(
    q_BTHK,
    k_BTHK,
    v_BTHV,
    log_decay_BTH,
    beta_BTH,
    *,
    state_BHKV=None,
    reset_BT=None,
    chunk_size=64,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T;  o_t = S_t^T q_t  (arXiv 2412.06464, eq. 10).

    Args:
        q_BTHK, k_BTHK: (B, T, H, K); k of unit length, q scaled by the caller.
        v_BTHV: (B, T, H, V).
        log_decay_BTH: (B, T, H), log a_t <= 0.
        beta_BTH: (B, T, H), b_t in [0, 1].
        state_BHKV: (B, H, K, V) float32 state before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        chunk_size: tokens computed in parallel.
        backend: auto or reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs).
    """
    run = resolve("gated_delta_rule", backend, v_BTHV)
    return run(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT, chunk_size)
