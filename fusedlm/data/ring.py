"""Shards as rings of tokens: windows wrap around, so that every token can be in one."""

from collections.abc import Iterator

import numpy as np

from fusedlm.data.shards import Shard


class Ring:
    """Consecutive tokens of one or more shards; the first follows the last.

    Every shard starts with end-of-text, so that joined shards are read as separate documents.
    """

    def __init__(self, shards: list[Shard]):
        self._shards = shards
        self._starts = np.cumsum([0, *(len(shard.tokens) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from `start`; length is at most len(self) + 1."""
        pieces = [shard.tokens[low:high] for shard, low, high, _ in self._spans(start, length)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def boundaries(self, start: int, length: int) -> np.ndarray:
        """Positions in 1..length-1 of the window from `start` at which a document starts."""
        found = []
        for shard, low, high, position in self._spans(start, length):
            first, last = np.searchsorted(shard.offsets, [low, high])
            found.append(shard.offsets[first:last] - low + position)
        positions = np.concatenate(found)
        return positions[positions > 0]

    def _spans(self, start: int, length: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Yields the parts of a window: a shard, first token and end in it, and position of the part in the window."""
        number, position = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while position < length:
            shard = self._shards[number]
            low = start + position - int(self._starts[number]) if position == 0 else 0
            high = min(len(shard.tokens), low + length - position)
            yield shard, low, high, position
            position += high - low
            number = (number + 1) % len(self._shards)


def rings(shards: list[Shard], seq_len: int) -> list[Ring]:
    """Rings of at least `seq_len` tokens that hold every shard, together at least so many.

    A shard that is long enough is a ring of its own. The others are joined, in order; if they are too short even
    together, the last ring takes them.
    """
    long = [[shard] for shard in shards if len(shard.tokens) >= seq_len]
    short = [shard for shard in shards if len(shard.tokens) < seq_len]
    if sum(len(shard.tokens) for shard in short) >= seq_len:
        long.append(short)
    elif short:
        long[-1] += short
    return [Ring(joined) for joined in long]
