"""Attention of new tokens to cached keys and values in plain PyTorch."""

import torch

from fusedlm.ops.attention.reference import all_before, attend, visibility_mask


def cached_attention(q, k, v, scale: float, visible, starts) -> torch.Tensor:
    if visible is None:
        visible = all_before(q.shape[1], k.shape[1], starts, q.device)
    seen = visibility_mask(visible, k.shape[1], starts)
    sees_some = seen.any(-1, keepdim=True)
    unseen = ~seen.any(2)[:, 0, :, None, None]
    out = attend(q, k.masked_fill(unseen, 0), v.masked_fill(unseen, 0), scale, seen | ~sees_some)
    # A token that sees nothing reads zeros.
    return out.masked_fill(~sees_some.transpose(1, 2), 0.0)
