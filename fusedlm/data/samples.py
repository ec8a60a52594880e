"""What the samples of a training are: windows of a stream, rows of packed documents, or those of several sources."""

from collections.abc import Hashable
from typing import Protocol

import numpy as np

from fusedlm.data.mixture import SourceSchedule
from fusedlm.data.order import WindowOrder
from fusedlm.data.packing import PackedRows
from fusedlm.data.ring import rings
from fusedlm.data.shards import TokenShards


class Samples(Protocol):
    """Rows of a fixed number of tokens, numbered endlessly."""

    def locate(self, samples: np.ndarray) -> list[Hashable]:
        """Places of int64 samples, each in constant or logarithmic time."""

    def read(self, place: Hashable, begin: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and targets (length,) of a sample from position `begin`, and the positions from there at which a
        document starts."""


class Windows:
    """Windows of the stream of tokens, cut wherever they end. A ring is a shard, or several that are too short for a
    window (`fusedlm.data.ring`).

    Attributes:
        per_epoch: windows.

    Raises:
        ValueError: the text is shorter than a window.
    """

    def __init__(self, shards: TokenShards, seq_len: int, seed: int | str):
        if shards.n_tokens < seq_len:
            raise ValueError(
                f"seq_len={seq_len} is longer than the text: {shards.n_tokens} tokens; lower seq_len or add text"
            )
        self._rings = rings(shards.shards, seq_len)
        self._order = WindowOrder([len(ring) for ring in self._rings], seq_len, seed)
        self.per_epoch = self._order.windows

    def locate(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Ring, and first token in it, of int64 samples."""
        numbers, starts = self._order.locate(samples)
        return list(zip(numbers.tolist(), starts.tolist(), strict=True))

    def read(self, place: tuple[int, int], begin: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Samples.read`."""
        number, first = place
        ring = self._rings[number]
        start = (first + begin) % len(ring)
        tokens = ring.read(start, length + 1)
        return tokens[:-1], tokens[1:], ring.boundaries(start, length)


class MixedSamples:
    """Samples of several sources, each with an order of its own, in the shares of a schedule.

    Attributes:
        sources: the samples of each source, by name.
    """

    def __init__(self, sources: dict[str, Windows | PackedRows], schedule: SourceSchedule):
        self.sources, self._schedule = sources, schedule
        self._ordered = [sources[name] for name in schedule.names]

    def locate(self, samples: np.ndarray) -> list[tuple[int, tuple]]:
        """Number of the source, and place in it, of int64 samples."""
        numbers, own = self._schedule.locate(samples)
        places: list = [None] * len(samples)
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            for at, place in zip(chosen.tolist(), self._ordered[number].locate(own[chosen]), strict=True):
                places[at] = (number, place)
        return places

    def read(self, place: tuple[int, tuple], begin: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Samples.read`."""
        number, own = place
        return self._ordered[number].read(own, begin, length)
