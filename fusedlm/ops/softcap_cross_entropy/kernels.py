"""The kernels of soft-capped cross entropy: on whole rows where they are narrow, on two blocks at a time where not.

With a cap the arithmetic needs no maximum: exp(cap tanh(z / cap)) lies within exp(-cap) and exp(cap), which float32
holds up to a cap of some 40, for sums over any vocabulary and for what is divided by them. With
r = 1 / (1 + exp(2 z / cap)) both what is summed, exp(cap (1 - 2r)), and the derivative of the cap, 4 r (1 - r), come
without cancellation, but for float32 logits much smaller than the cap, of which 1 - 2r keeps too few digits.

cap and rate, in all kernels: the cap, and 2 log2(e) / cap.

OVERLAPPED, in the kernels that have it: what comes next may be launched before this ends, and this may have been
launched before what is in front of it, the count of rows or the losses, has ended.
"""

import math

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.softcap_cross_entropy.reference import IGNORE_INDEX

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_IGNORE = tl.constexpr(IGNORE_INDEX)
_LOWEST = tl.constexpr(-3.0e38)  # finite: a difference of two infinities would be NaN
_DONE = tl.constexpr("evict_first")  # of what no one reads again: the cache is for what is read twice
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without a GPU there is no assembler

_SMALL = tl.constexpr(2.0**-15)  # keeps products of eight within float32

# CAP, in all kernels: whether there is none, or one, or one to float32's last digits.
UNCAPPED = tl.constexpr(0)
CAPPED = tl.constexpr(1)
CAPPED_PRECISELY = tl.constexpr(2)


