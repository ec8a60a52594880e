"""Rotary position embedding (arXiv 2104.09864), and its stretch to longer contexts by YaRN (arXiv 2309.00071)."""

import math
from dataclasses import dataclass

import torch

RopeTable = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class YaRN:
    """Rotary embedding stretched to contexts longer than trained.

    factor: by which the context is stretched, at least 1.
    trained_length: context of the training before the stretch, in tokens.
    beta_fast: turns within trained_length from which a frequency is left as it is.
    beta_slow: turns up to which it is divided by factor.
    """

    factor: float
    trained_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def inverse_frequencies(dim: int, base: float, device=None) -> torch.Tensor:
    """(dim / 2,) float64 radians per token: base^(-2i/dim)."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def yarn_frequencies(dim: int, base: float, yarn: YaRN, device=None) -> torch.Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2) as its authors compute it: pairs up to the one that turns beta_fast
    times within the trained length keep their frequency, pairs from the one that turns beta_slow times on are divided
    by the factor, and between the two the kept fraction falls linearly with the index of the pair.

    The paper's text has that fraction linear in the number of turns, which divides nearly all pairs between the bounds
    (docs/decisions.md).
    """
    frequencies = inverse_frequencies(dim, base, device)
    if dim == 0:
        return frequencies
    first = max(math.floor(_pair_that_turns(yarn.beta_fast, dim, base, yarn)), 0)
    last = min(math.ceil(_pair_that_turns(yarn.beta_slow, dim, base, yarn)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device=device) - first) / max(last - first, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / yarn.factor


def _pair_that_turns(turns: float, dim: int, base: float, yarn: YaRN) -> float:
    """The unrounded index of the pair that turns so many times within the trained length; 0 turns: the last."""
    if turns == 0:
        return dim - 1.0
    return dim * math.log(yarn.trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_score_gain(yarn: YaRN | None) -> float:
    """Factor on attention scores, the inverse of YaRN's temperature: (0.1 ln(factor) + 1)^2 (eq. 22)."""
    return 1.0 if yarn is None else (0.1 * math.log(yarn.factor) + 1) ** 2


def rope_table(
    positions_BT: torch.Tensor, dim: int, base: float, dtype: torch.dtype, yarn: YaRN | None = None
) -> RopeTable:
    """Cosines and sines (B or 1, T, 1, dim / 2); the angles are computed in float64, so they hold at any length."""
    device = positions_BT.device
    frequencies = inverse_frequencies(dim, base, device) if yarn is None else yarn_frequencies(dim, base, yarn, device)
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
