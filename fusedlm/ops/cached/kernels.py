"""The kernel of cached_attention. Keys are shared among programs, and pieces combined, as in `common.split_keys`.

Scores and outputs are computed transposed, so that the tiles of keys and values are first operands in shared memory and
fill the tensor cores even for one query per key head.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.split_keys import count_blocks, pick, seen_keys, share_blocks


@triton.jit(do_not_specialize=["batch", "n_keys", "n_programs"])
def attend_kernel(
    q, k, v, starts, visible, out, partial, log_sum, pieces,
    batch, n_keys, n_programs, factor, q_b, q_t, q_h, k_b, k_g, v_b, v_g, visible_b, visible_t,
    N_NEW: tl.constexpr, N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VISIBLE: tl.constexpr,
    SPLIT: tl.constexpr, TMA: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, p) computes ROWS of the queries of each row, a key head of a row of the batch, on part p of the keys.

    k and v: tensor descriptors (batch, keys, heads, columns) with TMA, else pointers. factor: of the scores, for exp2.
    SPLIT: otherwise program (i, p) has all keys of row p.
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
        after, quota, first, last, first_row, last_row = share_blocks(program, n_programs, b, n_blocks, N_GROUPS)
    else:
        first_row = program
        last_row = program

    N_QUERIES: tl.constexpr = N_NEW * (N_HEADS // N_GROUPS)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h = index // (N_HEADS // N_GROUPS), index % (N_HEADS // N_GROUPS)
    real = index < N_QUERIES
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    in_head, in_value = d < HEAD, e < VALUE

    for row in range(first_row, last_row + 1):
        row_b, group = row // N_GROUPS, row % N_GROUPS
        one = row_b + tl.arange(0, 1)
        start, begin, end = seen_keys(
            one, one < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
        )
        start, begin, end = tl.sum(start, 0), tl.sum(begin, 0), tl.sum(end, 0)
        n = count_blocks(begin, end, BLOCK, TMA)
        if SPLIT:
            row_last = pick(after, b, row_b) - (N_GROUPS - 1 - group) * n
            row_first = row_last - n
            block_first = tl.maximum(first, row_first) - row_first
            block_last = tl.minimum(last, row_last) - row_first
        else:
            block_first, block_last = 0, n
        origin = end - n * BLOCK if TMA else begin // BLOCK * BLOCK

        wide = tl.sum(one, 0).to(tl.int64)
        head = group * (N_HEADS // N_GROUPS) + h
        at = q + wide * q_b + t * q_t + head * q_h
        queries = tl.load(at[:, None] + d[None, :], mask=real[:, None] & in_head[None, :], other=0.0)
        queries = tl.trans(queries)
        latest = tl.minimum(start + t, end - 1)
        earliest = tl.zeros_like(latest)
        if HAS_VISIBLE:
            before = tl.load(visible + wide * visible_b + t * visible_t, mask=real, other=0).to(tl.int32)
            earliest = tl.maximum(start + t - before, 0)

        top = tl.full((ROWS,), float("-inf"), tl.float32)
        # Summed over keys at the end only: that needs the other warps.
        sums = tl.zeros((BLOCK, ROWS), tl.float32)
        acc = tl.zeros((BLOCK_E, ROWS), tl.float32)
        for i in tl.range(block_first, block_last, num_stages=STAGES):
            base = origin + i * BLOCK
            key = base + tl.arange(0, BLOCK)
            if TMA:
                keys = tl.reshape(k.load([row_b, base, group, 0]), (BLOCK, BLOCK_D))
                values = tl.reshape(v.load([row_b, base, group, 0]), (BLOCK, BLOCK_E))
            else:
                inside = ((key >= begin) & (key < end))[:, None]
                minor = key.to(tl.int64)[:, None]
                keys = tl.load(
                    k + wide * k_b + group * k_g + minor * K_STRIDE + d[None, :],
                    mask=inside & in_head[None, :], other=0.0,
                )  # fmt: skip
                values = tl.load(
                    v + wide * v_b + group * v_g + minor * V_STRIDE + e[None, :],
                    mask=inside & in_value[None, :], other=0.0,
                )  # fmt: skip
            scores = tl.dot(keys, queries, input_precision="ieee")
            sees = key[:, None] <= latest[None, :]
            if TMA or HAS_VISIBLE:
                sees = sees & (key[:, None] >= earliest[None, :])
            scores = tl.where(sees, scores * factor, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[None, :])
            rescale = tl.exp2(top - shift)
            sums = sums * rescale[None, :] + weights
            acc = tl.dot(tl.trans(values), weights.to(values.dtype), acc * rescale[None, :], input_precision="ieee")
            top = new_top

        total_weight = tl.sum(sums, 0)
        total_weight = tl.where(total_weight > 0, total_weight, 1.0)
        result = tl.trans(acc / total_weight[None, :])
        inside = real[:, None] & in_value[None, :]
        if SPLIT:
            is_final = (row_first >= first) & (row_last <= last)
            has_keys = block_last > block_first
            slot = (program + wide * N_GROUPS + group) * N_QUERIES + index
            piece = has_keys & (is_final == 0)
            tl.store(partial + slot[:, None] * VALUE + e[None, :], result, mask=inside & piece)
            tl.store(log_sum + slot, top + tl.log2(total_weight), mask=real & piece)
            # By the program of the row's first block: the row's first and last programs.
            owner = has_keys & (row_first >= first) & (tl.program_id(0) == 0)
            tl.store(pieces + 2 * row, program, mask=owner)
            tl.store(pieces + 2 * row + 1, (row_last - 1) // quota, mask=owner)
            inside = inside & is_final
        place = ((wide * N_NEW + t) * N_HEADS + head)[:, None] * VALUE + e[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
