"""Updates of many tensors in one launch, in Triton.

The tensors are reached through a table of addresses on the device, since gradients are allocated anew in every step.
All are float32 and contiguous. A kernel with `found_inf` changes nothing where it is not 0.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements of a tensor per program of the AdamW kernel


class AddressTable:
    """Addresses as an int64 tensor on a device, copied again when they change, without waiting for the device.

    While a CUDA graph is captured they must be those of the step before, as warm-up steps leave them.
    """

    def __init__(self):
        self._addresses: list[list[int]] | None = None
        self._table: torch.Tensor | None = None

    def of(self, addresses: list[list[int]], device: torch.device) -> torch.Tensor:
        """(len(addresses), tensors)."""
        if addresses != self._addresses:
            table = torch.tensor(addresses, dtype=torch.int64)
            self._table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
            self._addresses = addresses
        return self._table


@triton.jit
def _pointer(table, index):
    """A float32 tensor's address, which torch aligns to 16 bytes or more; rows of a part may start anywhere in it."""
    return tl.load(table + index).to(tl.pointer_type(tl.float32))


@triton.jit
def _written(count, found_inf, HAS_FOUND_INF: tl.constexpr):
    """How many of `count` rows or elements are written: none in a step that is skipped."""
    return tl.where(tl.load(found_inf) == 0.0, count, 0) if HAS_FOUND_INF else count


@triton.jit
def _rate(lr, IN_MEMORY: tl.constexpr):
    return tl.load(lr).to(tl.float32) if IN_MEMORY else lr


@triton.jit
def _tile(index, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS, 1) and columns (1, COLUMNS) of a tile of a matrix, and its mask."""
    across = tl.cdiv(n_columns, COLUMNS)
    rows = (index // across * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (index % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return rows, columns, (rows < n_rows) & (columns < n_columns)


@triton.jit
def _momentum_kernel(
    table, out, squares, found_inf, momentum, n_rows, n_columns, out_rows, out_columns,
    NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, HAS_FOUND_INF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, b), tile i of matrix b: updates the momentum, writes the update into the stack out (matrices,
    out_rows, out_columns), and the tile's sum of squares into squares (matrices, tiles)."""
    i, b = tl.program_id(0), tl.program_id(1)
    gradient, mean = _pointer(table, b), _pointer(table, tl.num_programs(1) + b)
    if ALIGNED:
        gradient, mean = tl.multiple_of(gradient, 16), tl.multiple_of(mean, 16)
    rows, columns, inside = _tile(i, n_rows, n_columns, ROWS, COLUMNS)
    at = rows * n_columns + columns
    g = tl.load(gradient + at, mask=inside, other=0.0)
    m = tl.load(mean + at, mask=inside, other=0.0)
    m += (1.0 - momentum) * (g - m)
    u = g + momentum * (m - g) if NESTEROV else m
    tl.store(mean + at, m, mask=inside & (rows < _written(n_rows, found_inf, HAS_FOUND_INF)))
    target = out + b.to(tl.int64) * out_rows * out_columns
    tl.store(target + rows * out_columns + columns, u.to(out.dtype.element_ty), mask=inside)
    tl.store(squares + b * tl.num_programs(0) + i, tl.sum(tl.sum(u * u, 1), 0))


