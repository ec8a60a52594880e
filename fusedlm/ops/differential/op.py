"""Public function of the fused subtract + head RMSNorm of differential attention."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.differential import reference

DIFFERENTIAL_COMBINE = Op(
    "differential_combine",
    [
        Backend("triton", "fusedlm.ops.differential.triton:differential_combine", needs_triton),
        Backend("reference", reference.differential_combine, fused=False),
    ],
)


def differential_combine(
    signal_BTHE, noise_BTHE, weight, gamma_E=None, scale=None, *, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """rms_norm(signal - weight * noise) * gamma * scale over each head (arXiv 2410.05258, eq. 3).

    Args:
        signal_BTHE, noise_BTHE: (B, T, H, E) of one float dtype; the arithmetic is float32 or better.
        weight: () or (H,) or (B, T, H), lambda, the factor of the noise.
        gamma_E: (E,) gain of the head norm; None: no norm.
        scale: () factor of the output, which gets no gradient; None: 1.
        eps: of the norm.
        backend: auto, triton or reference.

    Returns:
        (B, T, H, E), the dtype of signal.

    Raises:
        ValueError: the shapes do not match, scale requires a gradient, or the backend cannot run this call.
    """
    shape = signal_BTHE.shape
    if len(shape) != 4 or noise_BTHE.shape != shape or weight.shape not in ((), shape[2:3], shape[:3]):
        raise ValueError(
            f"signal {tuple(shape)}, noise {tuple(noise_BTHE.shape)} and weight {tuple(weight.shape)} must be "
            "(B, T, H, E) twice and (), (H,) or (B, T, H)"
        )
    if scale is not None and scale.requires_grad:
        raise ValueError("scale requires a gradient and gets none; fold a learned factor into gamma_E")
    run = resolve("differential_combine", backend, signal_BTHE)
    return run(signal_BTHE, noise_BTHE, weight, gamma_E, scale, eps)
