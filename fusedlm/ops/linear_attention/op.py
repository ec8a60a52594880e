"""Public function of linear attention with a scalar decay."""

import torch

from fusedlm.ops.common import Backend, Op, resolve
from fusedlm.ops.linear_attention import reference

DECAYED_LINEAR_ATTENTION = Op(
    "decayed_linear_attention", [Backend("reference", reference.decayed_linear_attention, fused=False)]
)


def decayed_linear_attention(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    log_decay_BTH,
    *,
    state_BHKV=None,
    reset_BT=None,
    chunk_size=64,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t  (arXiv 2405.21060, section 6).

    Args:
        q_BTGK, k_BTGK: (B, T, G, K), each shared by H / G consecutive value heads; scaled by the caller.
        v_BTHV: (B, T, H, V).
        log_decay_BTH: (B, T, H), log a_t <= 0.
        state_BHKV: (B, H, K, V) float32 state before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        chunk_size: tokens computed in parallel.
        backend: auto or reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs).
    """
    run = resolve("decayed_linear_attention", backend, v_BTHV)
    return run(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT, chunk_size)
