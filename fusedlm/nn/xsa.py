"""Exclusive self-attention: the output without its component along the token's own value."""

import torch


def exclude_own_value(y_BTHE: torch.Tensor, v_BTGE: torch.Tensor) -> torch.Tensor:
    """y - (y . u) u with u the L2-normalised value of the token itself; (B, T, H, E), the dtype of y.

    Args:
        y_BTHE: (B, T, H, E) output of the heads.
        v_BTGE: (B, T, G, E) values of the same tokens, G dividing H; head h has value h // (H / G).
    """
    wide = torch.promote_types(y_BTHE.dtype, torch.float32)
    own = torch.nn.functional.normalize(v_BTGE.to(wide), dim=-1)[:, :, :, None]
    y = y_BTHE.to(wide).unflatten(2, (v_BTGE.shape[2], -1))
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3).to(y_BTHE.dtype)
