"""Public function of RMSNorm and rotary embedding of heads."""

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
