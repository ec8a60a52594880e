"""RMSNorm with a SiLU gate in Triton: one pass forward, one backward.

A row is one group of one token; a tile is a few rows. y, z and x are saved for backward, which recomputes the norm.
Each program of the backward pass keeps partial sums of the gradients of gamma and skip; a second kernel reduces them in
a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fusedlm.ops.common.activations import sigmoid
from fusedlm.ops.common.device import supports_pdl
from fusedlm.ops.common.sums import column_sums, column_sums_of_two

_TILE = 2048  # elements
_PER_WARP = 256  # elements
_PROGRAMS = 528  # of the backward pass, 4 per multiprocessor of an H100: as many partial sums to reduce
_STAGES = 3  # software pipeline of the backward pass where a tile is one row; with several it is slower than none
_STAGE_BYTES = 8192  # of a row at most, beyond which the pipeline would not fit into shared memory


@triton.jit
def _rows(tile, n_rows, N_GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Row indices of a tile with their token and group, and a mask of the rows that exist."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return row, row // N_GROUPS, row % N_GROUPS, row < n_rows


@triton.jit
def _load(tensor, t, g, stride_t, stride_g, column, inside):
    at = (t * stride_t + g * stride_g)[:, None] + column[None, :]
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _elements(tensor, g, column, GROUPED: tl.constexpr, WIDTH: tl.constexpr):
    """An element for each column, or for each group and column."""
    at = g[:, None] * WIDTH + column[None, :] if GROUPED else column[None, :]
    return tl.load(tensor + at, mask=(column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    y, z, gamma, x, skip, out, n_rows, y_t, y_g, z_t, z_g, x_t, x_g, eps,
    N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, GAMMA_GROUPED: tl.constexpr, GROUPED: tl.constexpr,
    SKIP: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, t, g, row_inside = _rows(tl.program_id(0), n_rows, N_GROUPS, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row_inside[:, None] & (column < WIDTH)[None, :]
    value = _load(y, t, g, y_t, y_g, column, inside)
    gate = _load(z, t, g, z_t, z_g, column, inside)
    gate *= sigmoid(gate)
    if SKIP:
        factor = _elements(skip, g, column, GROUPED, WIDTH)
        value += factor * _load(x, t, g, x_t, x_g, column, inside)
    if GATE_FIRST:
        value *= gate
    scale = _elements(gamma, g, column, GAMMA_GROUPED, WIDTH)
    value *= tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None] * scale
    if not GATE_FIRST:
        value *= gate
    tl.store(out + row[:, None] * WIDTH + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    upstream, y, z, gamma, x, skip, dy, dz, d_gamma, d_skip, n_rows, n_tiles,
    up_t, up_g, y_t, y_g, z_t, z_g, x_t, x_g, eps,
    N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, GAMMA_GROUPED: tl.constexpr, GROUPED: tl.constexpr,
    SKIP: tl.constexpr, GATE_FIRST: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """d_gamma, d_skip: partial sums per program, and with PER_ROW per row of the tile, whose group is then the same in
    all tiles of the program. PDL: the reduction may start before this ends."""
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    gamma_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    skip_total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if not GAMMA_GROUPED:
        scale = _elements(gamma, column, column, False, WIDTH)
    if SKIP and not GROUPED:
        factor = _elements(skip, column, column, False, WIDTH)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        row, t, g, row_inside = _rows(tile, n_rows, N_GROUPS, ROWS)
        inside = row_inside[:, None] & (column < WIDTH)[None, :]
        d_out = _load(upstream, t, g, up_t, up_g, column, inside)
        value = _load(y, t, g, y_t, y_g, column, inside)
        gate_input = _load(z, t, g, z_t, z_g, column, inside)
        if GAMMA_GROUPED:
            scale = _elements(gamma, g, column, True, WIDTH)
        if SKIP:
            skipped = _load(x, t, g, x_t, x_g, column, inside)
            if GROUPED:
                factor = _elements(skip, g, column, True, WIDTH)
            value += factor * skipped
        opening = sigmoid(gate_input)
        gate = gate_input * opening
        d_gate = opening + gate * (1.0 - opening)
        normed = value
        if GATE_FIRST:
            normed = value * gate
        # With eps 0 this would be infinite for rows beyond the last, and the sums NaN.
        inverse = tl.where(row_inside, tl.rsqrt(tl.sum(normed * normed, 1) / WIDTH + eps), 0.0)[:, None]
        normed *= inverse
        d_scaled = d_out
        if not GATE_FIRST:
            d_scaled = d_out * gate
            d_gate *= d_out * normed * scale
        gamma_total += d_scaled * normed
        d_normed = d_scaled * scale
        d_value = (d_normed - normed * (tl.sum(d_normed * normed, 1) / WIDTH)[:, None]) * inverse
        if GATE_FIRST:
            d_gate *= d_value * value
            d_value *= gate
        if SKIP:
            skip_total += d_value * skipped
        at = row[:, None] * WIDTH + column[None, :]
        tl.store(dy + at, d_value.to(dy.dtype.element_ty), mask=inside)
        tl.store(dz + at, d_gate.to(dz.dtype.element_ty), mask=inside)
    if PER_ROW:
        at = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(d_gamma + at, gamma_total, mask=(column < WIDTH)[None, :])
        if SKIP:
            tl.store(d_skip + at, skip_total, mask=(column < WIDTH)[None, :])
    else:
        at = tl.program_id(0) * WIDTH + column
        tl.store(d_gamma + at, tl.sum(gamma_total, 0), mask=column < WIDTH)
        if SKIP:
            tl.store(d_skip + at, tl.sum(skip_total, 0), mask=column < WIDTH)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, T, G, W) as (B * T, G, W) with contiguous groups, which a slice of a packed projection is without a copy."""
    is_dense = x.stride(3) == 1 and (len(x) <= 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return (x if is_dense else x.contiguous()).flatten(0, 1)


def _launch(y: torch.Tensor, gamma, skip, gate_first: bool) -> dict:
    n_groups, width = y.shape[-2:]
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {
        "N_GROUPS": n_groups,
        "WIDTH": width,
        "GAMMA_GROUPED": gamma.ndim == 2 and n_groups > 1,
        "GROUPED": n_groups > 1,
        "SKIP": skip is not None,
        "GATE_FIRST": gate_first,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(16, max(1, rows * block // _PER_WARP)),
    }


def _per_channel(skip: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(G * W,)"""
    channels = y.shape[-2:].numel()
    return skip[:, None].expand(-1, channels // len(skip)).contiguous()


def _n_programs(n_tiles: int, rows: int, period: int) -> int:
    """Programs of the backward pass, whose rows add up to a multiple of `period`, after which the groups repeat. There
    may be more than tiles, or than _PROGRAMS; the sums of those without a tile are 0."""
    step = period // math.gcd(period, rows)
    return step * max(1, min(triton.cdiv(n_tiles, step), _PROGRAMS // step))


@torch.library.custom_op("fusedlm::gated_rmsnorm", mutates_args=())
def _forward(
    y: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    x: torch.Tensor | None,
    skip: torch.Tensor | None,
    gate_first: bool,
    eps: float,
) -> torch.Tensor:
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        y, z, x = _tokens(y), _tokens(z), None if x is None else _tokens(x)
        launch = _launch(y, gamma, skip, gate_first)
        n_rows = y.shape[:2].numel()
        _forward_kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
            y, z, gamma.contiguous(), y if x is None else x, gamma if skip is None else _per_channel(skip, y), out,
            n_rows, *y.stride()[:2], *z.stride()[:2], *(y if x is None else x).stride()[:2], eps, **launch,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(y, z, gamma, x, skip, gate_first, eps):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@torch.library.custom_op("fusedlm::gated_rmsnorm_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    gamma: torch.Tensor,
    x: torch.Tensor | None,
    skip: torch.Tensor | None,
    gate_first: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of y (with a skip, of y + skip * x), z, gamma, and skip per channel (G * W,) float32, empty without
    one; contiguous."""
    dy, dz = (torch.empty(y.shape, dtype=a.dtype, device=y.device) for a in (y, z))
    channels = 0 if skip is None else y.shape[2:].numel()
    if not y.numel():
        return dy, dz, gamma.new_zeros(gamma.shape), y.new_zeros(channels, dtype=torch.float32)
    upstream, y, z, x = _tokens(upstream), _tokens(y), _tokens(z), None if x is None else _tokens(x)
    launch = _launch(y, gamma, skip, gate_first)
    rows, n_rows = launch["ROWS"], y.shape[:2].numel()
    n_tiles = triton.cdiv(n_rows, rows)
    pipelined = rows == 1 and launch["BLOCK"] * y.element_size() <= _STAGE_BYTES
    per_row = launch["GAMMA_GROUPED"] or (skip is not None and launch["GROUPED"])
    period = y.shape[1] if per_row else 1
    n_programs = _n_programs(n_tiles, rows, period)
    shape = (n_programs * rows // period, period * y.shape[2]) if per_row else (n_programs, y.shape[2])
    d_gamma = torch.empty(shape, dtype=torch.float32, device=y.device)
    d_skip = torch.empty(0 if skip is None else shape, dtype=torch.float32, device=y.device)
    _backward_kernel[(n_programs,)](
        upstream, y, z, gamma.contiguous(), y if x is None else x, gamma if skip is None else _per_channel(skip, y),
        dy, dz, d_gamma, d_skip, n_rows, n_tiles, *upstream.stride()[:2], *y.stride()[:2], *z.stride()[:2],
        *(y if x is None else x).stride()[:2], eps, PER_ROW=per_row, STAGES=_STAGES if pipelined else 1,
        PDL=supports_pdl(y.device), **launch,
    )  # fmt: skip
    shared = per_row and gamma.ndim == 1  # by groups whose partial sums are apart
    dtype = torch.float32 if shared else gamma.dtype
    if skip is None:
        d_gamma = column_sums(d_gamma, dtype)
    else:
        d_gamma, d_skip = column_sums_of_two(d_gamma, dtype, d_skip, torch.float32)
    if shared:
        d_gamma = d_gamma.view(-1, len(gamma)).sum(0).to(gamma.dtype)
    return dy, dz, d_gamma.view(gamma.shape), d_skip


@_backward.register_fake
def _(upstream, y, z, gamma, x, skip, gate_first, eps):
    dy, dz = (torch.empty(y.shape, dtype=a.dtype, device=y.device) for a in (y, z))
    channels = 0 if skip is None else y.shape[2] * y.shape[3]
    return dy, dz, gamma.new_empty(gamma.shape), y.new_empty(channels, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.gate_first, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, upstream):
    y, z, gamma, x, skip = ctx.saved_tensors
    dy, dz, d_gamma, d_skip = _backward(upstream, y, z, gamma, x, skip, ctx.gate_first, ctx.eps)
    if skip is None:
        return dy, dz, d_gamma, None, None, None, None
    # Pointwise, so that torch.compile adds it to the other gradients of x without another pass.
    dx = (dy.flatten(-2).unflatten(-1, (len(skip), -1)) * skip.to(x.dtype)[:, None]).view(x.shape)
    return dy, dz, d_gamma, dx, d_skip.view(len(skip), -1).sum(1).to(skip.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def gated_rmsnorm(y, z, gamma, x, skip, gate_first: bool, eps: float) -> torch.Tensor:
    return _forward(y, z, gamma, x, skip, gate_first, eps)
