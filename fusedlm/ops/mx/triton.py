"""Conversion to the MX formats and back in Triton: one read and one write, the same integer arithmetic as the
reference, packed in registers."""

import torch
import triton
import triton.language as tl

from fusedlm.ops.mx.formats import BLOCK, FORMATS, MXFormat, MXTensor

_BLOCKS = 32  # that a program converts


@triton.jit
def _scale(
    largest, EMAX: tl.constexpr, LARGEST_MANTISSA: tl.constexpr, LARGEST_SUBNORMAL: tl.constexpr, RCEIL: tl.constexpr,
):  # fmt: skip
    exponent = largest >> 23
    mantissa = largest & 0x7FFFFF
    code = exponent - EMAX
    if RCEIL:
        code += (mantissa > LARGEST_MANTISSA).to(tl.int32)
        code = tl.where(exponent == 0, (mantissa > LARGEST_SUBNORMAL).to(tl.int32), code)
    code = tl.minimum(tl.maximum(code, 0), 254)
    return tl.where(largest >= 0x7F800000, 255, code)


@triton.jit
def _encode(
    bits, scale, BITS: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
):  # fmt: skip
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | ((exponent > 0).to(tl.int32) << 23)
    leading = (significand.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    lowest = tl.maximum(exponent, 1) - 23 - scale
    step = tl.maximum(lowest + leading, EMIN)
    if INTEGER:
        step = tl.zeros_like(step)
    drop = step - MANTISSA - lowest
    significand = significand << tl.maximum(-drop, 0)
    drop = tl.minimum(tl.maximum(drop, 0), 25)
    one = tl.full(drop.shape, 1, tl.int32)
    kept = significand >> drop
    rest = significand & ((one << drop) - 1)
    half = (one << drop) >> 1
    kept += ((rest > half) | ((rest == half) & (drop > 0) & ((kept & 1) == 1))).to(tl.int32)
    code = tl.minimum(kept + ((step - EMIN) << MANTISSA), LARGEST)
    negative = bits < 0
    code = (tl.where(negative, -code, code) & 0xFF) if INTEGER else (code | (negative.to(tl.int32) << (BITS - 1)))
    return tl.where(scale == 255, 0, code)


@triton.jit
def quantize_kernel(
    x, codes, scales, n_total, n_blocks, width,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr, LARGEST: tl.constexpr,
    LARGEST_MANTISSA: tl.constexpr, LARGEST_SUBNORMAL: tl.constexpr, INTEGER: tl.constexpr, RCEIL: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % n_blocks * 32)[:, None] + tl.arange(0, 32)[None, :]
    inside = block < n_total
    at = (block // n_blocks * width)[:, None] + column
    value = tl.load(x + at, mask=inside[:, None] & (column < width), other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    scale = _scale(tl.max(bits & 0x7FFFFFFF, 1), EMAX, LARGEST_MANTISSA, LARGEST_SUBNORMAL, RCEIL)
    tl.store(scales + block, scale.to(tl.uint8), mask=inside)
    code = _encode(bits, scale[:, None], BITS, MANTISSA, EMIN, LARGEST, INTEGER)
    out = codes + (block * (4 * BITS))[:, None]
    if BITS == 8:
        tl.store(out + tl.arange(0, 32)[None, :], code.to(tl.uint8), mask=inside[:, None])
    elif BITS == 4:
        low, high = tl.split(tl.reshape(code, (BLOCKS, 16, 2)))
        tl.store(out + tl.arange(0, 16)[None, :], (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
    else:
        even, odd = tl.split(tl.reshape(code, (BLOCKS, 8, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        word = a | (b << 6) | (c << 12) | (d << 18)
        at = out + 3 * tl.arange(0, 8)[None, :]
        tl.store(at, (word & 0xFF).to(tl.uint8), mask=inside[:, None])
        tl.store(at + 1, ((word >> 8) & 0xFF).to(tl.uint8), mask=inside[:, None])
        tl.store(at + 2, (word >> 16).to(tl.uint8), mask=inside[:, None])


@triton.jit
def element_value(
    code, BITS: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """The value of int32 codes, float32."""
    if INTEGER:
        value = (code - ((code >> 7) << 8)).to(tl.float32) * (1.0 / (1 << MANTISSA))
    else:
        magnitude = code & ((1 << (BITS - 1)) - 1)
        fraction = magnitude & ((1 << MANTISSA) - 1)
        normal = ((magnitude + ((126 + EMIN) << MANTISSA)) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
        subnormal = fraction.to(tl.float32) * (1.0 / (1 << (MANTISSA - EMIN)))
        value = tl.where((magnitude >> MANTISSA) == 0, subnormal, normal)
        if BITS == 8:
            value = tl.where(magnitude > LARGEST, float("nan"), value)
            if MANTISSA == 2:
                value = tl.where(magnitude == LARGEST + 1, float("inf"), value)
        value = tl.where((code >> (BITS - 1)) == 1, -value, value)
    return value


@triton.jit
def scale_value(scale):
    """2^(scale - 127) of int32 E8M0 codes, float32."""
    bits = tl.where(scale == 0, 1 << 22, scale << 23)
    return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def dequantize_kernel(
    codes, scales, out, n_total, n_blocks, width,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < n_total
    start = codes + (block * (4 * BITS))[:, None]
    if BITS == 8:
        code = tl.load(start + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    elif BITS == 4:
        both = tl.load(start + tl.arange(0, 16)[None, :], mask=inside[:, None], other=0).to(tl.int32)
        code = tl.reshape(tl.join(both & 0xF, both >> 4), (BLOCKS, 32))
    else:
        at = start + 3 * tl.arange(0, 8)[None, :]
        word = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
        word |= tl.load(at + 1, mask=inside[:, None], other=0).to(tl.int32) << 8
        word |= tl.load(at + 2, mask=inside[:, None], other=0).to(tl.int32) << 16
        even = tl.join(word & 0x3F, (word >> 12) & 0x3F)
        odd = tl.join((word >> 6) & 0x3F, word >> 18)
        code = tl.reshape(tl.join(even, odd), (BLOCKS, 32))
    scale = scale_value(tl.load(scales + block, mask=inside, other=0).to(tl.int32))
    value = element_value(code, BITS, MANTISSA, EMIN, LARGEST, INTEGER) * scale[:, None]
    column = (block % n_blocks * 32)[:, None] + tl.arange(0, 32)[None, :]
    at = out + (block // n_blocks * width)[:, None] + column
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None] & (column < width))


def element_constants(format: MXFormat) -> dict:
    """Constants of `element_value`."""
    return {
        "BITS": format.bits,
        "MANTISSA": format.mantissa,
        "EMIN": format.emin,
        "LARGEST": format.largest,
        "INTEGER": format.is_integer,
    }


@torch.library.custom_op("fusedlm::quantize_mx", mutates_args=())
def _quantize(x: torch.Tensor, format: str, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _allocate(x, format)
    x, width, n_blocks, kind = x.contiguous(), x.shape[-1], scales.shape[-1], FORMATS[format]
    if scales.numel():
        quantize_kernel[(triton.cdiv(scales.numel(), _BLOCKS),)](
            x, codes, scales, scales.numel(), n_blocks, width, **element_constants(kind), EMAX=kind.emax,
            LARGEST_MANTISSA=kind.largest_mantissa, LARGEST_SUBNORMAL=int(kind.largest_value * 2**22),
            RCEIL=scaling == "rceil", BLOCKS=_BLOCKS,
        )  # fmt: skip
    return codes, scales


def _allocate(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    n_blocks = -(-x.shape[-1] // BLOCK)
    shapes = FORMATS[format].n_bytes(n_blocks), n_blocks
    return tuple(torch.empty(*x.shape[:-1], n, dtype=torch.uint8, device=x.device) for n in shapes)


@_quantize.register_fake
def _(x, format, scaling):
    return _allocate(x, format)


@torch.library.custom_op("fusedlm::dequantize_mx", mutates_args=())
def _dequantize(codes: torch.Tensor, scales: torch.Tensor, width: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(*scales.shape[:-1], width, dtype=dtype, device=codes.device)
    if out.numel():
        dequantize_kernel[(triton.cdiv(scales.numel(), _BLOCKS),)](
            codes.contiguous(), scales.contiguous(), out, scales.numel(), scales.shape[-1], width,
            **element_constants(FORMATS[format]), BLOCKS=_BLOCKS,
        )  # fmt: skip
    return out


@_dequantize.register_fake
def _(codes, scales, width, format, dtype):
    return torch.empty(*scales.shape[:-1], width, dtype=dtype, device=codes.device)


def quantize(x, format, scaling):
    codes, scales = _quantize(x.detach(), format, scaling)
    return MXTensor(codes, scales, tuple(x.shape), FORMATS[format])


def dequantize(codes, scales, width, format, dtype):
    return _dequantize(codes, scales, width, format, dtype)
