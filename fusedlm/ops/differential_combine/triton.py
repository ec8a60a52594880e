"""The end of differential attention in Triton: one pass forward, one pass backward.

A tile is a few heads' rows, each normalised by itself. The gradients of lambda leave the backward pass one a row and
those of gamma one vector a program; torch sums both, in a fixed order.
"""

import torch
import triton
import triton.language as tl

_TILE = 1024  # elements
_PROGRAMS = (
    528  # of the backward pass, 4 on each of an H100's processors: as many vectors of gamma's gradient to add up
)
_STAGES = 3  # tiles on their way at a time in the backward pass


@triton.jit
def _rows(tile, n_rows, N_HEADS: tl.constexpr, n_tokens, ROWS: tl.constexpr):
    """Batch, token and head of each row of a tile, and which rows there are."""
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
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
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
            inverse = _inverse_rms(z, eps, WIDTH)[:, None]
            normed = z * inverse
            total += tl.sum(dz * normed, 0)
            dz *= g[None, :]
            dz = (dz - normed * (tl.sum(dz * normed, 1) / WIDTH)[:, None]) * inverse
        tl.store(d_signal + signal_at, dz.to(d_signal.dtype.element_ty), mask=inside)
        tl.store(d_noise + noise_at, (-w[:, None] * dz).to(d_noise.dtype.element_ty), mask=inside)
        tl.store(d_weight + row, -tl.sum(dz * n, 1), mask=row_inside)
    if NORM:
        tl.store(d_gamma + tl.program_id(0) * WIDTH + column, total, mask=column < WIDTH)


def _ready(x: torch.Tensor) -> torch.Tensor:
    """Heads whose numbers lie side by side, in memory of their own: gradients are written by the same strides."""
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


@torch.library.custom_op("fusedlm::differential_combine", mutates_args=())
def _forward(
    signal: torch.Tensor,
    noise: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    signal, noise = _ready(signal), _ready(noise)
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
    """Gradients of signal and noise, of lambda (B, T, H) float32 and of gamma (E,) float32."""
    upstream, signal, noise = _ready(upstream), _ready(signal), _ready(noise)
    d_signal, d_noise = torch.empty_like(signal), torch.empty_like(noise)
    d_weight = torch.empty(signal.shape[:3], dtype=torch.float32, device=signal.device)
    launch = _launch(signal, gamma, scale)
    n_tiles = triton.cdiv(d_weight.numel(), launch["ROWS"])
    n_programs = min(n_tiles, _PROGRAMS)
    d_gamma = torch.empty(n_programs, signal.shape[-1], dtype=torch.float32, device=signal.device)
    if signal.numel():
        _backward_kernel[(n_programs,)](
            upstream, signal, noise, weight, weight if gamma is None else gamma.contiguous(),
            weight if scale is None else scale, d_signal, d_noise, d_weight, d_gamma,
            d_weight.numel(), signal.shape[1], n_tiles, *upstream.stride()[:3], *signal.stride()[:3],
            *noise.stride()[:3], *_weight_strides(weight), eps, STAGES=_STAGES, **launch,
        )  # fmt: skip
    return d_signal, d_noise, d_weight, d_gamma.sum(0) if gamma is not None else d_gamma.new_zeros(signal.shape[-1])


@_backward.register_fake
def _(upstream, signal, noise, weight, gamma, scale, eps):
    narrow = signal.new_empty(signal.shape[:3], dtype=torch.float32)
    d_gamma = signal.new_empty(signal.shape[-1:], dtype=torch.float32)
    return torch.empty_like(_ready(signal)), torch.empty_like(_ready(noise)), narrow, d_gamma


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, upstream):
    signal, noise, weight, gamma, scale = ctx.saved_tensors
    d_signal, d_noise, d_weight, d_gamma = _backward(upstream, signal, noise, weight, gamma, scale, ctx.eps)
    d_weight = d_weight.sum_to_size(weight.shape).to(weight.dtype)
    return d_signal, d_noise, d_weight, None if gamma is None else d_gamma.to(gamma.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def differential_combine(signal, noise, weight, gamma, scale, eps: float) -> torch.Tensor:
    return _forward(signal, noise, weight, gamma, scale, eps)
