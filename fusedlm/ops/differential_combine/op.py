"""The entry to the combination of the two streams of differential attention."""

import torch

from fusedlm.ops.common import Implementation, Op, needs_triton
from fusedlm.ops.differential_combine import reference

DIFFERENTIAL_COMBINE = Op(
    "differential_combine",
    [
        Implementation(
            "triton",
            "fusedlm.ops.differential_combine.triton:differential_combine",
            lambda setting, **shape: needs_triton(setting),
        ),
        Implementation("reference", reference.differential_combine, lambda setting, **shape: None),
    ],
)


def differential_combine(
    signal_BTHE, noise_BTHE, weight, gamma_E=None, scale=None, *, eps: float = 1e-6, implementation=None
) -> torch.Tensor:
    """rms_norm(signal - weight * noise) * gamma * scale over each head (arXiv 2410.05258, eq. 3).

    Args:
        signal_BTHE, noise_BTHE: (B, T, H, E) of one float dtype; the arithmetic is float32 or better.
        weight: () or (H,) or (B, T, H), the share of the noise that is subtracted.
        gamma_E: (E,) gain of the head norm; None: no norm.
        scale: () factor on the output, which gets no gradient; None: 1.
        eps: of the norm.
        implementation: what `DIFFERENTIAL_COMBINE.choose(...).function` gave; None: the reference.

    Returns:
        (B, T, H, E), the dtype of signal.

    Raises:
        ValueError: the shapes do not go together, or scale wants a gradient.
    """
    shape = signal_BTHE.shape
    if len(shape) != 4 or noise_BTHE.shape != shape or weight.shape not in ((), shape[2:3], shape[:3]):
        raise ValueError(
            f"signal {tuple(shape)}, noise {tuple(noise_BTHE.shape)} and weight {tuple(weight.shape)} must be "
            "(B, T, H, E) twice and (), (H,) or (B, T, H)"
        )
    if scale is not None and scale.requires_grad:
        raise ValueError("scale gets no gradient; fold what is learnt into gamma_E")
    implementation = implementation or reference.differential_combine
    return implementation(signal_BTHE, noise_BTHE, weight, gamma_E, scale, eps)
