"""Tile order of persistent matmul kernels."""

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
