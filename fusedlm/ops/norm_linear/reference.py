"""RMSNorm and projection in plain PyTorch."""

import torch
import torch.nn.functional as F


def rmsnorm_linear(x, gamma, weight, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = dtype or x.dtype
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.rms_norm(x_float, (x.shape[-1],), gamma.to(x_float.dtype), eps)
    return F.linear(normed.to(dtype), weight.to(dtype))
