"""RMSNorm with a SiLU gate in plain PyTorch."""

import torch
import torch.nn.functional as F


def gated_rmsnorm(y_BTGW, z_BTGW, gamma, x_BTGW, skip_H, gate_first: bool, eps: float) -> torch.Tensor:
    compute_dtype = torch.promote_types(y_BTGW.dtype, torch.float32)
    y, gate, gamma = y_BTGW.to(compute_dtype), F.silu(z_BTGW.to(compute_dtype)), gamma.to(compute_dtype)
    if skip_H is not None:
        heads = x_BTGW.to(compute_dtype).flatten(-2).unflatten(-1, (len(skip_H), -1))
        y = y + (skip_H.to(compute_dtype)[:, None] * heads).flatten(-2).view_as(y)
    if gate_first:
        y = y * gate
    y = F.rms_norm(y, (y.shape[-1],), None, eps) * gamma
    return (y if gate_first else y * gate).to(y_BTGW.dtype)
