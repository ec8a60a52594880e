"""Kernels of soft-capped cross entropy. A row is read in pairs of tiles; a short one fits into a single pair.

With a cap (caps.py) no row maximum is needed: exp(cap tanh(z / width)) lies between exp(-cap) and exp(cap). Up to a cap
of about 40 float32 holds these, their sums over any vocabulary, and the quotients.

In all kernels cap, rate and center are those of caps.py.

PDL (programmatic dependent launch): the next kernel may start before this one ends, and this one may have started
before the previous one, which writes the count of rows or the losses, has ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.cross_entropy.caps import (
    LN2,
    LOG2E,
    SHIFTED,
    UNCAPPED,
    capped_exponent,
    exponents,
    log_normaliser,
    reciprocal,
    slope_scale,
    to_float32,
)
from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX

_IGNORE = tl.constexpr(IGNORE_INDEX)
_LOWEST = tl.constexpr(-3.0e38)  # finite: a difference of two infinities would be NaN
_EVICT_FIRST = tl.constexpr("evict_first")  # for the last access: the cache is for what is read twice


@triton.jit
def _load_pair(pointers, start, n, BLOCK: tl.constexpr):
    """Two adjacent tiles of the first n columns of each row, 0 beyond, and their masks."""
    column = start + tl.arange(0, BLOCK)[None, :]
    in_a, in_b = column < n, column + BLOCK < n
    a = to_float32(tl.load(pointers + start, mask=in_a, other=0.0))
    b = to_float32(tl.load(pointers + start + BLOCK, mask=in_b, other=0.0))
    return a, b, in_a, in_b


@triton.jit
def _n_read(target, n):
    """How many of n columns are read: none where all rows are ignored."""
    return tl.where(tl.max(tl.where(target == _IGNORE, 0, 1), 0) > 0, n, 0)


@triton.jit
def _accumulate(total, peak, u_a, u_b, in_a, in_b, BOUNDED: tl.constexpr, MASKED: tl.constexpr):
    """The running sum of 2^(u - peak), and the running peak, after two more tiles."""
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
def _load_and_accumulate(
    pointers, total, peak, cap, rate, center,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    a = to_float32(tl.load(pointers, eviction_policy=EVICTION))
    b = to_float32(tl.load(pointers + BLOCK, eviction_policy=EVICTION))
    u_a, _, u_b, _ = exponents(a, b, cap, rate, center, CAP, False)
    return _accumulate(total, peak, u_a, u_b, True, True, BOUNDED, False)


@triton.jit
def _normalisers(
    pointers, n, n_cached, cap, rate, center, CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The peak exponent of each row (ROWS,), 0 where BOUNDED, and log2 of the sum of 2^(u - peak) over the first n
    columns; both 0 for n = 0. n_cached: how many of the last columns shall stay in the cache, a multiple of 2 BLOCK."""
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        peak += _LOWEST
    # Without masks, which would double the time.
    n_unmasked = n // (2 * BLOCK) * (2 * BLOCK)
    n_streamed = tl.maximum(n_unmasked - n_cached, 0)
    for start in range(0, n_streamed, 2 * BLOCK):
        total, peak = _load_and_accumulate(
            pointers + start, total, peak, cap, rate, center, CAP, BOUNDED, BLOCK, _EVICT_FIRST
        )
    for start in range(n_streamed, n_unmasked, 2 * BLOCK):
        total, peak = _load_and_accumulate(
            pointers + start, total, peak, cap, rate, center, CAP, BOUNDED, BLOCK, "evict_last"
        )
    if n_unmasked < n:
        a, b, in_a, in_b = _load_pair(pointers, n_unmasked, n, BLOCK)
        u_a, _, u_b, _ = exponents(a, b, cap, rate, center, CAP, False)
        total, peak = _accumulate(total, peak, u_a, u_b, in_a, in_b, BOUNDED, True)
    return tl.where(n > 0, peak, 0.0), tl.log2(tl.where(n > 0, tl.sum(total, 1), 1.0))


@triton.jit
def _target_terms(rows, target, n, cap, rate, center, CAP: tl.constexpr):
    """Exponent of each row's target, and r (1 - r) there (1 without a cap), to which the derivative of the cap is
    proportional, without the difference 1 - r: it can be most of the row's gradient. Where the target is not a class,
    those of a logit of 0."""
    z = tl.load(rows + target, mask=(target >= 0) & (target < n), other=0.0).to(tl.float32)
    if CAP == UNCAPPED:
        return z * LOG2E, tl.full(z.shape, 1.0, dtype=tl.float32)
    else:
        if CAP >= SHIFTED:
            z += center
        e = tl.exp2(tl.minimum(z * rate, 60.0, propagate_nan=tl.PropagateNan.ALL))
        r = reciprocal(1.0 + e)
        return capped_exponent(z, r, cap, rate, CAP), e * r * r


