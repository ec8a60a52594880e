"""Weights in few bits in plain PyTorch: rounding, values, and the product."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fusedlm.ops.mx import reference as mx
from fusedlm.ops.mx.formats import BLOCK, FORMATS, NAN_SCALE, SCALE_BIAS
from fusedlm.ops.quantized.integer import by_column, in_groups

MXFP4 = FORMATS["mxfp4"]
GROUPS = (32, 64, 128)  # elements of int4 that share a scale
DEFAULT_GROUP = 64
WEIGHT_FORMATS = ("mxfp4", "int4", "fp8", "int8")
_ALIGNMENT = 16  # bytes of a row of codes, which kernels load at a time
LARGEST = {"int4": 7, "fp8": 448, "int8": 127}


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (N, K) of weights.

    codes: (N, bytes) uint8. mxfp4 and int4: two elements per byte, the even one in the low nibble, the last group
        filled with zeros; int4 is stored plus 8. fp8: E4M3; int8: two's complement; rows are filled with zeros to
        a multiple of 16 bytes.
    scales: mxfp4 (N, groups) uint8, E8M0; int4 (N, groups) bfloat16; fp8 and int8 (N, 1) float32.
    width: K.
    format: one of WEIGHT_FORMATS.
    group: elements of a row that share a scale; 0: all.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    width: int
    format: str
    group: int

    def rows(self, start: int, n: int) -> "QuantizedWeight":
        """n rows from start on."""
        codes, scales = self.codes[start : start + n], self.scales[start : start + n]
        return QuantizedWeight(codes, scales, self.width, self.format, self.group)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def group_of(format: str, group: int | None) -> int:
    """Elements that share a scale, of a format and an argument; 0: a row.

    Raises:
        ValueError: the format is unknown, or has no such groups.
    """
    if format not in WEIGHT_FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(WEIGHT_FORMATS)}")
    if format == "int4" and group not in (None, *GROUPS):
        raise ValueError(f"group={group} must be one of {', '.join(map(str, GROUPS))}")
    if format != "int4" and group is not None:
        raise ValueError(f"group={group}: only int4 has groups to choose, {format} does not")
    return {"mxfp4": BLOCK, "int4": group or DEFAULT_GROUP}.get(format, 0)


def layout(n_rows: int, width: int, format: str, group: int) -> tuple[tuple, tuple]:
    """((shape, dtype) of codes, (shape, dtype) of scales); group as `group_of` returns it."""
    n_groups = -(-width // group) if group else 1
    n_bytes = n_groups * group // 2 if group else -(-width // _ALIGNMENT) * _ALIGNMENT
    dtype = {"mxfp4": torch.uint8, "int4": torch.bfloat16}.get(format, torch.float32)
    return ((n_rows, n_bytes), torch.uint8), ((n_rows, n_groups), dtype)


def quantize(weight: torch.Tensor, format: str, group: int) -> QuantizedWeight:
    """Every element rounded to nearest even, by itself. weight: (N, K) finite; group as `group_of` returns it."""
    weight, width = weight.detach().float(), weight.shape[1]
    if format == "mxfp4":
        codes, scales = mx.quantize(weight, MXFP4, "floor")
        return QuantizedWeight(codes, scales, width, format, group)
    scales = scales_of(weight, format, group)
    divisor = by_column(scales.float(), width, group or None)
    # Of zeros, and of numbers so small that their scale is zero.
    levels = nearest_levels(torch.where(divisor > 0, weight / divisor, 0.0), format)
    return encode(levels, scales, format, group)


def scales_of(weight: torch.Tensor, format: str, group: int, ratio: float = 1.0) -> torch.Tensor:
    """The scales of a finite weight (N, K) float32, as a `QuantizedWeight` stores them.

    Args:
        ratio: the largest element stands for this fraction of the largest magnitude. mxfp4 has powers of two: the
            exponent changes by log2(ratio), rounded.
    """
    if not weight.shape[1]:
        (_, _), (shape, dtype) = layout(len(weight), 0, format, group)
        return weight.new_zeros(shape, dtype=dtype)
    magnitude = in_groups(weight, group or None).abs().amax(-1)
    if format == "mxfp4":
        exponent = mx.scale_of(magnitude.view(torch.int32), MXFP4, "floor") + round(math.log2(ratio))
        return exponent.clamp(0, NAN_SCALE - 1).to(torch.uint8)
    return (ratio * magnitude / LARGEST[format]).to(torch.bfloat16 if format == "int4" else torch.float32)


def scale_values(scales: torch.Tensor, format: str) -> torch.Tensor:
    """What stored scales stand for, float32."""
    return mx.scale_values(scales) if format == "mxfp4" else scales.float()


def nearest_levels(scaled: torch.Tensor, format: str) -> torch.Tensor:
    """The values of the nearest elements of numbers that were divided by their scale: ties to even, clamped; in the
    dtype of the numbers."""
    if format == "mxfp4":
        bits = scaled.float().contiguous().view(torch.int32)
        code = mx.encode(bits & 0x7FFFFFFF, bits < 0, torch.full_like(bits, SCALE_BIAS), MXFP4)
        return mx.element_values(MXFP4, scaled.device).to(scaled.dtype)[code]
    clamped = scaled.clamp(-LARGEST[format], LARGEST[format])
    return clamped.to(torch.float8_e4m3fn).to(scaled.dtype) if format == "fp8" else clamped.round()


def encode(levels: torch.Tensor, scales: torch.Tensor, format: str, group: int) -> QuantizedWeight:
    """The weight of levels (N, K), values of `nearest_levels`, and stored scales; group as `group_of` returns it."""
    width = levels.shape[1]
    filled = F.pad(levels.float(), (0, -width % (group or _ALIGNMENT)))
    if format == "mxfp4":
        bits = filled.view(torch.int32)
        codes = mx.encode(bits & 0x7FFFFFFF, bits < 0, torch.full_like(bits, SCALE_BIAS), MXFP4)
        codes = mx.pack(codes.to(torch.uint8), MXFP4)
    elif format == "fp8":
        codes = filled.to(torch.float8_e4m3fn).view(torch.uint8)
    elif format == "int4":
        codes = mx.pack((filled.to(torch.int8) + 8).view(torch.uint8), MXFP4)
    else:
        codes = filled.to(torch.int8).view(torch.uint8)
    return QuantizedWeight(codes, scales, width, format, group)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """(N, K): code times scale, computed in float32 or better."""
    if weight.format == "mxfp4":
        return mx.dequantize(weight.codes, weight.scales, weight.width, MXFP4, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if weight.format == "fp8":
        values = weight.codes.view(torch.float8_e4m3fn).to(wide)
    elif weight.format == "int8":
        values = weight.codes.view(torch.int8).to(wide)
    else:
        values = mx.unpack(weight.codes, MXFP4).to(wide) - 8
    scales = weight.scales.to(wide)
    if weight.group:
        values = (values.unflatten(1, (-1, weight.group)) * scales[..., None]).flatten(1)
    else:
        values = values * scales
    return values[:, : weight.width].to(dtype)


def quantized_linear(x: torch.Tensor, codes, scales, width: int, format: str, group: int) -> torch.Tensor:
    """x (..., K) times the values in its dtype: (..., N)."""
    return F.linear(x, dequantize(QuantizedWeight(codes, scales, width, format, group), x.dtype))
