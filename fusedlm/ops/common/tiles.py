"""Tiles of persistent matmul kernels: their order, and their parts."""

import triton
import triton.language as tl


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
    """The tile in 1, 2 or 4 subtiles from left to right: the epilogue of one at a time needs less shared memory."""
    if SUBTILES == 1:
        parts = (tile,)
    else:
        left, right = halves(tile, ROWS, COLUMNS)
        parts = (left, right) if SUBTILES == 2 else halves(left, ROWS, COLUMNS // 2) + halves(right, ROWS, COLUMNS // 2)
    return parts
