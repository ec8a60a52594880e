"""Short convolution in Triton: one pass forward, one backward, and one that also writes the next tail.

The parts are tensors of their own: autograd would concatenate the gradients of slices, another pass over all of them.
x, the tail and the weight are saved for backward, which recomputes the convolution. Each program of the backward pass
keeps partial sums of the weight's gradient; a second kernel reduces them in a fixed order.
"""

import math
from typing import NamedTuple

import torch
import triton

from fusedlm.ops.common.device import n_multiprocessors, supports_pdl
from fusedlm.ops.common.sums import column_sums
from fusedlm.ops.conv.kernels import backward_kernel, forward_kernel
from fusedlm.ops.conv.reference import EPS, next_tail

_STRIP = 128  # channels per program, more for wider heads
_WALKERS = 4  # per program, one warp each
_WALKERS_PER_SM = 16  # at which a multiprocessor is busy


class _Schedule(NamedTuple):
    """How a walker goes through its tokens."""

    span: int  # tokens per walker, fewer where that leaves multiprocessors without work
    rows: int  # tokens loaded at a time
    prefetch: bool = False  # whether the next ones are loaded before these are computed
    registers: int | None = None  # of a thread at most; with fewer, more walkers run at a time


_FORWARD = _Schedule(span=64, rows=8)
_BACKWARD = _Schedule(span=128, rows=4, prefetch=True, registers=128)
_BACKWARD_OF_DOCUMENTS = _Schedule(span=128, rows=2)  # a tail or boundaries take registers that tokens ahead need


def _dense_channels(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_tokens(x: torch.Tensor) -> torch.Tensor:
    """x with all tokens of the batch the same distance apart, which a slice of a packed gradient has without a copy."""
    is_dense = x.stride(2) == 1 and (len(x) <= 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if is_dense else x.contiguous()


def _launch(x, weight, tail, positions, silu: bool, parts, head_dim: int, scales, n_normed: int) -> dict:
    """Constants of a kernel."""
    widths = [part.shape[2] for part in parts]
    block = triton.next_power_of_2(head_dim) if n_normed else min(_STRIP, triton.next_power_of_2(max(widths)))
    heads = max(1, _STRIP // block)
    layout, n_strips, norm_strips, channel = [], 0, 0, 0
    for i, (part, width, scale) in enumerate(zip(parts, widths, scales, strict=True)):
        layout.append((n_strips, channel, width, part.stride(1), scale))
        channel += width
        n_strips += triton.cdiv(width, heads * (head_dim if i < n_normed else block))
        if i < n_normed:
            norm_strips = n_strips
    return {
        "SIZE": len(weight),
        "N": x.shape[2],
        "X_T": x.stride(1),
        "SILU": silu,
        "EPS": EPS,
        "PARTS": tuple(layout),
        "N_STRIPS": n_strips,
        "NORM_STRIPS": norm_strips,
        "HEAD_DIM": head_dim,
        "ALIGN": math.gcd(16, x.stride(0)),
        "HAS_TAIL": tail is not None,
        "PACKED": positions is not None,
        "HEADS": heads,
        "BLOCK": block,
    }


def _walkers(x: torch.Tensor, n_strips: int, schedule: _Schedule) -> tuple[int, list[int], dict]:
    """The number of blocks of walkers, the arguments that say what each walker does, and the constants."""
    batch, n_tokens, _ = x.shape
    busy = n_multiprocessors(x.device) * _WALKERS_PER_SM
    span = triton.next_power_of_2(triton.cdiv(batch * n_tokens * n_strips, busy))
    span = min(schedule.span, span, triton.next_power_of_2(n_tokens))
    n_spans = triton.cdiv(n_tokens, span)
    walkers = min(_WALKERS, triton.next_power_of_2(batch * n_spans))
    constants = {"WALKERS": walkers, "ROWS": min(schedule.rows, span), "num_warps": walkers}
    if schedule.registers is not None:
        constants["maxnreg"] = schedule.registers
    return triton.cdiv(batch * n_spans, walkers), [batch, n_tokens, n_spans, span], constants


def _strides(x: torch.Tensor, align: int, positions: torch.Tensor | None) -> list[int]:
    positions_b = 0 if positions is None or len(positions) == 1 else positions.shape[1]
    return [x.stride(0) // align, positions_b]


def _run_forward(x, weight, tail, positions, lengths, carry: bool, silu, widths, *norm):
    """The parts, and the next tail where it is wanted."""
    x, weight = _dense_channels(x), weight.contiguous()
    tail, positions, lengths = (None if y is None else y.contiguous() for y in (tail, positions, lengths))
    parts = [torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device) for width in widths]
    after = None
    if carry and not x.shape[1]:
        return parts, next_tail(x, tail, len(weight) - 1, None)
    if carry:
        after = torch.empty(len(x), len(weight) - 1, x.shape[2], dtype=x.dtype, device=x.device)
    if x.numel():
        launch = _launch(x, weight, tail, positions, silu, parts, *norm)
        n_blocks, work, constants = _walkers(x, launch["N_STRIPS"], _FORWARD)
        forward_kernel[(launch["N_STRIPS"] * n_blocks,)](
            x, weight, x if tail is None else tail, x if positions is None else positions,
            x if lengths is None else lengths, tuple(parts), x if after is None else after,
            *work, *_strides(x, launch["ALIGN"], positions), CARRY=carry, HAS_LENGTHS=lengths is not None,
            **launch, **constants,
        )  # fmt: skip
    return parts, after


@torch.library.custom_op("fusedlm::short_conv", mutates_args=())
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None,
    positions: torch.Tensor | None,
    silu: bool,
    widths: list[int],
    head_dim: int,
    scales: list[float],
    n_normed: int,
) -> list[torch.Tensor]:
    return _run_forward(x, weight, tail, positions, None, False, silu, widths, head_dim, scales, n_normed)[0]


@_forward.register_fake
def _(x, weight, tail, positions, silu, widths, head_dim, scales, n_normed):
    return [torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device) for width in widths]


@torch.library.custom_op("fusedlm::short_conv_inference", mutates_args=())
def _inference(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    silu: bool,
    widths: list[int],
    head_dim: int,
    scales: list[float],
    n_normed: int,
) -> list[torch.Tensor]:
    """The parts and the next tail."""
    norm = (head_dim, scales, n_normed)
    parts, after = _run_forward(x, weight, tail, positions, lengths, True, silu, widths, *norm)
    return [*parts, after]


@_inference.register_fake
def _(x, weight, tail, positions, lengths, silu, widths, head_dim, scales, n_normed):
    parts = [torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device) for width in widths]
    return [*parts, torch.empty(x.shape[0], weight.shape[0] - 1, x.shape[2], dtype=x.dtype, device=x.device)]


