"""Triton kernels of the gated delta rule, in chunks of 64 tokens (arXiv 2412.06464; WY form of arXiv 2406.06484).

Per head and chunk, with S the (K, V) state that enters, G the running sum of log decays, gamma_t = e^{G_t},
delta_t = e^{G_C - G_t} and D_ts = e^{G_t - G_s} for s <= t:

    A_ts = b_t D_ts k_t.k_s (s < t),  T = (I + A)^-1,  R = b (V - gamma K S),  U = T R,
    O = gamma Q S + M U,  M = D * (Q K^T),  S' = e^{G_C} S + (delta K)^T U,

and with dS' the gradient of S':

    dU = M^T dO + delta K dS',  dR = T^T dU,  dS = e^{G_C} dS' + (gamma Q)^T dO - K^T (gamma b dR).

T of every chunk, and M of wide keys, are computed in parallel. Two kernels pass over the chunks in order, one forward
and one backward, with the state in registers; both hold it transposed, (V, K), so that each product takes the result of
the one before from registers. Everything else of the backward pass is again parallel, from W = V - gamma K S, which the
forward pass saves: neither V nor K S is needed again. Where sequences are few, each is cut into segments: one pass
computes the end of every segment from a state of zero and its transition matrix, and a small kernel the state that
enters each.

A document that begins in a chunk removes every term that would cross its first token. Exponents are never positive, and
in base 2: G is stored times log2(e).
"""

import triton
import triton.language as tl

from fusedlm.ops.delta_rule.chunks import (
    LOG2_E,
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
    store_square,
    store_state,
)


