"""Soft-capped cross entropy in Triton: a program takes a row, or several narrow ones.

The loss reads a row once. Its gradient reads it again, from the end backwards: made by the same program right after, it
finds in the cache what was read last, and a gradient that is made with the loss costs one read and one write.

With a cap the arithmetic needs no maximum: exp(cap tanh(z / cap)) lies within exp(-cap) and exp(cap), which float32
holds up to a cap of some 75 for any vocabulary. With r = 1 / (1 + exp(2 z / cap)) both what is summed,
exp(cap (1 - 2r)), and the derivative of the cap, 4 r (1 - r), come without cancellation.
"""

import math

import torch
import triton
import triton.language as tl

from fusedlm.ops.softcap_cross_entropy.reference import IGNORE_INDEX

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
_IGNORE = tl.constexpr(IGNORE_INDEX)
_LOWEST = tl.constexpr(-3.0e38)  # finite: a difference of two infinities would be NaN
_WIDEST_BOUND = 75.0  # caps up to here need no maximum
_NARROW_TILE = 1024  # elements of the rows that a program takes together
_WHOLE = 4096  # classes up to which a program holds whole rows
_SCALE_BLOCK = 8192
_SCALE_PROGRAMS = 1024


@triton.jit
def _exponent(z, cap, CAPPED: tl.constexpr):
    """log2 of exp(capped z), and r, of which the derivative of the cap is made (0 without a cap)."""
    if CAPPED:
        r = 1.0 / (1.0 + tl.exp2(z * (2.0 * _LOG2E / cap)))
        return (1.0 - 2.0 * r) * (cap * _LOG2E), r
    else:
        return z * _LOG2E, tl.zeros_like(z)


@triton.jit
def _exponents(a, b, cap, CAPPED: tl.constexpr):
    """`_exponent` of two tiles with one division: exponentials and divisions are what the kernels wait for."""
    if CAPPED:
        factor, peak = 2.0 * _LOG2E / cap, cap * _LOG2E
        # At 2^60 r is nothing beside 1 and the product of two is finite; NaN must stay NaN.
        p = 1.0 + tl.exp2(tl.minimum(a * factor, 60.0, propagate_nan=tl.PropagateNan.ALL))
        q = 1.0 + tl.exp2(tl.minimum(b * factor, 60.0, propagate_nan=tl.PropagateNan.ALL))
        inverse = 1.0 / (p * q)
        r_a, r_b = q * inverse, p * inverse
        return (1.0 - 2.0 * r_a) * peak, r_a, (1.0 - 2.0 * r_b) * peak, r_b
    else:
        return a * _LOG2E, tl.zeros_like(a), b * _LOG2E, tl.zeros_like(b)


