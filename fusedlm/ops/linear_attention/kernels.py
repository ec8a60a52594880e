"""Kernels of linear attention with a scalar decay.

In a chunk of C tokens, with g the running sum of the log decays, S the (K, V) state that enters it, gamma_t = e^{g_t},
to_end_t = e^{g_C - g_t} and D_ts = e^{g_t - g_s} for s <= t, else 0:

    M = D * (Q K^T),  O = M V + gamma * (Q S),  S' = e^{g_C} S + K^T (to_end * V).

With X = D * (dO V^T) and dS' the gradient of the state that leaves:

    dV = M^T dO + to_end * (K dS'),    dQ = X K + gamma * (dO S^T),
    dK = X^T Q + to_end * (V dS'^T),   dS = e^{g_C} dS' + Q^T (gamma * dO).

No exponent is positive. A reset (first token of a document) removes from D, gamma, to_end and e^{g_C} what would cross
it. The gradient of the log decay of token t is the sum of what crosses the boundary before t: pairs of tokens of the
chunk, the state with tokens from t on, tokens before t with dS', and the state with dS'.

A program computes the chunks of a segment one after another, with the state in registers, for one head and a block of
columns of V. Sums over columns of V (dQ, dK, d log_decay) are partial where there are several blocks.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_PRECISION = tl.constexpr("tf32x3")  # of products of float32


@triton.jit
def load_tile(base, row, column, stride, n_rows, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Elements of a matrix with rows of WIDTH elements; zeros outside. FULL: nothing is outside."""
    at = base + row[:, None] * stride + column[None, :]
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=(row < n_rows)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, row, column, stride, n_rows, values, WIDTH: tl.constexpr, FULL: tl.constexpr):
    at = base + row[:, None] * stride + column[None, :]
    values = values.to(base.dtype.element_ty)
    if FULL:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=(row < n_rows)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def chunk_decays(log_decay, reset, stride, n_rows, C: tl.constexpr, RESET: tl.constexpr):
    """Of the tokens of a chunk: running sums of log decays in base 2, the documents begun in the chunk, and the last of
    both. Tokens beyond n_rows decay nothing."""
    token = tl.arange(0, C)
    inside = token < n_rows
    log_a = tl.load(log_decay + token * stride, mask=inside, other=0.0).to(tl.float32)
    total = tl.cumsum(log_a * _LOG2_E, 0)
    last = tl.sum(tl.where(token == C - 1, total, 0.0), 0)
    document = tl.zeros((C,), dtype=tl.int32)
    if RESET:
        document = tl.cumsum(tl.load(reset + token, mask=inside, other=0).to(tl.int32), 0)
    return total, document, last, tl.max(document, 0)


@triton.jit
def boundary_decays(total, document, last, last_document, RESET: tl.constexpr):
    """Factors between each token and the chunk's start, and its end; and from start to end."""
    from_start, to_end, through = tl.exp2(total), tl.exp2(tl.minimum(last - total, 0.0)), tl.exp2(last)
    if RESET:
        from_start = tl.where(document == 0, from_start, 0.0)
        to_end = tl.where(document == last_document, to_end, 0.0)
        through = tl.where(last_document == 0, through, 0.0)
    return from_start, to_end, through


@triton.jit
def pair_decays(total_later, total_earlier, document_later, document_earlier, visible, RESET: tl.constexpr):
    """Factors between the tokens of each visible pair, 0 elsewhere. Arguments broadcast to the pairs."""
    if RESET:
        visible = visible & (document_later == document_earlier)
    return tl.exp2(tl.where(visible, total_later - total_earlier, float("-inf")))


