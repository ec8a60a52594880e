"""Public function of RMSNorm with a SiLU gate."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.gated_norm import reference

_MAX_WIDTH = 8192  # of the kernels, which hold a row in registers


def _needs_kernels(call: Call, *, width: int) -> str | None:
    if width > _MAX_WIDTH:
        return f"needs groups of at most {_MAX_WIDTH}, not {width}"
    return needs_triton(call)


GATED_RMSNORM = Op(
    "gated_rmsnorm",
    [
        Backend("triton", "fusedlm.ops.gated_norm.triton:gated_rmsnorm", _needs_kernels),
        Backend("reference", reference.gated_rmsnorm, fused=False),
    ],
    width=128,
)


def gated_rmsnorm(
    y_BTGW,
    z_BTGW,
    gamma,
    *,
    x_BTGW=None,
    skip_H=None,
    gate_first: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """rms_norm(y) * gamma * silu(z) over each group, as after the gated delta rule (arXiv 2412.06464); with gate_first
    rms_norm(y * silu(z)) * gamma, as in Mamba 2 (arXiv 2405.21060). With a skip, y + skip * x takes the place of y.

    Args:
        y_BTGW, z_BTGW: (B, T, G, W) of one float dtype, perhaps slices of packed projections; the arithmetic is float32
            or better.
        gamma: (W,) or (G, W).
        x_BTGW, skip_H: (B, T, G, W), and a factor for each of H equal parts of its G * W channels, in order; both or
            neither.
        gate_first: whether the gate comes before the norm.
        eps: of the norm.
        backend: auto, triton or reference.

    Returns:
        (B, T, G, W), the dtype of y.

    Raises:
        ValueError: the shapes do not match, only one of x and skip is given, or the backend cannot run this call.
    """
    shape = y_BTGW.shape
    if len(shape) != 4 or z_BTGW.shape != shape or gamma.shape not in (shape[3:], shape[2:]):
        raise ValueError(
            f"y {tuple(shape)}, z {tuple(z_BTGW.shape)} and gamma {tuple(gamma.shape)} must be (B, T, G, W) twice and "
            "(W,) or (G, W)"
        )
    if (x_BTGW is None) != (skip_H is None):
        raise ValueError("x_BTGW and skip_H are given together or not at all")
    if skip_H is not None:
        channels = shape[2] * shape[3]
        if x_BTGW.shape != shape or skip_H.ndim != 1 or not len(skip_H) or channels % len(skip_H):
            raise ValueError(
                f"x {tuple(x_BTGW.shape)} and skip {tuple(skip_H.shape)} must be {tuple(shape)} and (H,), H a divisor "
                f"of {channels} channels"
            )
    run = resolve("gated_rmsnorm", backend, y_BTGW, width=shape[3])
    return run(y_BTGW, z_BTGW, gamma, x_BTGW, skip_H, gate_first, eps)
