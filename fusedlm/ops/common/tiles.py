"""Tiles of persistent matmul kernels: their order, their parts, and how they are loaded."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_at(index, n_row_tiles, n_column_tiles, GROUP: tl.constexpr):
    """Row and column of the tile at an index. Tiles are ordered in groups of GROUP tile rows, whose operands stay in
    the L2 cache."""
    in_group = GROUP * n_column_tiles
    first = index // in_group * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    return first + index % in_group % height, index % in_group // height


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)).split()


@triton.jit
def split_tile(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUBTILES: tl.constexpr):
    """The tile in 1, 2, 4 or 8 subtiles from left to right: the epilogue of one at a time needs less shared memory."""
    if SUBTILES == 1:
        parts = (tile,)
    else:
        left, right = halves(tile, ROWS, COLUMNS)
        lefts = split_tile(left, ROWS, COLUMNS // 2, SUBTILES // 2)
        parts = lefts + split_tile(right, ROWS, COLUMNS // 2, SUBTILES // 2)
    return parts


@triton.jit
def tile_offsets(row, column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile in a row-major matrix, and its mask."""
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return rows.to(tl.int64)[:, None] * n_columns + columns[None, :], inside


@triton.jit
def load_tile(source, row, column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a row-major matrix, 0 out of bounds."""
    if TMA:
        tile = source.load([row, column])
    else:
        offsets, inside = tile_offsets(row, column, n_rows, n_columns, ROWS, COLUMNS)
        tile = tl.load(source + offsets, mask=inside, other=0.0)
    return tile


def can_use_tma(*matrices: torch.Tensor) -> bool:
    """Whether rows and bases of contiguous tensors are aligned to 16 bytes, and the device has the tensor memory
    accelerator (TMA), as the interpreter does."""
    device = matrices[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in matrices)


def descriptor(tensor: torch.Tensor, *tile: int) -> TensorDescriptor:
    """Of tiles of a contiguous tensor, for TMA."""
    strides = [1]  # Not tensor.stride(): that of a dimension of size 1 can be anything.
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(tile))
