"""8-bit products emulated in plain PyTorch: values are rounded to the grid and multiplied in float32. It runs anywhere
and is the definition."""

import torch
import torch.nn.functional as F

from fusedlm.ops.low_precision.formats import TINY, Cast, Grid, padded


def scale_of(amax: torch.Tensor, grid: Grid) -> torch.Tensor:
    """amax / largest, at least TINY; NaN where amax is not finite."""
    amax = amax.float()
    # By a number, torch multiplies by its reciprocal on a GPU. A scale that is off by one bit rounds ties differently,
    # of which values of 16 bits have many.
    scale = (amax / torch.full_like(amax, grid.largest)).clamp_min(TINY)
    return torch.where(amax.isfinite(), scale, float("nan"))


def encode(value: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The bits, uint8, of float32 values rounded to nearest even and clamped. NaN is 0 as an integer."""
    value = value.clamp(-grid.largest, grid.largest)
    if grid.is_integer:
        value = value.nan_to_num(0.0).round()
    return value.to(grid.dtype).view(torch.uint8)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The values of bits, float32."""
    return codes.view(grid.dtype).float()


def produce(x: torch.Tensor, gain: torch.Tensor | None, producer: str, parameter: float):
    """(..., K) float32 that is cast, and the inverse root mean square of each row of a norm, else None.

    producer: none: x; norm: RMSNorm of x with the gain, eps the parameter; swiglu: silu(gate) * up, x (..., 2 K) with
    gate first; relu2: leaky_relu(x)^2, the slope the parameter.
    """
    x = x.float()
    if producer == "norm":
        inverse_rms = (x.square().mean(-1) + parameter).rsqrt()
        return x * gain.float() * inverse_rms[..., None], inverse_rms
    if producer == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up, None
    if producer == "relu2":
        return torch.where(x < 0, x * parameter, x).square(), None
    return x, None


def row_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row of (N, K), (N,) float32; NaN where there is one."""
    return torch.linalg.vector_norm(x.detach(), float("inf"), dim=-1).float()


def cast(x, gain, producer: str, parameter: float, amax, grid: Grid, by_row: bool):
    """The `Cast` of what a producer makes of x, the transpose with the same bits, and the inverse root mean squares.

    The transpose has one scale: that of the tensor, or 1 by rows, where its columns have the scales of the rows, which
    the other operand takes over (`cast_gradient`).

    Args:
        amax: (N,) float32, of each row of x itself; None: computed here.
    """
    value, inverse_rms = produce(x, gain, producer, parameter)
    amax = row_amax(value) if amax is None else amax
    scales = scale_of(amax if by_row else amax.amax(0, keepdim=True), grid)
    codes = encode(value * scales.reciprocal()[:, None], grid)
    return Cast(codes, scales, transpose(codes), torch.ones_like(scales[:1]) if by_row else scales), inverse_rms


def cast_gradient(dy, amax, fold, amax_t, grid: Grid) -> Cast:
    """The `Cast` of a gradient.

    Args:
        dy: (N, M).
        amax: of each row (N,), or of all, (1,).
        fold: None, or (N,): the transpose is of dy with row n times fold[n].
        amax_t: of the columns of the transpose's rows (M,), or of all, (1,); None without fold: as amax.
    """
    value, scales = dy.float(), scale_of(amax, grid)
    codes = encode(value * scales.reciprocal()[:, None], grid)
    if fold is None:
        return Cast(codes, scales, transpose(codes), scales)
    scales_t = scale_of(amax_t, grid)
    return Cast(codes, scales, transpose(encode(value * fold[:, None] * scales_t.reciprocal(), grid)), scales_t)


def cast_weight(weight, grid: Grid, by_row: bool, out: Cast | None = None) -> Cast:
    """The `Cast` of a weight (M, K). By rows, the transpose is rounded with scales of its own, one per column of W.

    out: what is overwritten, and returned.
    """
    cast = _cast_weight(weight, grid, by_row)
    if out is None:
        return cast
    for old, new in zip(out, cast, strict=True):
        old.copy_(new)
    return out


def _cast_weight(weight, grid: Grid, by_row: bool) -> Cast:
    amax = row_amax(weight)
    if not by_row:
        return cast_gradient(weight, amax.amax(0, keepdim=True), None, None, grid)
    return cast_gradient(weight, amax, torch.ones_like(amax), row_amax(weight.t()), grid)


def transpose(codes: torch.Tensor) -> torch.Tensor:
    """(K, N up to a multiple of 16), contiguous, of (N, K)."""
    n, k = codes.shape
    out = codes.new_zeros(k, padded(n))
    out[:, :n] = codes.t()
    return out


def multiply(a, a_scales, a_grid: Grid, b, b_scales, b_grid: Grid, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """a b^T of codes a (R, C) and b (S, C) with their scales, (R,), (S,) or (1,) each, in dtype.

    fast: ignored; on tensor cores, whether sums stay in their registers of fewer bits.
    """
    with torch.autocast(a.device.type, enabled=False):
        return (decode(a, a_grid) @ decode(b, b_grid).t() * a_scales[:, None] * b_scales).to(dtype)
