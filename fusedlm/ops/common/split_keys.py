"""Sharing the keys of a batch among programs in decoding, and combining what they give.

The keys that each row of the batch sees are cut into blocks, and the blocks of all rows, in order, are shared out
equally among programs, whatever the lengths. With several key heads each of them is a row. A program attends to its
part of one row after another; each such piece gives an output and the logarithm of its sum of exponentials. Both the
program and the row never decrease from one piece to the next and one of them increases, so that program + row is a slot
of the piece alone. None of this needs lengths on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import n_multiprocessors, pdl_options

_TILE = 8192  # elements of a step of the combining kernel
_COMBINING = 512  # its programs at least


@dataclass(frozen=True)
class Config:
    """Of a kernel that attends.

    block: keys of a step.
    stages: of the software pipeline. A single one with TMA accessed illegal memory (Triton 3.6 on an H100).
    per_processor: programs that run at a time on one multiprocessor.
    tma: load keys by the tensor memory accelerator (TMA), where they are aligned and the device has one.
    """

    block: int
    stages: int
    warps: int
    per_processor: int
    tma: bool = True

    def __post_init__(self):
        if self.tma and self.stages < 2:
            raise ValueError(f"stages={self.stages} with TMA; it needs at least 2")


def n_programs(n_rows: int, n_keys: int, row_blocks: int, config: Config, device: torch.device) -> int:
    """Among how many programs the keys are shared out; 0: one for each row, without a second kernel.

    Args:
        n_rows: rows of the batch, times key heads.
        n_keys: room for keys in each.
        row_blocks: programs for the queries of one row.
    """
    slots = config.per_processor * n_multiprocessors(device)
    n_blocks = triton.cdiv(n_keys, config.block)
    if n_blocks == 1 or n_rows * row_blocks >= 4 * slots:
        return 0
    return max(1, min(slots // row_blocks, n_rows * n_blocks))


def can_use_tma(*tensors: torch.Tensor) -> bool:
    """Whether bases and rows are aligned to 16 bytes, and the device has TMA (as the interpreter does)."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in strides(x)) for x in tensors)


