"""Rotary position embedding (arXiv 2104.09864), and its stretch to longer contexts by YaRN (arXiv 2309.00071)."""

import math

import torch

from fusedlm.config.model import YaRNConfig

RopeTable = tuple[torch.Tensor, torch.Tensor]


def inverse_frequencies(dim: int, base: float, device=None) -> torch.Tensor:
    """(dim / 2,) float64 radians a token: base^(-2i/dim)."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def yarn_frequencies(frequencies: torch.Tensor, yarn: YaRNConfig) -> torch.Tensor:
    """NTK-by-parts (arXiv 2309.00071, eqs. 17 to 20): a frequency that turns more than beta_fast times within the
    trained length stays, one that turns less than beta_slow times is divided by the factor, linear in between."""
    turns = yarn.trained_length * frequencies / (2 * math.pi)
    kept = ((turns - yarn.beta_slow) / (yarn.beta_fast - yarn.beta_slow)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / yarn.factor


def yarn_score_gain(yarn: YaRNConfig | None) -> float:
    """Factor on attention scores, the inverse of YaRN's temperature: (0.1 ln(factor) + 1)^2 (eq. 22)."""
    return 1.0 if yarn is None else (0.1 * math.log(yarn.factor) + 1) ** 2


def rope_table(
    positions_BT: torch.Tensor, dim: int, base: float, dtype: torch.dtype, yarn: YaRNConfig | None = None
) -> RopeTable:
    """Cosines and sines (B or 1, T, 1, dim / 2); the angles are computed in float64, so they hold at any length."""
    frequencies = inverse_frequencies(dim, base, positions_BT.device)
    if yarn is not None:
        frequencies = yarn_frequencies(frequencies, yarn)
    angle = positions_BT.to(torch.float64)[..., None] * frequencies
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
