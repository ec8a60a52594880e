"""The state of a linear-time mixer, whose size does not depend on the length."""

from collections.abc import Callable

import torch

# (memory, carried, n_kept_B) -> (memory, carried): the first n_kept_B tokens of one append run again.
Replay = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class RecurrentState:
    """memory: the matrix of each head, (B, H, K, V) float32. carried: the last inputs of a convolution (B, size - 1,
    C), or a working memory (B, C). Both None before the first token.

    The tensors are replaced, never written to, unless the state is static. After `mark`, every append leaves a function
    that runs its tokens again; `rollback` starts from the marked tensors and replays the tokens that are kept. A static
    state is written to at `rollback` alone, so that the marked tensors need no copy.
    """

    def __init__(self):
        self.memory: torch.Tensor | None = None
        self.carried: torch.Tensor | None = None
        self.static = False
        self._before: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        self._since: list[Replay] | None = None

    def update(self, memory: torch.Tensor, carried: torch.Tensor | None, replay: Replay) -> None:
        """Set the tensors after an append; replay(memory, carried, n_kept_B) gives those after its first tokens
        alone."""
        if self.in_place:
            self._copy(memory, carried)
            return
        self.memory, self.carried = memory, carried
        if self._since is not None:
            self._since.append(replay)

    @property
    def in_place(self) -> bool:
        """Whether appends write to the tensors."""
        return self.static and self._since is None

    def make_static(self, capacity: int, lengths_B: torch.Tensor, spare: int = 0) -> None:
        """See `TokenCache.make_static`."""
        if not self.static:
            self.static = True
            self.memory = self.memory.clone(memory_format=torch.contiguous_format)
            if self.carried is not None:
                self.carried = self.carried.clone(memory_format=torch.contiguous_format)

    def load(self, other: "RecurrentState", lengths_B: torch.Tensor) -> None:
        """See `TokenCache.load`."""
        self._copy(other.memory, other.carried)

    def _copy(self, memory: torch.Tensor, carried: torch.Tensor | None) -> None:
        for own, after in ((self.memory, memory), (self.carried, carried)):
            if own is not None and own is not after:
                own.copy_(after)

    def mark(self) -> None:
        """From now on save what `rollback` needs."""
        self._before, self._since = (self.memory, self.carried), []

    def rollback(self, kept: list[torch.Tensor] | None) -> None:
        """Keep only the first kept[i][b] tokens of the i-th append since the mark in row b; None: keep all."""
        before, since = self._before, self._since
        self._before = self._since = None
        if kept is not None:
            self.memory, self.carried = before
            for replay, n_kept_B in zip(since, kept, strict=True):
                if self.memory is not None or bool((n_kept_B > 0).any()):
                    self.memory, self.carried = replay(self.memory, self.carried, n_kept_B)
        if self.static:
            after, (self.memory, self.carried) = (self.memory, self.carried), before
            self._copy(*after)

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.memory, self.carried) if x is not None]


def hold(
    taken_BT: torch.Tensor | None, reset_BT: torch.Tensor | None, *inputs: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Resets and inputs (B, T, ...) of a recurrence, changed so that tokens that are not taken leave the state as it
    is: no reset, and zero inputs (log decays included). taken_BT: None: all are taken."""
    if taken_BT is None:
        return reset_BT, *inputs
    held = (x.masked_fill(~taken_BT.view(*taken_BT.shape, *[1] * (x.dim() - 2)), 0.0) for x in inputs)
    return None if reset_BT is None else reset_BT & taken_BT, *held
