"""Kernels of differential linear attention: both streams in one program.

Per head and stream i, with M_i = D * (phi(Q_i) phi(K_i)^T) and the symbols of ../linear_attention/kernels.py, and with
the sums of features z_i (a column of the state) beside S_i:

    Z_i = M_i 1 + gamma * (phi(Q_i) z_i),  E_1 = 1 / Z_1,  E_2 = -lambda / Z_2,
    Y = (E_1 M_1 + E_2 M_2) V + gamma * (E_1 (phi(Q_1) S_1) + E_2 (phi(Q_2) S_2)),  O = norm(Y).

The values are read once, and so is their product with dY, which both streams share. With P = dY V^T and the part of dY
that changes no normalised sum removed, delta_i = dY . (stream i alone, normalised), a pair of tokens receives
X_i = E_i D * (P - delta_i), and

    dV = sum_i (E_i M_i)^T dY + to_end * (phi(K_i) dS_i'),
    dphi(Q_i) = X_i phi(K_i) + gamma E_i * (dY S_i^T - delta_i z_i^T),
    dphi(K_i) = X_i^T phi(Q_i) + to_end * (V dS_i'^T + dz_i'^T),
    dS_i = e^{g_C} dS_i' + phi(Q_i)^T (gamma E_i dY),  dz_i = e^{g_C} dz_i' - phi(Q_i)^T (gamma E_i delta_i).

What a token receives from all tokens up to itself, weighted by M_i, adds up to 0: a common factor of its weights does
not change its output. So the gradient of the log decay needs only what each token sends to later ones.

Features have a part with rotary embedding and one without, so that 16 + 64 of them are not padded to 128.
"""

import triton
import triton.language as tl

from fusedlm.ops.linear_attention.kernels import boundary_decays, chunk_decays, load_tile, pair_decays, store_tile

PRECISION = tl.constexpr("tf32x3")  # of products of float32


@triton.jit
def phi(x, scale):
    """phi(scale x) in float32."""
    x = x.to(tl.float32)
    return (x * (0.5 * scale * scale) + scale) * x + 1.0


