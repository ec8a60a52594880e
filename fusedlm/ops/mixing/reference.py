"""The input of a block and its RMSNorm in plain PyTorch."""

import torch
import torch.nn.functional as F


def mix(x, mix_x=None, x0=None, mix_x0=None, skip=None, skip_weight=None) -> torch.Tensor:
    """mix_x * (x + skip_weight * skip) + mix_x0 * x0, without what is None; in float32 or better."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    mixed = x.to(compute_dtype)
    if skip is not None:
        mixed = mixed + skip_weight.to(compute_dtype) * skip.to(compute_dtype)
    if mix_x is not None:
        mixed = mix_x.to(compute_dtype) * mixed
    if x0 is not None:
        mixed = mixed + mix_x0.to(compute_dtype) * x0.to(compute_dtype)
    return mixed


def mix_inputs(x, gain, mix_x, x0, mix_x0, skip, skip_weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    mixed = mix(x, mix_x, x0, mix_x0, skip, skip_weight)
    normed = F.rms_norm(mixed, (mixed.shape[-1],), gain.to(mixed.dtype), eps)
    return mixed.to(x.dtype), normed.to(x.dtype)
