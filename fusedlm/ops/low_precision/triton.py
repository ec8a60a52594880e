"""8-bit casts by our kernels, and products by torch on the tensor cores."""

from functools import partial

import torch
import triton

from fusedlm.ops.low_precision.formats import Cast, Grid, padded
from fusedlm.ops.low_precision.kernels import cast_kernel, rescale_kernel, statistics_kernel
from fusedlm.ops.low_precision.linear import linear as low_precision_linear

# Tiles, when the program finds the largest magnitudes of its rows first, and when they are given. The rows of all
# programs that run at a time should fit the L2 cache, from which the second pass reads: 32 of up to 2048 columns do.
# Rows are bytes of the transpose that are contiguous, of which a sector of memory has 32.
CONFIGS = {
    "computed": {"ROWS": 32, "COLUMNS": 256, "num_warps": 8},
    "given": {"ROWS": 64, "COLUMNS": 128, "num_warps": 8},
}
_CHUNK = 131072  # terms of 127^2 whose sum fits in 32 bits
_LEAST_ROWS = 32  # torch._int_mm takes more than 16
_BLOCK = 1024  # columns of the rescaling kernel


def _encoding(x: torch.Tensor, grid: Grid) -> dict:
    return {"LARGEST": grid.largest, "MANTISSA": grid.mantissa, "EMIN": grid.emin, "NATIVE": x.is_cuda}


def _codes(x: torch.Tensor, n_rows: int, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(n_rows, n_columns, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(n_columns, padded(n_rows), dtype=torch.uint8, device=x.device)


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _float32(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(n, dtype=torch.float32, device=like.device)


def _launch(x, gain, inverse_rms, amax, fold, amax_t, out: Cast, grid: Grid, kind, transpose, producer, value) -> None:
    """kind, transpose: AMAX and TRANSPOSE of the kernel; value: the parameter of the producer."""
    n_rows, n_columns = out.codes.shape
    config = dict(CONFIGS["computed" if kind == "computed" else "given"])
    rows, columns = config["ROWS"], config["COLUMNS"]
    per_program = triton.cdiv(n_columns, columns) * columns if kind == "computed" else columns
    launch = (triton.cdiv(out.codes_t.shape[1], rows), triton.cdiv(n_columns, per_program))
    none = out.scales  # in place of what is not read
    tensors = [none if tensor is None else tensor.contiguous() for tensor in (gain, inverse_rms, amax, fold, amax_t)]
    cast_kernel[launch](
        x, *tensors, *out, n_rows, out.codes_t.shape[1], x.stride(0), n_columns, per_program, value, 1.0,
        PRODUCER=producer, AMAX=kind, TRANSPOSE=transpose, **_encoding(x, grid), **config,
    )  # fmt: skip


def cast(x, gain, producer: str, parameter: float, amax, grid: Grid, by_row: bool):
    """As `reference.cast`."""
    x = _contiguous_rows(x)
    n_rows, n_columns = x.shape[0], x.shape[1] // (2 if producer == "swiglu" else 1)
    codes, codes_t = _codes(x, n_rows, n_columns)
    inverse_rms = _float32(n_rows, x) if producer == "norm" else None
    kind = "row" if by_row else "tensor"
    if amax is None and by_row:
        kind = "computed"
    elif amax is None:
        amax, config = _float32(n_rows, x), CONFIGS["computed"]
        unused = amax if inverse_rms is None else inverse_rms
        statistics_kernel[(triton.cdiv(n_rows, config["ROWS"]),)](
            x, unused if gain is None else gain.contiguous(), amax, unused, n_rows, x.stride(0), n_columns, parameter,
            PRODUCER=producer, **config,
        )  # fmt: skip
    if kind == "tensor":
        amax = amax.amax(0, keepdim=True)
    scales = _float32(n_rows if by_row else 1, x)
    out = Cast(codes, scales, codes_t, scales)
    _launch(x, gain, inverse_rms, amax, None, None, out, grid, kind, "same", producer, parameter)
    return out._replace(scales_t=torch.ones_like(scales[:1]) if by_row else scales), inverse_rms


def cast_gradient(dy, amax, fold, amax_t, grid: Grid, out: Cast | None = None) -> Cast:
    """As `reference.cast_gradient`; out: what is overwritten."""
    dy = _contiguous_rows(dy)
    kind = "tensor" if fold is None else "row"
    transpose = "same"
    if fold is not None:
        transpose = "tensor" if len(amax_t) == 1 else "row"
    if out is None:
        scales = _float32(len(amax), dy)
        codes, codes_t = _codes(dy, *dy.shape)
        out = Cast(codes, scales, codes_t, scales if fold is None else _float32(len(amax_t), dy))
    _launch(dy, None, None, amax, fold, amax_t, out, grid, kind, transpose, "none", 0.0)
    return out


def cast_weight(weight, grid: Grid, by_row: bool, out: Cast | None = None) -> Cast:
    """As `reference.cast_weight`."""
    amax = torch.linalg.vector_norm(weight, float("inf"), dim=1)
    if not by_row:
        return cast_gradient(weight, amax.amax(0, keepdim=True), None, None, grid, out)
    columns = torch.linalg.vector_norm(weight, float("inf"), dim=0)
    return cast_gradient(weight, amax, torch.ones_like(amax), columns, grid, out)


def multiply(a, a_scales, a_grid: Grid, b, b_scales, b_grid: Grid, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """As `reference.multiply`, on a GPU."""
    if a_grid.is_integer:
        return rescale(_integer_product(a.view(torch.int8), b.view(torch.int8)), a_scales, b_scales, dtype)
    by_row = len(a_scales) > 1 or len(b_scales) > 1
    if by_row:
        a_scales, b_scales = a_scales.expand(len(a)).contiguous()[:, None], b_scales.expand(len(b)).contiguous()[None]
    out = torch._scaled_mm(
        a.view(a_grid.dtype),
        b.view(b_grid.dtype).t(),
        scale_a=a_scales,
        scale_b=b_scales,
        # With scales by row torch gives bfloat16 alone.
        out_dtype=torch.bfloat16 if by_row else dtype,
        use_fast_accum=fast,
    )
    return out.to(dtype)


def _integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T, int32; float32 where the sum of all terms could overflow."""
    n_rows = len(a)
    if n_rows < _LEAST_ROWS:
        a = torch.cat([a, a.new_zeros(_LEAST_ROWS - n_rows, a.shape[1])])
    parts = [
        torch._int_mm(a[:, start : start + _CHUNK].contiguous(), b[:, start : start + _CHUNK].contiguous().t())
        for start in range(0, a.shape[1], _CHUNK)
    ]
    return (parts[0] if len(parts) == 1 else torch.stack([part.float() for part in parts]).sum(0))[:n_rows]


def rescale(total: torch.Tensor, a_scales, b_scales, dtype: torch.dtype) -> torch.Tensor:
    """total (R, S) times a_scales (R,) or (1,) of its rows and b_scales (S,) or (1,) of its columns, in dtype."""
    n_rows, n_columns = total.shape
    out = torch.empty(n_rows, n_columns, dtype=dtype, device=total.device)
    block = min(_BLOCK, triton.next_power_of_2(n_columns))
    rescale_kernel[(n_rows, triton.cdiv(n_columns, block))](
        total, a_scales, b_scales, out, n_rows, n_columns,
        A_BY_ROW=len(a_scales) > 1, B_BY_ROW=len(b_scales) > 1, BLOCK=block,
    )  # fmt: skip
    return out


linear = partial(low_precision_linear, backend="triton")