@triton.jit
def _row_losses(u, target, n, peak, log2_total, z_loss, cap, CAP: tl.constexpr):
    """Loss of each row: 0 where ignored, NaN where the target is not a class."""
    lse = log_normaliser(peak, log2_total, cap, CAP)
    loss = (log2_total - (u - peak)) * LN2 + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < n), loss, float("nan"))
    return tl.where(target == _IGNORE, 0.0, loss)


@triton.jit
def _total_count(counts, N_COUNTS: tl.constexpr):
    return tl.sum(tl.load(counts + tl.arange(0, N_COUNTS)), 0).to(tl.float32)


@triton.jit
def _row_weights(weights, row, stride, N_COUNTS: tl.constexpr):
    """Weight of each row's loss. N_COUNTS > 0: one over the sum of so many counts; 0: a weight per row; -1: 1."""
    weight = tl.full(row.shape, 1.0, dtype=tl.float32)
    if N_COUNTS == 0:
        weight *= tl.load(weights + row * stride).to(tl.float32)
    elif N_COUNTS > 0:
        weight /= _total_count(weights, N_COUNTS)
    return weight


@triton.jit
def _factors(scale, target, peak, log2_total, z_loss, cap, rate, CAP: tl.constexpr):
    """Factor of 2^(u - peak) in the gradient, scale of the row, and what the z-loss adds relative to a probability."""
    scale = tl.where(target == _IGNORE, 0.0, scale)
    if CAP != UNCAPPED:
        scale *= slope_scale(cap, rate, CAP)  # left out by _through_cap
    z_term = 2.0 * z_loss * log_normaliser(peak, log2_total, cap, CAP)
    return scale * (1.0 + z_term) * tl.exp2(-log2_total), scale, z_term


@triton.jit
def _through_cap(gradient, r, CAP: tl.constexpr):
    """The gradient times the derivative of the cap, up to `slope_scale`."""
    if CAP != UNCAPPED:
        gradient *= r - r * r
    return gradient


@triton.jit
def _gradients(a, b, factor, peak, cap, rate, center, CAP: tl.constexpr, BOUNDED: tl.constexpr):
    u_a, r_a, u_b, r_b = exponents(a, b, cap, rate, center, CAP, False)
    if not BOUNDED:
        u_a, u_b = u_a - peak, u_b - peak
    e_a, e_b = tl.exp2(u_a), tl.exp2(u_b)
    return _through_cap(e_a * factor, r_a, CAP), _through_cap(e_b * factor, r_b, CAP)


@triton.jit
def _zero_ignored(gradient, target):
    """The gradient, 0 in ignored rows whatever their logits."""
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
    """Store two tiles of gradients, 0 in the padding."""
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
    pointers, out_pointers, target, factor, peak, n, width, cap, rate, center, row_inside,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write factor 2^(u - peak), through the cap, possibly over the logits. A single row that is ignored is not read:
    all of it is padding."""
    peak, factor = peak[:, None], factor[:, None]
    n_unmasked = _n_read(target, n) // (2 * BLOCK) * (2 * BLOCK)
    for start in range(n_unmasked, width, 2 * BLOCK):
        a, b, in_a, in_b = _load_pair(pointers, start, _n_read(target, n), BLOCK)
        a, b = _gradients(a, b, factor, peak, cap, rate, center, CAP, BOUNDED)
        if ROWS > 1:
            a, b = _zero_ignored(a, target), _zero_ignored(b, target)
        _store_pair(out_pointers, start, a, b, in_a, in_b, row_inside, width, ROWS, BLOCK, True, _EVICT_FIRST)
    for offset in range(0, n_unmasked, 2 * BLOCK):
        start = n_unmasked - 2 * BLOCK - offset
        a = to_float32(tl.load(pointers + start, eviction_policy=_EVICT_FIRST))
        b = to_float32(tl.load(pointers + start + BLOCK, eviction_policy=_EVICT_FIRST))
        a, b = _gradients(a, b, factor, peak, cap, rate, center, CAP, BOUNDED)
        if ROWS > 1:
            a, b = _zero_ignored(a, target), _zero_ignored(b, target)
        _store_pair(out_pointers, start, a, b, True, True, row_inside, width, ROWS, BLOCK, False, _EVICT_FIRST)


@triton.jit
def _write_targets(out_rows, target, scale, z_term, u, slope, n, peak, log2_total, row_inside):
    """Write the gradients at the targets, last, so that no other element has to test whether it is one."""
    tl.debug_barrier()  # another thread has written there
    probability = tl.exp2(u - peak - log2_total)
    gradient = scale * (probability - 1.0 + probability * z_term) * slope
    mask = (target >= 0) & (target < n) & row_inside
    tl.store(out_rows + target, gradient.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _load_targets(tile, targets, n_rows, ROWS: tl.constexpr):
    """Row indices of a tile, clamped to the last row, a mask of those that exist, and their targets."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    return row, row_inside, tl.load(targets + row)