@triton.jit
def _row_kernel(
    table, update, row_inverse, row_squares, found_inf, beta2, eps, n_rows, n_columns, out_rows, out_columns,
    HAS_FOUND_INF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, b), rows of matrix b: their mean squares over steps, in place, what rows are multiplied by, and their
    mean squares in this step; the last two (matrices, n_rows)."""
    b = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = update + b.to(tl.int64) * out_rows * out_columns
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, n_columns, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (rows < n_rows)[:, None] & (columns < n_columns)
        o = tl.load(source + rows[:, None] * out_columns + columns, mask=inside, other=0.0).to(tl.float32)
        sums += o * o
    square = tl.sum(sums, 1) / n_columns
    mean = _pointer(table, b)
    inside = rows < n_rows
    v = tl.load(mean + rows, mask=inside, other=0.0)
    v += (1.0 - beta2) * (square - v)
    tl.store(mean + rows, v, mask=rows < _written(n_rows, found_inf, HAS_FOUND_INF))
    tl.store(row_inverse + b * n_rows + rows, 1.0 / (tl.sqrt(v) + eps), mask=inside)
    tl.store(row_squares + b * n_rows + rows, square, mask=inside)


@triton.jit
def _ratio_kernel(row_inverse, row_squares, ratio, n_rows, ROWS: tl.constexpr):
    """Program b: |O|_F of a matrix, over that of its rows after they are multiplied."""
    b = tl.program_id(0)
    before, after = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        square = tl.load(row_squares + b * n_rows + rows, mask=rows < n_rows, other=0.0)
        inverse = tl.load(row_inverse + b * n_rows + rows, mask=rows < n_rows, other=0.0)
        before += square
        after += square * inverse * inverse
    total = tl.sum(after, 0)
    tl.store(ratio + b, tl.sqrt(tl.sum(before, 0) / tl.where(total > 0, total, 1.0)))


@triton.jit
def _update_kernel(
    table, update, row_inverse, ratio, found_inf, lr, scaling, weight_decay, n_rows, n_columns, out_rows, out_columns,
    BY_ROW: tl.constexpr, CAUTIOUS: tl.constexpr, LR_IN_MEMORY: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, b), tile i of matrix b of the parameters."""
    i, b = tl.program_id(0), tl.program_id(1)
    parameter = _pointer(table, b)
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
    rows, columns, inside = _tile(i, n_rows, n_columns, ROWS, COLUMNS)
    source = update + b.to(tl.int64) * out_rows * out_columns
    u = scaling * tl.load(source + rows * out_columns + columns, mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        u *= tl.load(row_inverse + b * n_rows + rows, mask=rows < n_rows, other=0.0) * tl.load(ratio + b)
    w = tl.load(parameter + rows * n_columns + columns, mask=inside, other=0.0)
    decayed = tl.where(u * w >= 0, w, 0.0) if CAUTIOUS else w
    w -= _rate(lr, LR_IN_MEMORY) * (u + weight_decay * decayed)
    inside &= rows < _written(n_rows, found_inf, HAS_FOUND_INF)
    tl.store(parameter + rows * n_columns + columns, w, mask=inside)


@triton.jit
def _cautious_adamw_kernel(
    table, tensors, starts, sizes, found_inf, lr, beta1, beta2, eps, weight_decay, n_tensors,
    LR_IN_MEMORY: tl.constexpr, HAS_FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK elements of tensor tensors[i] from starts[i] on. table: addresses of parameters, gradients,
    means, mean squares and numbers of steps."""
    i = tl.program_id(0)
    t = tl.load(tensors + i)
    at = tl.load(starts + i) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + t)
    parameter, gradient = _pointer(table, t), _pointer(table, n_tensors + t)
    mean, square = _pointer(table, 2 * n_tensors + t), _pointer(table, 3 * n_tensors + t)
    step = tl.load(_pointer(table, 4 * n_tensors + t))
    g = tl.load(gradient + at, mask=inside, other=0.0)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    w = tl.load(parameter + at, mask=inside, other=0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    # beta^step
    mean_total = 1.0 - tl.exp2(step * tl.log2(beta1))
    square_total = 1.0 - tl.exp2(step * tl.log2(beta2))
    u = (m / mean_total) / (tl.sqrt(v / square_total) + eps)
    w -= _rate(lr, LR_IN_MEMORY) * (u + weight_decay * tl.where(m * w >= 0, w, 0.0))
    inside = at < _written(tl.load(sizes + t), found_inf, HAS_FOUND_INF)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(parameter + at, w, mask=inside)
