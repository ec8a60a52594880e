"""The input of a block and its RMSNorm in Triton: one pass forward, one backward.

A row is one token; a tile is a few rows, and a program takes tile after tile, with the gain and the factors in
registers. Only inputs are saved for backward: the mixed row, from which the norm is recomputed, is one product and sum
of what the gradients of the factors need anyway. Each program of the backward pass keeps partial sums of the gradients
of the gain and the factors; a second kernel reduces them in a fixed order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fusedlm.ops.common.device import supports_pdl
from fusedlm.ops.common.sums import column_sums

# Elements of a tile and of a warp, and the most programs: forward one per tile, backward 7 per multiprocessor of an
# H100, where it writes as many partial sums as it has programs. Measured there, for rows of 512.
_FORWARD = {"tile": 512, "per_warp": 128, "programs": 2**31 - 1}
_BACKWARD = {"tile": 512, "per_warp": 128, "programs": 924}


@triton.jit
def _vector(tensor, column, WIDTH: tl.constexpr):
    return tl.load(tensor + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile(tile, n_rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Positions of a tile's elements, its mask, and that of its rows."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = row < n_rows
    return row[:, None] * WIDTH + column[None, :], row_inside[:, None] & (column < WIDTH)[None, :], row_inside


@triton.jit
def _load(tensor, at, inside):
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, x0, skip, gain, mix_x, mix_x0, skip_weight, mixed_out, normed_out, n_rows, n_tiles, eps,
    MIX: tl.constexpr, X0: tl.constexpr, SKIP: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    scale = _vector(gain, column, WIDTH)
    if MIX:
        factor = _vector(mix_x, column, WIDTH)
    if X0:
        factor_x0 = _vector(mix_x0, column, WIDTH)
    if SKIP:
        factor_skip = _vector(skip_weight, column, WIDTH)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        at, inside, _ = _tile(tile, n_rows, column, WIDTH, ROWS)
        mixed = _load(x, at, inside)
        if SKIP:
            mixed += factor_skip * _load(skip, at, inside)
        if MIX:
            mixed *= factor
        if X0:
            mixed += factor_x0 * _load(x0, at, inside)
        tl.store(mixed_out + at, mixed.to(mixed_out.dtype.element_ty), mask=inside)
        normed = mixed * tl.rsqrt(tl.sum(mixed * mixed, 1) / WIDTH + eps)[:, None] * scale
        tl.store(normed_out + at, normed.to(normed_out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_mixed, d_normed, x, x0, skip, gain, mix_x, mix_x0, skip_weight, dx, dx0, d_skip, partials,
    n_rows, n_tiles, eps,
    MIX: tl.constexpr, X0: tl.constexpr, SKIP: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partials: for each program a row of partial sums of the gradients of the gain and, where given, mix_x, mix_x0 and
    skip_weight. PDL: the reduction may start before this ends."""
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    scale = _vector(gain, column, WIDTH)
    gain_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if MIX:
        factor = _vector(mix_x, column, WIDTH)
        mix_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if X0:
        factor_x0 = _vector(mix_x0, column, WIDTH)
        x0_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if SKIP:
        factor_skip = _vector(skip_weight, column, WIDTH)
        skip_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        at, inside, row_inside = _tile(tile, n_rows, column, WIDTH, ROWS)
        own = _load(x, at, inside)
        if SKIP:
            skipped = _load(skip, at, inside)
            own += factor_skip * skipped
        mixed = own
        if MIX:
            mixed = factor * own
        if X0:
            first = _load(x0, at, inside)
            mixed += factor_x0 * first
        d_out = _load(d_normed, at, inside)
        # With eps 0 this would be infinite for rows beyond the last, and the sums NaN.
        inverse = tl.where(row_inside, tl.rsqrt(tl.sum(mixed * mixed, 1) / WIDTH + eps), 0.0)[:, None]
        mixed *= inverse
        gain_total += d_out * mixed
        d_out *= scale
        d_out = (d_out - mixed * (tl.sum(d_out * mixed, 1) / WIDTH)[:, None]) * inverse
        d_out += _load(d_mixed, at, inside)
        if X0:
            x0_total += d_out * first
            tl.store(dx0 + at, (d_out * factor_x0).to(dx0.dtype.element_ty), mask=inside)
        if MIX:
            mix_total += d_out * own
            d_out *= factor
        tl.store(dx + at, d_out.to(dx.dtype.element_ty), mask=inside)
        if SKIP:
            skip_total += d_out * skipped
            tl.store(d_skip + at, (d_out * factor_skip).to(d_skip.dtype.element_ty), mask=inside)
    is_column = column < WIDTH
    partials += tl.program_id(0).to(tl.int64) * ((1 + MIX + X0 + SKIP) * WIDTH) + column
    tl.store(partials, tl.sum(gain_total, 0), mask=is_column)
    if MIX:
        tl.store(partials + WIDTH, tl.sum(mix_total, 0), mask=is_column)
    if X0:
        tl.store(partials + (1 + MIX) * WIDTH, tl.sum(x0_total, 0), mask=is_column)
    if SKIP:
        tl.store(partials + (1 + MIX + X0) * WIDTH, tl.sum(skip_total, 0), mask=is_column)