@triton.jit
def forward_kernel(
    q, k, v, log_decay, reset, start, out, states, final, n_tokens, n_chunks, per_segment, H: tl.constexpr, R,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, v_b, v_t: tl.constexpr, v_h,
    a_b, a_t: tl.constexpr, a_h, reset_b,
    K: tl.constexpr, V: tl.constexpr, N_BLOCKS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, START: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * N_BLOCKS, segments). start: (B, H, segments, K, V), with START. states: (B, H, n_chunks, K, V),
    those that enter the chunks, with SAVE. FULL: chunks and blocks divide the tokens, K and V."""
    head, block = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    segment, n_segments = tl.program_id(1), tl.num_programs(1)
    b, h = (head // H).to(tl.int64), head % H
    token, kk, vv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    q += b * q_b + (h // R) * q_h
    k += b * k_b + (h // R) * k_h
    v += b * v_b + h * v_h
    log_decay += b * a_b + h * a_h
    reset += b * reset_b
    out += (b * n_tokens * H + h) * V
    wide: tl.constexpr = (BK == K) and (V % BV == 0)

    state = tl.zeros((BK, BV), dtype=tl.float32)
    if START:
        at = (head.to(tl.int64) * n_segments + segment) * (K * V)
        state = load_tile(start + at, kk, vv, V, K, V, wide).to(tl.float32)
    visible = token[:, None] >= token[None, :]
    first = segment * per_segment
    for i in tl.range(first, tl.minimum(first + per_segment, n_chunks), num_stages=STAGES):
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        queries = load_tile(q + row * q_t, token, kk, q_t, n_rows, K, FULL)
        keys = load_tile(k + row * k_t, token, kk, k_t, n_rows, K, FULL)
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        total, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(total, document, last, last_document, RESET)
        decay = pair_decays(total[:, None], total[None, :], document[:, None], document[None, :], visible, RESET)
        dtype = values.dtype

        entering = state.to(dtype)
        if SAVE:
            at = (head.to(tl.int64) * n_chunks + i) * (K * V)
            store_tile(states + at, kk, vv, V, K, entering, V, wide)
        weights = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION) * decay
        y = tl.dot(queries, entering, input_precision=_PRECISION) * from_start[:, None]
        y = tl.dot(weights.to(dtype), values, y, input_precision=_PRECISION)
        store_tile(out + row * H * V, token, vv, H * V, n_rows, y, V, FULL)
        written = (values * to_end[:, None]).to(dtype)
        state = tl.dot(tl.trans(keys), written, state * through, input_precision=_PRECISION)
    if segment == n_segments - 1:
        store_tile(final + head.to(tl.int64) * (K * V), kk, vv, V, K, state, V, wide)


@triton.jit
def segment_kernel(
    x, y, log_decay, reset, ends, factors, n_tokens, n_chunks, per_segment, H: tl.constexpr, R,
    x_b, x_t: tl.constexpr, x_h, y_b, y_t: tl.constexpr, y_h, a_b, a_t: tl.constexpr, a_h, reset_b,
    K: tl.constexpr, V: tl.constexpr, N_BLOCKS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, RESET: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each segment adds to a state that passes it, (B, H, segments, K, V), and the factor by which it decays,
    (B, H, segments). Grid (B * H * N_BLOCKS, segments - 1).

    Forward: x = k, y = v, for all segments but the last. REVERSE: x = q, y = dO, for all but the first.
    """
    head, block = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    segment, n_segments = tl.program_id(1), tl.num_programs(1) + 1
    if REVERSE:
        segment += 1
    b, h = (head // H).to(tl.int64), head % H
    token, kk, vv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    x += b * x_b + (h // R) * x_h
    y += b * y_b + h * y_h
    log_decay += b * a_b + h * a_h
    reset += b * reset_b
    wide: tl.constexpr = (BK == K) and (V % BV == 0)

    state = tl.zeros((BK, BV), dtype=tl.float32)
    factor = 1.0
    first = segment * per_segment
    n_steps = tl.minimum(per_segment, n_chunks - first)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        i = first + step
        if REVERSE:
            i = first + n_steps - 1 - step
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        left = load_tile(x + row * x_t, token, kk, x_t, n_rows, K, FULL)
        right = load_tile(y + row * y_t, token, vv, y_t, n_rows, V, FULL)
        total, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(total, document, last, last_document, RESET)
        weight = from_start if REVERSE else to_end
        scaled = (right * weight[:, None]).to(right.dtype)
        state = tl.dot(tl.trans(left), scaled, state * through, input_precision=_PRECISION)
        factor *= through
    at = head.to(tl.int64) * n_segments + segment
    store_tile(ends + at * (K * V), kk, vv, V, K, state, V, wide)
    if block == 0:
        tl.store(factors + at, factor)


@triton.jit
def combine_kernel(
    ends, factors, outer, passing, n_segments, SIZE, REVERSE: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr
):
    """States (B, H, segments, SIZE) that enter the segments, from `segment_kernel` and the one (B, H, SIZE) before the
    first; REVERSE: gradients of those that leave them, from the one after the last. Without OUTER that is zero."""
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    ends += head * n_segments * SIZE + column
    passing += head * n_segments * SIZE + column
    factors += head * n_segments
    step = 1
    if REVERSE:
        step = -1
        ends += (n_segments - 1) * SIZE
        passing += (n_segments - 1) * SIZE
        factors += n_segments - 1
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if OUTER:
        state = tl.load(outer + head * SIZE + column, mask=inside, other=0.0)
    tl.store(passing, state, mask=inside)
    n_steps = n_segments - 1
    for i in range(0, n_steps, 4):  # four independent loads at a time
        more_1, more_2, more_3 = i + 1 < n_steps, i + 2 < n_steps, i + 3 < n_steps
        end_0 = tl.load(ends, mask=inside, other=0.0)
        end_1 = tl.load(ends + step * SIZE, mask=inside & more_1, other=0.0)
        end_2 = tl.load(ends + 2 * step * SIZE, mask=inside & more_2, other=0.0)
        end_3 = tl.load(ends + 3 * step * SIZE, mask=inside & more_3, other=0.0)
        state = tl.load(factors) * state + end_0
        tl.store(passing + step * SIZE, state, mask=inside)
        state = tl.load(factors + step, mask=more_1, other=0.0) * state + end_1
        tl.store(passing + 2 * step * SIZE, state, mask=inside & more_1)
        state = tl.load(factors + 2 * step, mask=more_2, other=0.0) * state + end_2
        tl.store(passing + 3 * step * SIZE, state, mask=inside & more_2)
        state = tl.load(factors + 3 * step, mask=more_3, other=0.0) * state + end_3
        tl.store(passing + 4 * step * SIZE, state, mask=inside & more_3)
        ends += 4 * step * SIZE
        passing += 4 * step * SIZE
        factors += 4 * step


@triton.jit
def backward_kernel(
    upstream, q, k, v, log_decay, reset, states, leaving, dq, dk, dv, d_log_decay, d_start,
    n_tokens, n_chunks, per_segment, H: tl.constexpr, R, up_b, up_t: tl.constexpr, up_h,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, v_b, v_t: tl.constexpr, v_h,
    a_b, a_t: tl.constexpr, a_h, reset_b,
    K: tl.constexpr, V: tl.constexpr, N_BLOCKS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, LEAVING: tl.constexpr, START: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * N_BLOCKS, segments). leaving: gradients (B, H, segments, K, V) of the states that leave segments,
    with LEAVING. dq, dk: (B, T, H, N_BLOCKS, K); d_log_decay: (N_BLOCKS, B, T, H). d_start: with START.

    Pairs of tokens are (s, t) and dQ is computed transposed, so that no left operand is transposed in registers, which
    Triton before 3.7.1 miscompiles on Hopper. What the state is needed for comes first, while few registers are in use.
    """
    head, block = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    segment, n_segments = tl.program_id(1), tl.num_programs(1)
    b, h = (head // H).to(tl.int64), head % H
    token, kk, vv = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    upstream += b * up_b + h * up_h
    q += b * q_b + (h // R) * q_h
    k += b * k_b + (h // R) * k_h
    v += b * v_b + h * v_h
    log_decay += b * a_b + h * a_h
    reset += b * reset_b
    partial = ((b * n_tokens * H + h) * N_BLOCKS + block) * K
    dq += partial
    dk += partial
    dv += (b * n_tokens * H + h) * V
    d_log_decay += (block * (tl.num_programs(0) // (N_BLOCKS * H)) + b) * n_tokens * H + h
    wide: tl.constexpr = (BK == K) and (V % BV == 0)

    d_state = tl.zeros((BK, BV), dtype=tl.float32)
    if LEAVING:
        at = (head.to(tl.int64) * n_segments + segment) * (K * V)
        d_state = load_tile(leaving + at, kk, vv, V, K, V, wide).to(tl.float32)
    earlier, later = token[:, None], token[None, :]
    first = segment * per_segment
    n_steps = tl.minimum(per_segment, n_chunks - first)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        i = first + n_steps - 1 - step
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        queries = load_tile(q + row * q_t, token, kk, q_t, n_rows, K, FULL)
        keys = load_tile(k + row * k_t, token, kk, k_t, n_rows, K, FULL)
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        dy = load_tile(upstream + row * up_t, token, vv, up_t, n_rows, V, FULL)
        at = (head.to(tl.int64) * n_chunks + i) * (K * V)
        state = load_tile(states + at, kk, vv, V, K, V, wide)
        total, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(total, document, last, last_document, RESET)
        decay = pair_decays(
            total[None, :], total[:, None], document[None, :], document[:, None], later >= earlier, RESET
        )
        dtype = values.dtype
        passing = through * tl.sum(state * d_state)
        d_leaving = d_state.to(dtype)
        scaled = (dy * from_start[:, None]).to(dtype)
        d_state = tl.dot(tl.trans(queries), scaled, d_state * through, input_precision=_PRECISION)

        weights = tl.dot(keys, tl.trans(queries), input_precision=_PRECISION) * decay
        d_weights = tl.dot(values, tl.trans(dy), input_precision=_PRECISION)
        crossing = tl.where(later > earlier, weights * d_weights, 0.0)
        as_later, as_earlier = tl.sum(crossing, 0), tl.sum(crossing, 1)
        d_scores = (d_weights * decay).to(dtype)

        d_values = tl.dot(keys, d_leaving, input_precision=_PRECISION) * to_end[:, None]
        d_values = tl.dot(weights.to(dtype), dy, d_values, input_precision=_PRECISION)
        store_tile(dv + row * H * V, token, vv, H * V, n_rows, d_values, V, FULL)

        d_keys = tl.dot(values, tl.trans(d_leaving), input_precision=_PRECISION) * to_end[:, None]
        to_leaving = tl.sum(keys * d_keys, 1)
        d_keys = tl.dot(d_scores, queries, d_keys, input_precision=_PRECISION)
        stride = H * N_BLOCKS * K
        store_tile(dk + row * stride, token, kk, stride, n_rows, d_keys, K, FULL)

        d_queries = tl.dot(state, tl.trans(dy), input_precision=_PRECISION) * from_start[None, :]  # (K, t)
        from_entering = tl.sum(tl.trans(queries) * d_queries, 0)
        d_queries = tl.dot(tl.trans(keys), d_scores, d_queries, input_precision=_PRECISION)
        pointers = dq + row * stride + kk[:, None] + token[None, :] * stride
        if FULL:
            tl.store(pointers, d_queries.to(dq.dtype.element_ty))
        else:
            inside = (kk < K)[:, None] & (token < n_rows)[None, :]
            tl.store(pointers, d_queries.to(dq.dtype.element_ty), mask=inside)

        # Row t sums what tokens from t on receive across it and what earlier ones send to the chunk's end.
        received = as_later - as_earlier + from_entering
        crossing = tl.where(later >= earlier, received[None, :], to_leaving[None, :])
        d_log_a = tl.sum(crossing, 1) + passing
        if RESET:
            d_log_a = tl.where(tl.load(reset + row + token, mask=token < n_rows, other=0) != 0, 0.0, d_log_a)
        tl.store(d_log_decay + (row + token) * H, d_log_a, mask=token < n_rows)

    if START and segment == 0:
        store_tile(d_start + head.to(tl.int64) * (K * V), kk, vv, V, K, d_state, V, wide)


@triton.jit
def step_kernel(
    q, k, v, log_decay, reset, start, out, final, H, R,
    q_b, q_h, k_b, k_h, v_b, v_h, a_b, a_h, reset_b,
    K: tl.constexpr, V: tl.constexpr, N_BLOCKS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One token. Grid (B * H * N_BLOCKS,)."""
    head, block = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    b, h = (head // H).to(tl.int64), head % H
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    k_inside, v_inside = kk < K, vv < V
    query = tl.load(q + b * q_b + (h // R) * q_h + kk, mask=k_inside, other=0.0).to(tl.float32)
    key = tl.load(k + b * k_b + (h // R) * k_h + kk, mask=k_inside, other=0.0).to(tl.float32)
    value = tl.load(v + b * v_b + h * v_h + vv, mask=v_inside, other=0.0).to(tl.float32)
    state = key[:, None] * value[None, :]
    at = head.to(tl.int64) * (K * V) + kk[:, None] * V + vv[None, :]
    inside = k_inside[:, None] & v_inside[None, :]
    if START:
        before = tl.load(start + at, mask=inside, other=0.0)
        decay = tl.exp(tl.load(log_decay + b * a_b + h * a_h).to(tl.float32))
        if RESET:
            before = tl.where(tl.load(reset + b * reset_b) != 0, 0.0, before)
        state += decay * before
        tl.debug_barrier()  # `final` may be `start`, and threads may have loaded the same elements
    tl.store(final + at, state, mask=inside)
    y = tl.sum(state * query[:, None], 0)
    tl.store(out + head.to(tl.int64) * V + vv, y.to(out.dtype.element_ty), mask=v_inside)
