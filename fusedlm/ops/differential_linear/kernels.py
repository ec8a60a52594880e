"""Kernels of differential linear attention.

Per head and stream i, with M_i = D * (phi(Q_i) phi(K_i)^T) and the symbols of ../linear_attention/kernels.py, and with
the sums of features z_i (a column of the state) beside S_i:

    Z_i = M_i 1 + gamma * (phi(Q_i) z_i),  E_1 = 1 / Z_1,  E_2 = -lambda / Z_2,
    Y = (E_1 M_1 + E_2 M_2) V + gamma * (E_1 (phi(Q_1) S_1) + E_2 (phi(Q_2) S_2)),  O = norm(Y).

With P = dY V^T and the part of dY that changes no normalised sum removed, delta_i = dY . (stream i alone, normalised),
a pair of tokens receives X_i = E_i D * (P - delta_i), and

    dV = sum_i (E_i M_i)^T dY + to_end * (phi(K_i) dS_i'),
    dphi(Q_i) = X_i phi(K_i) + gamma E_i * (dY S_i^T - delta_i z_i^T),
    dphi(K_i) = X_i^T phi(Q_i) + to_end * (V dS_i'^T + dz_i'^T),
    dS_i = e^{g_C} dS_i' + phi(Q_i)^T (gamma E_i dY),  dz_i = e^{g_C} dz_i' - phi(Q_i)^T (gamma E_i delta_i).

What a token receives from all tokens up to itself, weighted by M_i, adds up to 0: a common factor of its weights does
not change its output. So the gradient of the log decay needs only what each token sends to later ones, which is
phi(K_i) . dphi(K_i).

Features have a part with rotary embedding and one without, so that 16 + 64 of them are not padded to 128. Sums of a
state are held transposed, (V, features), unless the features are fewer: for 64 rows and fewer than 64 columns, Triton
3.6 makes products in a loop read a wrong address. Strides of tokens are constants of
the compiled kernels: rows of a tile then share one address in registers.
"""

import triton
import triton.language as tl

from fusedlm.ops.linear_attention.kernels import boundary_decays, load_tile, pair_decays, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)
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
def masked(features, inside, column, WIDTH: tl.constexpr, KEEP: tl.constexpr):
    """0 for keys of tokens that are not written and beyond WIDTH, where phi(0) is 1. KEEP: there are none."""
    if KEEP:
        return features
    return tl.where(inside[:, None] & (column < WIDTH)[None, :], features, 0.0)


