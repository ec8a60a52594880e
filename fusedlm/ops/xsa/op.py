"""Public function of exclusive self-attention."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.xsa import reference

_MAX_WIDTH = 256  # of the kernels, which hold heads in registers


def _needs_kernels(call: Call, *, head_dim: int) -> str | None:
    if head_dim > _MAX_WIDTH:
        return f"needs heads of at most {_MAX_WIDTH}, not {head_dim}"
    return needs_triton(call)


EXCLUDE_OWN_VALUE = Op(
    "exclude_own_value",
    [
        Backend("triton", "fusedlm.ops.xsa.triton:exclude_own_value", _needs_kernels),
        Backend("reference", reference.exclude_own_value, fused=False),
    ],
    head_dim=64,
)


def exclude_own_value(y_BTHD, v_BTGD, *, backend: str = "auto") -> torch.Tensor:
    """y - (y . u) u with u the L2-normalised value of the token itself, as in public 16 MB models.

    A value shorter than 1e-12 is divided by that instead of its length: a value of zero takes nothing out.

    Args:
        y_BTHD: (B, T, H, D) output of the heads, of any float dtype; the arithmetic is float32 or better.
        v_BTGD: (B, T, G, D) values of the same tokens, G dividing H, perhaps a slice of a packed projection; head h has
            value h // (H / G).
        backend: auto, triton or reference.

    Returns:
        (B, T, H, D), the dtype of y.

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    shape, groups = y_BTHD.shape, v_BTGD.shape[2] if v_BTGD.ndim == 4 else 0
    if len(shape) != 4 or groups == 0 or shape[2] % groups or v_BTGD.shape != (*shape[:2], groups, shape[3]):
        raise ValueError(
            f"y {tuple(shape)} and v {tuple(v_BTGD.shape)} must be (B, T, H, D) and (B, T, G, D), G a divisor of H"
        )
    return resolve("exclude_own_value", backend, y_BTHD, head_dim=shape[3])(y_BTHD, v_BTGD)