@triton.jit
def _load_pair(pointers, start, n, BLOCK: tl.constexpr):
    """Two tiles side by side, the first n of each row; 0 beyond, and which are not beyond."""
    column = start + tl.arange(0, BLOCK)[None, :]
    in_a, in_b = column < n, column + BLOCK < n
    a = tl.load(pointers + start, mask=in_a, other=0.0).to(tl.float32)
    b = tl.load(pointers + start + BLOCK, mask=in_b, other=0.0).to(tl.float32)
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
def _log2_sums(pointers, n, cap, CAPPED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """log2 of the sum of exp(capped z) over the first n of each row (ROWS,); 0 for n = 0."""
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        peak += _LOWEST
    whole = n // (2 * BLOCK) * (2 * BLOCK)
    for start in range(0, whole, 2 * BLOCK):  # without masks, which cost as much as the rest
        a = tl.load(pointers + start, eviction_policy="evict_last").to(tl.float32)
        b = tl.load(pointers + start + BLOCK, eviction_policy="evict_last").to(tl.float32)
        u_a, _, u_b, _ = _exponents(a, b, cap, CAPPED)
        total, peak = _add_pair(total, peak, u_a, u_b, True, True, BOUNDED, False)
    if whole < n:
        a, b, in_a, in_b = _load_pair(pointers, whole, n, BLOCK)
        u_a, _, u_b, _ = _exponents(a, b, cap, CAPPED)
        total, peak = _add_pair(total, peak, u_a, u_b, in_a, in_b, BOUNDED, True)
    return tl.where(n > 0, peak, 0.0) + tl.log2(tl.where(n > 0, tl.sum(total, 1), 1.0))


@triton.jit
def _at_targets(rows, target, n, cap, CAPPED: tl.constexpr):
    """Exponent and r of each row's target; 0 where it is none of the n."""
    z = tl.load(rows + target, mask=(target >= 0) & (target < n), other=0.0).to(tl.float32)
    return _exponent(z, cap, CAPPED)


@triton.jit
def _losses_of(u, target, n, log2_sum, z_loss):
    """0 where ignored, NaN where the target is no class."""
    lse = log2_sum * _LN2
    loss = (log2_sum - u) * _LN2 + z_loss * lse * lse
    loss = tl.where((target >= 0) & (target < n), loss, float("nan"))
    return tl.where(target == _IGNORE, 0.0, loss)


@triton.jit
def _through_cap(gradient, r, CAPPED: tl.constexpr):
    """Times the derivative of the cap."""
    if CAPPED:
        gradient *= 4.0 * (r - r * r)
    return gradient


@triton.jit
def _store(pointers, gradient, kept, mask, MASKED: tl.constexpr):
    gradient = tl.where(kept[:, None], gradient, 0.0).to(pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, gradient, mask=mask)
    else:
        tl.store(pointers, gradient)


@triton.jit
def _store_pair(
    pointers, start, a, b, in_a, in_b, kept, row_inside, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Two tiles of gradients, zero in the padding and for ignored rows."""
    if MASKED:
        column = start + tl.arange(0, BLOCK)[None, :]
        a, b = tl.where(in_a, a, 0.0), tl.where(in_b, b, 0.0)
        _store(pointers + start, a, kept, (column < width) & row_inside[:, None], True)
        _store(pointers + start + BLOCK, b, kept, (column + BLOCK < width) & row_inside[:, None], True)
    else:
        _store(pointers + start, a, kept, row_inside[:, None], ROWS > 1)
        _store(pointers + start + BLOCK, b, kept, row_inside[:, None], ROWS > 1)


@triton.jit
def _write_gradients(
    pointers, out_pointers, target, factor, n, width, log2_sum, cap, row_inside,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """factor times the share of each class in its row's sum, through the cap; may overwrite the rows."""
    kept = target != _IGNORE
    shift = log2_sum[:, None]
    factor = factor[:, None]
    whole = _read(target, n) // (2 * BLOCK) * (2 * BLOCK)
    for start in range(whole, width, 2 * BLOCK):
        a, b, in_a, in_b = _load_pair(pointers, start, _read(target, n), BLOCK)
        u_a, r_a, u_b, r_b = _exponents(a, b, cap, CAPPED)
        a = _through_cap(tl.exp2(u_a - shift) * factor, r_a, CAPPED)
        b = _through_cap(tl.exp2(u_b - shift) * factor, r_b, CAPPED)
        _store_pair(out_pointers, start, a, b, in_a, in_b, kept, row_inside, width, ROWS, BLOCK, True)
    for past in range(0, whole, 2 * BLOCK):
        start = whole - 2 * BLOCK - past
        a = tl.load(pointers + start).to(tl.float32)
        b = tl.load(pointers + start + BLOCK).to(tl.float32)
        u_a, r_a, u_b, r_b = _exponents(a, b, cap, CAPPED)
        a = _through_cap(tl.exp2(u_a - shift) * factor, r_a, CAPPED)
        b = _through_cap(tl.exp2(u_b - shift) * factor, r_b, CAPPED)
        _store_pair(out_pointers, start, a, b, True, True, kept, row_inside, width, ROWS, BLOCK, False)


@triton.jit
def _factors(scale, target, log2_sum, z_loss):
    """What the shares are multiplied by, and the part of it that comes of the normaliser's square."""
    scale = tl.where(target == _IGNORE, 0.0, scale)
    pull = 2.0 * z_loss * log2_sum * _LN2
    return scale, pull


@triton.jit
def _write_targets(out_rows, target, scale, pull, u, r, n, log2_sum, row_inside, CAPPED: tl.constexpr):
    """The gradients of the targets themselves: last, so that no other element has to ask whether it is one."""
    tl.debug_barrier()  # another thread has written the share there
    share = tl.exp2(u - log2_sum)
    gradient = _through_cap(scale * (share - 1.0 + share * pull), r, CAPPED)
    mask = (target >= 0) & (target < n) & row_inside
    tl.store(out_rows + target, gradient.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of(targets, n_rows, ROWS: tl.constexpr):
    """Rows of this program, the last repeated beyond the end, which of them there are, and their targets."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_rows
    row = tl.minimum(row, n_rows - 1)
    return row, row_inside, tl.load(targets + row)


@triton.jit
def _forward_kernel(
    logits, targets, loss, log2_sums, n_rows, row_stride, n, cap, z_loss,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, row_inside, target = _rows_of(targets, n_rows, ROWS)
    rows = logits + row * row_stride
    pointers = rows[:, None] + tl.arange(0, BLOCK)[None, :]
    log2_sum = _log2_sums(pointers, _read(target, n), cap, CAPPED, BOUNDED, ROWS, BLOCK)
    u, _ = _at_targets(rows, target, n, cap, CAPPED)
    tl.store(log2_sums + row, log2_sum, mask=row_inside)
    tl.store(loss + row, _losses_of(u, target, n, log2_sum, z_loss), mask=row_inside)


@triton.jit
def _backward_kernel(
    logits, targets, log2_sums, upstream, gradient, n_rows, row_stride, upstream_stride, width, n, cap, z_loss,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, row_inside, target = _rows_of(targets, n_rows, ROWS)
    log2_sum = tl.load(log2_sums + row)
    scale, pull = _factors(tl.load(upstream + row * upstream_stride).to(tl.float32), target, log2_sum, z_loss)
    rows, out_rows = logits + row * row_stride, gradient + row * width
    columns = tl.arange(0, BLOCK)[None, :]
    u, r = _at_targets(rows, target, n, cap, CAPPED)
    _write_gradients(
        rows[:, None] + columns, out_rows[:, None] + columns, target, scale * (1.0 + pull), n, width, log2_sum, cap,
        row_inside, CAPPED, ROWS, BLOCK,
    )  # fmt: skip
    _write_targets(out_rows, target, scale, pull, u, r, n, log2_sum, row_inside, CAPPED)


@triton.jit
def _both_kernel(
    logits, targets, weights, loss, gradient, n_rows, row_stride, gradient_stride, weight_stride, width, n, cap, z_loss,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient may be the logits themselves."""
    row, row_inside, target = _rows_of(targets, n_rows, ROWS)
    weight = tl.load(weights + row * weight_stride).to(tl.float32)
    rows, out_rows = logits + row * row_stride, gradient + row * gradient_stride
    columns = tl.arange(0, BLOCK)[None, :]
    pointers, out_pointers = rows[:, None] + columns, out_rows[:, None] + columns
    u, r = _at_targets(rows, target, n, cap, CAPPED)
    log2_sum = _log2_sums(pointers, _read(target, n), cap, CAPPED, BOUNDED, ROWS, BLOCK)
    tl.store(loss + row, _losses_of(u, target, n, log2_sum, z_loss), mask=row_inside)
    scale, pull = _factors(weight, target, log2_sum, z_loss)
    tl.debug_barrier()  # all threads have read the targets' logits: the rows may be overwritten
    _write_gradients(
        pointers, out_pointers, target, scale * (1.0 + pull), n, width, log2_sum, cap, row_inside, CAPPED, ROWS, BLOCK
    )
    _write_targets(out_rows, target, scale, pull, u, r, n, log2_sum, row_inside, CAPPED)


@triton.jit
def _whole_rows_kernel(
    logits, targets, weights, loss, gradient, n_rows, row_stride, gradient_stride, weight_stride, width, n, cap, z_loss,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_both_kernel` of rows that a pair of tiles holds: nothing is computed twice."""
    row, row_inside, target = _rows_of(targets, n_rows, ROWS)
    weight = tl.load(weights + row * weight_stride).to(tl.float32)
    rows, out_rows = logits + row * row_stride, gradient + row * gradient_stride
    columns = tl.arange(0, BLOCK)[None, :]
    u, r = _at_targets(rows, target, n, cap, CAPPED)
    n_read = _read(target, n)
    a, b, in_a, in_b = _load_pair(rows[:, None] + columns, 0, n_read, BLOCK)
    u_a, r_a, u_b, r_b = _exponents(a, b, cap, CAPPED)
    peak = tl.zeros((ROWS,), dtype=tl.float32)
    if not BOUNDED:
        peak = tl.max(tl.maximum(tl.where(in_a, u_a, _LOWEST), tl.where(in_b, u_b, _LOWEST)), 1)
    e_a = tl.where(in_a, tl.exp2(u_a - peak[:, None]), 0.0)
    e_b = tl.where(in_b, tl.exp2(u_b - peak[:, None]), 0.0)
    total = tl.where(n_read > 0, tl.sum(e_a + e_b, 1), 1.0)
    log2_sum = tl.where(n_read > 0, peak, 0.0) + tl.log2(total)
    tl.store(loss + row, _losses_of(u, target, n, log2_sum, z_loss), mask=row_inside)
    scale, pull = _factors(weight, target, log2_sum, z_loss)
    factor = (scale * (1.0 + pull) / total)[:, None]
    tl.debug_barrier()  # all threads have read the targets' logits: the rows may be overwritten
    a, b = _through_cap(e_a * factor, r_a, CAPPED), _through_cap(e_b * factor, r_b, CAPPED)
    _store_pair(
        out_rows[:, None] + columns, 0, a, b, in_a, in_b, target != _IGNORE, row_inside, width, ROWS, BLOCK, True
    )
    _write_targets(out_rows, target, scale, pull, u, r, n, log2_sum, row_inside, CAPPED)


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor, without touching it when that is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, n, tl.num_programs(0) * BLOCK):
            at = start + own
            value = tl.load(x + at, mask=at < n).to(tl.float32) * scale
            tl.store(x + at, value.to(x.dtype.element_ty), mask=at < n)


def _launch(cap: float | None, width: int, *, gradient: bool) -> dict:
    """Narrow rows several to a program and whole, in two tiles; wide ones two blocks at a time, where a gradient is
    better off with more threads to a row: of fewer rows more stays in the cache."""
    whole = width <= _WHOLE
    block = max(1, triton.next_power_of_2(width) // 2) if whole else 2048 if gradient else 1024
    rows = max(1, _NARROW_TILE // (2 * block)) if whole else 1
    return {
        "CAPPED": cap is not None,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, block * rows // (512 if whole else 128)),
    }


def _bounded(cap: float | None) -> bool:
    return cap is not None and cap <= _WIDEST_BOUND


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _losses(logits, targets, cap, n_classes, z_loss) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log2 of the normaliser of each row, both (N,) float32."""
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    log2_sums = torch.empty_like(loss)
    if len(logits):
        launch = _launch(cap, n_classes, gradient=False)
        _forward_kernel[(triton.cdiv(len(logits), launch["ROWS"]),)](
            logits, targets, loss, log2_sums, len(logits), logits.stride(0), n_classes, cap or 0.0, z_loss,
            BOUNDED=_bounded(cap), **launch,
        )  # fmt: skip
    return loss, log2_sums


def _losses_and_gradients(logits, targets, weights, gradient, cap, n_classes, z_loss) -> torch.Tensor:
    """Loss of each row (N,) float32; gradient (N, V), which may be the logits, becomes weights times its own."""
    n_rows, width = logits.shape
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        launch = _launch(cap, width, gradient=True)
        kernel = _whole_rows_kernel if 2 * launch["BLOCK"] >= width else _both_kernel
        kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
            logits, targets, weights, loss, gradient, n_rows, logits.stride(0), gradient.stride(0), weights.stride(0),
            width, n_classes, cap or 0.0, z_loss, BOUNDED=_bounded(cap), **launch,
        )  # fmt: skip
    return loss


@torch.library.custom_op("fusedlm::softcap_cross_entropy", mutates_args=())
def _forward(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, n_classes: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _losses(_rows(logits), targets.contiguous(), cap, n_classes, z_loss)


@_forward.register_fake
def _(logits, targets, cap, n_classes, z_loss):
    loss = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return loss, torch.empty_like(loss)


@torch.library.custom_op("fusedlm::softcap_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    log2_sums: torch.Tensor,
    cap: float | None,
    n_classes: int,
    z_loss: float,
) -> torch.Tensor:
    """Gradient of the logits (N, V), contiguous."""
    logits = _rows(logits)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    n_rows, width = logits.shape
    if n_rows:
        launch = _launch(cap, width, gradient=True)
        _backward_kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
            logits, targets.contiguous(), log2_sums, upstream, gradient, n_rows, logits.stride(0), upstream.stride(0),
            width, n_classes, cap or 0.0, z_loss, **launch,
        )  # fmt: skip
    return gradient


@_backward.register_fake
def _(upstream, logits, targets, log2_sums, cap, n_classes, z_loss):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.rest = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _gradients(ctx, upstream, _):
    logits, targets, log2_sums = ctx.saved_tensors
    return _backward(upstream, logits, targets, log2_sums, *ctx.rest), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


@torch.library.custom_op("fusedlm::weighted_softcap_cross_entropy", mutates_args=())
def _weighted(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float | None, n_classes: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum () of losses times weights, and its gradient (N, V)."""
    logits = _rows(logits)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    loss = _losses_and_gradients(logits, targets.contiguous(), weights, gradient, cap, n_classes, z_loss)
    return (loss * weights).sum(), gradient


@_weighted.register_fake
def _(logits, targets, weights, cap, n_classes, z_loss):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return logits.new_empty((), dtype=torch.float32), gradient


@torch.library.custom_op("fusedlm::weighted_softcap_cross_entropy_", mutates_args=("logits",))
def _weighted_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    """Sum () of losses times weights; the logits, whose rows must be contiguous, become its gradient."""
    loss = _losses_and_gradients(logits, targets.contiguous(), weights, logits, cap, n_classes, z_loss)
    return (loss * weights).sum()


@_weighted_.register_fake
def _(logits, targets, weights, cap, n_classes, z_loss):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fusedlm::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor (); next to free when that is 1, as it is where the loss is what is differentiated."""
    _scale_kernel[(min(triton.cdiv(x.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS),)](
        x, factor, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8
    )


class _Weighted(torch.autograd.Function):
    """The sum, whose gradient was made with it and can be used once."""

    @staticmethod
    def forward(ctx, logits, targets, weights, cap, n_classes, z_loss, in_place):
        if in_place and logits.stride(-1) == 1:
            gradient = logits.detach()
            total = _weighted_(gradient, targets, weights, cap, n_classes, z_loss)
        else:
            total, gradient = _weighted(logits, targets, weights, cap, n_classes, z_loss)
        ctx.save_for_backward(gradient)
        ctx.used = False
        return total

    @staticmethod
    def backward(ctx, upstream):
        if ctx.used:
            raise RuntimeError("a reduced softcap_cross_entropy gives its gradient once; take reduction='none'")
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        if gradient.numel():
            scale_(gradient, upstream)
        return gradient, None, None, None, None, None, None


def softcap_cross_entropy(logits, targets, cap, n_classes, z_loss=0.0, weights=None, in_place=False) -> torch.Tensor:
    if weights is None:
        return _forward(logits, targets, cap, n_classes, z_loss)[0]
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Weighted.apply(logits, targets, weights, cap, n_classes, z_loss, in_place)
    return (_forward(logits, targets, cap, n_classes, z_loss)[0] * weights).sum()


def loss_and_gradient_(logits, targets, weights, cap, n_classes, z_loss=0.0) -> torch.Tensor:
    """Loss of each row (N,) float32; the logits (N, V) become weights times its gradient."""
    return _losses_and_gradients(logits, targets, weights, logits, cap, n_classes, z_loss)


def loss_only(logits, targets, cap, n_classes, z_loss=0.0) -> torch.Tensor:
    """Loss of each row (N,) float32 of logits (N, V) whose rows are contiguous; no gradient."""
    return _losses(logits, targets, cap, n_classes, z_loss)[0]
