"""Rotary position embedding (arXiv 2104.09864)."""

import torch

RopeTable = tuple[torch.Tensor, torch.Tensor]


def inverse_frequencies(dim: int, base: float, device=None) -> torch.Tensor:
    """(dim / 2,) float64 radians a token: base^(-2i/dim)."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def rope_table(positions_BT: torch.Tensor, dim: int, base: float, dtype: torch.dtype) -> RopeTable:
    """Cosines and sines (B or 1, T, 1, dim / 2); the angles are computed in float64, so they hold at any length."""
    angle = positions_BT.to(torch.float64)[..., None] * inverse_frequencies(dim, base, positions_BT.device)
    return angle.cos().to(dtype)[:, :, None], angle.sin().to(dtype)[:, :, None]


def apply_rope(x_BTHD: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Rotate the pairs (i, i + R/2) of the leading R dimensions, R = 2 * table width; the rest passes unchanged."""
    cos, sin = table
    half = cos.shape[-1]
    if half == 0:
        return x_BTHD
    wide = x_BTHD.to(torch.promote_types(x_BTHD.dtype, cos.dtype))
    first, second, rest = wide.split([half, half, x_BTHD.shape[-1] - 2 * half], dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return rotated.to(x_BTHD.dtype)
