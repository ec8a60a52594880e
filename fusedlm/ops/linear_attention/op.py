"""Public function of linear attention with a scalar decay."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.common.states import check_in_place
from fusedlm.ops.linear_attention import reference

MAX_KEY_DIM = 256  # of the kernels, whose programs hold all rows of a state


def _supports(call: Call, *, key_dim: int, value_dim: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if call.dtype != torch.bfloat16:
        return f"needs bfloat16, not {str(call.dtype).removeprefix('torch.')}"  # float16: states may exceed its range
    return None if key_dim <= MAX_KEY_DIM else f"needs a key_dim of at most {MAX_KEY_DIM}, not {key_dim}"


DECAYED_LINEAR_ATTENTION = Op(
    "decayed_linear_attention",
    [
        Backend("triton", "fusedlm.ops.linear_attention.triton:decayed_linear_attention", _supports),
        Backend("reference", reference.decayed_linear_attention, fused=False),
    ],
    key_dim=64,
    value_dim=64,
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
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t  (arXiv 2405.21060, section 6).

    Args:
        q_BTGK, k_BTGK: (B, T, G, K), each shared by H / G consecutive value heads; scaled by the caller.
        v_BTHV: (B, T, H, V), T at least 1.
        log_decay_BTH: (B, T, H), log a_t <= 0.
        state_BHKV: (B, H, K, V) float32 state before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        chunk_size: tokens that the reference computes in parallel; the kernels have their own chunks.
        in_place: without gradients, write the state after the last token into state_BHKV, which must be contiguous
            and of the dtype of the result, and is returned.
        backend: auto, triton or reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs). The
        kernels multiply in bfloat16 and add in float32.

    Raises:
        ValueError: the shapes do not match, the backend cannot run this call, or in_place comes without such a state or
            with gradients.
    """
    check_shapes(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT)
    key_dim, value_dim = k_BTGK.shape[3], v_BTHV.shape[3]
    run = resolve("decayed_linear_attention", backend, v_BTHV, key_dim=key_dim, value_dim=value_dim)
    arguments = (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT, chunk_size)
    if in_place:
        check_in_place(state_BHKV, v_BTHV)
        return run(*arguments, in_place=True)
    return run(*arguments)


def check_shapes(q, k, v, log_decay, state, reset) -> None:
    """Raises ValueError unless the shapes are those of `decayed_linear_attention`."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and log_decay {tuple(log_decay.shape)}"
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:2] != q.shape[:2] or log_decay.shape != v.shape[:3]:
        raise ValueError(f"{shapes} must be (B, T, G, K) twice, (B, T, H, V) and (B, T, H)")
    batch, n_tokens, groups, key_dim = q.shape
    if not n_tokens or not groups or not key_dim or v.shape[2] % groups:
        raise ValueError(f"{shapes}: T, G and K must be at least 1, and H a multiple of G")
    if state is not None and state.shape != (batch, v.shape[2], key_dim, v.shape[3]):
        raise ValueError(f"state {tuple(state.shape)} must be {(batch, v.shape[2], key_dim, v.shape[3])}, (B, H, K, V)")
    if reset is not None and (reset.dtype != torch.bool or reset.shape not in ((1, n_tokens), (batch, n_tokens))):
        raise ValueError(f"reset {tuple(reset.shape)} of {reset.dtype} must be bool and (B or 1, T)")
