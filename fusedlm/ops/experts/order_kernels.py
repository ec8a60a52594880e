"""Slots sorted by expert, and row tiles assigned to experts, in three kernels.

A counting sort: counts per block of slots, their sums over earlier blocks, and then the place of each slot, which is
its rank within its expert and block after these sums. It is stable, and nothing waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedlm.ops.experts.order import ExpertOrder

_TILE = 4096  # elements of a (slots, experts) tile
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
def _is_expert(indices, block, n_slots, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Slots of a block, whether they are inside, and their experts in one-hot encoding."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_slots
    expert = tl.load(indices + slot, mask=inside, other=-1).to(tl.int32)
    return slot, inside, (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(indices, counts, n_slots, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts (blocks, EXPERTS)."""
    block = tl.program_id(0)
    _, _, is_expert = _is_expert(indices, block, n_slots, BLOCK, EXPERTS)
    tl.store(counts + block * EXPERTS + tl.arange(0, EXPERTS), tl.sum(is_expert, 0))


@triton.jit
def _schedule_kernel(
    counts, places, starts, tile_starts, tile_experts, n_blocks, n_experts, n_tiles,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program. places (blocks, EXPERTS): the row of the first slot of each block and expert."""
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = counts + block[:, None] * EXPERTS + expert[None, :]
        total += tl.sum(tl.load(at, mask=(block < n_blocks)[:, None], other=0), 0)
    start = tl.cumsum(total, 0) - total
    height = tl.cdiv(total, BLOCK_M)
    tile_end = tl.cumsum(height, 0)
    tl.store(starts + expert, start, mask=expert < n_experts)
    tl.store(starts + expert + 1, start + total, mask=expert == n_experts - 1)
    tl.store(tile_starts + expert, tile_end - height, mask=expert < n_experts)
    tl.store(tile_starts + expert + 1, tile_end, mask=expert == n_experts - 1)
    for first in range(0, n_tiles, BLOCKS):
        tile = first + tl.arange(0, BLOCKS)
        # Tiles after the last one are read by no program, and have the last expert.
        before = tl.sum(((tile_end[None, :] <= tile[:, None]) & (expert < n_experts)[None, :]).to(tl.int32), 1)
        tl.store(tile_experts + tile, tl.minimum(before, n_experts - 1), mask=tile < n_tiles)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        offsets = block[:, None] * EXPERTS + expert[None, :]
        inside = (block < n_blocks)[:, None] & (expert >= 0)[None, :]
        count = tl.load(counts + offsets, mask=inside, other=0)
        tl.store(places + offsets, start[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        start += tl.sum(count, 0)


@triton.jit
def _place_kernel(indices, places, slots, rows, n_slots, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    slot, inside, is_expert = _is_expert(indices, block, n_slots, BLOCK, EXPERTS)
    first = tl.load(places + block * EXPERTS + tl.arange(0, EXPERTS))
    row = tl.sum(is_expert * (first[None, :] + tl.cumsum(is_expert, 0) - 1), 1)
    # An index that is no expert would write anywhere.
    inside = inside & (tl.sum(is_expert, 1) > 0)
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
    experts = triton.next_power_of_2(n_experts)
    block = max(16, min(256, _TILE // experts))  # slots
    blocks = max(1, min(256, 2 * _TILE // experts))  # of slots at a time in the one program
    n_blocks = triton.cdiv(n_slots, block)
    counts, places = (torch.empty(n_blocks, experts, dtype=torch.int32, device=indices.device) for _ in range(2))
    _count_kernel[(n_blocks,)](indices, counts, n_slots, BLOCK=block, EXPERTS=experts, num_warps=4)
    _schedule_kernel[(1,)](
        counts, places, schedule.starts, schedule.tile_starts, schedule.tile_experts, n_blocks, n_experts,
        len(schedule.tile_experts), BLOCK_M=block_m, BLOCKS=blocks, EXPERTS=experts, num_warps=8,
    )  # fmt: skip
    _place_kernel[(n_blocks,)](
        indices, places, schedule.slots, schedule.rows, n_slots, BLOCK=block, EXPERTS=experts, num_warps=4
    )
    return schedule
