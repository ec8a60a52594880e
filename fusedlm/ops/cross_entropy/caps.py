"""Soft caps of logits in Triton: exponents and derivatives.

A cap is cap tanh(z / width), z the logit plus a center. The tanh cap has width cap and center 0. The sigmoid cap
a sigmoid((z + b) / c) is a / 2 + (a / 2) tanh((z + b) / (2 c)), whose constant changes the log normaliser alone. With
r = 1 / (1 + exp(2 z / width)) both the capped exponent, exp(cap (1 - 2r)), and the derivative, 4 r (1 - r) cap / width,
are free of cancellation, except for float32 values much smaller than the width, for which 1 - 2r keeps too few digits.

rate is 2 log2(e) / width. Exponents are base 2.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
SMALL = tl.constexpr(2.0**-15)  # keeps products of eight terms within float32
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without a GPU there is no assembler

# CAP, in all kernels: no cap, a tanh cap, the same accurate to the last digits of float32, and the two for a sigmoid.
UNCAPPED = tl.constexpr(0)
CAPPED = tl.constexpr(1)
CAPPED_PRECISELY = tl.constexpr(2)
SHIFTED = tl.constexpr(3)
SHIFTED_PRECISELY = tl.constexpr(4)


@triton.jit
def reciprocal(x):
    """1 / x for 2^-122 <= x <= 2^122, by the approximate reciprocal: a division adds seven instructions per pair of
    elements to cover the rest of the range."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def to_float32(x):
    """x in float32. From bfloat16 this is one instruction per element; the compiler's is three for two."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        )
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _precisely(u, y, peak):
    """peak tanh(y) where y is near 0, u elsewhere."""
    s = y * y
    # (tanh(y) / y - 1) / y^2, interpolated at Chebyshev points in [0, 0.56^2]; the relative error of tanh is 4e-9.
    p = -0.333333292 + s * (0.133329747 + s * (-0.0538912034 + s * (0.0212217131 - s * 0.00647084486)))
    return tl.where(s < 0.3, (y + y * s * p) * peak, u)


@triton.jit
def capped_exponent(z, r, cap, rate, CAP: tl.constexpr):
    """log2 of exp(cap tanh(z / width)), from z and r = 1 / (1 + exp(2 z / width))."""
    peak = cap * LOG2E
    u = peak - (2.0 * peak) * r
    if CAP == CAPPED_PRECISELY:
        u = _precisely(u, z / cap, peak)
    elif CAP == SHIFTED_PRECISELY:
        u = _precisely(u, z * (rate * (0.5 * LN2)), peak)
    return u


@triton.jit
def reciprocals_by_two(x):
    """`SMALL` / x of a tile (ROWS, BLOCK), one division for two adjacent elements."""
    if x.shape[1] == 1:
        return reciprocal(x) * SMALL
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        shared = reciprocal(a * b) * SMALL
        return tl.reshape(tl.join(b * shared, a * shared), x.shape)


@triton.jit
def reciprocals(x, FULL_ROWS: tl.constexpr):
    """`SMALL` / x of a tile (ROWS, BLOCK), one division for two adjacent elements, or with FULL_ROWS for four."""
    if not FULL_ROWS or x.shape[1] == 1:
        return reciprocals_by_two(x)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        shared = reciprocals_by_two(a * b)
        return tl.reshape(tl.join(b * shared, a * shared), x.shape)


@triton.jit
def exponents(a, b, cap, rate, center, CAP: tl.constexpr, FULL_ROWS: tl.constexpr):
    """For two tiles, log2 of exp(capped z), and r, which gives the derivative of the cap (0 without a cap).

    One division serves four elements, or eight with FULL_ROWS, which leave registers for it: exponentials and divisions
    are the bottleneck."""
    if CAP == UNCAPPED:
        return a * LOG2E, tl.zeros_like(a), b * LOG2E, tl.zeros_like(b)
    else:
        if CAP >= SHIFTED:
            a, b = a + center, b + center
        # 2^-15 (1 + exp(2 z / width)), at most 2^15, so that the product of eight and its reciprocal are within
        # float32. From 2^30 on r is negligible beside 1. NaN must stay NaN.
        p = SMALL + tl.exp2(tl.minimum(a * rate - 15.0, 15.0, propagate_nan=tl.PropagateNan.ALL))
        q = SMALL + tl.exp2(tl.minimum(b * rate - 15.0, 15.0, propagate_nan=tl.PropagateNan.ALL))
        shared = reciprocals(p * q, FULL_ROWS)
        r_a, r_b = q * shared, p * shared
        return capped_exponent(a, r_a, cap, rate, CAP), r_a, capped_exponent(b, r_b, cap, rate, CAP), r_b


@triton.jit
def log_normaliser(peak, log2_total, cap, CAP: tl.constexpr):
    """The log of the sum of the exponentials of the capped logits, from the peak exponent and log2 of the rest."""
    lse = (peak + log2_total) * LN2
    if CAP >= SHIFTED:
        lse += cap
    return lse


@triton.jit
def slope_scale(cap, rate, CAP: tl.constexpr):
    """Factor of r (1 - r) in the derivative of a cap."""
    if CAP >= SHIFTED:
        return cap * rate * (2.0 * LN2)
    else:
        return 4.0
