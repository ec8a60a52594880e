"""Backward kernels of differential linear attention; kernels.py has the mathematics."""

import triton
import triton.language as tl

from fusedlm.ops.differential_linear.kernels import (
    PRECISION,
    add_sums,
    load_decays,
    load_state,
    masked,
    no_sums,
    phi,
    program_stream,
    rope_columns,
    rotated,
    save_state,
    store_state,
)
from fusedlm.ops.linear_attention.kernels import boundary_decays, load_tile, pair_decays, store_tile


@triton.jit
def norm_gradient_kernel(
    upstream, difference, noise, weight, gamma, dy, deltas, d_weight, d_gamma,
    n_tokens, per_program, H: tl.constexpr, eps, up_b, up_t: tl.constexpr, up_h,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the difference before the norm, dy (B, T, H, V), and what of them changes no sum of a stream, deltas
    (B, 2, H, T). Partial sums d_weight (B, programs, H) and d_gamma (B * H, programs, V). Grid (B * H, programs)."""
    program, n_programs = tl.program_id(1), tl.num_programs(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    token, vv = tl.arange(0, ROWS), tl.arange(0, BV)
    upstream += b * up_b + h * up_h
    at_head = (b * n_tokens * H + h) * V
    at_1 = deltas + (b * 2 * H + h) * n_tokens
    lam = tl.load(weight + h).to(tl.float32)
    gain = tl.load(gamma + vv, mask=vv < V, other=0.0).to(tl.float32)
    gain_sum, weight_sum = tl.zeros((BV,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
    first = program * per_program
    last = tl.minimum(first + per_program, tl.cdiv(n_tokens, ROWS))
    for i in tl.range(first, last, num_stages=STAGES):
        row = tl.cast(i, tl.int64) * ROWS
        n_rows = n_tokens - i * ROWS
        inside = token < n_rows
        at = at_head + row * H * V
        y = load_tile(difference + at, token, vv, H * V, n_rows, V, FULL).to(tl.float32)
        second = load_tile(noise + at, token, vv, H * V, n_rows, V, FULL).to(tl.float32)
        up = load_tile(upstream + row * up_t, token, vv, up_t, n_rows, V, FULL).to(tl.float32)
        square = tl.sum(y * y, 1)
        # With eps 0 this would be infinite for rows beyond the last, and the sums NaN.
        inverse = tl.where(inside, 1.0 / tl.sqrt(square / V + eps), 0.0)
        normed = y * inverse[:, None]
        gain_sum += tl.sum(up * normed, 0)
        up *= gain[None, :]
        along = tl.sum(up * normed, 1)
        exact = (up - normed * (along / V)[:, None]) * inverse[:, None]
        # With eps 0 dy is orthogonal to y, so its product with the component of the second stream along y is exact.
        common = tl.sum(y * second, 1) / tl.where(square > 0.0, square, 1.0)
        weight_sum -= tl.sum(exact * (second - common[:, None] * y), 1) + common * along * inverse * inverse * eps
        up = exact.to(dy.dtype.element_ty)
        store_tile(dy + at, token, vv, H * V, n_rows, up, V, FULL)
        up = up.to(tl.float32)  # as the next kernels read it
        delta = tl.sum(up * second, 1)
        tl.store(at_1 + row + token, tl.sum(up * y, 1) + lam * delta, mask=inside)
        tl.store(at_1 + H * n_tokens + row + token, delta, mask=inside)
    tl.store(d_weight + (b * n_programs + program) * H + h, tl.sum(weight_sum, 0))
    at = (tl.program_id(0).to(tl.int64) * n_programs + program) * V
    tl.store(d_gamma + at + vv, gain_sum, mask=vv < V)


@triton.jit
def state_gradients_kernel(
    dy, q, decays, documents, cos, sin, weight, deltas, inverses, leaving, states, totals, d_start, ends, factors,
    n_tokens, n_chunks, per_segment, H: tl.constexpr, scale, q_b, q_t: tl.constexpr, q_h, table_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, LEAVING: tl.constexpr, START: tl.constexpr, ENDS: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the states that leave the chunks, from the last chunk to the first: states and totals, as those of
    `states_kernel`. leaving: the ones (B * 2 * H, segments, R + D, V + 1) that leave the segments, with LEAVING.
    d_start: that of the first state, with START. Grid (B * H * 2, segments).

    ENDS: instead, for all segments but the first, ends and factors as `states_kernel`. Grid (B * H * 2, segments - 1).
    """
    segment, n_segments = tl.program_id(1), tl.num_programs(1)
    if ENDS:
        segment, n_segments = segment + 1, n_segments + 1
    b, h, stream, index = program_stream(H)
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    dy += (b * n_tokens * H + h) * V
    q += b * q_b + (stream * H + h) * q_h
    decays += (b * H + h) * n_chunks * C
    documents += b * n_chunks * C
    cos += b * table_b
    sin += b * table_b
    deltas += index * n_tokens
    inverses += index * n_tokens
    K: tl.constexpr = R + D
    sign = tl.where(stream == 0, 1.0, -tl.load(weight + h).to(tl.float32))
    state, total = no_sums(BD, BV), tl.zeros((BD,), dtype=tl.float32)
    rope_state, rope_total = no_sums(BR, BV), tl.zeros((BR,), dtype=tl.float32)
    if LEAVING:
        base = leaving + (index * n_segments + segment) * (K * (V + 1))
        state, total, rope_state, rope_total = load_state(base, dd, rr, vv, D, R, V, BD, BR, BV)
    factor = 1.0
    first = segment * per_segment
    n_steps = tl.minimum(per_segment, n_chunks - first)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        i = first + n_steps - 1 - step
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        gradient = load_tile(dy + row * H * V, token, vv, H * V, n_rows, V, FULL)
        queries = phi(load_tile(q + row * q_t + R, token, dd, q_t, n_rows, D, FULL), scale)
        running, document, last, last_document = load_decays(decays + row, documents + row, C, RESET)
        from_start, to_end, through = boundary_decays(running, document, last, last_document, RESET)
        delta = tl.load(deltas + row + token, mask=inside, other=0.0)
        received = sign * from_start * tl.load(inverses + row + token, mask=inside, other=0.0)
        if not ENDS:
            at = (index * n_chunks + i) * K
            save_state(states + at * V, totals + at, state, total, rope_state, rope_total, D, R, V, BD, BR, BV)
        queries *= received[:, None]
        total = total * through - tl.sum(queries * delta[:, None], 0)
        state = add_sums(state * through, gradient, queries.to(gradient.dtype), BD, BV)
        if R > 0:
            angle = row * (R // 2)
            queries = phi(rotated(q + row * q_t, cos + angle, sin + angle, token, rr, q_t, n_rows, R, FULL), scale)
            queries *= received[:, None]
            rope_total = rope_total * through - tl.sum(queries * delta[:, None], 0)
            rope_state = add_sums(rope_state * through, gradient, queries.to(gradient.dtype), BR, BV)
        factor *= through
    if ENDS:
        at = index * n_segments + segment
        store_state(ends + at * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V, BD, BR, BV)
        tl.store(factors + at, factor)
    elif START and segment == 0:
        store_state(
            d_start + index * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V, BD, BR, BV
        )


@triton.jit
def _store_unrotated(
    base, gradient, cos, sin, token, stride, n_rows, R: tl.constexpr, BR: tl.constexpr, C: tl.constexpr
):
    """Stores the gradient (C, R) of rotated dimensions as that of those before the rotation."""
    first, second = tl.split(tl.permute(tl.reshape(gradient, (C, 2, BR // 2)), (0, 2, 1)))
    half = tl.arange(0, BR // 2)
    inside = (half < R // 2)[None, :] & (token < n_rows)[:, None]
    angle = token[:, None] * (R // 2) + half[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    at = base + half[None, :] + token[:, None] * stride
    dtype = base.dtype.element_ty
    tl.store(at, (first * c + second * s).to(dtype), mask=inside)
    tl.store(at + R // 2, (second * c - first * s).to(dtype), mask=inside)


@triton.jit
def _slope(x, scale):
    """Derivative of phi(scale x) by x."""
    return x.to(tl.float32) * (scale * scale) + scale


@triton.jit
def _products(d_features, gradient, slope, inside, column, scale, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """phi . d_features per row, with gradient = d_features slope: phi is (slope^2 / scale^2 + 1) / 2."""
    squares = tl.sum(masked(gradient * slope, inside, column, WIDTH, KEEP), 1)
    return (squares / (scale * scale) + tl.sum(masked(d_features, inside, column, WIDTH, KEEP), 1)) * 0.5


@triton.jit
def backward_kernel(
    dy, q, k, k_rope, v, decays, documents, cos, sin, weight, reset, written, deltas, inverses, states, totals,
    d_states, d_totals, dq, dk, dk_rope, dv, d_log_decay, n_tokens, n_chunks, H: tl.constexpr, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, r_b, r_t: tl.constexpr, r_h,
    v_b, v_t: tl.constexpr, v_h, table_b, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One chunk of one stream. Grid (B * n_chunks * H * 2,). dq, dk: contiguous, of the shapes of q and k; dk_rope: (B,
    T, 2, H, R); dv and d_log_decay: (2, B, T, H, V) and (2, B, T, H), parts per stream."""
    program = tl.program_id(0)
    stream, h = program % 2, program // 2 % H
    i, b = program // (2 * H) % n_chunks, (program // (2 * H) // n_chunks).to(tl.int64)
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    K: tl.constexpr = R + D
    KEEP: tl.constexpr = FULL and not WRITTEN
    WIDE: tl.constexpr = (BD == D) and (BV == V)
    WIDE_ROPE: tl.constexpr = (BR == R) and (BV == V)
    row = tl.cast(i, tl.int64) * C
    n_rows = n_tokens - i * C
    inside = token < n_rows
    index = (b * 2 + stream) * H + h
    at = (index * n_chunks + i) * K
    q += b * q_b + row * q_t + (stream * H + h) * q_h
    k += b * k_b + row * k_t + (stream * H + h) * k_h
    k_rope += b * r_b + row * r_t + stream * r_h
    cos += b * table_b + row * (R // 2)
    sin += b * table_b + row * (R // 2)
    decays += ((b * H + h) * n_chunks + i) * C
    documents += (b * n_chunks + i) * C
    at_head = (b * n_tokens + row) * H + h
    partial = stream * (tl.num_programs(0) // (2 * H) // n_chunks).to(tl.int64) * n_tokens * H + at_head
    lam = tl.load(weight + h).to(tl.float32)
    keys_inside = inside
    if WRITTEN:
        keys_inside = inside & (tl.load(written + b * n_tokens + row + token, mask=inside, other=0) != 0)
    queries = load_tile(q + R, token, dd, q_t, n_rows, D, FULL)
    keys = load_tile(k, token, dd, k_t, n_rows, D, FULL)
    state = load_tile(states + at * V + V * R, vv, dd, D, V, D, WIDE)
    d_state = load_tile(d_states + at * V + V * R, vv, dd, D, V, D, WIDE)
    gradient = load_tile(dy + at_head * V, token, vv, H * V, n_rows, V, FULL)
    values = load_tile(v + b * v_b + row * v_t + h * v_h, token, vv, v_t, n_rows, V, FULL)
    dtype = values.dtype
    query_features = phi(queries, scale).to(dtype)
    key_features = masked(phi(keys, scale), keys_inside, dd, D, KEEP).to(dtype)
    passing = tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
    running, document, last, last_document = load_decays(decays, documents, C, RESET)
    from_start, to_end, through = boundary_decays(running, document, last, last_document, RESET)
    d_sent = tl.dot(d_state, tl.trans(key_features), input_precision=PRECISION)
    if R > 0:
        q_rope = rotated(q, cos, sin, token, rr, q_t, n_rows, R, FULL)
        rope_keys = load_tile(k_rope, token, rr, r_t, n_rows, R, FULL)
        rope_state = load_tile(states + at * V, vv, rr, R, V, R, WIDE_ROPE)
        rope_d_state = load_tile(d_states + at * V, vv, rr, R, V, R, WIDE_ROPE)
        passing += tl.sum(rope_state.to(tl.float32) * rope_d_state.to(tl.float32), 1)
        rope_query_features = phi(q_rope, scale).to(dtype)
        rope_key_features = masked(phi(rope_keys, scale), keys_inside, rr, R, KEEP).to(dtype)
        d_sent = tl.dot(rope_d_state, tl.trans(rope_key_features), d_sent, input_precision=PRECISION)
    d_values = d_sent * to_end[None, :]  # transposed
    scores = tl.dot(query_features, tl.trans(key_features), input_precision=PRECISION)
    if R > 0:
        scores = tl.dot(rope_query_features, tl.trans(rope_key_features), scores, input_precision=PRECISION)
    at_token = index * n_tokens + row + token
    delta = tl.load(deltas + at_token, mask=inside, other=0.0)
    factor = tl.where(stream == 0, 1.0, -lam) * tl.load(inverses + at_token, mask=inside, other=0.0)
    pairs = factor[:, None] * pair_decays(
        running[:, None], running[None, :], document[:, None], document[None, :], token[:, None] >= token[None, :],
        RESET,
    )  # fmt: skip
    d_scores = (tl.dot(gradient, tl.trans(values), input_precision=PRECISION) - delta[:, None]) * pairs
    sent_to_tokens = tl.sum(tl.sum(scores * d_scores, 1), 0)
    d_scores = d_scores.to(dtype)
    scores = (scores * pairs).to(dtype)
    d_values = tl.dot(tl.trans(gradient), scores, d_values, input_precision=PRECISION)
    store_tile(dv + partial * V, token, vv, H * V, n_rows, tl.trans(d_values), V, FULL)

    at_token = (b * n_tokens + row) * 2 * H + stream * H + h
    from_state = from_start * factor
    d_queries = tl.dot(gradient, state, input_precision=PRECISION)
    total = tl.load(totals + at + R + dd, mask=dd < D, other=0.0)
    d_total = tl.load(d_totals + at + R + dd, mask=dd < D, other=0.0)
    passing_total = tl.sum(total * d_total, 0)
    d_queries = (d_queries - delta[:, None] * total[None, :]) * from_state[:, None]
    d_queries = tl.dot(d_scores, key_features, d_queries, input_precision=PRECISION)
    queries = load_tile(q + R, token, dd, q_t, n_rows, D, FULL)  # again: registers are for what is summed
    d_queries *= _slope(queries, scale)
    store_tile(dq + at_token * K + R, token, dd, 2 * H * K, n_rows, d_queries, D, FULL)

    later = tl.trans(d_scores)
    d_keys = tl.dot(values, d_state, input_precision=PRECISION)
    d_keys = (d_keys + d_total[None, :]) * to_end[:, None]
    keys = load_tile(k, token, dd, k_t, n_rows, D, FULL)
    slope = _slope(keys, scale)
    d_keys = tl.dot(later, query_features, d_keys, input_precision=PRECISION)
    d_features = d_keys
    d_keys *= slope
    sent = _products(d_features, d_keys, slope, keys_inside, dd, scale, D, KEEP)
    if WRITTEN:
        d_keys = tl.where(keys_inside[:, None], d_keys, 0.0)
    store_tile(dk + at_token * D, token, dd, 2 * H * D, n_rows, d_keys, D, FULL)
    if R > 0:
        rope_total = tl.load(totals + at + rr, mask=rr < R, other=0.0)
        rope_d_total = tl.load(d_totals + at + rr, mask=rr < R, other=0.0)
        passing_total += tl.sum(rope_total * rope_d_total, 0)
        d_queries = tl.dot(gradient, rope_state, input_precision=PRECISION)
        d_queries = (d_queries - delta[:, None] * rope_total[None, :]) * from_state[:, None]
        d_queries = tl.dot(d_scores, rope_key_features, d_queries, input_precision=PRECISION)
        d_queries *= _slope(q_rope, scale)
        _store_unrotated(dq + at_token * K, d_queries, cos, sin, token, 2 * H * K, n_rows, R, BR, C)
        d_keys = tl.dot(values, rope_d_state, input_precision=PRECISION)
        d_keys = (d_keys + rope_d_total[None, :]) * to_end[:, None]
        rope_keys = load_tile(k_rope, token, rr, r_t, n_rows, R, FULL)
        slope = _slope(rope_keys, scale)
        d_keys = tl.dot(later, rope_query_features, d_keys, input_precision=PRECISION)
        d_features = d_keys
        d_keys *= slope
        sent += _products(d_features, d_keys, slope, keys_inside, rr, scale, R, KEEP)
        if WRITTEN:
            d_keys = tl.where(keys_inside[:, None], d_keys, 0.0)
        store_tile(dk_rope + at_token * R, token, rr, 2 * H * R, n_rows, d_keys, R, FULL)
    # What each token receives adds up to 0: what crosses to token t is what earlier ones send, to tokens and to the
    # chunk's end, less all that is sent to tokens.
    crossing = tl.cumsum(sent, 0) - sent - sent_to_tokens
    crossing += tl.where(last_document == 0, through * (tl.sum(passing, 0) + passing_total), 0.0)
    if RESET:
        is_reset = tl.load(reset + b * reset_b + row + token, mask=inside, other=0) != 0
        crossing = tl.where(is_reset, 0.0, crossing)
    tl.store(d_log_decay + partial + token * H, crossing, mask=inside)
