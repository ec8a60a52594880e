"""Backward kernels of differential linear attention; kernels.py has the mathematics."""

import triton
import triton.language as tl

from fusedlm.ops.differential_linear.kernels import (
    PRECISION,
    column_sums,
    load_state,
    phi,
    rope_columns,
    rotated,
    store_state,
)
from fusedlm.ops.linear_attention.kernels import boundary_decays, chunk_decays, load_tile, pair_decays, store_tile


@triton.jit
def norm_gradient_kernel(
    upstream, difference, noise, weight, gamma, dy, deltas, d_weight, d_gamma, n_tokens, per_program, H, eps,
    up_b, up_t, up_h, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Gradients of the outputs before the norm, dy (B, T, H, V), and what of them changes no sum of a stream, deltas
    (B, 2, H, T). Partial sums d_weight (B, programs, H) and d_gamma (B * H, programs, V). Grid (B * H, programs)."""
    program, n_programs = tl.program_id(1), tl.num_programs(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    token, vv = tl.arange(0, C), tl.arange(0, BV)
    upstream += b * up_b + h * up_h
    at_head = (b * n_tokens * H + h) * V
    at_1 = deltas + (b * 2 * H + h) * n_tokens
    lam = tl.load(weight + h).to(tl.float32)
    gain = tl.load(gamma + vv, mask=vv < V, other=0.0).to(tl.float32)
    gain_sum, weight_sum = tl.zeros((C, BV), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    first = program * per_program
    for i in range(first, tl.minimum(first + per_program, tl.cdiv(n_tokens, C))):
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        at = at_head + row * H * V
        y = load_tile(difference + at, token, vv, H * V, n_rows, V, FULL).to(tl.float32)
        second = load_tile(noise + at, token, vv, H * V, n_rows, V, FULL).to(tl.float32)
        up = load_tile(upstream + row * up_t, token, vv, up_t, n_rows, V, FULL).to(tl.float32)
        # With eps 0 this would be infinite for rows beyond the last, and the sums NaN.
        inverse = tl.where(inside, 1.0 / tl.sqrt(tl.sum(y * y, 1) / V + eps), 0.0)[:, None]
        normed = y * inverse
        gain_sum += up * normed
        up *= gain[None, :]
        up = (up - normed * (tl.sum(up * normed, 1) / V)[:, None]) * inverse
        up = up.to(dy.dtype.element_ty).to(tl.float32)  # as the next kernel reads it
        delta_2 = tl.sum(up * second, 1)
        weight_sum -= delta_2
        store_tile(dy + at, token, vv, H * V, n_rows, up, V, FULL)
        tl.store(at_1 + row + token, tl.sum(up * y, 1) + lam * delta_2, mask=inside)
        tl.store(at_1 + H * n_tokens + row + token, delta_2, mask=inside)
    tl.store(d_weight + (b * n_programs + program) * H + h, tl.sum(weight_sum, 0))
    at = (tl.program_id(0).to(tl.int64) * n_programs + program) * V
    tl.store(d_gamma + at + vv, tl.sum(gain_sum, 0), mask=vv < V)


@triton.jit
def gradient_ends_kernel(
    dy, q, log_decay, cos, sin, weight, reset, deltas, inverses, ends, factors,
    n_tokens, n_chunks, per_segment, H, scale, q_b, q_t, q_h, a_b, a_t, a_h, table_b, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`ends_kernel` of the gradients, for all segments but the first: what each adds to that of the state before it."""
    segment, n_segments = tl.program_id(1) + 1, tl.num_programs(1) + 1
    b, stream, h = (tl.program_id(0) // (2 * H)).to(tl.int64), tl.program_id(0) // H % 2, tl.program_id(0) % H
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    dy += (b * n_tokens * H + h) * V
    q += b * q_b + (stream * H + h) * q_h
    log_decay += b * a_b + h * a_h
    cos += b * table_b
    sin += b * table_b
    reset += b * reset_b
    deltas += tl.program_id(0).to(tl.int64) * n_tokens
    inverses += tl.program_id(0).to(tl.int64) * n_tokens
    K: tl.constexpr = R + D
    sign = tl.where(stream == 0, 1.0, -tl.load(weight + h).to(tl.float32))
    state, total = tl.zeros((BV, BD), dtype=tl.float32), tl.zeros((BD,), dtype=tl.float32)
    rope_state, rope_total = tl.zeros((BV, BR), dtype=tl.float32), tl.zeros((BR,), dtype=tl.float32)
    factor = 1.0
    first = segment * per_segment
    n_steps = tl.minimum(per_segment, n_chunks - first)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        i = first + n_steps - 1 - step
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        gradient = load_tile(dy + row * H * V, token, vv, H * V, n_rows, V, FULL)
        decays, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(decays, document, last, last_document, RESET)
        delta = tl.load(deltas + row + token, mask=inside, other=0.0)
        received = sign * from_start * tl.load(inverses + row + token, mask=inside, other=0.0)
        queries = phi(load_tile(q + row * q_t + R, token, dd, q_t, n_rows, D, FULL), scale)
        queries = (queries * received[:, None]).to(gradient.dtype)
        state = tl.dot(tl.trans(gradient), queries, state * through, input_precision=PRECISION)
        total = total * through - column_sums(delta, queries, C)
        if R > 0:
            angle = row * (R // 2)
            queries = phi(rotated(q + row * q_t, cos + angle, sin + angle, token, rr, q_t, n_rows, R, FULL), scale)
            queries = (queries * received[:, None]).to(gradient.dtype)
            rope_state = tl.dot(tl.trans(gradient), queries, rope_state * through, input_precision=PRECISION)
            rope_total = rope_total * through - column_sums(delta, queries, C)
        factor *= through
    at = tl.program_id(0).to(tl.int64) * n_segments + segment
    store_state(ends + at * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V)
    tl.store(factors + at, factor)


@triton.jit
def _slope(x, scale):
    """Derivative of phi(scale x) by x."""
    return x.to(tl.float32) * (scale * scale) + scale


@triton.jit
def _store_unrotated(
    base, gradient, cos, sin, token, stride, n_rows, R: tl.constexpr, BR: tl.constexpr, C: tl.constexpr
):
    """Stores the gradient (R, C) of rotated dimensions as that (C, R) of those before the rotation."""
    first, second = tl.split(tl.permute(tl.reshape(gradient, (2, BR // 2, C)), (1, 2, 0)))
    half = tl.arange(0, BR // 2)
    inside = (half < R // 2)[:, None] & (token < n_rows)[None, :]
    angle = token[None, :] * (R // 2) + half[:, None]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    at = base + half[:, None] + token[None, :] * stride
    dtype = base.dtype.element_ty
    tl.store(at, (first * c + second * s).to(dtype), mask=inside)
    tl.store(at + R // 2, (second * c - first * s).to(dtype), mask=inside)


@triton.jit
def _backward_stream(
    dv, sent, to_leaving, passing, passing_total, passing_rope, q, k, k_rope, cos, sin, states, totals, dq, dk, dk_rope,
    values, dy, products, decay, from_start, to_end, through, factor, delta,
    d_state, d_total, rope_d_state, rope_d_total,
    q_t, k_t, r_t, dq_t, dk_t, dr_t, n_rows, inside, keys_inside, scale,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    BV: tl.constexpr, FULL: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """Stores a stream's gradients of q, k and k_rope, and adds to those of v, to what tokens send to later ones and to
    the chunk's end, and to what passes the chunk, as vectors over V, D and R. Returns these and the gradient of the
    state before the chunk.

    Pairs are (s, t) and gradients of q are (D, t), as in ../linear_attention/kernels.py.
    """
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    WIDE: tl.constexpr = (BD == D) and (BV == V)
    KEEP: tl.constexpr = FULL and not WRITTEN
    dtype = values.dtype
    from_entering = factor * from_start
    state = load_tile(states + R * V, dd, vv, V, D, V, WIDE)
    total = tl.load(totals + R + dd, mask=dd < D, other=0.0)
    passing += tl.sum(tl.trans(state) * d_state, 1)
    passing_total += total * d_total
    leaving, d_leaving = d_state.to(dtype), d_total
    queries = load_tile(q + R, token, dd, q_t, n_rows, D, FULL)
    keys = load_tile(k, token, dd, k_t, n_rows, D, FULL)
    query_features, key_features = phi(queries, scale), phi(keys, scale)
    if not KEEP:
        key_features = tl.where(keys_inside[:, None] & (dd < D)[None, :], key_features, 0.0)
    scaled = (query_features * from_entering[:, None]).to(dtype)
    d_state = tl.dot(tl.trans(dy), scaled, d_state * through, input_precision=PRECISION)
    d_total = d_total * through - column_sums(delta, scaled, C)
    scaled = (key_features * to_end[:, None]).to(dtype)
    query_features, key_features = query_features.to(dtype), key_features.to(dtype)
    scores = tl.dot(key_features, tl.trans(query_features), input_precision=PRECISION)
    if R > 0:
        rope_queries = rotated(q, cos, sin, token, rr, q_t, n_rows, R, FULL)
        rope_keys = load_tile(k_rope, token, rr, r_t, n_rows, R, FULL)
        rope_query_features, rope_key_features = phi(rope_queries, scale), phi(rope_keys, scale)
        if not KEEP:
            rope_key_features = tl.where(keys_inside[:, None] & (rr < R)[None, :], rope_key_features, 0.0)
        rope_scaled = (rope_key_features * to_end[:, None]).to(dtype)
        rope_leaving, rope_d_leaving = rope_d_state.to(dtype), rope_d_total
        rope_state = load_tile(states, rr, vv, V, R, V, False)
        rope_total = tl.load(totals + rr, mask=rr < R, other=0.0)
        passing += tl.sum(tl.trans(rope_state) * rope_d_state, 1)
        passing_rope += rope_total * rope_d_total
        query_scaled = (rope_query_features * from_entering[:, None]).to(dtype)
        rope_d_state = tl.dot(tl.trans(dy), query_scaled, rope_d_state * through, input_precision=PRECISION)
        rope_d_total = rope_d_total * through - column_sums(delta, query_scaled, C)
        rope_query_features, rope_key_features = rope_query_features.to(dtype), rope_key_features.to(dtype)
        scores = tl.dot(rope_key_features, tl.trans(rope_query_features), scores, input_precision=PRECISION)
    received = products - delta[None, :]
    pairs = decay * factor[None, :]
    scores *= pairs
    sent += tl.sum(scores * received, 1)
    dv = tl.dot(scores.to(dtype), dy, dv, input_precision=PRECISION)
    scores = (received * pairs).to(dtype)

    dv = tl.dot(scaled, tl.trans(leaving), dv, input_precision=PRECISION)
    gradient = tl.dot(values, leaving, input_precision=PRECISION)
    gradient = (gradient + d_leaving[None, :]) * to_end[:, None]
    to_leaving += tl.sum(key_features * gradient, 1)
    gradient = tl.dot(scores, query_features, gradient, input_precision=PRECISION) * _slope(keys, scale)
    if WRITTEN:
        gradient = tl.where(keys_inside[:, None], gradient, 0.0)
    store_tile(dk, token, dd, dk_t, n_rows, gradient, D, FULL)

    gradient = tl.dot(state, tl.trans(dy), input_precision=PRECISION)
    gradient = (gradient - total[:, None] * delta[None, :]) * from_entering[None, :]
    gradient = tl.dot(tl.trans(key_features), scores, gradient, input_precision=PRECISION)
    gradient *= _slope(tl.trans(queries), scale)
    at = dq + R + dd[:, None] + token[None, :] * dq_t
    tl.store(at, gradient.to(dtype), mask=(dd < D)[:, None] & inside[None, :])
    if R > 0:
        dv = tl.dot(rope_scaled, tl.trans(rope_leaving), dv, input_precision=PRECISION)
        gradient = tl.dot(values, rope_leaving, input_precision=PRECISION)
        gradient = (gradient + rope_d_leaving[None, :]) * to_end[:, None]
        to_leaving += tl.sum(rope_key_features * gradient, 1)
        gradient = tl.dot(scores, rope_query_features, gradient, input_precision=PRECISION)
        gradient *= _slope(rope_keys, scale)
        if WRITTEN:
            gradient = tl.where(keys_inside[:, None], gradient, 0.0)
        store_tile(dk_rope, token, rr, dr_t, n_rows, gradient, R, FULL)
        gradient = tl.dot(rope_state, tl.trans(dy), input_precision=PRECISION)
        gradient = (gradient - rope_total[:, None] * delta[None, :]) * from_entering[None, :]
        gradient = tl.dot(tl.trans(rope_key_features), scores, gradient, input_precision=PRECISION)
        gradient *= _slope(tl.trans(rope_queries), scale)
        _store_unrotated(dq, gradient, cos, sin, token, dq_t, n_rows, R, BR, C)
    return dv, sent, to_leaving, passing, passing_total, passing_rope, d_state, d_total, rope_d_state, rope_d_total


@triton.jit
def backward_kernel(
    dy, q, k, k_rope, v, log_decay, cos, sin, weight, reset, written, deltas, inverses, states, totals, leaving,
    dq, dk, dk_rope, dv, d_log_decay, d_start, n_tokens, n_chunks, per_segment, H, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, v_b, v_t, v_h, a_b, a_t, a_h, table_b, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, LEAVING: tl.constexpr, START: tl.constexpr,
    FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, segments). leaving: gradients (B * 2 * H, segments, R + D, V + 1) of the states that leave segments,
    with LEAVING. dq, dk, dv: contiguous, of the shapes of q, k, v; dk_rope: (B, T, 2, H, R); d_log_decay: (B, T, H).
    d_start: with START.
    """
    segment, n_segments = tl.program_id(1), tl.num_programs(1)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    k_rope += b * r_b
    v += b * v_b + h * v_h
    log_decay += b * a_b + h * a_h
    cos += b * table_b
    sin += b * table_b
    reset += b * reset_b
    written += b * n_tokens
    K: tl.constexpr = R + D
    token_0 = b * n_tokens
    stream_1 = b * 2 * H + h  # of (B, 2, H)
    stream_2 = stream_1 + H
    lam = tl.load(weight + h).to(tl.float32)

    d_state_1, d_state_2 = tl.zeros((BV, BD), dtype=tl.float32), tl.zeros((BV, BD), dtype=tl.float32)
    d_total_1, d_total_2 = tl.zeros((BD,), dtype=tl.float32), tl.zeros((BD,), dtype=tl.float32)
    rope_d_state_1, rope_d_state_2 = tl.zeros((BV, BR), dtype=tl.float32), tl.zeros((BV, BR), dtype=tl.float32)
    rope_d_total_1, rope_d_total_2 = tl.zeros((BR,), dtype=tl.float32), tl.zeros((BR,), dtype=tl.float32)
    if LEAVING:
        base = leaving + (stream_1 * n_segments + segment) * (K * (V + 1))
        d_state_1, d_total_1, rope_d_state_1, rope_d_total_1 = load_state(base, dd, rr, vv, D, R, V)
        base = leaving + (stream_2 * n_segments + segment) * (K * (V + 1))
        d_state_2, d_total_2, rope_d_state_2, rope_d_total_2 = load_state(base, dd, rr, vv, D, R, V)
    first = segment * per_segment
    n_steps = tl.minimum(per_segment, n_chunks - first)
    for step in tl.range(0, n_steps, num_stages=STAGES):
        i = first + n_steps - 1 - step
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        at = ((token_0 + row) * H + h) * V
        gradient = load_tile(dy + at, token, vv, H * V, n_rows, V, FULL)
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        decays, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(decays, document, last, last_document, RESET)
        keys_inside = inside
        if WRITTEN:
            keys_inside = inside & (tl.load(written + row + token, mask=inside, other=0) != 0)
        at_1, at_2 = stream_1 * n_tokens + row + token, stream_2 * n_tokens + row + token
        factor_1 = tl.load(inverses + at_1, mask=inside, other=0.0)
        factor_2 = -lam * tl.load(inverses + at_2, mask=inside, other=0.0)
        delta_1 = tl.load(deltas + at_1, mask=inside, other=0.0)
        delta_2 = tl.load(deltas + at_2, mask=inside, other=0.0)
        products = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
        index = token + i * C  # depends on the step, so that comparisons are computed where they are used
        visible = index[None, :] >= index[:, None]
        decay = pair_decays(decays[None, :], decays[:, None], document[None, :], document[:, None], visible, RESET)

        d_values, angle = tl.zeros((C, BV), dtype=tl.float32), row * (R // 2)
        sent, to_leaving = tl.zeros((C,), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
        passing, passing_total = tl.zeros((BV,), dtype=tl.float32), tl.zeros((BD,), dtype=tl.float32)
        passing_rope = tl.zeros((BR,), dtype=tl.float32)
        at_1, at_2 = (stream_1 * n_chunks + i) * K, (stream_2 * n_chunks + i) * K
        at_head = (token_0 + row) * 2 * H + h
        (
            d_values, sent, to_leaving, passing, passing_total, passing_rope,
            d_state_1, d_total_1, rope_d_state_1, rope_d_total_1,
        ) = _backward_stream(
            d_values, sent, to_leaving, passing, passing_total, passing_rope,
            q + row * q_t, k + row * k_t, k_rope + row * r_t, cos + angle, sin + angle,
            states + at_1 * V, totals + at_1, dq + at_head * K, dk + at_head * D, dk_rope + at_head * R,
            values, gradient, products, decay, from_start, to_end, through, factor_1, delta_1,
            d_state_1, d_total_1, rope_d_state_1, rope_d_total_1,
            q_t, k_t, r_t, 2 * H * K, 2 * H * D, 2 * H * R, n_rows, inside, keys_inside, scale,
            D, R, V, C, BD, BR, BV, FULL, WRITTEN,
        )  # fmt: skip
        at_head += H
        (
            d_values, sent, to_leaving, passing, passing_total, passing_rope,
            d_state_2, d_total_2, rope_d_state_2, rope_d_total_2,
        ) = _backward_stream(
            d_values, sent, to_leaving, passing, passing_total, passing_rope,
            q + row * q_t + H * q_h, k + row * k_t + H * k_h, k_rope + row * r_t + r_h, cos + angle, sin + angle,
            states + at_2 * V, totals + at_2, dq + at_head * K, dk + at_head * D, dk_rope + at_head * R,
            values, gradient, products, decay, from_start, to_end, through, factor_2, delta_2,
            d_state_2, d_total_2, rope_d_state_2, rope_d_total_2,
            q_t, k_t, r_t, 2 * H * K, 2 * H * D, 2 * H * R, n_rows, inside, keys_inside, scale,
            D, R, V, C, BD, BR, BV, FULL, WRITTEN,
        )  # fmt: skip
        store_tile(dv + at, token, vv, H * V, n_rows, d_values, V, FULL)
        # Row t sums what tokens from t on receive across it and what earlier ones send to the chunk's end.
        crossing = tl.where(index[None, :] >= index[:, None], -sent[None, :], to_leaving[None, :])
        crossing = tl.sum(crossing, 1)
        crossing += (tl.sum(passing, 0) + tl.sum(passing_total, 0) + tl.sum(passing_rope, 0)) * through
        if RESET:
            crossing = tl.where(tl.load(reset + row + token, mask=inside, other=0) != 0, 0.0, crossing)
        tl.store(d_log_decay + (token_0 + row + token) * H + h, crossing, mask=inside)
    if START and segment == 0:
        base = d_start + stream_1 * (K * (V + 1))
        store_state(base, d_state_1, d_total_1, rope_d_state_1, rope_d_total_1, dd, rr, vv, D, R, V)
        base = d_start + stream_2 * (K * (V + 1))
        store_state(base, d_state_2, d_total_2, rope_d_state_2, rope_d_total_2, dd, rr, vv, D, R, V)
