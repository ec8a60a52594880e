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
def load_columns(
    pointer, column, stride, n_inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BEYOND: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The same transposed, (BLOCK, C). BEYOND: the columns may lie beyond WIDTH altogether."""
    i = tl.arange(0, C)
    inside = (i < n_inside)[None, :]
    if BEYOND or WIDTH % BLOCK:
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
def store_square(pointer, x, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(pointer + (i[:, None] * C + i[None, :]), x.to(pointer.dtype.element_ty))


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
def outer_state(
    outer, MODE: tl.constexpr, PREPARE: tl.constexpr, is_outer, bh, at_segment, block, value, key,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A tile (BV, BK) of what enters a segment, float32.

    MODE: what `outer` is: "state" (B, H, K, V), which enters the outermost segment, "segments" (B, H, segments, V, K),
    or "none": zeros.
    PREPARE: only the outermost segment starts from a given state. Blocks after those of the values, whose columns
    `value` lie beyond V, start from rows of the identity.
    """
    if MODE == "segments":
        return load_state(outer + at_segment * K * V, value, key, K, 1, V, BV, K, BK)
    else:
        state = tl.zeros((BV, BK), tl.float32)
        if MODE == "state":
            inside = (value < V) & is_outer
            mask = inside[:, None] & (key < K)[None, :]
            where = outer + bh * K * V + (value[:, None] + key[None, :] * V)
            state = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        if PREPARE:
            unit = (block - tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
            state += tl.where((unit[:, None] == key[None, :]) & (unit >= 0)[:, None], 1.0, 0.0)
        return state


@triton.jit
def store_outer(
    outer, state, PREPARE: tl.constexpr, bh, at_segment, block, value, key,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Store what leaves the sequence, (B, H, K, V), or with PREPARE a segment: (B, H, segments, V + K, K), ends of the
    values and then transitions."""
    if PREPARE:
        unit = (block - tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
        row = tl.where(unit >= 0, V + unit, value)
        inside = tl.where(unit >= 0, unit < K, value < V)
        where = outer + at_segment * (V + K) * K + (row[:, None] * K + key[None, :])
        tl.store(where, state, mask=inside[:, None] & (key < K)[None, :])
    else:
        store_state(outer + bh * K * V, state, value, key, 1, V, V, BV, K, BK)
