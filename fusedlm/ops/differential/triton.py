"""Fused subtract + head RMSNorm of differential attention in Triton: one pass forward, one backward.

A row is one head of one token; a tile is a few rows. Each program of the backward pass keeps partial sums of the
gradients of gamma and, unless it is per token, of lambda; a second kernel reduces them in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from fusedlm.ops.common.device import supports_pdl
from fusedlm.ops.common.sums import column_sums, column_sums_of_two

_TILE = 1024  # elements
_PROGRAMS = 528  # of the backward pass, 4 per multiprocessor of an H100: as many partial sums to reduce
_STAGES = 3  # software pipeline of the backward pass


@triton.jit
def _rows(tile, n_rows, N_HEADS: tl.constexpr, n_tokens, ROWS: tl.constexpr):
    """Row indices of a tile with their batch, token and head, and a mask of the rows that exist."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = row // N_HEADS
    return row, token // n_tokens, token % n_tokens, row % N_HEADS, row < n_rows


@triton.jit
def _difference(signal, noise, weight, signal_at, noise_at, weight_at, inside, row_inside):
    s = tl.load(signal + signal_at, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(noise + noise_at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + weight_at, mask=row_inside, other=0.0).to(tl.float32)
    return s - w[:, None] * n, n, w


@triton.jit
def _inverse_rms(z, eps, WIDTH: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(z * z, 1) / WIDTH + eps)


@triton.jit
def _forward_kernel(
    signal, noise, weight, gamma, scale, out, n_rows, n_tokens,
    signal_b, signal_t, signal_h, noise_b, noise_t, noise_h, weight_b, weight_t, weight_h, eps,
    N_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, b, t, h, row_inside = _rows(tl.program_id(0), n_rows, N_HEADS, n_tokens, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row_inside[:, None] & (column < WIDTH)[None, :]
    z, _, _ = _difference(
        signal, noise, weight,
        (b * signal_b + t * signal_t + h * signal_h)[:, None] + column[None, :],
        (b * noise_b + t * noise_t + h * noise_h)[:, None] + column[None, :],
        b * weight_b + t * weight_t + h * weight_h, inside, row_inside,
    )  # fmt: skip
    if NORM:
        z *= _inverse_rms(z, eps, WIDTH)[:, None]
        z *= tl.load(gamma + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        z *= tl.load(scale).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + column[None, :], z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    upstream, signal, noise, weight, gamma, scale, d_signal, d_noise, d_weight, d_gamma, n_rows, n_tokens, n_tiles,
    up_b, up_t, up_h, signal_b, signal_t, signal_h, noise_b, noise_t, noise_h, weight_b, weight_t, weight_h,
    eps,
    N_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """d_gamma: a row of partial sums per program. d_weight: with PER_TOKEN the gradient, else a partial sum for each of
    the program's ROWS. PDL: the reduction may start before this ends."""
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    gamma_total = tl.zeros((BLOCK,), dtype=tl.float32)
    weight_total = tl.zeros((ROWS,), dtype=tl.float32)
    g = tl.zeros((BLOCK,), dtype=tl.float32)
    if NORM:
        g = tl.load(gamma + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    factor = 1.0
    if SCALED:
        factor = tl.load(scale).to(tl.float32)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        row, b, t, h, row_inside = _rows(tile, n_rows, N_HEADS, n_tokens, ROWS)
        inside = row_inside[:, None] & (column < WIDTH)[None, :]
        signal_at = (b * signal_b + t * signal_t + h * signal_h)[:, None] + column[None, :]
        noise_at = (b * noise_b + t * noise_t + h * noise_h)[:, None] + column[None, :]
        z, n, w = _difference(
            signal, noise, weight, signal_at, noise_at, b * weight_b + t * weight_t + h * weight_h, inside, row_inside
        )
        up_at = (b * up_b + t * up_t + h * up_h)[:, None] + column[None, :]
        dz = tl.load(upstream + up_at, mask=inside, other=0.0).to(tl.float32) * factor
        if NORM:
            # With eps 0 this would be infinite for rows beyond the last, and the sums NaN.
            inverse = tl.where(row_inside, _inverse_rms(z, eps, WIDTH), 0.0)[:, None]
            normed = z * inverse
            gamma_total += tl.sum(dz * normed, 0)
            dz *= g[None, :]
            dz = (dz - normed * (tl.sum(dz * normed, 1) / WIDTH)[:, None]) * inverse
        tl.store(d_signal + signal_at, dz.to(d_signal.dtype.element_ty), mask=inside)
        tl.store(d_noise + noise_at, (-w[:, None] * dz).to(d_noise.dtype.element_ty), mask=inside)
        dw = -tl.sum(dz * n, 1)
        if PER_TOKEN:
            tl.store(d_weight + row, dw.to(d_weight.dtype.element_ty), mask=row_inside)
        else:
            weight_total += dw
    if NORM:
        tl.store(d_gamma + tl.program_id(0) * WIDTH + column, gamma_total, mask=column < WIDTH)
    if not PER_TOKEN:
        tl.store(d_weight + tl.program_id(0) * ROWS + tl.arange(0, ROWS), weight_total)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous heads and no overlaps or gaps: gradients are written with the same strides."""
    dense = x.numel() == 0 or torch.empty_like(x).stride() == x.stride()
    return x if x.stride(-1) == 1 and dense else x.contiguous()


def _weight_strides(weight: torch.Tensor) -> tuple[int, int, int]:
    """Batch, token and head strides of (), (H,) or (B, T, H)."""
    return (0,) * (3 - weight.ndim) + weight.stride()


def _launch(signal: torch.Tensor, gamma, scale) -> dict:
    width = signal.shape[-1]
    block = triton.next_power_of_2(width)
    return {
        "N_HEADS": signal.shape[2],
        "WIDTH": width,
        "NORM": gamma is not None,
        "SCALED": scale is not None,
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": 2,
    }


def _n_programs(n_tiles: int, rows: int, period: int) -> int:
    """Programs of the backward pass. Their rows add up to a multiple of `period`, after which the weights repeat.

    Each row of a program then has the same weight in all its tiles, and the partial sums are in the order of the
    weights. There may be more programs than tiles, or than _PROGRAMS; the sums of those without a tile are 0.
    """
    step = period // math.gcd(period, rows)
    return step * max(1, min(triton.cdiv(n_tiles, step), _PROGRAMS // step))


@torch.library.custom_op("fusedlm::differential_combine", mutates_args=())
def _forward(
    signal: torch.Tensor,
    noise: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    signal, noise = _dense(signal), _dense(noise)
    out = torch.empty(signal.shape, dtype=signal.dtype, device=signal.device)
    n_rows = signal.shape[:3].numel()
    if signal.numel():
        launch = _launch(signal, gamma, scale)
        _forward_kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
            signal, noise, weight, weight if gamma is None else gamma.contiguous(), weight if scale is None else scale,
            out, n_rows, signal.shape[1], *signal.stride()[:3], *noise.stride()[:3], *_weight_strides(weight), eps,
            **launch,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(signal, noise, weight, gamma, scale, eps):
    return torch.empty(signal.shape, dtype=signal.dtype, device=signal.device)


@torch.library.custom_op("fusedlm::differential_combine_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    signal: torch.Tensor,
    noise: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of signal, noise, weight and gamma (empty without gamma), with their shapes and dtypes."""
    upstream, signal, noise = _dense(upstream), _dense(signal), _dense(noise)
    d_signal, d_noise = torch.empty_like(signal), torch.empty_like(noise)
    if not signal.numel():
        d_gamma = signal.new_empty(0, dtype=torch.float32) if gamma is None else gamma.new_zeros(gamma.shape)
        return d_signal, d_noise, weight.new_zeros(weight.shape), d_gamma
    launch = _launch(signal, gamma, scale)
    rows, n_rows = launch["ROWS"], signal.shape[:3].numel()
    n_tiles = triton.cdiv(n_rows, rows)
    per_token = weight.ndim == 3
    period = 1 if per_token else weight.numel()
    n_programs = _n_programs(n_tiles, rows, period)
    shape, dtype = (weight.shape, weight.dtype) if per_token else ((n_programs * rows // period, period), torch.float32)
    d_weight = torch.empty(shape, dtype=dtype, device=signal.device)
    shape = 0 if gamma is None else (n_programs, signal.shape[-1])
    d_gamma = torch.empty(shape, dtype=torch.float32, device=signal.device)
    _backward_kernel[(n_programs,)](
        upstream, signal, noise, weight, weight if gamma is None else gamma.contiguous(),
        weight if scale is None else scale, d_signal, d_noise, d_weight, d_gamma,
        n_rows, signal.shape[1], n_tiles, *upstream.stride()[:3], *signal.stride()[:3],
        *noise.stride()[:3], *_weight_strides(weight), eps, PER_TOKEN=per_token, STAGES=_STAGES,
        PDL=supports_pdl(signal.device), **launch,
    )  # fmt: skip
    if not per_token and gamma is not None:
        d_weight, d_gamma = column_sums_of_two(d_weight, weight.dtype, d_gamma, gamma.dtype)
    elif not per_token:
        d_weight = column_sums(d_weight, weight.dtype)
    elif gamma is not None:
        d_gamma = column_sums(d_gamma, gamma.dtype)
    return d_signal, d_noise, d_weight.view(weight.shape), d_gamma


@_backward.register_fake
def _(upstream, signal, noise, weight, gamma, scale, eps):
    d_gamma = signal.new_empty(0, dtype=torch.float32) if gamma is None else gamma.new_empty(gamma.shape)
    return (
        torch.empty_like(_dense(signal)),
        torch.empty_like(_dense(noise)),
        weight.new_empty(weight.shape),
        d_gamma,
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, upstream):
    signal, noise, weight, gamma, scale = ctx.saved_tensors
    d_signal, d_noise, d_weight, d_gamma = _backward(upstream, signal, noise, weight, gamma, scale, ctx.eps)
    return d_signal, d_noise, d_weight, None if gamma is None else d_gamma, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def differential_combine(signal, noise, weight, gamma, scale, eps: float) -> torch.Tensor:
    return _forward(signal, noise, weight, gamma, scale, eps)