def strides(x: torch.Tensor) -> list[int]:
    """Of all dimensions but the last. That of a dimension of size 1 can be anything, and is made one that TMA takes."""
    found, least = [], -(-x.shape[-1] // 16) * 16
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        found.append(stride if size > 1 else least)
        least = found[-1] * size
    return found[::-1]


class Workspace:
    """What the first kernel writes for the second: outputs (slots, queries, width) and logarithms of sums of
    exponentials (slots, queries) of pieces, and the first and last program of each row.

    Args:
        n_rows: as for `n_programs`.
        n_queries: of a row.
        width: of an output.
        programs: 0: each row is one piece, and has a slot of its number and no logarithm.
        needed: whether there is a second kernel.
    """

    def __init__(self, n_rows: int, n_queries: int, width: int, programs: int, needed: bool, device: torch.device):
        split = programs > 0
        slots = (programs + n_rows) * needed
        self.partial = torch.empty(slots, n_queries, width, dtype=torch.float32, device=device)
        self.log_sum = torch.empty(slots * split, n_queries, dtype=torch.float32, device=device)
        self.pieces = torch.empty(n_rows * split, 2, dtype=torch.int32, device=device)


@triton.jit
def seen_keys(
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
def count_blocks(begin, end, BLOCK: tl.constexpr, FROM_END: tl.constexpr):
    """FROM_END: blocks end with the last key. Otherwise they begin at multiples of BLOCK."""
    return tl.cdiv(end - begin, BLOCK) if FROM_END else tl.where(end > begin, tl.cdiv(end, BLOCK) - begin // BLOCK, 0)


@triton.jit
def pick(values, index, at):
    return tl.sum(tl.where(index == at, values, 0), 0)


@triton.jit
def _row_of(block, b, n_blocks, after, N_GROUPS: tl.constexpr):
    """The row in which a block of all is."""
    at = tl.sum((after <= block).to(tl.int32), 0)
    if N_GROUPS > 1:
        n = tl.maximum(pick(n_blocks, b, at), 1)
        at = at * N_GROUPS + (block - pick(after, b, at) + n * N_GROUPS) // n
    return at


@triton.jit
def share_blocks(program, n_programs, b, n_blocks, N_GROUPS: tl.constexpr):
    """n_blocks (N,): blocks of one key head in rows b of the batch. Returns the blocks up to each row's end, how many
    blocks each program has, the first of this program and the end, and its first and last row."""
    after = tl.cumsum(n_blocks * N_GROUPS, 0)
    total = tl.sum(n_blocks, 0) * N_GROUPS
    quota = tl.cdiv(total, n_programs)
    first = program * quota
    last = tl.minimum(first + quota, total)
    first_row = _row_of(first, b, n_blocks, after, N_GROUPS)
    last_row = tl.where(first < last, _row_of(last - 1, b, n_blocks, after, N_GROUPS), first_row - 1)
    return after, quota, first, last, first_row, last_row


@triton.jit
def _combined(
    partial, log_sum, slot, n_pieces, column, step, WIDTH: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The output of one query from its pieces, which are `step` apart."""
    inside = column < WIDTH
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
            at = (slot + j * step)[:, None] * WIDTH + column[None, :]
            part = tl.load(partial + at, mask=(j < n_pieces)[:, None] & inside[None, :], other=0.0)
            acc += tl.sum(tl.exp2(piece - top)[:, None] * part, 0)
        acc = acc / tl.where(total > 0, total, 1.0)
    else:
        acc = tl.load(partial + slot * WIDTH + column, mask=inside, other=0.0)
    return acc


@triton.jit(do_not_specialize=["batch", "n_keys"])
def combine_kernel(
    partial, log_sum, pieces, noise_weight, starts, visible, out,
    batch, n_keys, visible_b, visible_t, weight_b, weight_t, weight_h,
    N_NEW: tl.constexpr, N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, N_SIGNAL: tl.constexpr, WIDTH: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_VISIBLE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr,
    PIECES: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes columns of output i, (row, token, signal head) in order: the sum of the signal's pieces,
    minus the noise weight times that of the noise head. Outputs that the first kernel has written stay."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) // (N_NEW * N_SIGNAL)
    t = tl.program_id(0) // N_SIGNAL % N_NEW
    h = tl.program_id(0) % N_SIGNAL
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    one = row + tl.arange(0, 1)
    _, begin, end = seen_keys(
        one, one < batch, starts, visible, n_keys, visible_b, visible_t, N_NEW, HAS_STARTS, HAS_VISIBLE, BLOCK_T
    )
    n_pieces = (tl.sum(end - begin, 0) > 0).to(tl.int32)
    group = h // (N_HEADS // N_GROUPS)
    slot = (row * N_GROUPS + group).to(tl.int64)
    if SPLIT:
        range_of = pieces + 2 * slot
        first = tl.load(range_of, mask=n_pieces > 0, other=0)
        n_pieces = tl.load(range_of + 1, mask=n_pieces > 0, other=-1) - first + 1
        slot += first
    step = N_NEW * (N_HEADS // N_GROUPS)
    slot = slot * step + t * (N_HEADS // N_GROUPS) - group * (N_HEADS // N_GROUPS)
    if (n_pieces != 1) | (N_SIGNAL < N_HEADS):
        result = _combined(partial, log_sum, slot + h, n_pieces, column, step, WIDTH, PIECES, GROUP, SPLIT)
        if N_SIGNAL < N_HEADS:
            noise_head = N_SIGNAL + (h if N_HEADS == 2 * N_SIGNAL else 0)
            noise = _combined(partial, log_sum, slot + noise_head, n_pieces, column, step, WIDTH, PIECES, GROUP, SPLIT)
            weight = tl.load(noise_weight + row.to(tl.int64) * weight_b + t * weight_t + h * weight_h)
            result -= weight.to(tl.float32) * noise
        at = ((row.to(tl.int64) * N_NEW + t) * N_SIGNAL + h) * WIDTH + column
        tl.store(out + at, result.to(out.dtype.element_ty), mask=column < WIDTH)


def combine(
    work: Workspace, out: torch.Tensor, starts, visible, n_keys: int, n_heads: int, n_groups: int, programs: int,
    noise_weight=None,
) -> None:  # fmt: skip
    """Launch the second kernel. out: (B, T, signal heads, width)."""
    batch, n_new, n_signal, width = out.shape
    block, n_out = max(16, triton.next_power_of_2(width)), batch * n_new * n_signal
    columns = min(block, max(16, triton.next_power_of_2(block * n_out // _COMBINING)))
    group = triton.next_power_of_2(triton.cdiv(programs, batch * n_groups) + 1)  # pieces of a row, about
    weight_strides = (0, 0, 0) if noise_weight is None else (0,) * (3 - noise_weight.ndim) + noise_weight.stride()
    combine_kernel[(n_out, block // columns)](
        work.partial, work.log_sum, work.pieces, noise_weight, starts, visible, out,
        batch, n_keys, *row_strides(visible), *weight_strides,
        N_NEW=n_new, N_HEADS=n_heads, N_GROUPS=n_groups, N_SIGNAL=n_signal, WIDTH=width,
        HAS_STARTS=starts is not None, HAS_VISIBLE=visible is not None, SPLIT=programs > 0,
        BLOCK_T=triton.next_power_of_2(n_new), PIECES=triton.next_power_of_2(max(1, programs)),
        GROUP=min(_TILE // columns, group), COLUMNS=columns, num_warps=4,
        **pdl_options(out.device),
    )  # fmt: skip


def row_strides(visible: torch.Tensor | None) -> tuple[int, int]:
    """Of (B or 1, T)."""
    return (0, 0) if visible is None else (visible.stride(0) * (len(visible) > 1), visible.stride(1))