@triton.jit
def _inverse(x):
    """1 / x of 2^-122 <= x <= 2^122, where the device's reciprocal needs none of the care that a division takes with
    numbers beyond: seven instructions of every pair."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _widened(x):
    """x in float32; of bfloat16 with one instruction a number where the compiler has three for two."""
    if _INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        )
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bent(z, r, cap, CAP: tl.constexpr):
    """log2 of exp(cap tanh(z / cap)) of z and r = 1 / (1 + exp(2 z / cap))."""
    peak = cap * _LOG2E
    u = peak - (2.0 * peak) * r
    if CAP == CAPPED_PRECISELY:
        y = z / cap
        s = y * y
        # (tanh(y) / y - 1) / y^2, fitted at the Chebyshev points of 0 to 0.56^2; tanh is right to 4e-9 of itself.
        p = -0.333333292 + s * (0.133329747 + s * (-0.0538912034 + s * (0.0212217131 - s * 0.00647084486)))
        u = tl.where(s < 0.3, (y + y * s * p) * peak, u)
    return u


@triton.jit
def _inverses_of_pairs(x):
    """`_SMALL` / x of a tile (ROWS, BLOCK), of neighbours with one division for two."""
    if x.shape[1] == 1:
        return _inverse(x) * _SMALL
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        inverse = _inverse(a * b) * _SMALL
        return tl.reshape(tl.join(b * inverse, a * inverse), x.shape)


@triton.jit
def _inverses(x, WHOLE: tl.constexpr):
    """`_SMALL` / x of a tile (ROWS, BLOCK), of neighbours with one division for two, or of WHOLE rows for four."""
    if not WHOLE or x.shape[1] == 1:
        return _inverses_of_pairs(x)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        inverse = _inverses_of_pairs(a * b)
        return tl.reshape(tl.join(b * inverse, a * inverse), x.shape)


@triton.jit
def _exponents(a, b, cap, rate, CAP: tl.constexpr, WHOLE: tl.constexpr):
    """Of two tiles log2 of exp(capped z) and r, of which the derivative of the cap is made (0 without a cap), with one
    division for four, or of WHOLE rows, which leave the registers for it, for eight: exponentials and divisions are
    what the kernels wait for."""
    if CAP == UNCAPPED:
        return a * _LOG2E, tl.zeros_like(a), b * _LOG2E, tl.zeros_like(b)
    else:
        # 1 + exp(2 z / cap) times 2^-15, at most 2^15, so that of eight the product is within float32 and so is what it
        # divides. From 2^30 on r is nothing beside 1. NaN must stay NaN.
        p = _SMALL + tl.exp2(tl.minimum(a * rate - 15.0, 15.0, propagate_nan=tl.PropagateNan.ALL))
        q = _SMALL + tl.exp2(tl.minimum(b * rate - 15.0, 15.0, propagate_nan=tl.PropagateNan.ALL))
        inverse = _inverses(p * q, WHOLE)
        r_a, r_b = q * inverse, p * inverse
        return _bent(a, r_a, cap, CAP), r_a, _bent(b, r_b, cap, CAP), r_b


@triton.jit
def _load_pair(pointers, start, n, BLOCK: tl.constexpr):
    """Two tiles side by side, the first n of each row; 0 beyond, and which are not beyond."""
    column = start + tl.arange(0, BLOCK)[None, :]
    in_a, in_b = column < n, column + BLOCK < n
    a = _widened(tl.load(pointers + start, mask=in_a, other=0.0))
    b = _widened(tl.load(pointers + start + BLOCK, mask=in_b, other=0.0))
    return a, b, in_a, in_b


@triton.jit
def _read(target, n):
    """How much of the rows is read: nothing where all are ignored."""
    return tl.where(tl.max(tl.where(target == _IGNORE, 0, 1), 0) > 0, n, 0)


@triton.jit
def _add_pair(total, peak, u_a, u_b, in_a, in_b, BOUNDED: tl.constexpr, MASKED: tl.constexpr):
    """The sum of 2^(u - peak), and the peak, with those of two tiles."""
    if not BOUNDED:
        if MASKED:
            u_a, u_b = tl.where(in_a, u_a, _LOWEST), tl.where(in_b, u_b, _LOWEST)
        higher = tl.maximum(peak, tl.max(tl.maximum(u_a, u_b), 1))
        total *= tl.exp2(peak - higher)[:, None]
        peak = higher
        u_a, u_b = u_a - peak[:, None], u_b - peak[:, None]
    e_a, e_b = tl.exp2(u_a), tl.exp2(u_b)
    if MASKED:
        e_a, e_b = tl.where(in_a, e_a, 0.0), tl.where(in_b, e_b, 0.0)
    return total + (e_a + e_b), peak


@triton.jit
def _add_whole_pair(
    pointers, total, peak, cap, rate,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    a = _widened(tl.load(pointers, eviction_policy=EVICTION))
    b = _widened(tl.load(pointers + BLOCK, eviction_policy=EVICTION))
    u_a, _, u_b, _ = _exponents(a, b, cap, rate, CAP, False)
    return _add_pair(total, peak, u_a, u_b, True, True, BOUNDED, False)


@triton.jit
def _normalisers(
    pointers, n, kept, cap, rate, CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest exponent of each row (ROWS,), 0 where BOUNDED, and log2 of the sum of 2^(u - highest) over the first
    n; both 0 for n = 0. kept: how many of the last shall stay in the cache, a multiple of both blocks."""
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        peak += _LOWEST
    # Without masks, which cost as much as the rest.
    whole = n // (2 * BLOCK) * (2 * BLOCK)
    passing = tl.maximum(whole - kept, 0)
    for start in range(0, passing, 2 * BLOCK):
        total, peak = _add_whole_pair(pointers + start, total, peak, cap, rate, CAP, BOUNDED, BLOCK, _DONE)
    for start in range(passing, whole, 2 * BLOCK):
        total, peak = _add_whole_pair(pointers + start, total, peak, cap, rate, CAP, BOUNDED, BLOCK, "evict_last")
    if whole < n:
        a, b, in_a, in_b = _load_pair(pointers, whole, n, BLOCK)
        u_a, _, u_b, _ = _exponents(a, b, cap, rate, CAP, False)
        total, peak = _add_pair(total, peak, u_a, u_b, in_a, in_b, BOUNDED, True)
    return tl.where(n > 0, peak, 0.0), tl.log2(tl.where(n > 0, tl.sum(total, 1), 1.0))


@triton.jit
def _at_targets(rows, target, n, cap, rate, CAP: tl.constexpr):
    """Exponent of each row's target, and a quarter of the derivative of the cap there (1 without one), which is not
    made of the difference of 1 and r: it can be most of the row's gradient. Of 0 where the target is none of the n."""
    z = tl.load(rows + target, mask=(target >= 0) & (target < n), other=0.0).to(tl.float32)
    if CAP == UNCAPPED:
        return z * _LOG2E, tl.full(z.shape, 1.0, dtype=tl.float32)
    else:
        e = tl.exp2(tl.minimum(z * rate, 60.0, propagate_nan=tl.PropagateNan.ALL))
        r = _inverse(1.0 + e)
        return _bent(z, r, cap, CAP), e * r * r


