"""Triton kernels of the backward pass of the gated delta rule; the formulas stand in forward_kernels.py."""

import triton
import triton.language as tl

from fusedlm.ops.delta_rule.chunks import (
    chunk_decays,
    documents,
    load_columns,
    load_square,
    load_state,
    load_tokens,
    outer_state,
    pair_decays,
    store_columns,
    store_outer,
    store_state,
    store_tokens,
)


@triton.jit
def backward_state_kernel(
    q, k, g, beta, inverse, scores, reset, d_out, d_end, d_states, d_written_out, d_start, n_tokens, n_chunks,
    n_segments, per_segment, q_b, q_t, q_h, k_b, k_t, k_h, reset_b, d_out_b, d_out_t, d_out_h,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PREPARE: tl.constexpr, END: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the states that leave the chunks, (B, H, N, V, K), dR (B, T, H, V), and the gradient of the
    first state, `d_start` (B, H, K, V). Keys wider than 64 are held in halves, which takes fewer registers.

    END: what leaves the last chunk: "none", "state" (B, H, K, V), or "segments" (B, H, segments, V, K).
    PREPARE: instead, the gradients of the states that enter the segments, the last with what leaves it and the others
    without, and in programs of later columns the transitions of the others: `d_start` is (B, H, segments, V + K, K).
    The first segment is left out.
    """
    block, part, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if PREPARE:
        part += 1
    b, h = bh // H, bh % H
    SPLIT: tl.constexpr = BK > 64
    BH: tl.constexpr = BK // 2 if SPLIT else BK
    i, key, value = tl.arange(0, C), tl.arange(0, BH), block * BV + tl.arange(0, BV)
    n_here = tl.minimum(per_segment, n_chunks - part * per_segment)
    last_chunk = part * per_segment + n_here - 1
    first = last_chunk.to(tl.int64) * C
    q += b * q_b + first * q_t + (h // GROUP) * q_h
    k += b * k_b + first * k_t + (h // GROUP) * k_h
    d_out += b * d_out_b + first * d_out_t + h * d_out_h
    d_written_out += ((b * n_tokens + first) * H + h) * V
    at_chunk, at_segment = bh * n_chunks + last_chunk, bh * n_segments + part
    g += at_chunk * C
    beta += at_chunk * C
    inverse += at_chunk * C * C
    scores += at_chunk * C * C
    d_states += at_chunk * K * V
    reset += b * reset_b + first
    is_last = part == n_segments - 1
    if PREPARE:  # the last segment needs no transition
        n_here = tl.where(is_last & (block >= tl.cdiv(V, BV)), 0, n_here)
    d_state = outer_state(d_end, END, PREPARE, is_last, bh, at_segment, block, value, key, K, BH, V, BV)
    if SPLIT:
        d_state_2 = outer_state(d_end, END, PREPARE, is_last, bh, at_segment, block, value, BH + key, K, BH, V, BV)
    n_inside = n_tokens - last_chunk * C
    for _ in tl.range(0, n_here, num_stages=STAGES):
        segment, last_segment = documents(reset, n_inside, RESETS, C)
        g_t, gamma, delta, whole = chunk_decays(g, segment, last_segment, RESETS, C)
        strength = tl.load(beta + i)
        queries = load_tokens(q, key, q_t, n_inside, K, BH, C)
        keys = load_tokens(k, key, k_t, n_inside, K, BH, C)
        d_read = load_columns(d_out, value, d_out_t, n_inside, V, BV, PREPARE, C)
        t_matrix = load_square(inverse, C)
        if SPLIT:
            weights = load_square(scores, C)
            queries_2 = load_tokens(q, BH + key, q_t, n_inside, K, BH, C)
            keys_2 = load_tokens(k, BH + key, k_t, n_inside, K, BH, C)
        else:
            weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            weights *= pair_decays(g_t, g_t, segment, segment, i[:, None] >= i[None, :], RESETS)
        leaving = d_state.to(keys.dtype)
        d_updates = tl.dot(leaving, tl.trans(keys), input_precision=PRECISION)
        if not PREPARE:
            store_state(d_states, leaving, value, key, K, 1, V, BV, K, BH)
        if SPLIT:
            leaving = d_state_2.to(keys.dtype)
            d_updates = tl.dot(leaving, tl.trans(keys_2), d_updates, input_precision=PRECISION)
            if not PREPARE:
                store_state(d_states, leaving, value, BH + key, K, 1, V, BV, K, BH)
        d_updates *= delta[None, :]
        d_updates = tl.dot(d_read, weights.to(keys.dtype), d_updates, input_precision=PRECISION)
        d_written = tl.dot(d_updates.to(keys.dtype), t_matrix, input_precision=PRECISION)
        if not PREPARE:
            store_columns(d_written_out, d_written, value, H * V, n_inside, V, BV, C)
        d_read = (d_read * gamma[None, :]).to(keys.dtype)
        d_recalled = (d_written * -(gamma * strength)[None, :]).to(keys.dtype)
        d_state = tl.dot(d_read, queries, whole * d_state, input_precision=PRECISION)
        d_state = tl.dot(d_recalled, keys, d_state, input_precision=PRECISION)
        if SPLIT:
            d_state_2 = tl.dot(d_read, queries_2, whole * d_state_2, input_precision=PRECISION)
            d_state_2 = tl.dot(d_recalled, keys_2, d_state_2, input_precision=PRECISION)
        q -= C * q_t
        k -= C * k_t
        d_out -= C * d_out_t
        d_written_out -= C * H * V
        g -= C
        beta -= C
        inverse -= C * C
        scores -= C * C
        d_states -= K * V
        reset -= C
        n_inside += C
    if PREPARE or part == 0:
        store_outer(d_start, d_state, PREPARE, bh, at_segment, block, value, key, K, BH, V, BV)
        if SPLIT:
            store_outer(d_start, d_state_2, PREPARE, bh, at_segment, block, value, BH + key, K, BH, V, BV)


@triton.jit
def _value_columns(
    differences, d_out, dv, t_matrix, value, strength, n_inside, d_out_t: tl.constexpr, H: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """From BV columns of the values: U, dO U^T, dR U^T, and the sum over the columns of W dR. dv, which holds dR,
    becomes the gradient of v."""
    d_written = load_tokens(dv, value, H * V, n_inside, V, BV, C)
    difference = load_tokens(differences, value, H * V, n_inside, V, BV, C)
    d_read = load_tokens(d_out, value, d_out_t, n_inside, V, BV, C)
    written = (strength[:, None] * difference).to(difference.dtype)
    updates = tl.dot(t_matrix, written, input_precision=PRECISION).to(written.dtype)
    d_strength = tl.sum(difference.to(tl.float32) * d_written, 1)
    written_updates = tl.dot(d_written, tl.trans(updates), input_precision=PRECISION)
    read_updates = tl.dot(d_read, tl.trans(updates), input_precision=PRECISION)
    store_tokens(dv, strength[:, None] * d_written, value, H * V, n_inside, V, BV, C)
    return updates, read_updates, written_updates, d_strength


# Strides of tokens are constants, which saves registers. The numbers of blocks never are: an unrolled loop would load
# everything first and run out of them.
@triton.jit(do_not_specialize=["n_key_blocks", "n_value_blocks"])
def gradients_kernel(
    q, k, g, beta, inverse, reset, states, differences, updates_out, d_out, d_states, dq, dk, dv, d_decay, d_beta,
    n_tokens, n_chunks, n_key_blocks, n_value_blocks, q_b, q_h, k_b, k_h, reset_b, d_out_b, d_out_h,
    q_t: tl.constexpr, k_t: tl.constexpr, d_out_t: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, ALL_V: tl.constexpr, BV: tl.constexpr, RESETS: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk from the state that enters it and the gradient of the state that leaves it: dq and dk of
    each value head (B, T, H, K), d_decay and d_beta (B, T, H) float32, and dv (B, T, H, V), which holds dR before.
    Values are taken BV columns at a time, then keys BK at a time; U waits in `updates_out`, like v, if BV < V."""
    chunk, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    first, at_chunk = chunk * C, bh * n_chunks + chunk
    n_inside = n_tokens - first
    at_token = (b * n_tokens + first) * H + h
    q += b * q_b + first * q_t + (h // GROUP) * q_h
    k += b * k_b + first * k_t + (h // GROUP) * k_h
    d_out += b * d_out_b + first * d_out_t + h * d_out_h
    states += at_chunk * K * V
    d_states += at_chunk * K * V
    dq += at_token * K
    dk += at_token * K
    dv += at_token * V
    differences += at_token * V
    updates_out += at_token * V
    segment, last_segment = documents(reset + b * reset_b + first, n_inside, RESETS, C)
    g_t, gamma, delta, whole = chunk_decays(g + at_chunk * C, segment, last_segment, RESETS, C)
    strength = tl.load(beta + at_chunk * C + i)
    t_matrix = load_square(inverse + at_chunk * C * C, C)
    dtype = t_matrix.dtype

    if BV == ALL_V:
        updates, d_query_key, d_a, d_strength = _value_columns(
            differences, d_out, dv, t_matrix, tl.arange(0, BV), strength, n_inside, d_out_t, H, V, BV, PRECISION, C
        )
    else:
        d_query_key, d_a = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        d_strength = tl.zeros((C,), tl.float32)
        for block in range(n_value_blocks):
            value = block * BV + tl.arange(0, BV)
            some, of_read, of_written, of_strength = _value_columns(
                differences, d_out, dv, t_matrix, value, strength, n_inside, d_out_t, H, V, BV, PRECISION, C
            )
            store_tokens(updates_out, some, value, H * V, n_inside, V, BV, C)
            d_query_key += of_read
            d_a += of_written
            d_strength += of_strength

    pairs = pair_decays(g_t, g_t, segment, segment, i[:, None] >= i[None, :], RESETS)
    query_key, key_key = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for block in range(n_key_blocks):
        key = block * BK + tl.arange(0, BK)
        keys = load_tokens(k, key, k_t, n_inside, K, BK, C)
        queries = load_tokens(q, key, q_t, n_inside, K, BK, C)
        query_key += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        key_key += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    d_query_key *= pairs
    through = d_query_key * query_key
    d_g = tl.sum(through, 1) - tl.sum(through, 0)
    d_query_key = d_query_key.to(dtype)
    d_a *= tl.where(i[:, None] > i[None, :], -pairs, 0.0)
    through = d_a * key_key
    d_strength += tl.sum(through, 1)
    through *= strength[:, None]
    d_g += tl.sum(through, 1) - tl.sum(through, 0)
    d_key_key = (strength[:, None] * d_a).to(dtype)

    tl.debug_barrier()  # dv and updates_out are read back
    to_end = 0.0
    for block in range(n_key_blocks):
        key = block * BK + tl.arange(0, BK)
        d_queries, d_keys = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        d_recall = tl.zeros((C, BK), tl.float32)
        kept = 0.0
        for value_block in tl.range(n_value_blocks, num_stages=STAGES):
            value = value_block * BV + tl.arange(0, BV)
            state = load_state(states, value, key, K, 1, V, BV, K, BK)
            d_state = load_state(d_states, value, key, K, 1, V, BV, K, BK)
            d_read = load_tokens(d_out, value, d_out_t, n_inside, V, BV, C)
            d_values = load_tokens(dv, value, H * V, n_inside, V, BV, C)  # beta dR
            if BV < ALL_V:
                updates = load_tokens(updates_out, value, H * V, n_inside, V, BV, C)
            d_queries += tl.dot(d_read, state, input_precision=PRECISION)
            d_keys += tl.dot(updates, d_state, input_precision=PRECISION)
            d_recall += tl.dot(d_values, state, input_precision=PRECISION)
            kept += tl.sum(tl.sum(state.to(tl.float32) * d_state, 1), 0)
        keys = load_tokens(k, key, k_t, n_inside, K, BK, C)
        queries = load_tokens(q, key, q_t, n_inside, K, BK, C)
        d_queries *= gamma[:, None]
        d_g += tl.sum(queries * d_queries, 1)
        d_queries += tl.dot(d_query_key, keys, input_precision=PRECISION)
        store_tokens(dq, d_queries, key, H * K, n_inside, K, BK, C)
        d_keys *= delta[:, None]
        from_delta = tl.sum(keys * d_keys, 1)
        d_g -= from_delta
        to_end += tl.sum(from_delta, 0) + whole * kept
        d_recall *= gamma[:, None]
        d_g -= tl.sum(keys * d_recall, 1)
        d_keys -= d_recall
        d_keys += tl.dot(tl.trans(d_query_key), queries, input_precision=PRECISION)
        d_keys += tl.dot(d_key_key, keys, input_precision=PRECISION)
        d_keys += tl.dot(tl.trans(d_key_key), keys, input_precision=PRECISION)
        store_tokens(dk, d_keys, key, H * K, n_inside, K, BK, C)
    # A log decay is part of G from its token to the end of the chunk.
    d_log = to_end + tl.sum(d_g, 0) - tl.cumsum(d_g, 0) + d_g
    tl.store(d_decay + at_token + i * H, d_log, mask=i < n_inside)
    tl.store(d_beta + at_token + i * H, d_strength, mask=i < n_inside)
