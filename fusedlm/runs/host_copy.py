"""Copies of tensors in host memory that stays allocated from one checkpoint to the next, pinned beside a GPU."""

from collections.abc import Sequence

import torch

# Pinned allocations are rounded up to a power of two: many tensors share one that is.
_BLOCK_BYTES = 1 << 30
_ALIGNMENT = 64  # of every tensor, which serves all dtypes


class HostCopy:
    """Copies the tensors of one checkpoint after another, each over those of the one before.

    Args:
        pinned: whether the memory is pinned, so that GPUs write it at the speed of the bus; where the system refuses to
            pin so much, it is ordinary memory.
    """

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []  # uint8, one-dimensional

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous copies, complete on return. Those of an earlier call must not be read any more."""
        sizes = [-(-_n_bytes(tensor) // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        used, left = [0] * len(self._blocks), sum(sizes)
        copies, devices = [], set()
        for tensor, size in zip(tensors, sizes, strict=True):
            index = next((i for i, block in enumerate(self._blocks) if used[i] + size <= len(block)), None)
            if index is None:
                index = len(self._blocks)
                self._blocks.append(self._allocate(max(size, min(left, _BLOCK_BYTES))))
                used.append(0)
            memory = self._blocks[index][used[index] : used[index] + _n_bytes(tensor)]
            used[index] += size
            left -= size
            copies.append(memory.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor.detach(), non_blocking=True)
            if tensor.is_cuda:
                devices.add(tensor.device)
        # Copied on the stream that computes, so before anything that changes a tensor. The host waits, so that the time
        # that GPUs spend on it is that of the checkpoint, and not of the next step.
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def _allocate(self, n_bytes: int) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._pinned = False
        return torch.empty(n_bytes, dtype=torch.uint8)


def _n_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
