"""The entry to linear attention with a scalar decay."""

import torch

from fusedlm.ops.common import Implementation, Op
from fusedlm.ops.decayed_linear_attention import reference

DECAYED_LINEAR_ATTENTION = Op(
    "decayed_linear_attention",
    [Implementation("reference", reference.decayed_linear_attention, lambda setting, **shape: None)],
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
    implementation=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t  (arXiv 2405.21060, section 6).

    Args:
        q_BTGK, k_BTGK: (B, T, G, K), each shared by H / G consecutive value heads; scaled by the caller.
        v_BTHV: (B, T, H, V).
        log_decay_BTH: (B, T, H), log a_t <= 0.
        state_BHKV: (B, H, K, V) float32 state before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is emptied; None: none.
        chunk_size: tokens computed in parallel.
        implementation: what `DECAYED_LINEAR_ATTENTION.choose(...).function` gave; None: the reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs).
    """
    implementation = implementation or reference.decayed_linear_attention
    return implementation(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT, chunk_size)


def chunked_flops(n_tokens: int, chunk_size: int, n_groups: int, n_heads: int, key_dim: int, value_dim: int) -> int:
    """Matrix-multiply FLOPs of one sequence in the chunked form: scores and weighted values inside chunks, a write and
    a read of the state a chunk. Whole chunks are counted, as they are computed."""
    size = min(chunk_size, n_tokens)
    padded = -(-n_tokens // size) * size
    inside = 2 * size * (n_groups * key_dim + n_heads * value_dim)
    return padded * (inside + 4 * n_heads * key_dim * value_dim)