@triton.jit
def rope_columns(R: tl.constexpr, BR: tl.constexpr):
    """The dimensions in the columns of a padded tile, whose halves hold the halves of R dimensions; R: none."""
    column = tl.arange(0, BR)
    if BR == R:
        return column
    half = column % (BR // 2)
    return tl.where(half < R // 2, half + column // (BR // 2) * (R // 2), R)


@triton.jit
def rotated(base, cos, sin, row, column, stride, n_rows, R: tl.constexpr, FULL: tl.constexpr):
    """A tile of R dimensions in float32, rotated. cos, sin: (T, R / 2), from the tile's first row."""
    partner = (column + R // 2) % R
    angle = row[:, None] * (R // 2) + (column % (R // 2))[None, :]
    at, other = row[:, None] * stride + column[None, :], row[:, None] * stride + partner[None, :]
    if FULL:
        x, y, c, s = tl.load(base + at), tl.load(base + other), tl.load(cos + angle), tl.load(sin + angle)
    else:
        inside = (row < n_rows)[:, None] & (column < R)[None, :]
        x, y = tl.load(base + at, mask=inside, other=0.0), tl.load(base + other, mask=inside, other=0.0)
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    sign = tl.where(column < R // 2, -1.0, 1.0)
    return x.to(tl.float32) * c.to(tl.float32) + y.to(tl.float32) * (s.to(tl.float32) * sign[None, :])


@triton.jit
def _key_features(
    base, row, column, stride, n_rows, inside, scale, WIDTH: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr
):
    """phi(scale k) in float32; 0 for tokens that are not written and beyond WIDTH, where phi(0) is 1. KEEP: none."""
    features = phi(load_tile(base, row, column, stride, n_rows, WIDTH, FULL), scale)
    if not KEEP:
        features = tl.where(inside[:, None] & (column < WIDTH)[None, :], features, 0.0)
    return features


@triton.jit
def column_sums(weight, x, C: tl.constexpr):
    """Sums of the rows of x, each times its weight, by the tensor cores."""
    first_row = (tl.arange(0, 16) == 0)[:, None]
    weights = tl.where(first_row, tl.broadcast_to(weight[None, :], (16, C)), 0.0).to(x.dtype)
    return tl.sum(tl.dot(weights, x, input_precision=PRECISION), 0)


@triton.jit
def _forward_stream(
    y, q, k, k_rope, cos, sin, values, added, decay, from_start, to_end, through,
    state, total, rope_state, rope_total, q_t, k_t, r_t, n_rows, inside, scale,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    FULL: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Adds a stream's normalised sum to y. Returns y, the inverse normaliser and the state after the chunk."""
    token, dd, rr = tl.arange(0, C), tl.arange(0, BD), rope_columns(R, BR)
    dtype = values.dtype
    queries = phi(load_tile(q + R, token, dd, q_t, n_rows, D, FULL), scale)
    keys = _key_features(k, token, dd, k_t, n_rows, inside, scale, D, FULL, KEEP)
    z = tl.sum(queries * total[None, :], 1)
    queries, keys = queries.to(dtype), keys.to(dtype)
    total = total * through + column_sums(to_end, keys, C)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if R > 0:
        rope_queries = phi(rotated(q, cos, sin, token, rr, q_t, n_rows, R, FULL), scale)
        rope_keys = _key_features(k_rope, token, rr, r_t, n_rows, inside, scale, R, FULL, KEEP)
        z += tl.sum(rope_queries * rope_total[None, :], 1)
        rope_queries, rope_keys = rope_queries.to(dtype), rope_keys.to(dtype)
        rope_total = rope_total * through + column_sums(to_end, rope_keys, C)
        scores = tl.dot(rope_queries, tl.trans(rope_keys), scores, input_precision=PRECISION)
    weights = scores * decay
    z = tl.sum(weights, 1) + from_start * z
    factor = tl.where(z > 0.0, 1.0 / z, 0.0)
    y = tl.dot((weights * factor[:, None]).to(dtype), values, y, input_precision=PRECISION)
    before = tl.dot(queries, tl.trans(state.to(dtype)), input_precision=PRECISION)
    if R > 0:
        before = tl.dot(rope_queries, tl.trans(rope_state.to(dtype)), before, input_precision=PRECISION)
        rope_state = tl.dot(tl.trans(added), rope_keys, rope_state * through, input_precision=PRECISION)
    y += before * (from_start * factor)[:, None]
    state = tl.dot(tl.trans(added), keys, state * through, input_precision=PRECISION)
    return y, factor, state, total, rope_state, rope_total


@triton.jit
def load_state(base, dd, rr, vv, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr):
    """A state (R + D, V + 1) as tiles (V, D) and (V, R) of sums and vectors of normalisers."""
    at = base + (R + dd)[None, :] * (V + 1) + vv[:, None]
    state = tl.load(at, mask=(dd < D)[None, :] & (vv < V)[:, None], other=0.0)
    total = tl.load(base + (R + dd) * (V + 1) + V, mask=dd < D, other=0.0)
    at = base + rr[None, :] * (V + 1) + vv[:, None]
    rope_state = tl.load(at, mask=(rr < R)[None, :] & (vv < V)[:, None], other=0.0)
    rope_total = tl.load(base + rr * (V + 1) + V, mask=rr < R, other=0.0)
    return state, total, rope_state, rope_total


@triton.jit
def store_state(
    base, state, total, rope_state, rope_total, dd, rr, vv, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr
):
    at = base + (R + dd)[None, :] * (V + 1) + vv[:, None]
    tl.store(at, state, mask=(dd < D)[None, :] & (vv < V)[:, None])
    tl.store(base + (R + dd) * (V + 1) + V, total, mask=dd < D)
    if R > 0:
        at = base + rr[None, :] * (V + 1) + vv[:, None]
        tl.store(at, rope_state, mask=(rr < R)[None, :] & (vv < V)[:, None])
        tl.store(base + rr * (V + 1) + V, rope_total, mask=rr < R)


@triton.jit
def _save_state(
    states, totals, state, total, rope_state, rope_total, dd, rr, vv, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr
):
    """A state (R + D, V) in the dtype of the inputs and its normalisers (R + D,) in float32."""
    at = states + (R + dd)[None, :] * V + vv[:, None]
    tl.store(at, state.to(states.dtype.element_ty), mask=(dd < D)[None, :] & (vv < V)[:, None])
    tl.store(totals + R + dd, total, mask=dd < D)
    if R > 0:
        at = states + rr[None, :] * V + vv[:, None]
        tl.store(at, rope_state.to(states.dtype.element_ty), mask=(rr < R)[None, :] & (vv < V)[:, None])
        tl.store(totals + rr, rope_total, mask=rr < R)


@triton.jit
def forward_kernel(
    q, k, k_rope, v, log_decay, cos, sin, weight, gamma, reset, written, start,
    out, difference, noise, inverses, states, totals, final,
    n_tokens, n_chunks, per_segment, H, scale, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, r_b, r_t, r_h, v_b, v_t, v_h, a_b, a_t, a_h, table_b, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, START: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, segments). q: (B, T, 2 H, R + D), k: (B, T, 2 H, D), stream by stream; k_rope: (B, T, 2, R),
    rotated. start, final: (B * 2 * H, segments or 1, R + D, V + 1), float32, the normalisers in the last column.

    With SAVE: difference (B, T, H, V), the outputs before the norm, and noise (B, T, H, V), the second stream; inverses
    (B, 2, H, T) of the normalisers; states and totals (B, 2, H, n_chunks, R + D, V) and (B, 2, H, n_chunks, R + D),
    those that enter the chunks.
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
    at_out = (b * n_tokens * H + h) * V
    stream_1 = b * 2 * H + h  # of (B, 2, H)
    stream_2 = stream_1 + H
    K: tl.constexpr = R + D
    KEEP: tl.constexpr = FULL and not WRITTEN
    lam = tl.load(weight + h).to(tl.float32)
    gain = tl.load(gamma + vv, mask=vv < V, other=0.0).to(tl.float32)

    state_1, state_2 = tl.zeros((BV, BD), dtype=tl.float32), tl.zeros((BV, BD), dtype=tl.float32)
    total_1, total_2 = tl.zeros((BD,), dtype=tl.float32), tl.zeros((BD,), dtype=tl.float32)
    rope_state_1, rope_state_2 = tl.zeros((BV, BR), dtype=tl.float32), tl.zeros((BV, BR), dtype=tl.float32)
    rope_total_1, rope_total_2 = tl.zeros((BR,), dtype=tl.float32), tl.zeros((BR,), dtype=tl.float32)
    if START:
        base = start + (stream_1 * n_segments + segment) * (K * (V + 1))
        state_1, total_1, rope_state_1, rope_total_1 = load_state(base, dd, rr, vv, D, R, V)
        base = start + (stream_2 * n_segments + segment) * (K * (V + 1))
        state_2, total_2, rope_state_2, rope_total_2 = load_state(base, dd, rr, vv, D, R, V)
    visible = token[:, None] >= token[None, :]
    first = segment * per_segment
    for i in tl.range(first, tl.minimum(first + per_segment, n_chunks), num_stages=STAGES):
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        dtype = values.dtype
        total, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(total, document, last, last_document, RESET)
        decay = pair_decays(total[:, None], total[None, :], document[:, None], document[None, :], visible, RESET)
        keys_inside = inside
        if WRITTEN:
            keys_inside = inside & (tl.load(written + row + token, mask=inside, other=0) != 0)
        added = (values * to_end[:, None]).to(dtype)
        if SAVE:
            at = stream_1 * n_chunks + i
            _save_state(
                states + at * K * V, totals + at * K, state_1, total_1, rope_state_1, rope_total_1,
                dd, rr, vv, D, R, V,
            )  # fmt: skip
            at = stream_2 * n_chunks + i
            _save_state(
                states + at * K * V, totals + at * K, state_2, total_2, rope_state_2, rope_total_2,
                dd, rr, vv, D, R, V,
            )  # fmt: skip
        angle = row * (R // 2)
        zero = tl.zeros((C, BV), dtype=tl.float32)
        second, inverse_2, state_2, total_2, rope_state_2, rope_total_2 = _forward_stream(
            zero, q + row * q_t + H * q_h, k + row * k_t + H * k_h, k_rope + row * r_t + r_h, cos + angle, sin + angle,
            values, added, decay, from_start, to_end, through, state_2, total_2, rope_state_2, rope_total_2,
            q_t, k_t, r_t, n_rows, keys_inside, scale, D, R, C, BD, BR, FULL, KEEP,
        )  # fmt: skip
        at = at_out + row * H * V
        if SAVE:
            store_tile(noise + at, token, vv, H * V, n_rows, second, V, FULL)
        y, inverse_1, state_1, total_1, rope_state_1, rope_total_1 = _forward_stream(
            -lam * second, q + row * q_t, k + row * k_t, k_rope + row * r_t, cos + angle, sin + angle,
            values, added, decay, from_start, to_end, through, state_1, total_1, rope_state_1, rope_total_1,
            q_t, k_t, r_t, n_rows, keys_inside, scale, D, R, C, BD, BR, FULL, KEEP,
        )  # fmt: skip
        if SAVE:
            store_tile(difference + at, token, vv, H * V, n_rows, y, V, FULL)
            tl.store(inverses + stream_1 * n_tokens + row + token, inverse_1, mask=inside)
            tl.store(inverses + stream_2 * n_tokens + row + token, inverse_2, mask=inside)
        inverse = 1.0 / tl.sqrt(tl.sum(y * y, 1) / V + eps)
        store_tile(out + at, token, vv, H * V, n_rows, y * inverse[:, None] * gain[None, :], V, FULL)
    if segment == n_segments - 1:
        base = final + stream_1 * (K * (V + 1))
        store_state(base, state_1, total_1, rope_state_1, rope_total_1, dd, rr, vv, D, R, V)
        base = final + stream_2 * (K * (V + 1))
        store_state(base, state_2, total_2, rope_state_2, rope_total_2, dd, rr, vv, D, R, V)


@triton.jit
def ends_kernel(
    k, k_rope, v, log_decay, reset, written, ends, factors, n_tokens, n_chunks, per_segment, H, scale,
    k_b, k_t, k_h, r_b, r_t, r_h, v_b, v_t, v_h, a_b, a_t, a_h, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each segment but the last adds to the state of a stream that passes it, (B * 2 * H, segments, R + D, V + 1),
    and the factor by which it decays, (B * 2 * H, segments). Grid (B * 2 * H, segments - 1)."""
    segment, n_segments = tl.program_id(1), tl.num_programs(1) + 1
    b, stream, h = (tl.program_id(0) // (2 * H)).to(tl.int64), tl.program_id(0) // H % 2, tl.program_id(0) % H
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    k += b * k_b + (stream * H + h) * k_h
    k_rope += b * r_b + stream * r_h
    v += b * v_b + h * v_h
    log_decay += b * a_b + h * a_h
    reset += b * reset_b
    written += b * n_tokens
    K: tl.constexpr = R + D
    KEEP: tl.constexpr = FULL and not WRITTEN
    state, total = tl.zeros((BV, BD), dtype=tl.float32), tl.zeros((BD,), dtype=tl.float32)
    rope_state, rope_total = tl.zeros((BV, BR), dtype=tl.float32), tl.zeros((BR,), dtype=tl.float32)
    factor = 1.0
    first = segment * per_segment
    for i in tl.range(first, tl.minimum(first + per_segment, n_chunks), num_stages=STAGES):
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        if WRITTEN:
            inside = inside & (tl.load(written + row + token, mask=inside, other=0) != 0)
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        decays, document, last, last_document = chunk_decays(log_decay + row * a_t, reset + row, a_t, n_rows, C, RESET)
        from_start, to_end, through = boundary_decays(decays, document, last, last_document, RESET)
        added = (values * to_end[:, None]).to(values.dtype)
        keys = _key_features(k + row * k_t, token, dd, k_t, n_rows, inside, scale, D, FULL, KEEP)
        keys = keys.to(values.dtype)
        state = tl.dot(tl.trans(added), keys, state * through, input_precision=PRECISION)
        total = total * through + column_sums(to_end, keys, C)
        if R > 0:
            keys = _key_features(k_rope + row * r_t, token, rr, r_t, n_rows, inside, scale, R, FULL, KEEP)
            keys = keys.to(values.dtype)
            rope_state = tl.dot(tl.trans(added), keys, rope_state * through, input_precision=PRECISION)
            rope_total = rope_total * through + column_sums(to_end, keys, C)
        factor *= through
    at = tl.program_id(0).to(tl.int64) * n_segments + segment
    store_state(ends + at * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V)
    tl.store(factors + at, factor)


@triton.jit
def step_kernel(
    q, k, k_rope, v, log_decay, cos, sin, weight, gamma, reset, written, start, out, final, H, scale, eps,
    q_b, q_h, k_b, k_h, r_b, r_h, v_b, v_h, a_b, a_h, table_b, reset_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One token, both streams of a head per program. Grid (B * H,)."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    dd, vv, rr = tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    K: tl.constexpr = R + D
    value = tl.load(v + b * v_b + h * v_h + vv, mask=vv < V, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + b * a_b + h * a_h).to(tl.float32))
    if RESET:
        decay = tl.where(tl.load(reset + b * reset_b) != 0, 0.0, decay)
    kept = 1.0
    if WRITTEN:
        kept = tl.where(tl.load(written + b) != 0, 1.0, 0.0)
    y = tl.zeros((BV,), dtype=tl.float32)
    for stream in tl.static_range(2):
        base = (b * 2 * H + stream * H + h) * (K * (V + 1))
        head = stream * H + h
        query = phi(tl.load(q + b * q_b + head * q_h + R + dd, mask=dd < D, other=0.0), scale)
        key = phi(tl.load(k + b * k_b + head * k_h + dd, mask=dd < D, other=0.0), scale)
        key = tl.where(dd < D, key, 0.0) * kept
        query = tl.where(dd < D, query, 0.0)
        state, total = key[:, None] * value[None, :], key
        inside = (dd < D)[:, None] & (vv < V)[None, :]
        at = base + (R + dd)[:, None] * (V + 1) + vv[None, :]
        at_total = base + (R + dd) * (V + 1) + V
        if START:
            before = tl.load(start + at, mask=inside, other=0.0)
            state += tl.where(decay > 0.0, decay * before, 0.0)
            before = tl.load(start + at_total, mask=dd < D, other=0.0)
            total += tl.where(decay > 0.0, decay * before, 0.0)
        tl.store(final + at, state, mask=inside)
        tl.store(final + at_total, total, mask=dd < D)
        weighted, z = tl.sum(state * query[:, None], 0), tl.sum(total * query, 0)
        if R > 0:
            half = rr % (R // 2)
            partner = (rr + R // 2) % R
            inside = rr < R
            c = tl.load(cos + b * table_b + half, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + b * table_b + half, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(q + b * q_b + head * q_h + rr, mask=inside, other=0.0).to(tl.float32)
            other = tl.load(q + b * q_b + head * q_h + partner, mask=inside, other=0.0).to(tl.float32)
            query = phi(x * c + other * tl.where(rr < R // 2, -s, s), scale)
            key = phi(tl.load(k_rope + b * r_b + stream * r_h + rr, mask=inside, other=0.0), scale)
            key, query = tl.where(inside, key, 0.0) * kept, tl.where(inside, query, 0.0)
            state, total = key[:, None] * value[None, :], key
            at = base + rr[:, None] * (V + 1) + vv[None, :]
            at_total = base + rr * (V + 1) + V
            inside_tile = inside[:, None] & (vv < V)[None, :]
            if START:
                before = tl.load(start + at, mask=inside_tile, other=0.0)
                state += tl.where(decay > 0.0, decay * before, 0.0)
                before = tl.load(start + at_total, mask=inside, other=0.0)
                total += tl.where(decay > 0.0, decay * before, 0.0)
            tl.store(final + at, state, mask=inside_tile)
            tl.store(final + at_total, total, mask=inside)
            weighted += tl.sum(state * query[:, None], 0)
            z += tl.sum(total * query, 0)
        normalised = weighted * tl.where(z > 0.0, 1.0 / z, 0.0)
        if stream == 0:
            y += normalised
        else:
            y -= tl.load(weight + h).to(tl.float32) * normalised
    inverse = 1.0 / tl.sqrt(tl.sum(y * y, 0) / V + eps)
    gain = tl.load(gamma + vv, mask=vv < V, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0).to(tl.int64) * V + vv, y * inverse * gain, mask=vv < V)
