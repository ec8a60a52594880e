"""Grouped matrix products of routed experts, with gathered rows and activations in their epilogues.

Rows are slots sorted by expert. Kernels are persistent: a program computes every n-th tile of the output, and finds the
expert and rows of a tile in tables on the device (`TileSchedule`). Rows of x and dy are gathered as they are loaded.
A tile may load rows of the next expert after the last one of its own; these are not stored, or are multiplied by 0.
"""

import triton
import triton.language as tl

from fusedlm.ops.common.activations import sigmoid
from fusedlm.ops.common.tiles import halves, load_tile, split_tile, tile_at


@triton.jit
def _find_tile(index, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Expert, first row, end of the expert's rows and column tile at an index. All tiles of an expert are adjacent."""
    expert = tl.load(tile_experts + index // n_tiles_n)
    first = tl.load(tile_starts + expert)
    n_tiles_m = tl.load(tile_starts + expert + 1) - first
    m, n = tile_at(index - first * n_tiles_n, n_tiles_m, n_tiles_n, GROUP_M)
    return expert, tl.load(starts + expert) + m * BLOCK_M, tl.load(starts + expert + 1), n


@triton.jit
def _tokens(slots, rows, end, top_k):
    """Tokens of rows; beyond the end those of the last row before it."""
    return tl.load(slots + tl.maximum(tl.minimum(rows, end - 1), 0)) // top_k


@triton.jit
def _gather_tile(row_starts, k, K, MASK_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns of rows at pointers (rows, 1). MASK_K: some columns may be out of bounds; they are 0."""
    columns = k + tl.arange(0, BLOCK_K)[None, :]
    mask = (columns < K) if MASK_K else None
    return tl.load(row_starts + columns, mask=mask, other=0.0 if MASK_K else None)


@triton.jit
def _row_tile(matrix, row, end, column, n_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of a row-major matrix, and its mask. Within a tile 32 bits are enough, and save registers."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i < end - row)[:, None] & (j < n_columns - column)[None, :]
    return matrix + row.to(tl.int64) * stride + column + i[:, None] * stride + j[None, :], inside


@triton.jit
def _load_pair(w, first, second, k, n_rows, K, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """WIDTH rows of a weight from the first, and then WIDTH from the second, as one tile."""
    i = tl.arange(0, 2 * WIDTH)
    rows = tl.where(i < WIDTH, first + i, second + i - WIDTH)
    columns = k + tl.arange(0, BLOCK_K)
    inside = (rows < n_rows)[:, None] & (columns < K)[None, :]
    return tl.load(w + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_squared(
    h, a, z, slope, row, end, column, HIDDEN, SAVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """z in h, with SAVE, and leaky_relu(z, slope)^2 in a."""
    if SAVE:
        at, inside = _row_tile(h, row, end, column, HIDDEN, HIDDEN, ROWS, COLUMNS)
        tl.store(at, z.to(h.dtype.element_ty), mask=inside)
    root = tl.where(z < 0, z * slope, z)
    at, inside = _row_tile(a, row, end, column, HIDDEN, HIDDEN, ROWS, COLUMNS)
    tl.store(at, (root * root).to(a.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slope", "top_k", "n_experts"])
def up_kernel(
    x, w, slots, starts, tile_starts, tile_experts, h, a, slope, top_k, n_experts, HIDDEN, K,
    SWIGLU: tl.constexpr, SAVE: tl.constexpr, TMA: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """a (rows, HIDDEN), and with SAVE the pre-activation h (rows, 2 HIDDEN or HIDDEN), of gathered rows of x (N, K) and
    w (experts, columns of h, K).

    A tile has two halves of columns of h: of gate and up, or adjacent ones. With TMA w is (2 experts, HIDDEN, K) or
    (experts, HIDDEN, K).
    """
    HALF: tl.constexpr = BLOCK_N // 2
    PIECES: tl.constexpr = SUBTILES // 2 if SUBTILES > 1 else 1  # of a half
    WIDTH: tl.constexpr = HALF // PIECES
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    COLUMNS: tl.constexpr = BLOCK_N // PARTS  # of a
    stride = PARTS * HIDDEN  # of h
    n_tiles_n = tl.cdiv(HIDDEN, COLUMNS)
    n_tiles = tl.load(tile_starts + n_experts) * n_tiles_n
    epilogue_tile = tl.program_id(0) - tl.num_programs(0)
    for index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, n = _find_tile(index, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        token = _tokens(slots, row + tl.arange(0, BLOCK_M), end, top_k)
        x_rows = x + token.to(tl.int64)[:, None] * K
        first = expert * stride + n * COLUMNS
        second = first + (HIDDEN if SWIGLU else HALF)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K
            x_tile = _gather_tile(x_rows, k, K, MASK_K, BLOCK_K)
            if TMA:
                w_tile = w.load([expert * PARTS, n * COLUMNS, k]).reshape(BLOCK_N, BLOCK_K)
            else:
                w_tile = _load_pair(w, first, second, k, n_experts * stride, K, HALF, BLOCK_K)
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
        # The tile's position is computed a second time: carried across the inner loop it would make the epilogue depend
        # on the loads of the next tile.
        epilogue_tile += tl.num_programs(0)
        _, row, end, n = _find_tile(epilogue_tile, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        lefts, rights = split_tile(left, BLOCK_M, HALF, PIECES), split_tile(right, BLOCK_M, HALF, PIECES)
        for i in tl.static_range(PIECES):
            column = n * COLUMNS + i * WIDTH
            if SWIGLU:
                if SAVE:
                    at, inside = _row_tile(h, row, end, column, HIDDEN, stride, BLOCK_M, WIDTH)
                    tl.store(at, lefts[i].to(h.dtype.element_ty), mask=inside)
                    tl.store(at + HIDDEN, rights[i].to(h.dtype.element_ty), mask=inside)
                at, inside = _row_tile(a, row, end, column, HIDDEN, HIDDEN, BLOCK_M, WIDTH)
                tl.store(at, (lefts[i] * sigmoid(lefts[i]) * rights[i]).to(a.dtype.element_ty), mask=inside)
            else:
                _store_squared(h, a, lefts[i], slope, row, end, column, HIDDEN, SAVE, BLOCK_M, WIDTH)
                _store_squared(h, a, rights[i], slope, row, end, column + HALF, HIDDEN, SAVE, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["n_experts", "n_rows"])
def rows_kernel(
    a, w, starts, tile_starts, tile_experts, out, n_experts, n_rows, N, K,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (rows, N) of sorted rows a (rows, K) and w (experts, K, N), or with TRANSPOSED (experts, N, K)."""
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    n_tiles_n = tl.cdiv(N, BLOCK_N)
    n_tiles = tl.load(tile_starts + n_experts) * n_tiles_n
    epilogue_tile = tl.program_id(0) - tl.num_programs(0)
    for index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, _, n = _find_tile(index, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            a_tile = load_tile(a, row, k * BLOCK_K, n_rows, K, BLOCK_M, BLOCK_K, TMA)
            if TRANSPOSED:
                w_row = expert * N + n * BLOCK_N
                w_tile = load_tile(w, w_row, k * BLOCK_K, n_experts * N, K, BLOCK_N, BLOCK_K, TMA).T
            else:
                w_row = expert * K + k * BLOCK_K
                w_tile = load_tile(w, w_row, n * BLOCK_N, n_experts * K, N, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
        epilogue_tile += tl.num_programs(0)
        _, row, end, n = _find_tile(epilogue_tile, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        subtiles = split_tile(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            at, inside = _row_tile(out, row, end, n * BLOCK_N + i * WIDTH, N, N, BLOCK_M, WIDTH)
            tl.store(at, subtiles[i].to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_hidden(h, row, end, column, HIDDEN, SWIGLU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of the gate and one of up, or twice one of h."""
    at, inside = _row_tile(h, row, end, column, HIDDEN, 2 * HIDDEN if SWIGLU else HIDDEN, ROWS, COLUMNS)
    gate = tl.load(at, mask=inside, other=0.0)
    return gate, tl.load(at + HIDDEN, mask=inside, other=0.0) if SWIGLU else gate


@triton.jit(do_not_specialize=["slope", "top_k", "n_experts", "n_rows"])
def down_backward_kernel(
    dy, w, slots, starts, tile_starts, tile_experts, weights, h, dh, weighted, scores, slope,
    top_k, n_experts, n_rows, HIDDEN, K,
    SWIGLU: tl.constexpr, TMA: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """From gathered rows of dy (N, K), w (experts, K, HIDDEN) and the saved h: its gradient dh; `weighted` (rows,
    HIDDEN), the weight of the row times a, for the gradient of w; and `scores` (column tiles, rows) float32, <dy w, a>
    of a tile, whose sum is the gradient of the weight (arXiv 2512.14080). a is recomputed from h.

    The epilogue is bound by memory, and the tensor cores wait for it. Reading h into the L2 cache during the product,
    or a subtile ahead of its use, made it slower on an H100.
    """
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    stride = 2 * HIDDEN if SWIGLU else HIDDEN  # of h
    dtype = dh.dtype.element_ty
    n_tiles_n = tl.cdiv(HIDDEN, BLOCK_N)
    n_tiles = tl.load(tile_starts + n_experts) * n_tiles_n
    epilogue_tile = tl.program_id(0)
    for index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, n = _find_tile(index, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        token = _tokens(slots, row + tl.arange(0, BLOCK_M), end, top_k)
        dy_rows = dy + token.to(tl.int64)[:, None] * K
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            dy_tile = _gather_tile(dy_rows, k, K, MASK_K, BLOCK_K)
            w_tile = load_tile(w, expert * K + k, n * BLOCK_N, n_experts * K, HIDDEN, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")
        _, row, end, n = _find_tile(epilogue_tile, starts, tile_starts, tile_experts, n_tiles_n, BLOCK_M, GROUP_M)
        epilogue_tile += tl.num_programs(0)
        rows = row + tl.arange(0, BLOCK_M)
        weight = tl.load(weights + tl.load(slots + tl.minimum(rows, end - 1))).to(tl.float32)[:, None]
        score = tl.zeros((BLOCK_M,), dtype=tl.float32)
        subtiles = split_tile(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            da = subtiles[i]
            column = n * BLOCK_N + i * WIDTH
            gate, up = _load_hidden(h, row, end, column, HIDDEN, SWIGLU, BLOCK_M, WIDTH)
            gate, up = gate.to(tl.float32), up.to(tl.float32)
            dh_at, inside = _row_tile(dh, row, end, column, HIDDEN, stride, BLOCK_M, WIDTH)
            a_at, _ = _row_tile(weighted, row, end, column, HIDDEN, HIDDEN, BLOCK_M, WIDTH)
            if SWIGLU:
                s = sigmoid(gate)
                silu = gate * s
                a = silu * up
                tl.store(dh_at, (weight * da * up * (s + silu * (1.0 - s))).to(dtype), mask=inside)
                tl.store(dh_at + HIDDEN, (weight * da * silu).to(dtype), mask=inside)
            else:
                factor = tl.where(gate < 0, slope, 1.0)
                root = gate * factor
                a = root * root
                tl.store(dh_at, (weight * da * (2.0 * root * factor)).to(dtype), mask=inside)
            tl.store(a_at, (weight * a).to(dtype), mask=inside)
            score += tl.sum(da * a, 1)
        tl.store(scores + n.to(tl.int64) * n_rows + rows, score, mask=rows < end)


@triton.jit(do_not_specialize=["top_k", "n_experts", "n_rows"])
def weight_gradient_kernel(
    left, right, slots, starts, out, top_k, n_experts, n_rows, M, N,
    GATHER_LEFT: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """out (experts, M, N): left^T right of the rows of each expert, and zeros without rows. Rows of left or right are
    gathered from (tokens, M) or (tokens, N); the other has sorted rows. Gathered rows beyond the end are 0."""
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    n_tiles_m, n_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    per_expert = n_tiles_m * n_tiles_n
    for index in range(tl.program_id(0), n_experts * per_expert, tl.num_programs(0)):
        expert = index // per_expert
        m, n = tile_at(index % per_expert, n_tiles_m, n_tiles_n, GROUP_M)
        start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        token = _tokens(slots, start + tl.arange(0, BLOCK_K), end, top_k)
        for row in range(start, end, BLOCK_K):
            is_row = (tl.arange(0, BLOCK_K) < end - row)[:, None]
            at = token.to(tl.int64)[:, None]
            # Tokens are loaded one step ahead: an indirect load would halve the depth of the pipeline.
            token = _tokens(slots, row + BLOCK_K + tl.arange(0, BLOCK_K), end, top_k)
            if GATHER_LEFT:
                columns = m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
                left_tile = tl.load(left + at * M + columns, mask=is_row & (columns < M), other=0.0)
                right_tile = load_tile(right, row, n * BLOCK_N, n_rows, N, BLOCK_K, BLOCK_N, TMA)
            else:
                columns = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                right_tile = tl.load(right + at * N + columns, mask=is_row & (columns < N), other=0.0)
                left_tile = load_tile(left, row, m * BLOCK_M, n_rows, M, BLOCK_K, BLOCK_M, TMA)
            acc = tl.dot(left_tile.T, right_tile, acc, input_precision="ieee")
        first = expert * M + m * BLOCK_M
        subtiles = split_tile(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            column = n * BLOCK_N + i * WIDTH
            pointers, inside = _row_tile(out, first, expert * M + M, column, N, N, BLOCK_M, WIDTH)
            tl.store(pointers, subtiles[i].to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(
    sorted_rows, rows, weights, out, WIDTH, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """out (N, WIDTH): the sum over the k rows of each token, with WEIGHTED of weight * row."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        slot = token.to(tl.int64) * TOP_K + j
        row = tl.load(rows + slot).to(tl.int64)
        value = tl.load(sorted_rows + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + slot).to(tl.float32)
        total += value
    tl.store(out + token.to(tl.int64) * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def spread_kernel(x, rows, out, WIDTH, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out (N k, WIDTH): row n of x (N, WIDTH) in the k sorted rows of its slots. x is read once."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + token.to(tl.int64) * WIDTH + column, mask=inside)
    for j in tl.static_range(TOP_K):
        row = tl.load(rows + token.to(tl.int64) * TOP_K + j).to(tl.int64)
        # As in the schedule, an index that is no expert writes nowhere.
        is_row = (row >= 0) & (row < tl.num_programs(0).to(tl.int64) * TOP_K)
        tl.store(out + row * WIDTH + column, value, mask=inside & is_row)
