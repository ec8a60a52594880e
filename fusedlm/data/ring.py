"""Shards as rings of tokens: windows wrap around, so that every token can be in one."""

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
        """Positions in 0..length-1 of the window from `start` at which a document starts."""
        found = []
        for shard, low, high, position in self._spans(start, length):
            first, last = shard.offsets.searchsorted((low, high))
            found.append(shard.offsets[first:last] + (position - low))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _spans(self, start: int, length: int) -> list[tuple[Shard, int, int, int]]:
        """The parts of a window: a shard, first token and end in it, and position of the part in the window."""
        number = int(self._starts.searchsorted(start, side="right")) - 1 if len(self._shards) > 1 else 0
        spans, position, low = [], 0, start - int(self._starts[number])
        while position < length:
            shard = self._shards[number]
            high = min(len(shard.tokens), low + length - position)
            spans.append((shard, low, high, position))
            position += high - low
            number, low = (number + 1) % len(self._shards), 0
        return spans


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
