"""Kernels of latent_decode: one attends to parts of the state, one combines the parts.

The keys that each row of the batch sees are cut into blocks, and the blocks of all rows, in order, are shared out
equally among programs, whatever the lengths. A program attends to its part of one row after another; each such piece
gives an output and the logarithm of its sum of exponentials. Both the program and the row never decrease from one piece
to the next and one of them increases, so that program + row is a slot of the piece alone. None of this needs lengths on
the host.

Scores are computed transposed, keys by queries, and so are the outputs: the tile of latents is then the first operand
of both products, in shared memory, and its 64 or more keys and columns fill the tensor cores even for one query.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _seen(
    row, inside, starts, visible, n_keys, visible_b, visible_t,
    N_NEW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VISIBLE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """For rows of the batch (N,): the key of the first new token, and the range of keys that the new tokens see."""
    if HAS_STARTS:
        start = tl.load(starts + row, mask=inside, other=-N_NEW).to(tl.int32)
    else:
        start = tl.where(inside, n_keys - N_NEW, -N_NEW)
    end = tl.maximum(tl.minimum(start + N_NEW, n_keys), 0)
    if HAS_VISIBLE:
        t = tl.arange(0, BLOCK_T)
        real = inside[:, None] & (t < N_NEW)[None, :]
        before = tl.load(visible + row[:, None] * visible_b + t[None, :] * visible_t, mask=real, other=0).to(tl.int32)
        earliest = tl.where(real, start[:, None] + t[None, :] - before, n_keys)
        begin = tl.minimum(tl.maximum(tl.min(earliest, 1), 0), end)
    else:
        begin = tl.zeros_like(end)
    return start, begin, end


@triton.jit
def _n_blocks(begin, end, BLOCK: tl.constexpr, FROM_END: tl.constexpr):
    """FROM_END: blocks end with the last key. Otherwise they begin at multiples of BLOCK."""
    return tl.cdiv(end - begin, BLOCK) if FROM_END else tl.where(end > begin, tl.cdiv(end, BLOCK) - begin // BLOCK, 0)


@triton.jit
def _pick(values, index, at):
    return tl.sum(tl.where(index == at, values, 0), 0)


@triton.jit(do_not_specialize=["batch", "n_keys", "n_programs"])
def attend_kernel(
    q, latent, rope, token_scale, page_table, starts, visible, out, partial, log_sum, pieces,
    batch, n_keys, n_programs, factor, q_b, q_t, q_h, latent_major, rope_major, scale_major, table_b,
    visible_b, visible_t,
    N_NEW: tl.constexpr, N_HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_VISIBLE: tl.constexpr, QUANTISED: tl.constexpr, PARTIAL: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, p) computes ROWS of the N_NEW * N_HEADS queries of each row of the batch on part p of the keys.

    latent and rope: tensor descriptors (batch, keys, columns) with TMA, else pointers; their major strides are those of
    a row of the batch or of a page. factor: of the scores, for exp2. DOT: dtype of the operands of products.
    SPLIT: otherwise program (i, p) has all keys of row p. PARTIAL: write no final outputs.
    """
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(1)
    if SPLIT:
        b = tl.arange(0, BATCH)
        _, begins, ends = _seen(
            b, b < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
        )
        n_blocks = _n_blocks(begins, ends, BLOCK, TMA)
        after = tl.cumsum(n_blocks, 0)
        total = tl.sum(n_blocks, 0)
        quota = tl.cdiv(total, n_programs)
        first = program * quota
        last = tl.minimum(first + quota, total)
        first_row = tl.sum((after <= first).to(tl.int32), 0)
        last_row = tl.sum((after < last).to(tl.int32), 0)
    else:
        first_row = program
        last_row = program

    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h = index // N_HEADS, index % N_HEADS
    real = index < N_NEW * N_HEADS
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    in_rank, in_rope = c < RANK, r < ROPE

    for row in range(first_row, last_row + 1):
        one = row + tl.arange(0, 1)
        start, begin, end = _seen(
            one, one < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
        )
        start, begin, end = tl.sum(start, 0), tl.sum(begin, 0), tl.sum(end, 0)
        n = _n_blocks(begin, end, BLOCK, TMA)
        if SPLIT:
            row_last = _pick(after, b, row)
            row_first = row_last - n
            block_first = tl.maximum(first, row_first) - row_first
            block_last = tl.minimum(last, row_last) - row_first
        else:
            block_first, block_last = 0, n
        origin = end - n * BLOCK if TMA else begin // BLOCK * BLOCK

        wide = tl.sum(one, 0).to(tl.int64)
        at = q + wide * q_b + t * q_t + h * q_h
        q_latent = tl.load(at[:, None] + c[None, :], mask=real[:, None] & in_rank[None, :], other=0.0)
        if QUANTISED:  # the latents have no range of their own: neither must the queries
            peak = tl.maximum(tl.max(tl.abs(q_latent.to(tl.float32)), 1), 1e-30)
            q_latent = q_latent.to(tl.float32) / peak[:, None]
        q_latent = tl.trans(q_latent.to(DOT))
        if ROPE > 0:
            q_rope = tl.load(at[:, None] + RANK + r[None, :], mask=real[:, None] & in_rope[None, :], other=0.0)
            q_rope = tl.trans(q_rope)
        latest = tl.minimum(start + t, end - 1)
        earliest = tl.zeros_like(latest)
        if HAS_VISIBLE:
            before = tl.load(visible + wide * visible_b + t * visible_t, mask=real, other=0).to(tl.int32)
            earliest = tl.maximum(start + t - before, 0)

        top = tl.full((ROWS,), float("-inf"), tl.float32)
        # Summed over keys at the end only: that needs the other warps.
        sums = tl.zeros((BLOCK, ROWS), tl.float32)
        acc = tl.zeros((BLOCK_C, ROWS), tl.float32)
        for i in tl.range(block_first, block_last, num_stages=STAGES):
            base = origin + i * BLOCK
            key = base + tl.arange(0, BLOCK)
            inside = (key >= begin) & (key < end)
            if PAGE_SIZE == 0:
                major, minor = wide, key.to(tl.int64)
            elif PAGE_SIZE >= BLOCK:
                major = tl.load(page_table + wide * table_b + base // PAGE_SIZE).to(tl.int64)
                minor = (key % PAGE_SIZE).to(tl.int64)
            else:
                pages = page_table + wide * table_b + key // PAGE_SIZE
                major = tl.load(pages, mask=inside, other=0).to(tl.int64)
                minor = (key % PAGE_SIZE).to(tl.int64)
            if TMA:
                tile = tl.reshape(latent.load([row, base, 0]), (BLOCK, BLOCK_C))
            else:
                tile = tl.load(
                    latent + (major * latent_major + minor * LATENT_STRIDE)[:, None] + c[None, :],
                    mask=inside[:, None] & in_rank[None, :], other=0.0,
                )  # fmt: skip
            tile = tile.to(DOT)
            scores = tl.dot(tile, q_latent, input_precision="ieee")
            if QUANTISED:
                token = tl.load(token_scale + major * scale_major + minor, mask=inside, other=1.0)
                scores *= peak[None, :] * token[:, None]
            if ROPE > 0:
                if TMA:
                    k_rope = tl.reshape(rope.load([row, base, 0]), (BLOCK, BLOCK_R))
                else:
                    k_rope = tl.load(
                        rope + (major * rope_major + minor * ROPE_STRIDE)[:, None] + r[None, :],
                        mask=inside[:, None] & in_rope[None, :], other=0.0,
                    )  # fmt: skip
                scores = tl.dot(k_rope, q_rope, scores, input_precision="ieee")
            sees = key[:, None] <= latest[None, :]
            if TMA or HAS_VISIBLE:
                sees = sees & (key[:, None] >= earliest[None, :])
            scores = tl.where(sees, scores * factor, float("-inf"))
            # Weights of quantised latents include their scale, and are relative to the largest such weight: in half
            # precision they would otherwise be as small as the scale makes them.
            weighted = scores + tl.log2(tl.maximum(token, 1e-20))[:, None] if QUANTISED else scores
            new_top = tl.maximum(top, tl.max(weighted, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(weighted - shift[None, :])
            probabilities = tl.exp2(scores - shift[None, :]) if QUANTISED else weights
            rescale = tl.exp2(top - shift)
            sums = sums * rescale[None, :] + probabilities
            acc = tl.dot(tl.trans(tile), weights.to(DOT), acc * rescale[None, :], input_precision="ieee")
            top = new_top

        total_weight = tl.sum(sums, 0)
        total_weight = tl.where(total_weight > 0, total_weight, 1.0)
        result = tl.trans(acc / total_weight[None, :])
        inside = real[:, None] & in_rank[None, :]
        if SPLIT:
            is_final = (row_first >= first) & (row_last <= last) & (not PARTIAL)
            has_keys = block_last > block_first
            slot = (program + wide) * (N_NEW * N_HEADS) + index
            piece = has_keys & (is_final == 0)
            tl.store(partial + slot[:, None] * RANK + c[None, :], result, mask=inside & piece)
            tl.store(log_sum + slot, top + tl.log2(total_weight), mask=real & piece)
            # By the program of the row's first block: the row's first and last programs.
            owner = has_keys & (row_first >= first) & (tl.program_id(0) == 0)
            tl.store(pieces + 2 * row, program, mask=owner)
            tl.store(pieces + 2 * row + 1, (row_last - 1) // quota, mask=owner)
            inside = inside & is_final
        if SPLIT or not PARTIAL:
            place = (wide * (N_NEW * N_HEADS) + index)[:, None] * RANK + c[None, :]
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
        else:
            slot = wide * (N_NEW * N_HEADS) + index
            tl.store(partial + slot[:, None] * RANK + c[None, :], result, mask=inside)


@triton.jit
def _combined(
    partial, log_sum, slot, n_pieces, column, step, RANK: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The output of one query from its pieces, which are `step` apart."""
    inside = column < RANK
    if SPLIT:
        i = tl.arange(0, PIECES)
        logs = tl.load(log_sum + slot + i * step, mask=i < n_pieces, other=float("-inf"))
        top = tl.max(logs, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(logs - top), 0)
        acc = tl.zeros_like(column).to(tl.float32)
        for start in range(0, n_pieces, GROUP):
            j = start + tl.arange(0, GROUP)
            piece = tl.load(log_sum + slot + j * step, mask=j < n_pieces, other=float("-inf"))
            at = (slot + j * step)[:, None] * RANK + column[None, :]
            part = tl.load(partial + at, mask=(j < n_pieces)[:, None] & inside[None, :], other=0.0)
            acc += tl.sum(tl.exp2(piece - top)[:, None] * part, 0)
        acc = acc / tl.where(total > 0, total, 1.0)
    else:
        acc = tl.load(partial + slot * RANK + column, mask=inside, other=0.0)
    return acc


@triton.jit(do_not_specialize=["batch", "n_keys"])
def combine_kernel(
    partial, log_sum, pieces, noise_weight, starts, visible, out,
    batch, n_keys, visible_b, visible_t, weight_b, weight_t, weight_h,
    N_NEW: tl.constexpr, N_HEADS: tl.constexpr, N_SIGNAL: tl.constexpr, RANK: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_VISIBLE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr,
    PIECES: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes columns of output i, (row, token, signal head) in order: the sum of the signal's pieces,
    minus the noise weight times that of the noise head. Outputs that the first kernel has written stay."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0) // (N_NEW * N_SIGNAL)
    t = tl.program_id(0) // N_SIGNAL % N_NEW
    h = tl.program_id(0) % N_SIGNAL
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = N_NEW * N_HEADS
    one = row + tl.arange(0, 1)
    _, begin, end = _seen(
        one, one < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
    )
    n_pieces = (tl.sum(end - begin, 0) > 0).to(tl.int32)
    slot = row.to(tl.int64)
    if SPLIT:
        first = tl.load(pieces + 2 * row, mask=n_pieces > 0, other=0)
        n_pieces = tl.load(pieces + 2 * row + 1, mask=n_pieces > 0, other=-1) - first + 1
        slot += first
    slot = slot * step + t * N_HEADS
    if (n_pieces != 1) | (N_SIGNAL < N_HEADS):
        result = _combined(partial, log_sum, slot + h, n_pieces, column, step, RANK, PIECES, GROUP, SPLIT)
        if N_SIGNAL < N_HEADS:
            noise_head = N_SIGNAL + (h if N_HEADS == 2 * N_SIGNAL else 0)
            noise = _combined(partial, log_sum, slot + noise_head, n_pieces, column, step, RANK, PIECES, GROUP, SPLIT)
            weight = tl.load(noise_weight + row.to(tl.int64) * weight_b + t * weight_t + h * weight_h)
            result -= weight.to(tl.float32) * noise
        at = ((row.to(tl.int64) * N_NEW + t) * N_SIGNAL + h) * RANK + column
        tl.store(out + at, result.to(out.dtype.element_ty), mask=column < RANK)