@triton.jit
def _losses_of(u, target, n, peak, log2_total, z_loss):
    """0 where ignored, NaN where the target is no class."""
    lse = (peak + log2_total) * _LN2
    loss = (log2_total - (u - peak)) * _LN2 + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < n), loss, float("nan"))
    return tl.where(target == _IGNORE, 0.0, loss)


@triton.jit
def _sum_of_counts(counts, N_COUNTS: tl.constexpr):
    return tl.sum(tl.load(counts + tl.arange(0, N_COUNTS)), 0).to(tl.float32)


@triton.jit
def _weights_of(weights, row, stride, N_COUNTS: tl.constexpr):
    """What each row's loss is multiplied by. N_COUNTS: of the counts one over whose sum it is; 0: it is a number of its
    own; -1: it is 1."""
    weight = tl.full(row.shape, 1.0, dtype=tl.float32)
    if N_COUNTS == 0:
        weight *= tl.load(weights + row * stride).to(tl.float32)
    elif N_COUNTS > 0:
        weight /= _sum_of_counts(weights, N_COUNTS)
    return weight


@triton.jit
def _factors(scale, target, peak, log2_total, z_loss, CAP: tl.constexpr):
    """What 2^(u - peak) is multiplied by for the gradient, of it the scale of the row, and what the square of the
    normaliser adds to a share."""
    scale = tl.where(target == _IGNORE, 0.0, scale)
    if CAP != UNCAPPED:
        scale *= 4.0  # of the derivative of the cap
    pull = 2.0 * z_loss * (peak + log2_total) * _LN2
    return scale * (1.0 + pull) * tl.exp2(-log2_total), scale, pull


@triton.jit
def _through_cap(gradient, r, CAP: tl.constexpr):
    """Times the derivative of the cap, but for its factor of 4."""
    if CAP != UNCAPPED:
        gradient *= r - r * r
    return gradient


@triton.jit
def _gradients(a, b, factor, peak, cap, rate, CAP: tl.constexpr, BOUNDED: tl.constexpr):
    u_a, r_a, u_b, r_b = _exponents(a, b, cap, rate, CAP, False)
    if not BOUNDED:
        u_a, u_b = u_a - peak, u_b - peak
    e_a, e_b = tl.exp2(u_a), tl.exp2(u_b)
    return _through_cap(e_a * factor, r_a, CAP), _through_cap(e_b * factor, r_b, CAP)


@triton.jit
def _of_kept(gradient, target):
    """Zero for ignored rows, whatever their logits."""
    return tl.where((target != _IGNORE)[:, None], gradient, 0.0)


