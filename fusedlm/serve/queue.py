"""Sequences that wait for a slot, in the order in which they came."""

from collections import deque

from fusedlm.serve.requests import QueueFull, Sequence


class WaitingQueue:
    def __init__(self, most: int):
        """most: sequences that may wait for a slot; further ones are refused."""
        self.most = most
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequences: list[Sequence], n_free: int) -> None:
        """Add all of them, or none. n_free: slots that the next step can give to waiting sequences.

        Raises:
            QueueFull: there is no room for all.
        """
        if len(self) + len(sequences) > self.most + n_free:
            waiting = max(0, len(self) - n_free)
            raise QueueFull(f"{waiting} sequences are waiting, and at most {self.most} may; try again later")
        self._waiting.extend(sequences)

    def admit(self, n_free: int) -> list[Sequence]:
        """Take out the first n_free sequences. A choice of a prompt that another choice is reading keeps its place
        until that has been read."""
        taken, left = [], deque()
        while self._waiting and len(taken) < n_free:
            sequence = self._waiting.popleft()
            group = sequence.group
            if group is not None and group.row is None and group.is_reading:
                left.append(sequence)
                continue
            if group is not None:
                group.is_reading = True
            taken.append(sequence)
        self._waiting.extendleft(reversed(left))
        return taken

    def cancel(self, sequence: Sequence) -> bool:
        """Whether the sequence was waiting; it no longer is."""
        if sequence not in self._waiting:
            return False
        self._waiting.remove(sequence)
        return True

    def sequences(self) -> list[Sequence]:
        return list(self._waiting)
