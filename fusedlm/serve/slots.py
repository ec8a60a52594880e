"""The states of the sequences that are decoded together: rows of one static state, which has room as it is needed."""

from collections.abc import Callable

import torch

from fusedlm.model.rows import (
    Row,
    Snapshot,
    copy_rows,
    move_row,
    put_row,
    static_rows,
    take_snapshot,
    take_tokens,
)

_LEAST_CAPACITY = 64  # tokens per row


class Slots:
    """Sequences have the rows 0 to n - 1, without gaps, so that a step computes as few rows as there are sequences.

    Both the number of rows and their tokens double when they do not suffice, up to the limits. On the CPU, where a step
    costs as much as all the room that rows have, the state becomes small again when the sequences are few and short; on
    a GPU, where it does not, memory and CUDA graphs are kept. One static state serves all kinds of layers: caches of
    keys and values or of latents, windows and recurrent states.

    generation: changes with the memory; a CUDA graph captured before is then of no use.
    lengths: tokens of the row of every sequence.
    """

    def __init__(self, model, max_rows: int, max_tokens: int, at_once: Callable[[], int] | None = None):
        """max_tokens: most tokens of a row. at_once: asked for bytes before the first allocation; where all rows with
        all their tokens take no more, they are allocated then, and CUDA graphs are captured once."""
        self._model, self.max_rows, self._most, self._at_once = model, max_rows, max_tokens + 1, at_once
        self.most_tokens = max_tokens
        self.state = None
        self.generation = 0
        self.lengths: list[int] = []
        self._shrinks = next(model.parameters()).device.type == "cpu"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_rows(self) -> int:
        """Rows that there is memory for."""
        return 0 if self.state is None else len(self.state.lengths)

    @property
    def capacity(self) -> int:
        return 0 if self.state is None else self.state.capacity

    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes()

    def append(self, row: Row) -> int:
        """Give a sequence the next row; returns its number.

        Raises:
            ValueError: all max_rows are taken.
        """
        if len(self) == self.max_rows:
            raise ValueError(f"all {self.max_rows} rows are taken")
        self._make_room(len(self) + 1, max([row.length, *self.lengths]) + 1, row)
        put_row(self.state, len(self), row)
        self.lengths.append(row.length)
        self._count()
        return len(self) - 1

    def remove(self, index: int) -> int | None:
        """Free a row. The last row takes its place: its number before is returned, None if it was the last itself."""
        last = len(self) - 1
        if index != last:
            move_row(self.state, last, index)
        self.lengths[index] = self.lengths[last]
        self.lengths.pop()
        if self._shrinks and not self.lengths:
            self.state = None
            self.generation += 1
        else:
            self._count()
            self._shrink()
        return None if index == last else last

    def view(self, n_rows: int):
        """The first rows as a static state that takes one token per row, with room for it."""
        self._make_room(n_rows, max(self.lengths) + 1, None)
        return self.state.first_rows(n_rows)

    def advance(self) -> None:
        """Every sequence has one token more, which the device has counted already."""
        self.lengths = [length + 1 for length in self.lengths]

    def take_tokens(self, index: int, first: int, last: int) -> list[torch.Tensor]:
        """See `fusedlm.model.rows`."""
        return take_tokens(self.state, index, first, last)

    def take_snapshot(self, index: int) -> Snapshot:
        """See `fusedlm.model.rows`."""
        return take_snapshot(self.state, index, self.lengths[index])

    def _count(self) -> None:
        # Rows without a sequence are computed with the others, and stay at one token.
        self.state.set_lengths([*self.lengths, *[1] * (self.n_rows - len(self))])
        self.state.growing_B.zero_()
        self.state.growing_B[: len(self)] = 1

    def _make_room(self, n_rows: int, n_tokens: int, like: Row | None) -> None:
        if n_rows <= self.n_rows and n_tokens < self.capacity:
            return
        rows = max(self.n_rows, _power_of_two(n_rows, 1, self.max_rows))
        capacity = max(self.capacity, _power_of_two(n_tokens + 1, _LEAST_CAPACITY, self._most + 1))
        if self.state is None and self._all_fits(like):
            rows, capacity = self.max_rows, self._most + 1
        self._resize(rows, capacity, like)

    def _all_fits(self, like: Row) -> bool:
        if self._at_once is None:
            return False
        # A row takes some bytes, and each of its tokens others.
        small, large = (static_rows(self._model, like, 1, n * _LEAST_CAPACITY).nbytes() for n in (1, 2))
        per_token = (large - small) / _LEAST_CAPACITY
        return self.max_rows * (small + (self._most + 1 - _LEAST_CAPACITY) * per_token) <= self._at_once()

    def _shrink(self) -> None:
        if not self._shrinks:
            return
        rows = _power_of_two(len(self), 1, self.max_rows)
        tokens = _power_of_two(max(self.lengths) + 2, _LEAST_CAPACITY, self._most + 1)
        if 4 * rows * tokens <= self.n_rows * self.capacity:
            self._resize(rows, tokens, None)

    def _resize(self, n_rows: int, capacity: int, like: Row | None) -> None:
        if like is None:
            like = Row(1, take_tokens(self.state, 0, 0, 1), take_snapshot(self.state, 0, self.lengths[0]))
        before, self.state = self.state, static_rows(self._model, like, n_rows, capacity)
        if before is not None and self.lengths:
            copy_rows(before, self.state, len(self))
        if self.lengths:
            self._count()
        self.generation += 1


def _power_of_two(n: int, least: int, most: int) -> int:
    return min(most, max(least, 1 << (n - 1).bit_length()))