def _launch(x: torch.Tensor, mix_x, x0, skip, tile: int, per_warp: int, programs: int) -> tuple[int, int, int, dict]:
    """Rows, tiles, programs, and the constants of a kernel."""
    block = triton.next_power_of_2(x.shape[-1])
    rows = max(1, tile // block)
    n_rows = x.numel() // x.shape[-1]
    n_tiles = triton.cdiv(n_rows, rows)
    constants = {
        "MIX": mix_x is not None,
        "X0": x0 is not None,
        "SKIP": skip is not None,
        "WIDTH": x.shape[-1],
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(16, max(1, rows * block // per_warp)),
    }
    return n_rows, n_tiles, min(n_tiles, programs), constants


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("fusedlm::mix_inputs", mutates_args=())
def _forward(
    x: torch.Tensor,
    gain: torch.Tensor,
    mix_x: torch.Tensor | None,
    x0: torch.Tensor | None,
    mix_x0: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    mixed, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        n_rows, n_tiles, n_programs, launch = _launch(x, mix_x, x0, skip, **_FORWARD)
        _forward_kernel[(n_programs,)](
            *_contiguous(x, x0, skip, gain, mix_x, mix_x0, skip_weight), mixed, normed, n_rows, n_tiles, eps, **launch
        )
    return mixed, normed


@_forward.register_fake
def _(x, gain, mix_x, x0, mix_x0, skip, skip_weight, eps):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


@torch.library.custom_op("fusedlm::mix_inputs_backward", mutates_args=())
def _backward(
    d_mixed: torch.Tensor,
    d_normed: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor,
    mix_x: torch.Tensor | None,
    x0: torch.Tensor | None,
    mix_x0: torch.Tensor | None,
    skip: torch.Tensor | None,
    skip_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, x0 and skip, empty where there is none; and of the gain and, where given, mix_x, mix_x0 and
    skip_weight, the rows of one float32 matrix."""
    dx, dx0, d_skip = (_empty_gradient(a, x) for a in (x, x0, skip))
    n_vectors = 1 + sum(a is not None for a in (mix_x, x0, skip))
    width = x.shape[-1]
    if not x.numel():
        return dx, dx0, d_skip, x.new_zeros(n_vectors, width, dtype=torch.float32)
    n_rows, n_tiles, n_programs, launch = _launch(x, mix_x, x0, skip, **_BACKWARD)
    partials = torch.empty(n_programs, n_vectors * width, dtype=torch.float32, device=x.device)
    _backward_kernel[(n_programs,)](
        *_contiguous(d_mixed, d_normed, x, x0, skip, gain, mix_x, mix_x0, skip_weight), dx, dx0, d_skip, partials,
        n_rows, n_tiles, eps, PDL=supports_pdl(x.device), **launch,
    )  # fmt: skip
    return dx, dx0, d_skip, column_sums(partials, torch.float32).view(n_vectors, width)


def _empty_gradient(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Contiguous."""
    if tensor is None:
        return torch.empty(0, dtype=x.dtype, device=x.device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)


@_backward.register_fake
def _(d_mixed, d_normed, x, gain, mix_x, x0, mix_x0, skip, skip_weight, eps):
    n_vectors = 1 + sum(a is not None for a in (mix_x, x0, skip))
    vectors = torch.empty(n_vectors, x.shape[-1], dtype=torch.float32, device=x.device)
    return *(_empty_gradient(a, x) for a in (x, x0, skip)), vectors


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, d_mixed, d_normed):
    x, gain, mix_x, x0, mix_x0, skip, skip_weight = ctx.saved_tensors
    dx, dx0, d_skip, vectors = _backward(d_mixed, d_normed, x, gain, mix_x, x0, mix_x0, skip, skip_weight, ctx.eps)
    found = iter(vectors.unbind())
    d_gain, d_mix, d_mix_x0, d_weight = (
        None if a is None else next(found).to(a.dtype) for a in (gain, mix_x, mix_x0, skip_weight)
    )
    return dx, d_gain, d_mix, None if x0 is None else dx0, d_mix_x0, None if skip is None else d_skip, d_weight, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def mix_inputs(x, gain, mix_x, x0, mix_x0, skip, skip_weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, gain, mix_x, x0, mix_x0, skip, skip_weight, eps)