@triton.jit
def decays_kernel(
    log_decay, reset, decays, documents, n_tokens, n_chunks, H, a_b, a_t, a_h, reset_b,
    C: tl.constexpr, BH: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """Running sums of the log decays of each chunk, in base 2: decays (B, H, n_chunks, C), tokens beyond the last decay
    nothing; and, with RESET, of the documents begun in it: documents (B, n_chunks, C). Grid (B, n_chunks)."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, head = tl.arange(0, C), tl.arange(0, BH)
    row = tl.cast(i, tl.int64) * C
    inside = token < n_tokens - row
    at = log_decay + b * a_b + (row + token)[:, None] * a_t + head[None, :] * a_h
    log_a = tl.load(at, mask=inside[:, None] & (head < H)[None, :], other=0.0).to(tl.float32)
    at = decays + ((b * H + head[None, :]) * n_chunks + i) * C + token[:, None]
    tl.store(at, tl.cumsum(log_a * LOG2_E, 0), mask=(head < H)[None, :])
    if RESET:
        begun = tl.load(reset + b * reset_b + row + token, mask=inside, other=0).to(tl.int32)
        tl.store(documents + (b * n_chunks + i) * C + token, tl.cumsum(begun, 0))


@triton.jit
def load_decays(decays, documents, C: tl.constexpr, RESET: tl.constexpr):
    """What `chunk_decays` returns, from `decays_kernel`: loads, unlike sums, are cheap to repeat in each layout."""
    token = tl.arange(0, C)
    total, last = tl.load(decays + token), tl.load(decays + C - 1)
    document, last_document = tl.zeros((C,), dtype=tl.int32), 0
    if RESET:
        document, last_document = tl.load(documents + token), tl.load(documents + C - 1)
    return total, document, last, last_document


@triton.jit
def program_stream(H):
    """Sequence, stream and head of a program of a grid (B * H * 2, ...), and its index in (B, 2, H): both streams of a
    head follow each other, so that the second finds the values in the L2 cache."""
    program = tl.program_id(0)
    b, h, stream = (program // (2 * H)).to(tl.int64), program // 2 % H, program % 2
    return b, h, stream, (b * 2 + stream) * H + h


@triton.jit
def state_tile(
    feature, value, BF: tl.constexpr, BV: tl.constexpr, stride_f, stride_v, F: tl.constexpr, V: tl.constexpr
):
    """Offsets of a tile of sums as it is held, and which of them exist."""
    if BF < BV:
        at = feature[:, None] * stride_f + value[None, :] * stride_v
        inside = (feature < F)[:, None] & (value < V)[None, :]
    else:
        at = feature[None, :] * stride_f + value[:, None] * stride_v
        inside = (feature < F)[None, :] & (value < V)[:, None]
    return at, inside


@triton.jit
def no_sums(BF: tl.constexpr, BV: tl.constexpr):
    if BF < BV:
        return tl.zeros((BF, BV), dtype=tl.float32)
    else:
        return tl.zeros((BV, BF), dtype=tl.float32)


@triton.jit
def add_sums(sums, values, features, BF: tl.constexpr, BV: tl.constexpr):
    """sums + features^T values, of values (C, V) and features (C, F)."""
    if BF < BV:
        return tl.dot(tl.trans(features), values, sums, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(values), features, sums, input_precision=PRECISION)


@triton.jit
def load_state(
    base, dd, rr, vv, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The sums of a state (R + D, V + 1) as tiles of D and of R features, and those of features."""
    at, inside = state_tile(dd, vv, BD, BV, V + 1, 1, D, V)
    state = tl.load(base + R * (V + 1) + at, mask=inside, other=0.0)
    total = tl.load(base + (R + dd) * (V + 1) + V, mask=dd < D, other=0.0)
    at, inside = state_tile(rr, vv, BR, BV, V + 1, 1, R, V)
    rope_state = tl.load(base + at, mask=inside, other=0.0)
    rope_total = tl.load(base + rr * (V + 1) + V, mask=rr < R, other=0.0)
    return state, total, rope_state, rope_total


@triton.jit
def store_state(
    base, state, total, rope_state, rope_total, dd, rr, vv, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    at, inside = state_tile(dd, vv, BD, BV, V + 1, 1, D, V)
    tl.store(base + R * (V + 1) + at, state, mask=inside)
    tl.store(base + (R + dd) * (V + 1) + V, total, mask=dd < D)
    if R > 0:
        at, inside = state_tile(rr, vv, BR, BV, V + 1, 1, R, V)
        tl.store(base + at, rope_state, mask=inside)
        tl.store(base + rr * (V + 1) + V, rope_total, mask=rr < R)


@triton.jit
def save_state(
    states, totals, state, total, rope_state, rope_total, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Stores a state as (V, R), then (V, D), in the dtype of the inputs; float32 sums of features (R + D,)."""
    dd, vv, rr = tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    dtype = states.dtype.element_ty
    at, inside = state_tile(dd, vv, BD, BV, 1, D, D, V)
    if BD == D and BV == V:
        tl.store(states + V * R + at, state.to(dtype))
    else:
        tl.store(states + V * R + at, state.to(dtype), mask=inside)
    tl.store(totals + R + dd, total, mask=dd < D)
    if R > 0:
        at, inside = state_tile(rr, vv, BR, BV, 1, R, R, V)
        if BR == R and BV == V:
            tl.store(states + at, rope_state.to(dtype))
        else:
            tl.store(states + at, rope_state.to(dtype), mask=inside)
        tl.store(totals + rr, rope_total, mask=rr < R)


@triton.jit
def states_kernel(
    k, k_rope, v, decays, documents, written, start, states, totals, final, ends, factors,
    n_tokens, n_chunks, per_segment, H: tl.constexpr, scale,
    k_b, k_t: tl.constexpr, k_h, r_b, r_t: tl.constexpr, r_h, v_b, v_t: tl.constexpr, v_h,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, START: tl.constexpr, ENDS: tl.constexpr, FULL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """States that enter the chunks, states (B, 2, H, n_chunks, (R + D) V) and totals (B, 2, H, n_chunks, R + D), and
    that after the last token, final. start, with START, and final: (B * 2 * H, segments or 1, R + D, V + 1) float32,
    the sums of features in the last column. Grid (B * H * 2, segments).

    ENDS: instead, what each segment but the last adds to the state that passes it, ends (B * 2 * H, segments, R + D,
    V + 1), and the factor by which that decays, factors (B * 2 * H, segments). Grid (B * H * 2, segments - 1).
    """
    segment, n_segments = tl.program_id(1), tl.num_programs(1)
    if ENDS:
        n_segments += 1
    b, h, stream, index = program_stream(H)
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    k += b * k_b + (stream * H + h) * k_h
    k_rope += b * r_b + stream * r_h
    v += b * v_b + h * v_h
    decays += (b * H + h) * n_chunks * C
    documents += b * n_chunks * C
    written += b * n_tokens
    K: tl.constexpr = R + D
    KEEP: tl.constexpr = FULL and not WRITTEN
    state, total = no_sums(BD, BV), tl.zeros((BD,), dtype=tl.float32)
    rope_state, rope_total = no_sums(BR, BV), tl.zeros((BR,), dtype=tl.float32)
    if START:
        base = start + (index * n_segments + segment) * (K * (V + 1))
        state, total, rope_state, rope_total = load_state(base, dd, rr, vv, D, R, V, BD, BR, BV)
    factor = 1.0
    first = segment * per_segment
    for i in tl.range(first, tl.minimum(first + per_segment, n_chunks), num_stages=STAGES):
        row = tl.cast(i, tl.int64) * C
        n_rows = n_tokens - i * C
        inside = token < n_rows
        if WRITTEN:
            inside = inside & (tl.load(written + row + token, mask=inside, other=0) != 0)
        keys = load_tile(k + row * k_t, token, dd, k_t, n_rows, D, FULL)
        values = load_tile(v + row * v_t, token, vv, v_t, n_rows, V, FULL)
        running, document, last, last_document = load_decays(decays + row, documents + row, C, RESET)
        from_start, to_end, through = boundary_decays(running, document, last, last_document, RESET)
        if not ENDS:
            at = (index * n_chunks + i) * K
            save_state(states + at * V, totals + at, state, total, rope_state, rope_total, D, R, V, BD, BR, BV)
        features = masked(phi(keys, scale), inside, dd, D, KEEP) * to_end[:, None]
        total = total * through + tl.sum(features, 0)
        state = add_sums(state * through, values, features.to(values.dtype), BD, BV)
        if R > 0:
            keys = load_tile(k_rope + row * r_t, token, rr, r_t, n_rows, R, FULL)
            features = masked(phi(keys, scale), inside, rr, R, KEEP) * to_end[:, None]
            rope_total = rope_total * through + tl.sum(features, 0)
            rope_state = add_sums(rope_state * through, values, features.to(values.dtype), BR, BV)
        factor *= through
    if ENDS:
        at = index * n_segments + segment
        store_state(ends + at * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V, BD, BR, BV)
        tl.store(factors + at, factor)
    elif segment == n_segments - 1:
        store_state(
            final + index * (K * (V + 1)), state, total, rope_state, rope_total, dd, rr, vv, D, R, V, BD, BR, BV
        )


@triton.jit
def outputs_kernel(
    q, k, k_rope, v, decays, documents, cos, sin, weight, gamma, written, states, totals,
    out, difference, noise, inverses, n_tokens, n_chunks, H: tl.constexpr, scale, eps,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, r_b, r_t: tl.constexpr, r_h,
    v_b, v_t: tl.constexpr, v_h, table_b,
    D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    RESET: tl.constexpr, WRITTEN: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk of a head, out (B, T, H, V). Grid (B * n_chunks * H,). q: (B, T, 2 H, R + D), k: (B, T, 2 H,
    D), stream by stream; k_rope: (B, T, 2, R), rotated.

    With SAVE: difference (B, T, H, V), the outputs before the norm, and noise (B, T, H, V), the second stream; inverses
    (B, 2, H, T) of the normalisers.
    """
    program = tl.program_id(0)
    h, i, b = program % H, program // H % n_chunks, (program // H // n_chunks).to(tl.int64)
    token, dd, vv, rr = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BV), rope_columns(R, BR)
    K: tl.constexpr = R + D
    KEEP: tl.constexpr = FULL and not WRITTEN
    WIDE: tl.constexpr = (BD == D) and (BV == V)
    WIDE_ROPE: tl.constexpr = (BR == R) and (BV == V)
    row = tl.cast(i, tl.int64) * C
    n_rows = n_tokens - i * C
    inside = token < n_rows
    q += b * q_b + row * q_t + h * q_h
    k += b * k_b + row * k_t + h * k_h
    k_rope += b * r_b + row * r_t
    cos += b * table_b + row * (R // 2)
    sin += b * table_b + row * (R // 2)
    at_out = ((b * n_tokens + row) * H + h) * V
    keys_inside = inside
    if WRITTEN:
        keys_inside = inside & (tl.load(written + b * n_tokens + row + token, mask=inside, other=0) != 0)
    values = load_tile(v + b * v_b + row * v_t + h * v_h, token, vv, v_t, n_rows, V, FULL)
    dtype = values.dtype
    at = ((b * H + h) * n_chunks + i) * C
    running, document, last, last_document = load_decays(decays + at, documents + (b * n_chunks + i) * C, C, RESET)
    from_start, to_end, through = boundary_decays(running, document, last, last_document, RESET)
    y = tl.zeros((C, BV), dtype=tl.float32)
    for stream in tl.static_range(1, -1, -1):
        index = (b * 2 + stream) * H + h
        at = (index * n_chunks + i) * K
        queries = load_tile(q + stream * H * q_h + R, token, dd, q_t, n_rows, D, FULL)
        keys = load_tile(k + stream * H * k_h, token, dd, k_t, n_rows, D, FULL)
        state = load_tile(states + at * V + V * R, vv, dd, D, V, D, WIDE)
        total = tl.load(totals + at + R + dd, mask=dd < D, other=0.0)
        features = phi(queries, scale)
        z = tl.sum(features * total[None, :], 1)
        features = features.to(dtype)
        key_features = masked(phi(keys, scale), keys_inside, dd, D, KEEP).to(dtype)
        scores = tl.dot(features, tl.trans(key_features), input_precision=PRECISION)
        sums = tl.dot(features, tl.trans(state), input_precision=PRECISION)
        if R > 0:
            keys = load_tile(k_rope + stream * r_h, token, rr, r_t, n_rows, R, FULL)
            rope_state = load_tile(states + at * V, vv, rr, R, V, R, WIDE_ROPE)
            rope_total = tl.load(totals + at + rr, mask=rr < R, other=0.0)
            features = phi(rotated(q + stream * H * q_h, cos, sin, token, rr, q_t, n_rows, R, FULL), scale)
            z += tl.sum(features * rope_total[None, :], 1)
            features = features.to(dtype)
            key_features = masked(phi(keys, scale), keys_inside, rr, R, KEEP).to(dtype)
            scores = tl.dot(features, tl.trans(key_features), scores, input_precision=PRECISION)
            sums = tl.dot(features, tl.trans(rope_state), sums, input_precision=PRECISION)
        scores *= pair_decays(
            running[:, None], running[None, :], document[:, None], document[None, :], token[:, None] >= token[None, :],
            RESET,
        )  # fmt: skip
        z = tl.sum(scores, 1) + from_start * z
        inverse = tl.where(z > 0.0, 1.0 / z, 0.0)
        sums = tl.dot(scores.to(dtype), values, sums * from_start[:, None], input_precision=PRECISION)
        sums *= inverse[:, None]
        if SAVE:
            tl.store(inverses + index * n_tokens + row + token, inverse, mask=inside)
        if stream == 1:
            if SAVE:
                store_tile(noise + at_out, token, vv, H * V, n_rows, sums, V, FULL)
            y = sums * -tl.load(weight + h).to(tl.float32)
        else:
            y += sums
    if SAVE:
        store_tile(difference + at_out, token, vv, H * V, n_rows, y, V, FULL)
    inverse = 1.0 / tl.sqrt(tl.sum(y * y, 1) / V + eps)
    gain = tl.load(gamma + vv, mask=vv < V, other=0.0).to(tl.float32)
    store_tile(out + at_out, token, vv, H * V, n_rows, y * inverse[:, None] * gain[None, :], V, FULL)


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
            tl.debug_barrier()  # `final` may be `start`, and threads may have loaded the same elements
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
                tl.debug_barrier()
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
