"""Public functions of RMSNorm and rotary embedding of heads, alone and with the append to caches."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.rotary import reference

RMSNORM_ROPE = Op(
    "rmsnorm_rope",
    [
        Backend("triton", "fusedlm.ops.rotary.triton:rmsnorm_rope", needs_triton),
        Backend("reference", reference.rmsnorm_rope, fused=False),
    ],
)

ROPE_APPEND = Op(
    "rope_append",
    [
        Backend("triton", "fusedlm.ops.rotary.triton:rope_append", needs_triton),
        Backend("reference", reference.rope_append, fused=False),
    ],
)


def rmsnorm_rope(
    x_BTHD, cos_BTR, sin_BTR, *, eps: float | None = None, gain_H=None, backend: str = "auto"
) -> torch.Tensor:
    """RMSNorm of each head, a gain per head, and rotary embedding (arXiv 2104.09864) of the pairs (i, i + R) of its
    first 2 R elements; in float32 or better, rounded once.

    Args:
        x_BTHD: (B, T, H, D), perhaps a slice of a packed projection.
        cos_BTR, sin_BTR: (B or 1, T, 1, R), cosines and sines of the angles; R may be 0.
        eps: of the norm; None: no norm.
        gain_H: (up to H,) factors of the first heads; None: none.
        backend: auto, triton or reference. The kernel of triton has no backward pass; with gradients it runs the
            reference.

    Returns:
        (B, T, H, D) in the dtype of x.

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    shapes = f"x {tuple(x_BTHD.shape)}, cos {tuple(cos_BTR.shape)} and sin {tuple(sin_BTR.shape)}"
    if x_BTHD.ndim != 4 or cos_BTR.ndim != 4 or cos_BTR.shape != sin_BTR.shape:
        raise ValueError(f"{shapes} must be (B, T, H, D) and (B or 1, T, 1, R) twice")
    batch, n_tokens, n_heads, width = x_BTHD.shape
    if cos_BTR.shape[:3] not in ((batch, n_tokens, 1), (1, n_tokens, 1)) or 2 * cos_BTR.shape[3] > width:
        raise ValueError(f"{shapes} must be (B, T, H, D) and (B or 1, T, 1, R) twice, 2 R at most D")
    if gain_H is not None and (gain_H.ndim != 1 or len(gain_H) > n_heads):
        raise ValueError(f"gain {tuple(gain_H.shape)} must have one factor for each of up to {n_heads} heads")
    run = resolve("rmsnorm_rope", backend, x_BTHD)
    return run(x_BTHD, cos_BTR, sin_BTR, None if eps is None else float(eps), gain_H)


def rope_append(
    q_BTHD,
    k_BTGD,
    v_BTE,
    keys_BSGD,
    values_BSE,
    starts_B,
    cos_BTR,
    sin_BTR,
    *,
    eps: float | None = None,
    gain_H=None,
    v_gain_E=None,
    v_eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """What one token of each row writes into caches of fixed size before it attends to them: `rmsnorm_rope` of its keys
    into one, its values as they are or with RMSNorm into the other. A cache of S places is a ring; the token at
    position p has place p % S.

    Args:
        q_BTHD, k_BTGD: (B, 1, H, D) and (B, 1, G, D), perhaps slices of a packed projection.
        v_BTE: (B, 1, E).
        keys_BSGD, values_BSE: (B, S, G, D) and (B, S, E), perhaps slices of one cache. One place of each row
            is overwritten.
        starts_B: (B,) int64, the position of each row's token, at least 0.
        cos_BTR, sin_BTR: (B or 1, 1, 1, R), cosines and sines of the angles; R may be 0.
        eps: of the norm of queries and keys; None: no norm.
        gain_H: (up to H,) factors of the first query heads; None: none.
        v_gain_E: (E,) gain of the norm of the values; None: no norm.
        v_eps: of that norm.
        backend: auto, triton or reference. There are no gradients.

    Returns:
        (B, 1, H, D), the queries after `rmsnorm_rope`, in the dtype of q.

    Raises:
        ValueError: the shapes do not match, a tensor requires gradients, or the backend cannot run this call.
    """
    _check_append(q_BTHD, k_BTGD, v_BTE, keys_BSGD, values_BSE, starts_B, cos_BTR, sin_BTR, gain_H, v_gain_E)
    run = resolve("rope_append", backend, q_BTHD)
    norm = None if eps is None else float(eps), gain_H, v_gain_E, float(v_eps)
    return run(q_BTHD, k_BTGD, v_BTE, keys_BSGD, values_BSE, starts_B, cos_BTR, sin_BTR, *norm)


def _check_append(q, k, v, keys, values, starts, cos, sin, gain, v_gain) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 3 or q.shape[1] != 1 or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes} must be (B, 1, H, D), (B, 1, G, D) and (B, 1, E)")
    batch, _, n_heads, width = q.shape
    if k.shape[:2] != (batch, 1) or v.shape[:2] != (batch, 1) or starts.shape != (batch,):
        raise ValueError(f"{shapes}, starts {tuple(starts.shape)} must have the same B, and one token per row")
    places = keys.shape[1] if keys.ndim == 4 else 0
    if not places or keys.shape != (batch, places, *k.shape[2:]) or values.shape != (batch, places, v.shape[2]):
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be (B, S, G, D) and (B, S, E) for {shapes}"
        )
    tables = [(batch, 1, 1), (1, 1, 1)]
    if cos.ndim != 4 or cos.shape != sin.shape or cos.shape[:3] not in tables or 2 * cos.shape[3] > width:
        found = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{found} must be (B or 1, 1, 1, R) twice, 2 R at most {width}")
    if gain is not None and (gain.ndim != 1 or len(gain) > n_heads):
        raise ValueError(f"gain {tuple(gain.shape)} must have one factor for each of up to {n_heads} heads")
    if v_gain is not None and v_gain.shape != v.shape[2:]:
        raise ValueError(f"v_gain {tuple(v_gain.shape)} must be {tuple(v.shape[2:])}")
    tensors = (q, k, v, keys, values, cos, sin, gain, v_gain)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("a tensor requires gradients, which rope_append has not; use torch.no_grad()")
