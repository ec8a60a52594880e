"""Rank, size, sums and barriers. With one process nothing is communicated."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: of this process, from 0.
    size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """torch.distributed's default group if it is initialised, else one process."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, a new tensor; with one process the tensor itself."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether the flag is set in any process.

        Args:
            device: a device that the process group communicates from.
        """
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=device)) > 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()
