"""Conversion to the MX formats and back in plain PyTorch, by integer arithmetic on the bits of float32.

Section 6.3 of the standard: the scale is a power of two from the largest magnitude of the block, elements are rounded
to nearest even and clamped to the largest one. No float product is rounded, so results do not depend on how a device
treats subnormal numbers.
"""

import torch
import torch.nn.functional as F

from fusedlm.ops.mx.formats import BLOCK, NAN_SCALE, SCALE_BIAS, MXFormat

_EXPONENT = 0x7F800000  # of float32
_MANTISSA = 0x007FFFFF
_ROUNDS_TO_ZERO = 25  # bits to drop from a significand of 24 so that nothing is left


def quantize(x: torch.Tensor, format: MXFormat, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of x (..., K) in float32 or less, as in `MXTensor`."""
    n_blocks = -(-x.shape[-1] // BLOCK)
    x = F.pad(x.float(), (0, n_blocks * BLOCK - x.shape[-1])).unflatten(-1, (n_blocks, BLOCK))
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    scale = scale_of(magnitude.amax(-1, keepdim=True), format, scaling)
    code = encode(magnitude, bits < 0, scale, format)
    code = torch.where(scale == NAN_SCALE, 0, code).to(torch.uint8)
    return pack(code.flatten(-2), format), scale.squeeze(-1).to(torch.uint8)


def scale_of(largest: torch.Tensor, format: MXFormat, scaling: str) -> torch.Tensor:
    """The E8M0 code of blocks by the bits of their largest magnitude, int32.

    floor: 2^(floor(log2 largest) - emax). rceil: the smallest power of two by which no element is clamped,
    2^ceil(log2(largest / largest element)). Either is at least 2^-127.
    """
    exponent, mantissa = largest >> 23, largest & _MANTISSA
    code = exponent - format.emax
    if scaling == "rceil":
        code += (mantissa > format.largest_mantissa).int()
        # A subnormal of float32 is mantissa * 2^-149, which code 0 fits up to largest element * 2^-127.
        code = torch.where(exponent == 0, (mantissa > format.largest_value * 2**22).int(), code)
    code = code.clamp(0, NAN_SCALE - 1)
    return torch.where(largest >= _EXPONENT, NAN_SCALE, code)


def encode(magnitude: torch.Tensor, negative: torch.Tensor, scale: torch.Tensor, format: MXFormat) -> torch.Tensor:
    """The codes of elements, int32, by the bits of their magnitude, their sign, and the code of their scale."""
    exponent = magnitude >> 23
    # |x| = significand * 2^(exponent - 150); of subnormals the leading bit is lower than 23.
    significand = (magnitude & _MANTISSA) | ((exponent > 0).int() << 23)
    exponent = exponent.clamp_min(1)
    leading = (significand.float().view(torch.int32) >> 23) - 127
    lowest = exponent - 150 - (scale - SCALE_BIAS)  # exponent of the lowest bit, over the scale
    step = (lowest + leading).clamp_min(format.emin)  # exponent of the element before rounding
    if format.is_integer:
        step = torch.zeros_like(step)
    drop = step - format.mantissa - lowest
    significand = significand << (-drop).clamp_min(0)
    drop = drop.clamp(0, _ROUNDS_TO_ZERO)
    kept, rest, half = significand >> drop, significand & ((1 << drop) - 1), (1 << drop) >> 1
    kept = kept + ((rest > half) | ((rest == half) & (drop > 0) & (kept & 1 == 1))).int()
    # A mantissa that overflows carries into the exponent.
    code = (kept + ((step - format.emin) << format.mantissa)).clamp_max(format.largest)
    if format.is_integer:
        return torch.where(negative, -code, code) & 0xFF
    return code | (negative.int() << (format.bits - 1))


def pack(code: torch.Tensor, format: MXFormat) -> torch.Tensor:
    """(..., n) uint8, one element each, to bytes."""
    if format.bits == 4:
        return code[..., ::2] | (code[..., 1::2] << 4)
    if format.bits == 6:
        a, b, c, d = code.unflatten(-1, (-1, 4)).unbind(-1)
        return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(-2)
    return code


def unpack(packed: torch.Tensor, format: MXFormat) -> torch.Tensor:
    """The reverse of `pack`."""
    if format.bits == 4:
        return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    if format.bits == 6:
        a, b, c = packed.unflatten(-1, (-1, 3)).unbind(-1)
        parts = (a & 0x3F, (a >> 6) | ((b & 0xF) << 2), (b >> 4) | ((c & 0x3) << 4), c >> 2)
        return torch.stack(parts, -1).flatten(-2)
    return packed


def element_values(format: MXFormat, device: torch.device) -> torch.Tensor:
    """The value of every code, float32. It is computed on the device: a CUDA graph cannot copy it there."""
    code = torch.arange(1 << format.bits, device=device)
    if format.is_integer:
        return (code - ((code >> 7) << 8)).float() / 2**format.mantissa
    magnitude = code & ((1 << (format.bits - 1)) - 1)
    exponent, mantissa = magnitude >> format.mantissa, magnitude & ((1 << format.mantissa) - 1)
    fraction = mantissa + ((exponent > 0).long() << format.mantissa)
    value = torch.ldexp(fraction.double(), exponent.clamp_min(1) - 1 + format.emin - format.mantissa)
    if format.bits == 8:  # E4M3 has one NaN, E5M2 is as IEEE 754 has it (OCP 8-bit floating point, table 1)
        value = torch.where(magnitude > format.largest, torch.nan, value)
        if format.mantissa == 2:
            value = torch.where(magnitude == format.largest + 1, torch.inf, value)
    return torch.where(code >> (format.bits - 1) == 1, -value, value).float()


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """2^(scale - 127) of uint8 E8M0 codes, float32; code 0 is the subnormal 2^-127."""
    bits = scales.int() << 23
    bits = torch.where(scales == 0, 1 << 22, bits)
    return torch.where(scales == NAN_SCALE, _EXPONENT | 1 << 22, bits).view(torch.float32)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, width: int, format: MXFormat, dtype) -> torch.Tensor:
    """(..., width) in dtype; exact in float64, and in float32 up to its largest number; rounded once to others."""
    code = unpack(codes, format)
    value = element_values(format, code.device).to(torch.promote_types(dtype, torch.float32))[code.int()]
    product = value.unflatten(-1, (-1, BLOCK)) * scale_values(scales)[..., None]
    return product.flatten(-2)[..., :width].to(dtype)
