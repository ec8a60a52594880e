"""Loads, stores and decays of a chunk, for the kernels of the gated delta rule."""

import triton
import triton.language as tl

CHUNK = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(pointer, column, stride, n_inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Columns of the tokens of a chunk, (C, BLOCK); zero beyond n_inside tokens and WIDTH columns."""
    i = tl.arange(0, C)
    inside = (i < n_inside)[:, None]
    if WIDTH % BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(pointer + (i[:, None] * stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def load_columns(pointer, column, stride, n_inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """The same transposed, (BLOCK, C)."""
    i = tl.arange(0, C)
    inside = (i < n_inside)[None, :]
    if WIDTH % BLOCK:
        inside = inside & (column < WIDTH)[:, None]
    return tl.load(pointer + (i[None, :] * stride + column[:, None]), mask=inside, other=0.0)


@triton.jit
def store_tokens(
    pointer, x, column, stride, n_inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, C)
    inside = (i < n_inside)[:, None]
    if WIDTH % BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    tl.store(pointer + (i[:, None] * stride + column[None, :]), x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_columns(
    pointer, x, column, stride, n_inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, C)
    inside = (i < n_inside)[None, :]
    if WIDTH % BLOCK:
        inside = inside & (column < WIDTH)[:, None]
    tl.store(pointer + (i[None, :] * stride + column[:, None]), x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_state(
    pointer, value, key, value_stride, key_stride,
    V: tl.constexpr, BV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile (BV, BK) of a state, zero outside."""
    where = pointer + (value[:, None] * value_stride + key[None, :] * key_stride)
    if V % BV == 0 and K % BK == 0:
        return tl.load(where)
    else:
        return tl.load(where, mask=(value < V)[:, None] & (key < K)[None, :], other=0.0)


@triton.jit
def store_state(
    pointer, x, value, key, value_stride, key_stride,
    V: tl.constexpr, BV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    where = pointer + (value[:, None] * value_stride + key[None, :] * key_stride)
    if V % BV == 0 and K % BK == 0:
        tl.store(where, x.to(pointer.dtype.element_ty))
    else:
        tl.store(where, x.to(pointer.dtype.element_ty), mask=(value < V)[:, None] & (key < K)[None, :])


@triton.jit
def load_square(pointer, C: tl.constexpr):
    """A contiguous (C, C) matrix."""
    i = tl.arange(0, C)
    return tl.load(pointer + (i[:, None] * C + i[None, :]))


@triton.jit
def documents(reset, n_inside, RESETS: tl.constexpr, C: tl.constexpr):
    """Documents begun so far in the chunk that `reset` is at, for each token, and in all of it."""
    if RESETS:
        i = tl.arange(0, C)
        begun = tl.load(reset + i, mask=i < n_inside, other=0).to(tl.int32)
        return tl.cumsum(begun, 0), tl.sum(begun, 0)
    else:
        return tl.zeros((C,), tl.int32), 0


@triton.jit
def pair_decays(g_row, g_column, segment_row, segment_column, keep, RESETS: tl.constexpr):
    """2^(g_row - g_column) where kept and in one document, else zero."""
    if RESETS:
        keep = keep & (segment_row[:, None] == segment_column[None, :])
    return tl.where(keep, tl.exp2(tl.minimum(g_row[:, None] - g_column[None, :], 0.0)), 0.0)


@triton.jit
def chunk_decays(g, segment, last_segment, RESETS: tl.constexpr, C: tl.constexpr):
    """G, gamma, delta (C,) and the decay of the whole chunk that `g` is at."""
    g_t, g_last = tl.load(g + tl.arange(0, C)), tl.load(g + C - 1)
    gamma, delta, whole = tl.exp2(g_t), tl.exp2(g_last - g_t), tl.exp2(g_last)
    if RESETS:
        gamma = tl.where(segment == 0, gamma, 0.0)
        delta = tl.where(segment == last_segment, delta, 0.0)
        whole = tl.where(last_segment == 0, whole, 0.0)
    return g_t, gamma, delta, whole


@triton.jit
def prepared_state(
    outer, OUTER: tl.constexpr, is_outer, n_chunks, bh, block, value, key,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state from which a segment is prepared and the number of its chunks. Blocks of the values start from what
    enters the sequence in the outermost segment (OUTER: it is given) and from zero elsewhere. The blocks after them,
    whose columns `value` lie beyond V, start from rows of the identity; the outermost segment needs none."""
    n_blocks: tl.constexpr = tl.cdiv(V, BV)
    is_unit = block >= n_blocks
    unit = (block - n_blocks) * BV + tl.arange(0, BV)
    state = tl.where((unit[:, None] == key[None, :]) & is_unit, 1.0, 0.0)
    if OUTER:
        mask = ((value < V) & is_outer)[:, None] & (key < K)[None, :]
        state += tl.load(outer + bh * K * V + (value[:, None] + key[None, :] * V), mask=mask, other=0.0)
    return state, tl.where(is_unit & is_outer, 0, n_chunks)


@triton.jit
def store_prepared(end, state, block, value, key, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Rows of (V + K, K): ends of the values, then transitions."""
    n_blocks: tl.constexpr = tl.cdiv(V, BV)
    unit = (block - n_blocks) * BV + tl.arange(0, BV)
    row = tl.where(block >= n_blocks, V + unit, value)
    inside = tl.where(block >= n_blocks, unit < K, value < V)
    tl.store(end + (row[:, None] * K + key[None, :]), state, mask=inside[:, None] & (key < K)[None, :])
