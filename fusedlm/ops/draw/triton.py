"""The next token in Triton: a first kernel reduces blocks of the vocabulary, of all rows in parallel; the second finds
the block of each row's token from these, and the token in it.

Weights and sums are float64. A block's sum is relative to the block's own maximum, so that one pass over the logits is
enough; the second kernel rescales it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.draw.reference import LARGEST_FRACTION

_BLOCK = 1024  # ids


@triton.jit
def _weights(x, top, TEMPERATURE: tl.constexpr):
    """exp((x - top) / temperature), 0 for -inf."""
    shifted = x.to(tl.float64) - top.to(tl.float64)
    return tl.where(x > float("-inf"), tl.exp(shifted / TEMPERATURE), 0.0)


@triton.jit
def blocks_kernel(
    logits, tops, firsts, sums, logits_b, VOCAB: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, b), block i of row b: its maximum, NaN if a logit is NaN or +inf; and with temperature 0 the first id
    that has it, else the sum of weights relative to it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i, b = tl.program_id(0), tl.program_id(1)
    at = b * tl.num_programs(0) + i
    id = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b.to(tl.int64) * logits_b + id, mask=id < VOCAB, other=float("-inf")).to(tl.float32)
    wrong = (x != x) | (x == float("inf"))
    x = tl.where(wrong, float("-inf"), x)
    top = tl.max(x, 0)
    if TEMPERATURE == 0:
        tl.store(firsts + at, tl.min(tl.where(x == top, id, VOCAB), 0))
    else:
        tl.store(sums + at, tl.sum(_weights(x, top, TEMPERATURE), 0))
    tl.store(tops + at, tl.where(tl.max(wrong.to(tl.int32), 0) > 0, float("nan"), top))


@triton.jit
def token_kernel(
    logits, uniform, tops, firsts, sums, out, logits_b, uniform_b, n_blocks,
    VOCAB: tl.constexpr, TEMPERATURE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program b: the token of row b."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    i = tl.arange(0, BLOCKS)
    at, inside = b * n_blocks + i, i < n_blocks
    block_tops = tl.load(tops + at, mask=inside, other=float("-inf"))
    wrong = tl.max((block_tops != block_tops).to(tl.int32), 0) > 0
    block_tops = tl.where(block_tops != block_tops, float("-inf"), block_tops)
    top = tl.max(block_tops, 0)
    if TEMPERATURE == 0:
        first = tl.load(firsts + at, mask=inside & (block_tops == top), other=VOCAB)
        token = tl.min(first, 0)
    else:
        block_sums = tl.load(sums + at, mask=inside, other=0.0) * _weights(block_tops, top, TEMPERATURE)
        cumulative = tl.cumsum(block_sums, 0)
        total = tl.sum(tl.where(i == BLOCKS - 1, cumulative, 0.0), 0)
        fraction = tl.minimum(tl.load(uniform + b.to(tl.int64) * uniform_b) * total, total * LARGEST)
        block = tl.min(tl.where((cumulative > fraction) & (block_sums > 0), i, BLOCKS), 0)
        block = tl.minimum(block, tl.max(tl.where(block_sums > 0, i, 0), 0))
        before = tl.sum(tl.where(i == block - 1, cumulative, 0.0), 0)
        id = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + b.to(tl.int64) * logits_b + id, mask=id < VOCAB, other=float("-inf")).to(tl.float32)
        weights = _weights(x, top, TEMPERATURE)
        # By rounding the sum of all may be a little less than that of the block: then the last one is meant.
        exceeds = (before + tl.cumsum(weights, 0) > fraction) & (weights > 0)
        token = tl.min(tl.where(exceeds, id, VOCAB), 0)
        token = tl.minimum(token, tl.max(tl.where(weights > 0, id, 0), 0))
    token = tl.where(wrong | (top == float("-inf")), -1, token)
    tl.store(out + b, token.to(tl.int64))


@torch.library.custom_op("fusedlm::draw_token", mutates_args=())
def draw_token(logits: torch.Tensor, uniform: torch.Tensor | None, temperature: float) -> torch.Tensor:
    n_rows, vocab = logits.shape
    n_blocks, device = triton.cdiv(vocab, _BLOCK), logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(n_rows, dtype=torch.int64, device=device)
    if not n_rows:
        return out
    tops = torch.empty(n_rows, n_blocks, dtype=torch.float32, device=device)
    firsts = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=device) if temperature == 0 else tops
    sums = torch.empty(n_rows, n_blocks, dtype=torch.float64, device=device) if temperature > 0 else tops
    constants = {"VOCAB": vocab, "TEMPERATURE": temperature, "BLOCK": _BLOCK} | pdl_options(device)
    blocks_kernel[(n_blocks, n_rows)](logits, tops, firsts, sums, logits.stride(0), **constants, num_warps=4)
    token_kernel[(n_rows,)](
        logits, tops if uniform is None else uniform, tops, firsts, sums, out, logits.stride(0),
        0 if uniform is None else uniform.stride(0), n_blocks,
        LARGEST=LARGEST_FRACTION, BLOCKS=triton.next_power_of_2(n_blocks), **constants, num_warps=4,
    )  # fmt: skip
    return out


@draw_token.register_fake
def _(logits, uniform, temperature):
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