@torch.library.custom_op("fusedlm::short_conv_backward", mutates_args=())
def _backward(
    upstreams: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor | None,
    positions: torch.Tensor | None,
    silu: bool,
    head_dim: int,
    scales: list[float],
    n_normed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and tail (empty without one), contiguous."""
    x, weight = _dense_channels(x), weight.contiguous()
    upstreams = [_dense_tokens(upstream) for upstream in upstreams]
    tail, positions = (None if y is None else y.contiguous() for y in (tail, positions))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_tail = x.new_empty(0) if tail is None else torch.empty(tail.shape, dtype=tail.dtype, device=x.device)
    if not x.numel():
        return dx, weight.new_zeros(weight.shape), d_tail.zero_()
    launch = _launch(x, weight, tail, positions, silu, upstreams, head_dim, scales, n_normed)
    schedule = _BACKWARD if tail is None and positions is None else _BACKWARD_OF_DOCUMENTS
    n_blocks, work, constants = _walkers(x, launch["N_STRIPS"], schedule)
    d_weight = torch.empty(n_blocks, weight.numel(), dtype=torch.float32, device=x.device)
    backward_kernel[(launch["N_STRIPS"] * n_blocks,)](
        x, weight, x if tail is None else tail, x if positions is None else positions, tuple(upstreams), dx,
        d_tail, d_weight, *work, *_strides(x, launch["ALIGN"], positions), PREFETCH=schedule.prefetch,
        PDL=supports_pdl(x.device), **launch, **constants,
    )  # fmt: skip
    return dx, column_sums(d_weight, weight.dtype).view(weight.shape), d_tail


@_backward.register_fake
def _(upstreams, x, weight, tail, positions, silu, head_dim, scales, n_normed):
    d_tail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(weight.shape), d_tail


def _setup_context(ctx, inputs, output):
    x, weight, tail, positions, ctx.silu, ctx.widths, *ctx.norm = inputs
    ctx.save_for_backward(x, weight, tail, positions)


def _gradients(ctx, upstreams):
    x, weight, tail, positions = ctx.saved_tensors
    upstreams = [
        x.new_zeros(*x.shape[:2], width) if upstream is None else upstream
        for upstream, width in zip(upstreams, ctx.widths, strict=True)
    ]
    dx, d_weight, d_tail = _backward(upstreams, x, weight, tail, positions, ctx.silu, *ctx.norm)
    return dx, d_weight, None if tail is None else d_tail, *[None] * 6


_forward.register_autograd(_gradients, setup_context=_setup_context)


def short_conv(x, weight, tail, positions, lengths, silu: bool, widths, head_dim: int, head_scales):
    n_normed = len(head_scales)
    scales = [*head_scales, *[1.0] * (len(widths) - n_normed)]  # not empty, which autograd takes for a list of tensors
    arguments = (silu, list(widths), head_dim, scales, n_normed)
    leaves = (x, weight) if tail is None else (x, weight, tail)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        parts = _forward(x, weight, tail, positions, *arguments)
        return tuple(parts), next_tail(x, tail, len(weight) - 1, lengths)
    *parts, after = _inference(x, weight, tail, positions, lengths, *arguments)
    return tuple(parts), after
