"""The end of differential attention in plain PyTorch."""

import torch
import torch.nn.functional as F


def differential_combine(signal, noise, weight, gamma, scale, eps: float) -> torch.Tensor:
    wide = torch.promote_types(signal.dtype, torch.float32)
    out = signal.to(wide) - weight.to(wide)[..., None] * noise.to(wide)
    if gamma is not None:
        out = F.rms_norm(out, (out.shape[-1],), gamma.to(wide), eps)
    if scale is not None:
        out = out * scale.to(wide)
    return out.to(signal.dtype)
