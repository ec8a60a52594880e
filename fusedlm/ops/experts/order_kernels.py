"""Slots sorted by expert, and row tiles assigned to experts, in three kernels.

A counting sort: counts per chunk of slots, their sums over earlier chunks and experts, and then the place of each slot,
which is its rank among the slots of its expert in the chunk after these sums. It is stable, and nothing waits for the
host. No kernel has a single program, whose loop would take longer than all the rest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedlm.ops.experts.order import ExpertOrder

_CHUNK = 256  # slots of a program; the time for ranks is proportional to it
_TILE = 8192  # elements of a tile in registers
_LEAST_BLOCK_M = 32  # of a row tile, by which room for tiles is allocated


class TileSchedule(NamedTuple):
    """Slots sorted by expert (`ExpertOrder`, with int32 starts of E + 1 in place of ends), and the row tiles of each
    expert. Tiles are BLOCK_M rows of one expert; all tensors are int32."""

    slots: torch.Tensor  # (N k,)
    rows: torch.Tensor  # (N k,)
    starts: torch.Tensor  # (E + 1,): the first row of each expert, and N k
    tile_starts: torch.Tensor  # (E + 1,): the first row tile of each expert, and the number of tiles
    tile_experts: torch.Tensor  # (at least the number of tiles,): the expert of each row tile

    @property
    def order(self) -> ExpertOrder:
        return ExpertOrder(self.slots, self.rows, self.starts[1:])


@triton.jit
def _load_experts(indices, slot, n_slots):
    """Experts of slots; -1 beyond the last slot."""
    return tl.load(indices + slot, mask=slot < n_slots, other=-1).to(tl.int32)


@triton.jit
def _count_kernel(indices, counts, n_slots, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts (chunks, EXPERTS)."""
    first = tl.program_id(0) * CHUNK
    experts = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    for step in range(0, CHUNK, STEP):
        expert = _load_experts(indices, first + step + tl.arange(0, STEP), n_slots)
        count += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EXPERTS + experts, count)


@triton.jit
def _schedule_kernel(
    counts, places, starts, tile_starts, tile_experts, n_chunks, n_tiles,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per expert, which sums the counts of all. places (chunks, EXPERTS): the row of the first slot of each
    chunk and expert."""
    expert, is_last = tl.program_id(0), tl.program_id(0) == tl.num_programs(0) - 1
    experts = tl.arange(0, EXPERTS)
    partials = tl.zeros((CHUNKS, EXPERTS), dtype=tl.int32)
    for first in range(0, n_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = counts + chunk[:, None] * EXPERTS + experts[None, :]
        partials += tl.load(at, mask=(chunk < n_chunks)[:, None], other=0)
    totals = tl.sum(partials, 0)
    heights = tl.cdiv(totals, BLOCK_M)
    start, end = tl.sum(tl.where(experts < expert, totals, 0)), tl.sum(tl.where(experts <= expert, totals, 0))
    tile, tile_end = tl.sum(tl.where(experts < expert, heights, 0)), tl.sum(tl.where(experts <= expert, heights, 0))
    tl.store(starts + expert, start)
    tl.store(starts + expert + 1, end, mask=is_last)
    tl.store(tile_starts + expert, tile)
    tl.store(tile_starts + expert + 1, tile_end, mask=is_last)
    # Tiles after the last one are read by no program, and have the last expert.
    tile_end = tl.where(is_last, n_tiles, tile_end)
    for first in range(tile, tile_end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(tile_experts + at, expert + tl.zeros((BLOCK,), dtype=tl.int32), mask=at < tile_end)
    for first in range(0, n_chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        offsets = chunk * EXPERTS + expert
        count = tl.load(counts + offsets, mask=chunk < n_chunks, other=0)
        tl.store(places + offsets, start + tl.cumsum(count, 0) - count, mask=chunk < n_chunks)
        start += tl.sum(count, 0)


@triton.jit
def _place_kernel(
    indices, places, slots, rows, n_slots, n_experts, CHUNK: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr
):
    first = tl.program_id(0) * CHUNK
    slot = first + tl.arange(0, CHUNK)
    expert = _load_experts(indices, slot, n_slots)
    # An index that is no expert would write anywhere.
    inside = (expert >= 0) & (expert < n_experts)
    row = tl.load(places + tl.program_id(0) * EXPERTS + expert, mask=inside, other=0)
    for step in range(0, CHUNK, STEP):
        other = first + step + tl.arange(0, STEP)
        other_expert = _load_experts(indices, other, n_slots)
        is_before = (other_expert[:, None] == expert[None, :]) & (other[:, None] < slot[None, :])
        row += tl.sum(is_before.to(tl.int32), 0)
    tl.store(rows + slot, row, mask=inside)
    tl.store(slots + row, slot, mask=inside)


def empty_schedule(like: torch.Tensor, n_slots: int, n_experts: int) -> TileSchedule:
    """Memory on the device of a tensor."""
    sizes = (n_slots, n_slots, n_experts + 1, n_experts + 1, n_slots // _LEAST_BLOCK_M + n_experts)
    return TileSchedule(*(torch.empty(size, dtype=torch.int32, device=like.device) for size in sizes))


def schedule_tiles(indices_NK: torch.Tensor, n_experts: int, block_m: int) -> TileSchedule:
    """Sort slots by expert, and assign tiles of block_m rows to experts.

    Args:
        indices_NK: (N, k) int64 in [0, n_experts).
        block_m: at least 32.
    """
    indices, n_slots = indices_NK.contiguous(), indices_NK.numel()
    schedule = empty_schedule(indices, n_slots, n_experts)
    if not n_slots:
        for table in schedule:
            table.zero_()
        return schedule
    experts, n_chunks = triton.next_power_of_2(n_experts), triton.cdiv(n_slots, _CHUNK)
    height = max(1, _TILE // experts)  # of a tile with a column per expert
    counts, places = (torch.empty(n_chunks, experts, dtype=torch.int32, device=indices.device) for _ in range(2))
    _count_kernel[(n_chunks,)](
        indices, counts, n_slots, CHUNK=_CHUNK, STEP=min(height, _CHUNK), EXPERTS=experts, num_warps=4
    )
    _schedule_kernel[(n_experts,)](
        counts, places, schedule.starts, schedule.tile_starts, schedule.tile_experts, n_chunks,
        len(schedule.tile_experts), BLOCK_M=block_m, CHUNKS=height, EXPERTS=experts, BLOCK=_TILE // 32, num_warps=8,
    )  # fmt: skip
    _place_kernel[(n_chunks,)](
        indices, places, schedule.slots, schedule.rows, n_slots, n_experts, CHUNK=_CHUNK,
        STEP=min(_TILE // _CHUNK, _CHUNK), EXPERTS=experts, num_warps=4,
    )  # fmt: skip
    return schedule
