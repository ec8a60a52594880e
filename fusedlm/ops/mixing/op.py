"""Public function of the input of a block and its RMSNorm."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.mixing import reference

_MAX_WIDTH = 8192  # of the kernels, which hold a row in registers


def _needs_kernels(call: Call, *, width: int) -> str | None:
    if width > _MAX_WIDTH:
        return f"needs rows of at most {_MAX_WIDTH}, not {width}"
    return needs_triton(call)


MIX_INPUTS = Op(
    "mix_inputs",
    [
        Backend("triton", "fusedlm.ops.mixing.triton:mix_inputs", _needs_kernels),
        Backend("reference", reference.mix_inputs, fused=False),
    ],
    width=512,
)


def mix_inputs(
    x,
    gain_D,
    *,
    mix_x_D=None,
    x0=None,
    mix_x0_D=None,
    skip=None,
    skip_weight_D=None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """mix_x * (x + skip_weight * skip) + mix_x0 * x0, the input of a block, and its RMSNorm (arXiv 1910.07467).

    x0, the input of the first block, is mixed in as in modded-nanogpt; the skip is that of a U-Net (arXiv 1505.04597).
    One kernel reads each input once and writes both outputs. Backward is one kernel too, which recomputes the sum and
    the norm, and a reduction of its partial sums: per element of x with a skip and x0 in bfloat16, 10 bytes forward and
    16 backward. Only inputs are saved for backward.

    Args:
        x: (..., D) of any float dtype; the arithmetic is float32 or better.
        gain_D: (D,) gain of the norm.
        mix_x_D: (D,); None: 1.
        x0, mix_x0_D: the shape of x, and (D,); both or neither.
        skip, skip_weight_D: the shape of x, and (D,); both or neither.
        eps: of the norm.
        backend: auto, triton or reference.

    Returns:
        The mixed input and its norm, each with the shape and dtype of x.

    Raises:
        ValueError: the shapes do not match, only one of a pair is given, or the backend cannot run this call.
    """
    width = x.shape[-1] if x.ndim else 0
    if width == 0:
        raise ValueError(f"x {tuple(x.shape)} must be (..., D) with D at least 1")
    for name, tensor, factor in (("x0", x0, mix_x0_D), ("skip", skip, skip_weight_D)):
        if (tensor is None) != (factor is None):
            raise ValueError(f"{name} and its factor are given together or not at all")
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of x, {tuple(x.shape)}")
    vectors = {"gain_D": gain_D, "mix_x_D": mix_x_D, "mix_x0_D": mix_x0_D, "skip_weight_D": skip_weight_D}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name} {tuple(vector.shape)} must be ({width},), the width of x")
    run = resolve("mix_inputs", backend, x, width=width)
    return run(x, gain_D, mix_x_D, x0, mix_x0_D, skip, skip_weight_D, eps)
