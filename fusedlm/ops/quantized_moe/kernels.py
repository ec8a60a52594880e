"""Kernels of routed experts with weights in few bits.

A slot is a pair of a token and one of its k experts: slot n k + j is the j-th of token n. Of one token every slot reads
an expert of its own. Of several, a program multiplies rows of one expert with all tokens that chose it, in a tile of
TOKENS tokens that has room for all there are: each weight is read once, and no slot has to be sorted. Programs of
experts without tokens end at once, so that the grid depends on shapes alone.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.activations import sigmoid
from fusedlm.ops.quantized.products import row_products, tile_products


@triton.jit
def _activated(z, slope, SWIGLU: tl.constexpr):
    """Of (2, ...) gates and rows of up their silu(gate) * up, or (...) leaky_relu(z, slope)^2; float32."""
    if SWIGLU:
        gate, up = tl.split(tl.trans(z)) if len(z.shape) == 2 else tl.split(tl.permute(z, (1, 2, 0)))
        value = gate * sigmoid(gate) * up
    else:
        root = tl.where(z < 0, z * slope, z)
        value = root * root
    return value


@triton.jit(do_not_specialize=["slope"])
def one_token_up_kernel(
    x, codes, scales, indices, a, slope, HIDDEN, width, ROW_UNITS: tl.constexpr, n_groups,
    SWIGLU: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a (k, HIDDEN) of the experts of one token. ROWS: of gate and up together. Grid: (blocks of a, k)."""
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    COLUMNS: tl.constexpr = ROWS // PARTS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot, first = tl.program_id(1), tl.program_id(0) * COLUMNS
    i = tl.arange(0, ROWS)
    row = i // COLUMNS * HIDDEN + tl.minimum(first + i % COLUMNS, HIDDEN - 1)
    row += tl.load(indices + slot) * PARTS * HIDDEN
    z = row_products(x, codes, scales, row, width, ROW_UNITS, n_groups, KIND, GROUP, ROWS, UNITS, EVEN, False)
    value = _activated(tl.reshape(z, (2, COLUMNS)) if SWIGLU else z, slope, SWIGLU)
    column = first + tl.arange(0, COLUMNS)
    tl.store(a + slot * HIDDEN + column, value.to(a.dtype.element_ty), mask=column < HIDDEN)


@triton.jit
def one_token_down_kernel(
    a, codes, scales, indices, weights, out, DIM, width, ROW_UNITS: tl.constexpr, n_groups,
    TOP_K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (DIM,): the weighted sum over the experts of one token. Grid: blocks of out."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < DIM
    column = tl.minimum(column, DIM - 1)
    total = tl.zeros((ROWS,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(indices + j) * DIM + column
        y = row_products(
            a + j * width, codes, scales, row, width, ROW_UNITS, n_groups, KIND, GROUP, ROWS, UNITS, EVEN, False
        )
        total += tl.load(weights + j).to(tl.float32) * y
    tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expert_slots(
    indices, n_tokens, TOP_K: tl.constexpr, CHOICES: tl.constexpr, TOKENS: tl.constexpr, BY_SLOT: tl.constexpr
):
    """The expert of a program, and (TOKENS,) its slots by token; -1: a token that did not choose it.

    Programs are numbered by experts or, where these are more, BY_SLOT: that of a slot has its expert if it is the first
    slot that has it, and none otherwise. CHOICES: TOP_K or more, a power of two."""
    program = tl.program_id(1)
    token, choice = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHOICES)[None, :]
    slot = token * TOP_K + choice
    chosen = tl.load(indices + slot, mask=(token < n_tokens) & (choice < TOP_K), other=-1).to(tl.int32)
    if BY_SLOT:
        expert = tl.load(indices + program).to(tl.int32)
        slot = tl.where(chosen == expert, slot, -1)
        first = tl.min(tl.min(tl.where(slot < 0, TOKENS * TOP_K, slot), 1), 0)
        slot = tl.where(first == program, slot, -1)
    else:
        expert = program
        slot = tl.where(chosen == expert, slot, -1)
    return expert.to(tl.int64), tl.max(slot, 1)


@triton.jit(do_not_specialize=["slope", "n_tokens"])
def several_tokens_up_kernel(
    x, codes, scales, indices, a, slope, n_tokens, HIDDEN, width, row_units, n_groups,
    SWIGLU: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, BY_SLOT: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """a (n_tokens * k, HIDDEN). ROWS: of gate and up together. Grid: (blocks of a, experts or slots)."""
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    COLUMNS: tl.constexpr = ROWS // PARTS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, slot = expert_slots(indices, n_tokens, TOP_K, CHOICES, TOKENS, BY_SLOT)
    if tl.max(slot, 0) < 0:
        return
    first = tl.program_id(0) * COLUMNS
    i = tl.arange(0, ROWS)
    row = expert * PARTS * HIDDEN + i // COLUMNS * HIDDEN + tl.minimum(first + i % COLUMNS, HIDDEN - 1)
    z = tile_products(
        x + tl.arange(0, TOKENS)[:, None] * width, (slot >= 0)[:, None], codes, scales, row, width, row_units, n_groups,
        0, row_units * 8, KIND, GROUP, ROWS, HALVES, TOKENS, EVEN, ASM,
    )  # fmt: skip
    if GROUP == 0:
        z *= tl.load(scales + row)[:, None]
    value = _activated(tl.reshape(z, (2, COLUMNS, TOKENS)) if SWIGLU else z, slope, SWIGLU)
    column = first + tl.arange(0, COLUMNS)
    at = a + slot[None, :] * HIDDEN + column[:, None]
    tl.store(at, value.to(a.dtype.element_ty), mask=(slot >= 0)[None, :] & (column < HIDDEN)[:, None])


@triton.jit(do_not_specialize=["n_tokens"])
def several_tokens_down_kernel(
    a, codes, scales, indices, weights, partial, n_tokens, DIM, width, row_units, n_groups,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BY_SLOT: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial (n_tokens * k, DIM) float32: the output of each slot times its weight. Grid: (blocks of DIM, experts or
    slots)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, slot = expert_slots(indices, n_tokens, TOP_K, CHOICES, TOKENS, BY_SLOT)
    if tl.max(slot, 0) < 0:
        return
    inside = slot >= 0
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = expert * DIM + tl.minimum(column, DIM - 1)
    y = tile_products(
        a + slot[:, None] * width, inside[:, None], codes, scales, row, width, row_units, n_groups,
        0, row_units * 8, KIND, GROUP, ROWS, HALVES, TOKENS, EVEN, ASM,
    )  # fmt: skip
    if GROUP == 0:
        y *= tl.load(scales + row)[:, None]
    y *= tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = partial + slot[None, :] * DIM + column[:, None]
    tl.store(at, y, mask=inside[None, :] & (column < DIM)[:, None])


@triton.jit
def sum_kernel(partial, out, DIM, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out (tokens, DIM): the sum of the k rows of each token, in order. Grid: (tokens, blocks of DIM)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(partial + (token * TOP_K + j) * DIM + column, mask=inside, other=0.0)
    tl.store(out + token * DIM + column, total.to(out.dtype.element_ty), mask=inside)
