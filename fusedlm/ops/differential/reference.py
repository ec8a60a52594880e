"""Subtract + head RMSNorm of differential attention in plain PyTorch."""

import torch
import torch.nn.functional as F


def differential_combine(signal, noise, weight, gamma, scale, eps: float) -> torch.Tensor:
    compute_dtype = torch.promote_types(signal.dtype, torch.float32)
    out = signal.to(compute_dtype) - weight.to(compute_dtype)[..., None] * noise.to(compute_dtype)
    if gamma is not None:
        out = F.rms_norm(out, (out.shape[-1],), gamma.to(compute_dtype), eps)
    if scale is not None:
        out = out * scale.to(compute_dtype)
    return out.to(signal.dtype)
