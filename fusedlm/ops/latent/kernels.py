"""The kernel of latent_decode. Keys are shared among programs, and pieces combined, as in `common.split_keys`.

Scores are computed transposed, keys by queries, and so are the outputs: the tile of latents is then the first operand
of both products, in shared memory, and its 64 or more keys and columns fill the tensor cores even for one query.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.split_keys import count_blocks, pick, seen_keys, share_blocks


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
        gdc_wait()
    program = tl.program_id(1)
    if SPLIT:
        b = tl.arange(0, BATCH)
        _, begins, ends = seen_keys(
            b, b < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
        )
        n_blocks = count_blocks(begins, ends, BLOCK, TMA)
        after, quota, first, last, first_row, last_row = share_blocks(program, n_programs, b, n_blocks, 1)
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
        start, begin, end = seen_keys(
            one, one < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
        )
        start, begin, end = tl.sum(start, 0), tl.sum(begin, 0), tl.sum(end, 0)
        n = count_blocks(begin, end, BLOCK, TMA)
        if SPLIT:
            row_last = pick(after, b, row)
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