@triton.jit
def _inverse(a, PRECISION: tl.constexpr, C: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular (C, C) matrix, C = 64.

    [[P, 0], [L, Q]]^-1 = [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]] for all diagonal blocks of 2, 4, ... 64 at once; up to 16 as
    a batch of small products. No power of a is formed, whose entries could be far larger than those of the inverse.
    """
    N: tl.constexpr = C // 16
    n, r, i = tl.arange(0, N), tl.arange(0, 16), tl.arange(0, C)
    diagonal = n[:, None, None, None] == n[None, None, :, None]
    block = tl.sum(tl.where(diagonal, tl.reshape(a, (N, 16, N, 16)), 0.0), 2)  # (N, 16, 16)
    row, column = r[None, :, None], r[None, None, :]
    x = tl.where(row == column, 1.0, 0.0) - tl.where((row == column + 1) & (column % 2 == 0), block, 0.0)
    for level in tl.static_range(1, 4):
        below = ((row >> level) == (column >> level) + 1) & ((column >> level) % 2 == 0)
        left = tl.dot(x, tl.where(below, block, 0.0), input_precision=PRECISION)
        x -= tl.dot(left, x, input_precision=PRECISION)
    x = tl.reshape(tl.where(diagonal, tl.expand_dims(x, 2), 0.0), (C, C))
    for level in tl.static_range(4, 6):
        below = ((i >> level)[:, None] == (i >> level)[None, :] + 1) & ((i >> level)[None, :] % 2 == 0)
        left = tl.dot(x, tl.where(below, a, 0.0), input_precision=PRECISION)
        x -= tl.dot(left, x, input_precision=PRECISION)
    return x


@triton.jit
def prepare_kernel(
    q, k, log_decay, beta, reset, g_out, beta_out, inverse_out, scores_out, n_tokens, n_chunks,
    q_b, q_t, q_h, k_b, k_t, k_h, decay_b, decay_t, decay_h, beta_b, beta_t, beta_h, reset_b,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, RESETS: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """G and beta (B, H, N C) float32, zero beyond the last token, and T (B, H, N, C, C), and M where keys are wider
    than 64: those kernels have no registers left to compute it."""
    chunk, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    first = chunk * C
    n_inside = n_tokens - first
    inside = i < n_inside
    log_decay += b * decay_b + first * decay_t + h * decay_h
    beta += b * beta_b + first * beta_t + h * beta_h
    decay = tl.load(log_decay + i * decay_t, mask=inside, other=0.0).to(tl.float32)
    strength = tl.load(beta + i * beta_t, mask=inside, other=0.0).to(tl.float32)
    g = tl.cumsum(decay * LOG2_E, 0)
    row = (bh * n_chunks + chunk) * C
    tl.store(g_out + row + i, g)
    tl.store(beta_out + row + i, strength)
    segment, _ = documents(reset + b * reset_b + first, n_inside, RESETS, C)
    q += b * q_b + first * q_t + (h // GROUP) * q_h
    k += b * k_b + first * k_t + (h // GROUP) * k_h
    products, scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for start in tl.static_range(0, K, BK):
        keys = load_tokens(k, start + tl.arange(0, BK), k_t, n_inside, K, BK, C)
        products += tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        if K > 64:
            queries = load_tokens(q, start + tl.arange(0, BK), q_t, n_inside, K, BK, C)
            scores += tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    pairs = pair_decays(g, g, segment, segment, i[:, None] >= i[None, :], RESETS)
    if K > 64:
        store_square(scores_out + row * C, scores * pairs, C)
    a = tl.where(i[:, None] > i[None, :], strength[:, None] * products * pairs, 0.0)
    store_square(inverse_out + row * C, _inverse(a, PRECISION, C), C)


@triton.jit
def forward_kernel(
    q, k, v, g, beta, inverse, scores, reset, start, out, states, differences_out, end,
    n_tokens, n_chunks, n_segments, per_segment,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, reset_b, out_b, out_t, out_h,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PREPARE: tl.constexpr, START: tl.constexpr, SAVE: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs (B, T, H, V), `end`, the state after the last chunk (B, H, K, V), and with SAVE the states that enter the
    chunks, (B, H, N, V, K), and W (B, T, H, V). A program takes a segment of a head and BV columns of the values. Keys
    wider than 64 are held in halves, which takes fewer registers.

    START: "none", "state" (B, H, K, V), or "segments" (B, H, segments, V, K).
    PREPARE: instead, the end of the first segment and those of the others from a state of zero, and in programs of
    later columns the transitions of the others: `end` is (B, H, segments, V + K, K). The last segment is left out.
    """
    block, part, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    SPLIT: tl.constexpr = BK > 64
    BH: tl.constexpr = BK // 2 if SPLIT else BK
    i, key, value = tl.arange(0, C), tl.arange(0, BH), block * BV + tl.arange(0, BV)
    first_chunk = part * per_segment
    first = first_chunk.to(tl.int64) * C
    q += b * q_b + first * q_t + (h // GROUP) * q_h
    k += b * k_b + first * k_t + (h // GROUP) * k_h
    v += b * v_b + first * v_t + h * v_h
    out += b * out_b + first * out_t + h * out_h
    at_chunk, at_segment = bh * n_chunks + first_chunk, bh * n_segments + part
    g += at_chunk * C
    beta += at_chunk * C
    inverse += at_chunk * C * C
    scores += at_chunk * C * C
    states += at_chunk * K * V
    differences_out += ((b * n_tokens + first) * H + h) * V
    reset += b * reset_b + first
    n_here = tl.minimum(per_segment, n_chunks - first_chunk)
    if PREPARE:  # the first segment needs no transition
        n_here = tl.where((part == 0) & (block >= tl.cdiv(V, BV)), 0, n_here)
    state = outer_state(start, START, PREPARE, part == 0, bh, at_segment, block, value, key, K, BH, V, BV)
    if SPLIT:
        state_2 = outer_state(start, START, PREPARE, part == 0, bh, at_segment, block, value, BH + key, K, BH, V, BV)
    n_inside = n_tokens - first_chunk * C
    for _ in tl.range(0, n_here, num_stages=STAGES):
        segment, last_segment = documents(reset, n_inside, RESETS, C)
        g_t, gamma, delta, whole = chunk_decays(g, segment, last_segment, RESETS, C)
        strength = tl.load(beta + i)
        keys = load_tokens(k, key, k_t, n_inside, K, BH, C)
        values = load_columns(v, value, v_t, n_inside, V, BV, PREPARE, C)
        t_matrix = load_square(inverse, C)
        entering = state.to(keys.dtype)
        recalled = tl.dot(entering, tl.trans(keys), input_precision=PRECISION)
        if SPLIT:
            keys_2 = load_tokens(k, BH + key, k_t, n_inside, K, BH, C)
            entering_2 = state_2.to(keys.dtype)
            recalled = tl.dot(entering_2, tl.trans(keys_2), recalled, input_precision=PRECISION)
        difference = values - gamma[None, :] * recalled
        if SAVE and not PREPARE:
            store_columns(differences_out, difference, value, H * V, n_inside, V, BV, C)
        written = (strength[None, :] * difference).to(keys.dtype)
        updates = tl.dot(written, tl.trans(t_matrix), input_precision=PRECISION)
        if not PREPARE:
            queries = load_tokens(q, key, q_t, n_inside, K, BH, C)
            read = tl.dot(entering, tl.trans(queries), input_precision=PRECISION)
            if SAVE:
                store_state(states, entering, value, key, K, 1, V, BV, K, BH)
            if SPLIT:
                queries_2 = load_tokens(q, BH + key, q_t, n_inside, K, BH, C)
                weights = tl.trans(load_square(scores, C))
                read = tl.dot(entering_2, tl.trans(queries_2), read, input_precision=PRECISION)
                if SAVE:
                    store_state(states, entering_2, value, BH + key, K, 1, V, BV, K, BH)
            else:
                weights = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
                weights *= tl.trans(pair_decays(g_t, g_t, segment, segment, i[:, None] >= i[None, :], RESETS))
            read *= gamma[None, :]
            read = tl.dot(updates.to(keys.dtype), weights.to(keys.dtype), read, input_precision=PRECISION)
            store_columns(out, read, value, out_t, n_inside, V, BV, C)
        updates = (updates * delta[None, :]).to(keys.dtype)
        state = tl.dot(updates, keys, whole * state, input_precision=PRECISION)
        if SPLIT:
            state_2 = tl.dot(updates, keys_2, whole * state_2, input_precision=PRECISION)
        q += C * q_t
        k += C * k_t
        v += C * v_t
        out += C * out_t
        g += C
        beta += C
        inverse += C * C
        scores += C * C
        states += K * V
        differences_out += C * H * V
        reset += C
        n_inside -= C
    if PREPARE or part == n_segments - 1:
        store_outer(end, state, PREPARE, bh, at_segment, block, value, key, K, BH, V, BV)
        if SPLIT:
            store_outer(end, state_2, PREPARE, bh, at_segment, block, value, BH + key, K, BH, V, BV)


@triton.jit
def combine_kernel(
    first, ends, start, n_segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, FIRST: tl.constexpr,
    REVERSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What enters each segment, (B, H, segments, V, K) float32, from `ends`; FIRST: what enters the first one is given
    (B, H, K, V). REVERSED: gradients, which enter the last segment first."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    state = tl.zeros((BV, BK), tl.float32)
    if FIRST:
        state = load_state(first + bh * K * V, value, key, 1, V, V, BV, K, BK).to(tl.float32)
    for index in range(n_segments):
        part = n_segments - 1 - index if REVERSED else index
        at = bh * n_segments + part
        store_state(start + at * V * K, state, value, key, K, 1, V, BV, K, BK)
        if index < n_segments - 1:
            local = load_state(ends + at * (V + K) * K, value, key, K, 1, V, BV, K, BK)
            if index == 0:
                state = local
            else:
                transition = load_state(ends + (at * (V + K) + V) * K, key, key, K, 1, K, BK, K, BK)
                state = local + tl.dot(state, transition, input_precision=PRECISION)


@triton.jit
def step_kernel(
    q, k, v, log_decay, beta, reset, state, out, new_state,
    q_b, q_h, k_b, k_h, v_b, v_h, decay_b, decay_h, beta_b, beta_h, reset_b,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STATE: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """One token: out (B, 1, H, V) and the state after it; a program takes BV columns of the values of a head."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    key, value = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    key_inside, value_inside = key < K, value < V
    queries = tl.load(q + b * q_b + (h // GROUP) * q_h + key, mask=key_inside, other=0.0).to(tl.float32)
    keys = tl.load(k + b * k_b + (h // GROUP) * k_h + key, mask=key_inside, other=0.0).to(tl.float32)
    values = tl.load(v + b * v_b + h * v_h + value, mask=value_inside, other=0.0).to(tl.float32)
    strength = tl.load(beta + b * beta_b + h * beta_h).to(tl.float32)
    current = tl.zeros((BK, BV), tl.float32)
    at = bh * K * V + key[:, None] * V + value[None, :]
    mask = key_inside[:, None] & value_inside[None, :]
    if STATE:
        decay = tl.exp(tl.load(log_decay + b * decay_b + h * decay_h).to(tl.float32))
        if RESETS:
            decay = tl.where(tl.load(reset + b * reset_b) != 0, 0.0, decay)
        current = tl.load(state + at, mask=mask, other=0.0) * decay
        tl.debug_barrier()  # `new_state` may be `state`, and threads may have loaded the same elements
    update = strength * (values - tl.sum(current * keys[:, None], 0))
    current += keys[:, None] * update[None, :]
    tl.store(new_state + at, current, mask=mask)
    read = tl.sum(current * queries[:, None], 0)
    tl.store(out + bh * V + value, read.to(out.dtype.element_ty), mask=value_inside)
