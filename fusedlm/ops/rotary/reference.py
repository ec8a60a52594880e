"""RMSNorm and rotary embedding of heads, and what is appended to caches, in plain PyTorch."""

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


def rope_append(q, k, v, keys, values, starts, cos, sin, eps: float | None, gain, v_gain, v_eps: float) -> torch.Tensor:
    if v_gain is not None:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))
        v = F.rms_norm(wide, (v.shape[-1],), v_gain.to(wide.dtype), v_eps)
    rows = torch.arange(len(keys), device=keys.device)
    for cache, new in ((keys, rmsnorm_rope(k, cos, sin, eps, None)), (values, v)):
        cache[rows, starts % cache.shape[1]] = new[:, 0].to(cache.dtype)
    return rmsnorm_rope(q, cos, sin, eps, gain)
