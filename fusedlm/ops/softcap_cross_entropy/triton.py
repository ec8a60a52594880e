"""Soft-capped cross entropy in Triton: one program a row, the row read once for the loss and once for the gradient.

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


@triton.jit
def _exponent(z, cap, CAPPED: tl.constexpr):
    """log2 of exp(capped z), and r, of which the derivative of the cap is made (0 without a cap)."""
    if CAPPED:
        r = 1.0 / (1.0 + tl.exp2(z * (2.0 * _LOG2E / cap)))
        return (1.0 - 2.0 * r) * (cap * _LOG2E), r
    else:
        return z * _LOG2E, tl.zeros_like(z)


@triton.jit
def _log2_sum(row_ptr, n, cap, CAPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """log2 of the sum of exp(capped z) over the first n of a row; 0 for n = 0."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    peak = _LOWEST
    for start in range(0, n, BLOCK):
        inside = start + columns < n
        z = tl.load(row_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        u, _ = _exponent(z, cap, CAPPED)
        if BOUNDED:
            total += tl.where(inside, tl.exp2(u), 0.0)
        else:
            u = tl.where(inside, u, _LOWEST)
            higher = tl.maximum(peak, tl.max(u, 0))
            total = total * tl.exp2(peak - higher) + tl.where(inside, tl.exp2(u - higher), 0.0)
            peak = higher
    if BOUNDED:
        peak = 0.0
    return tl.where(n > 0, peak, 0.0) + tl.log2(tl.where(n > 0, tl.sum(total, 0), 1.0))


@triton.jit
def _loss(row_ptr, target, n, log2_sum, cap, z_loss, CAPPED: tl.constexpr):
    """Of one row; 0 where ignored, NaN where the target is no class."""
    valid = (target >= 0) & (target < n)
    z = tl.load(row_ptr + target, mask=valid, other=0.0).to(tl.float32)
    u, _ = _exponent(z, cap, CAPPED)
    lse = log2_sum * _LN2
    loss = (log2_sum - u) * _LN2 + z_loss * lse * lse
    return tl.where(target == _IGNORE, 0.0, tl.where(valid, loss, float("nan")))


@triton.jit
def _write_gradient(
    row_ptr, out_ptr, target, scale, n, width, log2_sum, cap, z_loss, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """scale times the gradient of the row's loss, zero in the padding and for ignored rows; may overwrite the row."""
    columns = tl.arange(0, BLOCK)
    ignored = target == _IGNORE
    pull = 2.0 * z_loss * log2_sum * _LN2  # of the normaliser's square
    for start in range(0, width, BLOCK):
        column = start + columns
        inside = (column < n) & (not ignored)
        z = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
        u, r = _exponent(z, cap, CAPPED)
        share = tl.exp2(u - log2_sum)
        gradient = share - tl.where(column == target, 1.0, 0.0) + share * pull
        if CAPPED:
            gradient *= 4.0 * r * (1.0 - r)
        gradient = tl.where(inside, gradient * scale, 0.0)
        tl.store(out_ptr + column, gradient.to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _forward_kernel(
    logits, targets, loss, log2_sums, row_stride, n, cap, z_loss,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    target = tl.load(targets + row)
    log2_sum = _log2_sum(row_ptr, tl.where(target == _IGNORE, 0, n), cap, CAPPED, BOUNDED, BLOCK)
    tl.store(log2_sums + row, log2_sum)
    tl.store(loss + row, _loss(row_ptr, target, n, log2_sum, cap, z_loss, CAPPED))


@triton.jit
def _backward_kernel(
    logits, targets, log2_sums, upstream, gradient, row_stride, upstream_stride, width, n, cap, z_loss,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    scale = tl.load(upstream + row * upstream_stride).to(tl.float32)
    log2_sum = tl.load(log2_sums + row)
    _write_gradient(
        logits + row * row_stride, gradient + row * width, target, scale, n, width, log2_sum, cap, z_loss, CAPPED, BLOCK
    )


@triton.jit
def _both_kernel(
    logits, targets, weights, loss, row_stride, weight_stride, width, n, cap, z_loss,
    CAPPED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits + row * row_stride
    target = tl.load(targets + row)
    weight = tl.load(weights + row * weight_stride).to(tl.float32)
    log2_sum = _log2_sum(row_ptr, tl.where(target == _IGNORE, 0, n), cap, CAPPED, BOUNDED, BLOCK)
    tl.store(loss + row, _loss(row_ptr, target, n, log2_sum, cap, z_loss, CAPPED))
    # The target's logit was read; from here on the row may be overwritten.
    tl.debug_barrier()
    _write_gradient(row_ptr, row_ptr, target, weight, n, width, log2_sum, cap, z_loss, CAPPED, BLOCK)


def _launch(cap: float | None, width: int) -> dict:
    block = min(triton.next_power_of_2(width), 4096)
    return {
        "CAPPED": cap is not None,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 256)),
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
        _forward_kernel[(len(logits),)](
            logits, targets, loss, log2_sums, logits.stride(0), n_classes, cap or 0.0, z_loss,
            BOUNDED=_bounded(cap), **_launch(cap, n_classes),
        )  # fmt: skip
    return loss, log2_sums


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
        _backward_kernel[(n_rows,)](
            logits, targets.contiguous(), log2_sums, upstream, gradient, logits.stride(0), upstream.stride(0), width,
            n_classes, cap or 0.0, z_loss, **_launch(cap, width),
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


def softcap_cross_entropy(logits, targets, cap, n_classes, z_loss=0.0) -> torch.Tensor:
    return _forward(logits, targets, cap, n_classes, z_loss)[0]


def loss_and_gradient_(logits, targets, weights, cap, n_classes, z_loss=0.0) -> torch.Tensor:
    """Loss of each row (N,) float32; the logits (N, V) become weights times its gradient."""
    n_rows, width = logits.shape
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        _both_kernel[(n_rows,)](
            logits, targets, weights, loss, logits.stride(0), weights.stride(0), width, n_classes, cap or 0.0, z_loss,
            BOUNDED=_bounded(cap), **_launch(cap, width),
        )  # fmt: skip
    return loss


def loss_only(logits, targets, cap, n_classes, z_loss=0.0) -> torch.Tensor:
    """Loss of each row (N,) float32 of logits (N, V) whose rows are contiguous; no gradient."""
    return _losses(logits, targets, cap, n_classes, z_loss)[0]
