"""Public function of attention to cached keys and values, and where each backend can run."""

import torch

from fusedlm.ops.attention import sdpa
from fusedlm.ops.cached import reference
from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve


def _fits(call: Call, *, head_dim: int, value_dim: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if max(head_dim, value_dim) > 256:
        return f"needs head dimensions up to 256, not {head_dim} and {value_dim}"
    return None


CACHED_ATTENTION = Op(
    "cached_attention",
    [
        Backend("triton", "fusedlm.ops.cached.triton:cached_attention", _fits),
        Backend("sdpa", sdpa.cached),
        Backend("reference", reference.cached_attention),
    ],
    head_dim=64,
    value_dim=64,
)


def cached_attention(
    q_BTHD, k_BSGD, v_BSGE, *, scale: float, visible_before_BT=None, starts_B=None, backend: str = "auto"
) -> torch.Tensor:
    """Attention of T new tokens to cached tokens and to one another, for decoding.

    Lengths stay on the device, so that a CUDA graph of this call serves any lengths.

    Args:
        q_BTHD: (B, T, H, D).
        k_BSGD, v_BSGE: (B, S, G, D) and (B, S, G, E), earlier tokens first, the new ones included; query head h reads
            key head h // (H / G). What follows a row's tokens must be finite, and is not used.
        scale: scores are multiplied by it.
        visible_before_BT: (B or 1, T) int, how many tokens before itself each query sees; None: all.
        starts_B: (B,) int, index among the S keys of each row's first query; None: S - T in every row.
        backend: auto, triton, sdpa or reference. The kernels of triton take at most 64 new tokens and have no backward
            pass; for more tokens, with gradients, and where nothing is masked and torch's kernels are faster, it runs
            torch's attention.

    Returns:
        (B, T, H, E), the dtype of q.

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    shapes = tuple(q_BTHD.shape), tuple(k_BSGD.shape), tuple(v_BSGE.shape)
    if not all(len(shape) == 4 for shape in shapes):
        raise ValueError(
            f"q {shapes[0]}, k {shapes[1]} and v {shapes[2]} must be (B, T, H, D), (B, S, G, D), (B, S, G, E)"
        )
    (batch, _, n_heads, head_dim), k_shape = shapes[0], shapes[1]
    if k_shape[::3] != (batch, head_dim) or shapes[2][:3] != k_shape[:3] or n_heads % max(1, k_shape[2]):
        raise ValueError(
            f"q {shapes[0]}, k {shapes[1]} and v {shapes[2]} must be (B, T, H, D), (B, S, G, D) and (B, S, G, E), "
            "G dividing H"
        )
    run = resolve("cached_attention", backend, q_BTHD, head_dim=head_dim, value_dim=v_BSGE.shape[-1])
    return run(q_BTHD, k_BSGD, v_BSGE, scale, visible_before_BT, starts_B)
