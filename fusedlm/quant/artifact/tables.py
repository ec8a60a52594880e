"""Adaptive frequency tables of the entropy coder, in integers."""

import numpy as np

from fusedlm.quant.artifact.rans import PRECISION

_TOTAL = 1 << PRECISION
_LARGEST_COUNT = 1 << 22  # of a table; then all its counts are halved, and it follows what comes later


class Tables:
    """One table of frequencies per context, learnt from the symbols coded so far.

    Args:
        counts: (contexts, symbols) int64, all positive: what is assumed before the first symbol.
        step: what a symbol adds to its count.
    """

    def __init__(self, counts: np.ndarray, step: int):
        self._counts, self._step = counts.copy(), step
        self._n_contexts, self.n_symbols = counts.shape
        self._frequencies = np.empty_like(counts)
        self._starts = np.empty_like(counts)  # of each symbol, plus 2**16 times its context: all in ascending order
        self._totals = counts.sum(1)
        self._built = np.zeros(self._n_contexts, np.int64)  # totals when the frequencies were computed
        self._build(np.arange(self._n_contexts))

    def copy(self) -> "Tables":
        """Tables that learn from here on by themselves."""
        return Tables(self._counts, self._step)

    def lookup(self, contexts: np.ndarray, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(frequency, sum of those before it) of each symbol in the table of its context."""
        at = contexts * self.n_symbols + symbols
        return self._frequencies.ravel()[at], self._starts.ravel()[at] & (_TOTAL - 1)

    def find(self, contexts: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(symbol, frequency, sum of those before it) whose interval holds each slot, 0 to 2**16 - 1."""
        at = np.searchsorted(self._starts.ravel(), contexts * _TOTAL + slots, side="right") - 1
        symbols = at - contexts * self.n_symbols
        return symbols, self._frequencies.ravel()[at], self._starts.ravel()[at] & (_TOTAL - 1)

    def learn(self, contexts: np.ndarray, symbols: np.ndarray) -> None:
        """Count symbols. Frequencies of a table change when it has counted an eighth more than when they were made."""
        np.add.at(self._counts.ravel(), contexts * self.n_symbols + symbols, self._step)
        self._totals += self._step * np.bincount(contexts, minlength=self._n_contexts)
        self._build(np.flatnonzero(self._totals - self._built > self._built >> 3))

    def _build(self, contexts: np.ndarray) -> None:
        if not len(contexts):
            return
        counts = self._counts[contexts]
        while (large := counts.sum(1) > _LARGEST_COUNT).any():
            counts[large] = (counts[large] + 1) >> 1
        self._counts[contexts] = counts
        self._totals[contexts] = totals = counts.sum(1)
        # Every symbol keeps a frequency of at least 1; what rounding leaves over goes to the most frequent.
        frequencies = 1 + counts * (_TOTAL - self.n_symbols) // totals[:, None]
        rows = np.arange(len(contexts))
        frequencies[rows, counts.argmax(1)] += _TOTAL - frequencies.sum(1)
        self._frequencies[contexts] = frequencies
        self._starts[contexts] = np.cumsum(frequencies, 1) - frequencies + (contexts * _TOTAL)[:, None]
        self._built[contexts] = totals