@triton.jit
def _store(pointers, gradient, mask, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    gradient = gradient.to(pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, gradient, mask=mask, eviction_policy=EVICTION)
    else:
        tl.store(pointers, gradient, eviction_policy=EVICTION)


@triton.jit
def _store_pair(
    pointers, start, a, b, in_a, in_b, row_inside, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Two tiles of gradients, zero in the padding."""
    if MASKED:
        column = start + tl.arange(0, BLOCK)[None, :]
        a, b = tl.where(in_a, a, 0.0), tl.where(in_b, b, 0.0)
        _store(pointers + start, a, (column < width) & row_inside[:, None], True, EVICTION)
        _store(pointers + start + BLOCK, b, (column + BLOCK < width) & row_inside[:, None], True, EVICTION)
    else:
        _store(pointers + start, a, row_inside[:, None], ROWS > 1, EVICTION)
        _store(pointers + start + BLOCK, b, row_inside[:, None], ROWS > 1, EVICTION)


@triton.jit
def _write_gradients(
    pointers, out_pointers, target, factor, peak, n, width, cap, rate, row_inside,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor times 2^(u - peak), through the cap; may overwrite the rows. A single row that is ignored is not read, so
    that all of it is padding."""
    peak, factor = peak[:, None], factor[:, None]
    whole = _read(target, n) // (2 * BLOCK) * (2 * BLOCK)
    for start in range(whole, width, 2 * BLOCK):
        a, b, in_a, in_b = _load_pair(pointers, start, _read(target, n), BLOCK)
        a, b = _gradients(a, b, factor, peak, cap, rate, CAP, BOUNDED)
        if ROWS > 1:
            a, b = _of_kept(a, target), _of_kept(b, target)
        _store_pair(out_pointers, start, a, b, in_a, in_b, row_inside, width, ROWS, BLOCK, True, _DONE)
    for past in range(0, whole, 2 * BLOCK):
        start = whole - 2 * BLOCK - past
        a = _widened(tl.load(pointers + start, eviction_policy=_DONE))
        b = _widened(tl.load(pointers + start + BLOCK, eviction_policy=_DONE))
        a, b = _gradients(a, b, factor, peak, cap, rate, CAP, BOUNDED)
        if ROWS > 1:
            a, b = _of_kept(a, target), _of_kept(b, target)
        _store_pair(out_pointers, start, a, b, True, True, row_inside, width, ROWS, BLOCK, False, _DONE)


@triton.jit
def _write_targets(out_rows, target, scale, pull, u, slope, n, peak, log2_total, row_inside):
    """The gradients of the targets themselves: last, so that no other element has to ask whether it is one."""
    tl.debug_barrier()  # another thread has written the share there
    share = tl.exp2(u - peak - log2_total)
    gradient = scale * (share - 1.0 + share * pull) * slope
    mask = (target >= 0) & (target < n) & row_inside
    tl.store(out_rows + target, gradient.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of(tile, targets, n_rows, ROWS: tl.constexpr):
    """Rows of a tile, the last repeated beyond the end, which of them there are, and their targets."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    return row, row_inside, tl.load(targets + row)


@triton.jit
def forward_kernel(
    logits, targets, loss, peaks, log2_totals, n_rows, row_stride, n, cap, rate, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    row, row_inside, target = _rows_of(tl.program_id(0), targets, n_rows, ROWS)
    rows = logits + row * row_stride
    pointers = rows[:, None] + tl.arange(0, BLOCK)[None, :]
    peak, log2_total = _normalisers(pointers, _read(target, n), 0, cap, rate, CAP, BOUNDED, ROWS, BLOCK)
    u, _ = _at_targets(rows, target, n, cap, rate, CAP)
    tl.store(peaks + row, peak, mask=row_inside)
    tl.store(log2_totals + row, log2_total, mask=row_inside)
    tl.store(loss + row, _losses_of(u, target, n, peak, log2_total, z_loss), mask=row_inside)


@triton.jit
def backward_kernel(
    logits, targets, peaks, log2_totals, upstream, gradient, n_rows, row_stride, upstream_stride, width, n, cap,
    rate, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, row_inside, target = _rows_of(tl.program_id(0), targets, n_rows, ROWS)
    peak, log2_total = tl.load(peaks + row), tl.load(log2_totals + row)
    scale = tl.load(upstream + row * upstream_stride).to(tl.float32)
    factor, scale, pull = _factors(scale, target, peak, log2_total, z_loss, CAP)
    rows, out_rows = logits + row * row_stride, gradient + row * width
    columns = tl.arange(0, BLOCK)[None, :]
    u, slope = _at_targets(rows, target, n, cap, rate, CAP)
    _write_gradients(
        rows[:, None] + columns, out_rows[:, None] + columns, target, factor, peak, n, width, cap, rate, row_inside,
        CAP, BOUNDED, ROWS, BLOCK,
    )  # fmt: skip
    _write_targets(out_rows, target, scale, pull, u, slope, n, peak, log2_total, row_inside)


@triton.jit
def both_kernel(
    logits, targets, weights, loss, gradient, n_rows, row_stride, gradient_stride, weight_stride, width, n, kept, cap,
    rate, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, N_COUNTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """gradient may be the logits themselves."""
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    row, row_inside, target = _rows_of(tl.program_id(0), targets, n_rows, ROWS)
    weight = _weights_of(weights, row, weight_stride, N_COUNTS)
    rows, out_rows = logits + row * row_stride, gradient + row * gradient_stride
    columns = tl.arange(0, BLOCK)[None, :]
    pointers, out_pointers = rows[:, None] + columns, out_rows[:, None] + columns
    u, slope = _at_targets(rows, target, n, cap, rate, CAP)
    peak, log2_total = _normalisers(pointers, _read(target, n), kept, cap, rate, CAP, BOUNDED, ROWS, BLOCK)
    tl.store(loss + row, _losses_of(u, target, n, peak, log2_total, z_loss), mask=row_inside)
    factor, scale, pull = _factors(weight, target, peak, log2_total, z_loss, CAP)
    tl.debug_barrier()  # all threads have read the targets' logits: the rows may be overwritten
    _write_gradients(
        pointers, out_pointers, target, factor, peak, n, width, cap, rate, row_inside, CAP, BOUNDED, ROWS, BLOCK
    )  # fmt: skip
    _write_targets(out_rows, target, scale, pull, u, slope, n, peak, log2_total, row_inside)


@triton.jit
def whole_rows_kernel(
    logits, targets, weights, loss, peaks, log2_totals, gradient, n_rows, row_stride, gradient_stride, weight_stride,
    width, n, cap, rate, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, N_COUNTS: tl.constexpr, GRADIENT: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """`forward_kernel`, or with GRADIENT `both_kernel`, of rows that a pair of tiles holds: nothing is computed twice.
    FULL: rows are as wide as the pair. Rows to be ignored are read like the others: to wait for their targets first
    would take longer."""
    if OVERLAPPED:
        gdc_launch_dependents()
    row, row_inside, target = _rows_of(tl.program_id(0), targets, n_rows, ROWS)
    rows = logits + row * row_stride
    columns = tl.arange(0, BLOCK)[None, :]
    if FULL:
        in_a, in_b = True, True
        a = _widened(tl.load(rows[:, None] + columns))
        b = _widened(tl.load(rows[:, None] + columns + BLOCK))
    else:
        a, b, in_a, in_b = _load_pair(rows[:, None] + columns, 0, n, BLOCK)
    u, slope = _at_targets(rows, target, n, cap, rate, CAP)
    u_a, r_a, u_b, r_b = _exponents(a, b, cap, rate, CAP, True)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        if FULL:
            peak = tl.max(tl.maximum(u_a, u_b), 1)
        else:
            peak = tl.max(tl.maximum(tl.where(in_a, u_a, _LOWEST), tl.where(in_b, u_b, _LOWEST)), 1)
        u_a, u_b = u_a - peak[:, None], u_b - peak[:, None]
    e_a, e_b = tl.exp2(u_a), tl.exp2(u_b)
    if not FULL:
        e_a, e_b = tl.where(in_a, e_a, 0.0), tl.where(in_b, e_b, 0.0)
    log2_total = tl.log2(tl.sum(e_a + e_b, 1))
    if OVERLAPPED:
        gdc_wait()
    tl.store(loss + row, _losses_of(u, target, n, peak, log2_total, z_loss), mask=row_inside)
    if GRADIENT:
        weight = _weights_of(weights, row, weight_stride, N_COUNTS)
        factor, scale, pull = _factors(weight, target, peak, log2_total, z_loss, CAP)
        factor = factor[:, None]
        out_rows = gradient + row * gradient_stride
        tl.debug_barrier()  # all threads have read the targets' logits: the rows may be overwritten
        a, b = _through_cap(e_a * factor, r_a, CAP), _through_cap(e_b * factor, r_b, CAP)
        a, b = _of_kept(a, target), _of_kept(b, target)
        _store_pair(
            out_rows[:, None] + columns, 0, a, b, in_a, in_b, row_inside, width, ROWS, BLOCK, not FULL, ""
        )  # fmt: skip
        _write_targets(out_rows, target, scale, pull, u, slope, n, peak, log2_total, row_inside)
    else:
        tl.store(peaks + row, peak, mask=row_inside)
        tl.store(log2_totals + row, log2_total, mask=row_inside)


@triton.jit
def count_kernel(targets, counts, n_rows, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr):
    """How many targets of each program's share are not to be ignored."""
    if OVERLAPPED:
        gdc_launch_dependents()
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        target = tl.load(targets + at, mask=at < n_rows, other=_IGNORE)
        total += tl.where(target == _IGNORE, 0, 1)
    tl.store(counts + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def sums_kernel(
    losses, weights, sums, n_rows, weight_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr
):
    """The sum of each program's share of losses times weights."""
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        loss = tl.load(losses + row, mask=row < n_rows, other=0.0)
        if WEIGHTED:
            loss *= tl.load(weights + row * weight_stride, mask=row < n_rows, other=0.0).to(tl.float32)
        total += loss
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def total_kernel(sums, counts, out, N_SUMS: tl.constexpr, N_COUNTS: tl.constexpr, OVERLAPPED: tl.constexpr):
    """The sum of the sums, over that of the counts if there are any."""
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.sum(tl.load(sums + tl.arange(0, N_SUMS)), 0)
    if N_COUNTS > 0:
        total /= _sum_of_counts(counts, N_COUNTS)
    tl.store(out, total)


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr):
    """x *= factor, without touching it when that is 1."""
    if OVERLAPPED:
        gdc_wait()
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, n, tl.num_programs(0) * BLOCK):
            at = start + own
            value = tl.load(x + at, mask=at < n).to(tl.float32) * scale
            tl.store(x + at, value.to(x.dtype.element_ty), mask=at < n)
