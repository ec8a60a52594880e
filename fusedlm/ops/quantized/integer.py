"""Symmetric integers of 2 to 8 bits in plain PyTorch: scales per row or per group of a row, codes and values.

Training with fake quantisation and rounding after it use these functions, so that both have the same grid.
"""

import torch
import torch.nn.functional as F

BITS = range(2, 9)
SCALE_DTYPE = torch.bfloat16  # the range of float32; elements are rounded with the rounded scale


def largest_code(bits: int) -> int:
    """2^(bits - 1) - 1: codes are from minus this to this."""
    return (1 << (bits - 1)) - 1


def integer_scales(
    weight_NK: torch.Tensor, bits: int, group: int | None = None, clip: float | None = None
) -> torch.Tensor:
    """Scales without a floor: that of zeros is zero.

    Args:
        weight_NK: (N, K), of any float dtype.
        group: columns that share a scale; None: the row.
        clip: the largest code stands for clip standard deviations of the row or group, which may be more than its
            largest magnitude; None: for that magnitude. So it does too where elements are nearly equal, and a thousand
            times farther from zero than clip deviations.

    Returns:
        (N, groups) bfloat16.
    """
    weight_NGC = in_groups(weight_NK, group)
    limit_NG = weight_NGC.abs().amax(-1)
    if clip is not None:
        ones_1GC = in_groups(torch.ones_like(weight_NK[:1]), group)
        count_1G = ones_1GC.sum(-1)
        mean_NG = weight_NGC.sum(-1) / count_1G
        deviation_NGC = (weight_NGC - mean_NG[..., None]) * ones_1GC
        reach_NG = clip * (deviation_NGC.square().sum(-1) / count_1G).sqrt()
        limit_NG = torch.where(reach_NG < limit_NG / 1000, limit_NG, reach_NG)
    # By a tensor: by a number, torch multiplies by its reciprocal on a GPU, and devices would not agree.
    return (limit_NG / torch.full_like(limit_NG, largest_code(bits))).to(SCALE_DTYPE)


def integer_codes(
    weight_NK: torch.Tensor, scales_NG: torch.Tensor, bits: int, group: int | None = None
) -> torch.Tensor:
    """(N, K) in the dtype of the weight: weight / scale to nearest, ties to even, clamped; 0 where the scale is 0."""
    scale_NK = by_column(scales_NG.to(weight_NK.dtype), weight_NK.shape[1], group)
    largest = largest_code(bits)
    return torch.where(scale_NK > 0, weight_NK / scale_NK, 0.0).round().clamp(-largest, largest)


def integer_values(codes_NK: torch.Tensor, scales_NG: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """(N, K) codes times scales, in float32 or better."""
    dtype = torch.promote_types(codes_NK.dtype, torch.float32)
    return codes_NK.to(dtype) * by_column(scales_NG.to(dtype), codes_NK.shape[1], group)


def fake_quantize(weight: torch.Tensor, bits: int, group: int | None = None, clip: float | None = None) -> torch.Tensor:
    """The values to which `integer_codes` rounds a weight (..., K), in its dtype; arguments as of `integer_scales`."""
    weight_NK = weight.flatten(0, -2)
    wide_NK = weight_NK.to(torch.promote_types(weight.dtype, torch.float32))
    scales_NG = integer_scales(wide_NK, bits, group, clip)
    codes_NK = integer_codes(wide_NK, scales_NG, bits, group)
    return integer_values(codes_NK, scales_NG, group).to(weight.dtype).view_as(weight)


def in_groups(weight_NK: torch.Tensor, group: int | None) -> torch.Tensor:
    """(N, groups, group), the last one filled with zeros; without groups (N, 1, K)."""
    if group is None:
        return weight_NK[:, None]
    return F.pad(weight_NK, (0, -weight_NK.shape[1] % group)).unflatten(1, (-1, group))


def by_column(scales_NG: torch.Tensor, width: int, group: int | None) -> torch.Tensor:
    """The scale of each of `width` columns: (N, width), or without groups (N, 1)."""
    return scales_NG if group is None else scales_NG.repeat_interleave(group, dim=1)[:, :width]