@triton.jit
def forward_kernel(
    logits, targets, loss, peaks, log2_totals, n_rows, row_stride, n, cap, rate, center, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, row_inside, target = _load_targets(tl.program_id(0), targets, n_rows, ROWS)
    rows = logits + row * row_stride
    pointers = rows[:, None] + tl.arange(0, BLOCK)[None, :]
    peak, log2_total = _normalisers(pointers, _n_read(target, n), 0, cap, rate, center, CAP, BOUNDED, ROWS, BLOCK)
    u, _ = _target_terms(rows, target, n, cap, rate, center, CAP)
    tl.store(peaks + row, peak, mask=row_inside)
    tl.store(log2_totals + row, log2_total, mask=row_inside)
    tl.store(loss + row, _row_losses(u, target, n, peak, log2_total, z_loss, cap, CAP), mask=row_inside)


@triton.jit
def backward_kernel(
    logits, targets, peaks, log2_totals, upstream, gradient, n_rows, row_stride, upstream_stride, width, n, cap,
    rate, center, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, row_inside, target = _load_targets(tl.program_id(0), targets, n_rows, ROWS)
    peak, log2_total = tl.load(peaks + row), tl.load(log2_totals + row)
    scale = tl.load(upstream + row * upstream_stride).to(tl.float32)
    factor, scale, z_term = _factors(scale, target, peak, log2_total, z_loss, cap, rate, CAP)
    rows, out_rows = logits + row * row_stride, gradient + row * width
    columns = tl.arange(0, BLOCK)[None, :]
    u, slope = _target_terms(rows, target, n, cap, rate, center, CAP)
    _write_gradients(
        rows[:, None] + columns, out_rows[:, None] + columns, target, factor, peak, n, width, cap, rate, center,
        row_inside, CAP, BOUNDED, ROWS, BLOCK,
    )  # fmt: skip
    _write_targets(out_rows, target, scale, z_term, u, slope, n, peak, log2_total, row_inside)


@triton.jit
def loss_and_gradient_kernel(
    logits, targets, weights, loss, gradient, n_rows, row_stride, gradient_stride, weight_stride, width, n, n_cached,
    cap, rate, center, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, N_COUNTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """gradient may be the memory of the logits."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, row_inside, target = _load_targets(tl.program_id(0), targets, n_rows, ROWS)
    weight = _row_weights(weights, row, weight_stride, N_COUNTS)
    rows, out_rows = logits + row * row_stride, gradient + row * gradient_stride
    columns = tl.arange(0, BLOCK)[None, :]
    pointers, out_pointers = rows[:, None] + columns, out_rows[:, None] + columns
    u, slope = _target_terms(rows, target, n, cap, rate, center, CAP)
    peak, log2_total = _normalisers(
        pointers, _n_read(target, n), n_cached, cap, rate, center, CAP, BOUNDED, ROWS, BLOCK
    )
    tl.store(loss + row, _row_losses(u, target, n, peak, log2_total, z_loss, cap, CAP), mask=row_inside)
    factor, scale, z_term = _factors(weight, target, peak, log2_total, z_loss, cap, rate, CAP)
    tl.debug_barrier()  # all threads have read the targets' logits: rows may be overwritten
    _write_gradients(
        pointers, out_pointers, target, factor, peak, n, width, cap, rate, center, row_inside, CAP, BOUNDED, ROWS, BLOCK
    )  # fmt: skip
    _write_targets(out_rows, target, scale, z_term, u, slope, n, peak, log2_total, row_inside)


@triton.jit
def full_rows_kernel(
    logits, targets, weights, loss, peaks, log2_totals, gradient, n_rows, row_stride, gradient_stride, weight_stride,
    width, n, cap, rate, center, z_loss,
    CAP: tl.constexpr, BOUNDED: tl.constexpr, N_COUNTS: tl.constexpr, GRADIENT: tl.constexpr, UNMASKED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`forward_kernel`, or with GRADIENT `loss_and_gradient_kernel`, for rows that fit into a pair of tiles: nothing is
    computed twice. UNMASKED: they fill it. Ignored rows are read too: waiting for their targets first takes longer."""
    if PDL:
        gdc_launch_dependents()
    row, row_inside, target = _load_targets(tl.program_id(0), targets, n_rows, ROWS)
    rows = logits + row * row_stride
    columns = tl.arange(0, BLOCK)[None, :]
    if UNMASKED:
        in_a, in_b = True, True
        a = to_float32(tl.load(rows[:, None] + columns))
        b = to_float32(tl.load(rows[:, None] + columns + BLOCK))
    else:
        a, b, in_a, in_b = _load_pair(rows[:, None] + columns, 0, n, BLOCK)
    u, slope = _target_terms(rows, target, n, cap, rate, center, CAP)
    u_a, r_a, u_b, r_b = exponents(a, b, cap, rate, center, CAP, True)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        if UNMASKED:
            peak = tl.max(tl.maximum(u_a, u_b), 1)
        else:
            peak = tl.max(tl.maximum(tl.where(in_a, u_a, _LOWEST), tl.where(in_b, u_b, _LOWEST)), 1)
        u_a, u_b = u_a - peak[:, None], u_b - peak[:, None]
    e_a, e_b = tl.exp2(u_a), tl.exp2(u_b)
    if not UNMASKED:
        e_a, e_b = tl.where(in_a, e_a, 0.0), tl.where(in_b, e_b, 0.0)
    log2_total = tl.log2(tl.sum(e_a + e_b, 1))
    if PDL:
        gdc_wait()
    tl.store(loss + row, _row_losses(u, target, n, peak, log2_total, z_loss, cap, CAP), mask=row_inside)
    if GRADIENT:
        weight = _row_weights(weights, row, weight_stride, N_COUNTS)
        factor, scale, z_term = _factors(weight, target, peak, log2_total, z_loss, cap, rate, CAP)
        factor = factor[:, None]
        out_rows = gradient + row * gradient_stride
        tl.debug_barrier()  # all threads have read the targets' logits: rows may be overwritten
        a, b = _through_cap(e_a * factor, r_a, CAP), _through_cap(e_b * factor, r_b, CAP)
        a, b = _zero_ignored(a, target), _zero_ignored(b, target)
        _store_pair(
            out_rows[:, None] + columns, 0, a, b, in_a, in_b, row_inside, width, ROWS, BLOCK, not UNMASKED, ""
        )  # fmt: skip
        _write_targets(out_rows, target, scale, z_term, u, slope, n, peak, log2_total, row_inside)
    else:
        tl.store(peaks + row, peak, mask=row_inside)
        tl.store(log2_totals + row, log2_total, mask=row_inside)


@triton.jit
def count_kernel(targets, counts, n_rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """How many of each program's targets are not ignored."""
    if PDL:
        gdc_launch_dependents()
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        target = tl.load(targets + at, mask=at < n_rows, other=_IGNORE)
        total += tl.where(target == _IGNORE, 0, 1)
    tl.store(counts + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def partial_sums_kernel(
    losses, weights, sums, n_rows, weight_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The sum of each program's losses times weights."""
    if PDL:
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
def total_kernel(sums, counts, out, N_SUMS: tl.constexpr, N_COUNTS: tl.constexpr, PDL: tl.constexpr):
    """The sum of the partial sums, divided by the sum of the counts if there are any."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.sum(tl.load(sums + tl.arange(0, N_SUMS)), 0)
    if N_COUNTS > 0:
        total /= _total_count(counts, N_COUNTS)
    tl.store(out, total)


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x *= factor; without an access to x where factor is 1."""
    if PDL:
        gdc_wait()
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, n, tl.num_programs(0) * BLOCK):
            at = start + own
            value = tl.load(x + at, mask=at < n).to(tl.float32) * scale
            tl.store(x + at, value.to(x.dtype.element_ty), mask=at < n)
