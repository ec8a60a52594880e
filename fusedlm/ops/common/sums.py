"""Final reduction of per-program partial sums, such as gradients of weights that every token shares."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fusedlm.ops.common.device import pdl_options

_COLUMNS = 16  # per program, 64 bytes: few, so that many multiprocessors take part
_TILE = 8192  # elements that a program loads at a time


@triton.jit
def _sum_columns(block, partials, out, n_partials, WIDTH: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((DEPTH, COLUMNS), dtype=tl.float32)
    for start in range(0, n_partials, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (row < n_partials)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(partials + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _column_sums_kernel(
    first, first_out, n_first, second, second_out, n_second,
    FIRST_WIDTH: tl.constexpr, FIRST_COLUMNS: tl.constexpr, SECOND_WIDTH: tl.constexpr, SECOND_COLUMNS: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PDL: it may start before the kernel that writes the partial sums has ended."""
    if PDL:
        gdc_wait()
    block = tl.program_id(0)
    n_blocks = tl.cdiv(FIRST_WIDTH, FIRST_COLUMNS)
    if block < n_blocks:
        _sum_columns(block, first, first_out, n_first, FIRST_WIDTH, TILE // FIRST_COLUMNS, FIRST_COLUMNS)
    elif SECOND_WIDTH > 0:
        _sum_columns(
            block - n_blocks, second, second_out, n_second, SECOND_WIDTH, TILE // SECOND_COLUMNS, SECOND_COLUMNS
        )


def column_sums(partials: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums of contiguous partials (P, W) float32 over the first dimension: (W,) in dtype, zeros where P is 0.

    The sums are float32, in an order that depends only on the shape, and rounded once.
    """
    return column_sums_of_two(partials, dtype, partials[:, :0], dtype)[0]


def column_sums_of_two(
    first: torch.Tensor, first_dtype: torch.dtype, second: torch.Tensor, second_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`column_sums` of two matrices of any shapes, in one kernel."""
    (n_first, first_width), (n_second, second_width) = first.shape, second.shape
    out = [torch.empty(x.shape[1], dtype=t, device=x.device) for x, t in ((first, first_dtype), (second, second_dtype))]
    columns = [min(_COLUMNS, triton.next_power_of_2(max(1, x.shape[1]))) for x in (first, second)]
    _column_sums_kernel[(triton.cdiv(first_width, columns[0]) + triton.cdiv(second_width, columns[1]),)](
        first, out[0], n_first, second, out[1], n_second,
        FIRST_WIDTH=first_width, FIRST_COLUMNS=columns[0], SECOND_WIDTH=second_width, SECOND_COLUMNS=columns[1],
        TILE=_TILE, num_warps=8, **pdl_options(first.device),
    )  # fmt: skip
    return out[0], out[1]
