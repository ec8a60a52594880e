"""Exclusive self-attention in plain PyTorch."""

import torch
import torch.nn.functional as F

EPS = 1e-12  # least length that a value is divided by


def exclude_own_value(y_BTHD, v_BTGD) -> torch.Tensor:
    compute_dtype = torch.promote_types(y_BTHD.dtype, torch.float32)
    own = F.normalize(v_BTGD.to(compute_dtype), dim=-1, eps=EPS)[:, :, :, None]
    y = y_BTHD.to(compute_dtype).unflatten(2, (v_BTGD.shape[2], -1))
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3).to(y_BTHD.dtype)
