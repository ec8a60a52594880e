"""The end of a gradient of which every program of a kernel has summed a part."""

import torch
import triton
import triton.language as tl

_COLUMNS = 16  # of a program, 64 bytes: few, so that many processors share the work
_TILE = 8192  # elements on their way to a program at a time


@triton.jit
def _column_sums_kernel(parts, out, n_parts, WIDTH: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((DEPTH, COLUMNS), dtype=tl.float32)
    for start in range(0, n_parts, DEPTH):
        part = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = (part < n_parts)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(parts + part[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < WIDTH)


def column_sums(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums of contiguous parts (P, W) float32 over the first dimension: (W,) in dtype, zeros where P is 0.

    The sums are float32, in an order that depends on the shape alone, and rounded once.
    """
    n_parts, width = parts.shape
    out = torch.empty(width, dtype=dtype, device=parts.device)
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    launch = {"WIDTH": width, "DEPTH": _TILE // columns, "COLUMNS": columns, "num_warps": 8}
    _column_sums_kernel[(triton.cdiv(width, columns),)](parts, out, n_parts, **launch)
    return out
