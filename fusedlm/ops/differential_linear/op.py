"""Public function of differential linear attention."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.common.states import check_in_place
from fusedlm.ops.differential_linear import reference

MAX_DIM = 64  # of the kernels, whose programs hold a state in registers


def _supports(call: Call, *, head_dim: int, value_dim: int, rope_dim: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if call.dtype != torch.bfloat16:
        return f"needs bfloat16, not {str(call.dtype).removeprefix('torch.')}"  # float16: states may exceed its range
    for name, size in (("head_dim", head_dim), ("value_dim", value_dim), ("rope_dim", rope_dim)):
        if size > MAX_DIM:
            return f"needs a {name} of at most {MAX_DIM}, not {size}"
    return None


DIFFERENTIAL_LINEAR_ATTENTION = Op(
    "differential_linear_attention",
    [
        Backend("triton", "fusedlm.ops.differential_linear.triton:differential_linear_attention", _supports),
        Backend("reference", reference.differential_linear_attention, fused=False),
    ],
    head_dim=64,
    value_dim=64,
    rope_dim=16,
)


def differential_linear_attention(
    q_BTNK,
    k_BTND,
    k_rope_BTSR,
    v_BTHV,
    log_decay_BTH,
    weight_H,
    gamma_V,
    *,
    rope=None,
    scale: float | None = None,
    eps: float = 1e-6,
    state_BNKE=None,
    reset_BT=None,
    written_BT=None,
    chunk_size: int = 64,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = norm(o_1 - weight o_2) gamma with two streams of linear attention that share decay and values: for stream i

        S_t = a_t S_{t-1} + phi(k_t) v_t^T,  z_t = a_t z_{t-1} + phi(k_t),  o_i = S_t^T phi(q_t) / (z_t . phi(q_t)),

    phi(x) = 1 + u + u^2 / 2 with u = scale x (differential attention: arXiv 2410.05258, eq. 3; the decay: arXiv
    2405.21060, section 6).

    Args:
        q_BTNK: (B, T, 2 H, R + D), the heads of the first stream before those of the second; R rotary dimensions first.
        k_BTND: (B, T, 2 H, D), in the same order.
        k_rope_BTSR: (B, T, 2, R), the rotary dimensions of the keys, shared by the heads of a stream.
        v_BTHV: (B, T, H, V), T at least 1.
        log_decay_BTH: (B, T, H), log a_t <= 0.
        weight_H: (H,), lambda.
        gamma_V: (V,), gain of the head norm.
        rope: cosines and sines (B or 1, T, 1, R / 2), by which the pairs (i, i + R / 2) of q and k_rope are rotated;
            they get no gradient. None without rotary dimensions.
        scale: of queries and keys; None: (R + D)^(-1/4).
        eps: of the norm.
        state_BNKE: (B, 2 H, R + D, V + 1) float32, S and, as the last column, z before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        written_BT: (B, T) bool; the other tokens leave the state as it is, and their outputs mean nothing; None: all.
        chunk_size: tokens that the reference computes in parallel; the kernels have their own chunks.
        in_place: without gradients, write the state after the last token into state_BNKE, which must be contiguous and
            of the returned state's dtype, and return it.
        backend: auto, triton or reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs). The
        kernels multiply in bfloat16 and add in float32.

    Raises:
        ValueError: the shapes do not match, the backend cannot run this call, or in_place comes without such a state or
            with gradients.
    """
    q, k, k_rope, v = q_BTNK, k_BTND, k_rope_BTSR, v_BTHV
    _check_shapes(q, k, k_rope, v, log_decay_BTH, weight_H, gamma_V, rope, state_BNKE, reset_BT, written_BT)
    if scale is None:
        scale = q.shape[3] ** -0.25
    if written_BT is not None:
        log_decay_BTH = log_decay_BTH.masked_fill(~written_BT[..., None], 0.0)
        reset_BT = None if reset_BT is None else reset_BT & written_BT
    sizes = {"head_dim": k.shape[3], "value_dim": v.shape[3], "rope_dim": k_rope.shape[3]}
    run = resolve("differential_linear_attention", backend, v, **sizes)
    options = (rope, scale, eps, state_BNKE, reset_BT, written_BT, chunk_size)
    arguments = (q, k, k_rope, v, log_decay_BTH, weight_H, gamma_V, *options)
    if in_place:
        check_in_place(state_BNKE, v)
        return run(*arguments, in_place=True)
    return run(*arguments)


def _check_shapes(q, k, k_rope, v, log_decay, weight, gamma, rope, state, reset, written) -> None:
    shapes = (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, k_rope {tuple(k_rope.shape)}, v {tuple(v.shape)} and log_decay "
        f"{tuple(log_decay.shape)}"
    )
    if any(x.ndim != 4 for x in (q, k, k_rope, v)):
        raise ValueError(f"{shapes} must be (B, T, 2 H, R + D), (B, T, 2 H, D), (B, T, 2, R), (B, T, H, V), (B, T, H)")
    batch, n_tokens, heads, value_dim = v.shape
    rope_dim, head_dim = k_rope.shape[3], k.shape[3]
    expected = [(2 * heads, rope_dim + head_dim), (2 * heads, head_dim), (2, rope_dim)]
    if [x.shape[2:] for x in (q, k, k_rope)] != expected or log_decay.shape != v.shape[:3]:
        raise ValueError(f"{shapes} must be (B, T, 2 H, R + D), (B, T, 2 H, D), (B, T, 2, R), (B, T, H, V), (B, T, H)")
    if any(x.shape[:2] != v.shape[:2] for x in (q, k, k_rope)) or not n_tokens or not head_dim or not value_dim:
        raise ValueError(f"{shapes} must have the same B and T, and T, D and V be at least 1")
    if weight.shape != (heads,) or gamma.shape != (value_dim,):
        raise ValueError(f"weight {tuple(weight.shape)} and gamma {tuple(gamma.shape)} must be (H,) and (V,)")
    tables = [] if rope is None else list(rope)
    table_shapes = [(n, n_tokens, 1, rope_dim // 2) for n in (1, batch)]
    if rope_dim % 2 or len(tables) != 2 * (rope_dim > 0) or any(x.shape not in table_shapes for x in tables):
        found = [tuple(x.shape) for x in tables]
        raise ValueError(
            f"rope {found} must be two tables (B or 1, T, 1, R / 2) with R = {rope_dim}, or None if R is 0"
        )
    expected = (batch, 2 * heads, rope_dim + head_dim, value_dim + 1)
    if state is not None and state.shape != expected:
        raise ValueError(f"state {tuple(state.shape)} must be {expected}, (B, 2 H, R + D, V + 1)")
    if reset is not None and (reset.dtype != torch.bool or reset.shape not in ((1, n_tokens), (batch, n_tokens))):
        raise ValueError(f"reset {tuple(reset.shape)} of {reset.dtype} must be bool and (B or 1, T)")
    if written is not None and (written.dtype != torch.bool or written.shape != (batch, n_tokens)):
        raise ValueError(f"written {tuple(written.shape)} of {written.dtype} must be bool and (B, T)")
