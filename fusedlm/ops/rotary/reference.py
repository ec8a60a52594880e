"""RMSNorm and rotary embedding of heads in plain PyTorch."""

import torch
import torch.nn.functional as F


def rmsnorm_rope(x, cos, sin, eps: float | None, gain) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps is not None:
        wide = F.rms_norm(wide, (x.shape[-1],), None, eps)
    if gain is not None:
        ones = gain.new_ones(x.shape[2] - len(gain))
        wide = wide * torch.cat([gain, ones]).to(wide.dtype)[:, None]
    half = cos.shape[-1]
    first, second, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
