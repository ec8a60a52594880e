"""Rank, size, sums, and decisions that processes take together. With one process nothing is communicated."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class OneProcessFailed(ValueError):
    """A failure of one process alone: the others do not know it, and it has to tell the user itself."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: of this process, from 0.
    size: number of processes.
    control: group that carries flags, errors and objects, on the CPU: decisions do not wait for a GPU, and a process
        may wait for the main one as long as that prepares text. None: the default group, which must communicate from
        the CPU.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

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

    def sum_all(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `sum` of each tensor, all on one device, in one exchange of float64; integers are exact up to 2^53."""
        if self.size == 1 or not tensors:
            return tensors
        total = self.sum(torch.cat([tensor.detach().flatten().double() for tensor in tensors]))
        parts = total.split([tensor.numel() for tensor in tensors])
        return [part.view(one.shape).to(one.dtype) for part, one in zip(parts, tensors, strict=True)]

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return self.largest_of_each([number])[0]

    def largest_of_each(self, numbers: list[int]) -> list[int]:
        """For each place in the lists of the processes, which are of one length, the largest number; in one exchange.
        """
        if self.size == 1:
            return numbers
        table = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        table[self.rank] = torch.tensor(numbers)
        dist.all_reduce(table, group=self.control)
        return table.amax(0).tolist()

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in each of them, in the order of ranks. They must be picklable."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.largest(int(flag)))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def raise_together(self, error: Exception | None) -> None:
        """A barrier. If a process comes with an error, every process raises: those that have one their own, the others
        a ValueError or OSError with the text of the first one."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        if not self.any(error is not None):
            return
        # Text alone: not every exception can be sent.
        texts = self.gathered(None if error is None else (isinstance(error, OSError), str(error)))
        if error is not None:
            raise error
        is_os_error, text = next(text for text in texts if text is not None)
        raise (OSError if is_os_error else ValueError)(text)

    def together(self, call: Callable[[], T], *, only_main: bool = False) -> T | None:
        """What `call` returns in this process, for all of which this is a barrier; a ValueError or OSError of one
        process is raised in all. only_main: the others do not call it."""
        result, error = None, None
        if self.is_main or not only_main:
            try:
                result = call()
            except (ValueError, OSError) as raised:
                error = raised
        self.raise_together(error)
        return result

    def on_main(self, call: Callable[[], T]) -> T:
        """What `call` returns in the main process, for all of them; its ValueError or OSError is raised in all."""
        if self.size == 1:
            return call()
        found = [self.together(call, only_main=True)]
        dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    def main_first(self, call: Callable[[], T]) -> T:
        """What `call` returns in this process; the others call it after the main one is done, to find its files. A
        ValueError or OSError of one is raised in all."""
        if self.size == 1:
            return call()
        result = self.together(call, only_main=True)
        others = self.together(lambda: None if self.is_main else call())
        return result if self.is_main else others
