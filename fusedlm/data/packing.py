"""Rows of full documents: best-fit packing, by which only documents longer than a row are cut.

A document longer than a row is cut into rows of its own and a rest; rests and shorter documents are packed by
`fusedlm.data.best_fit`. What remains free in a row is filled up and has no targets. No token is left out: an epoch
trains on every token once, end-of-text after each document included.
"""

import numpy as np

from fusedlm.data.best_fit import best_fit_decreasing
from fusedlm.data.order import Permutation, keyed, mix
from fusedlm.data.shards import TokenShards

IGNORED = -100  # target that no loss counts


class PackedRows:
    """Samples that are rows of packed documents.

    Rows are the same in every epoch but for which documents of a length are together. Memory: 8 bytes per document, or
    part of one, and one sort of them.

    Args:
        shards: the text.
        row_length: tokens per row.
        seed: of the order: a number, or text of a number and the name of a source.

    Attributes:
        per_epoch: rows.
        padded: positions of all rows that hold no token, as a fraction of all.
        cut: documents that are longer than a row.
        n_documents: all documents.

    Raises:
        ValueError: there is no text.
    """

    def __init__(self, shards: TokenShards, row_length: int, seed: int | str):
        if not shards.n_tokens:
            raise ValueError("0 tokens to pack into rows; add text")
        self._shards, self._row_length, self._seed = shards.shards, row_length, seed
        self._shard_starts = np.cumsum([0, *(len(shard.tokens) for shard in shards.shards)])
        starts, lengths = self._parts()
        self._counts = np.bincount(lengths, minlength=row_length + 1)
        self._firsts = np.cumsum(self._counts) - self._counts  # of each length, in the sorted parts
        self._starts = starts[np.argsort(lengths, kind="stable")]
        self._groups = best_fit_decreasing(self._counts)
        self._ends = np.cumsum([group.bins for group in self._groups])
        self.per_epoch = int(self._ends[-1])
        self.padded = 1 - shards.n_tokens / (self.per_epoch * row_length)
        self.n_documents = shards.n_documents
        self._eot = int(self._shards[0].tokens[0:1][0])
        self._epoch: tuple[int, Permutation, np.ndarray] | None = None

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """First token, counted over all shards, and length of each part of a document that is in one row."""
        starts, lengths, self.cut = [], [], 0
        for shard, base in zip(self._shards, self._shard_starts.tolist(), strict=False):
            n_tokens = np.diff(shard.offsets)
            self.cut += int((n_tokens > self._row_length).sum())
            n_parts = -(-n_tokens // self._row_length)
            part = np.arange(n_parts.sum()) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
            before = part * self._row_length
            starts.append(base + np.repeat(shard.offsets[:-1], n_parts) + before)
            lengths.append(np.minimum(np.repeat(n_tokens, n_parts) - before, self._row_length))
        return np.concatenate(starts), np.concatenate(lengths)

    def locate(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Epoch and row of int64 samples."""
        epochs, rows = samples // self.per_epoch, np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._draw(int(epoch))[0](samples[chosen] % self.per_epoch)
        return list(zip(epochs.tolist(), rows.tolist(), strict=True))

    def read(self, place: tuple[int, int], begin: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and targets (length,) int64 of a row from position `begin`, and the positions from there at which a
        document, or what fills up the row, starts."""
        epoch, row = place
        shifts = self._draw(epoch)[1]
        tokens = np.full(length, self._eot, np.int64)
        targets = np.full(length, IGNORED, np.int64)
        starts, position = [], 0
        group = int(self._ends.searchsorted(row, side="right"))
        in_group = row - (int(self._ends[group - 1]) if group else 0)
        for size, n, first in self._groups[group].shares:
            for item in range(first + in_group * n, first + (in_group + 1) * n):
                low, high = max(position, begin), min(position + size, begin + length)
                if low < high:
                    # Documents of one length change places from epoch to epoch.
                    number = (item + int(shifts[size])) % int(self._counts[size])
                    start = int(self._starts[self._firsts[size] + number]) + low - position
                    text = self._read(start, high - low + 1)
                    tokens[low - begin : high - begin], targets[low - begin : high - begin] = text[:-1], text[1:]
                    starts.append(low - begin)
                position += size
        if position < begin + length:
            starts.append(max(position - begin, 0))
        return tokens, targets, np.asarray(starts, np.int64)

    def _read(self, start: int, length: int) -> np.ndarray:
        """Tokens from a place counted over all shards. After the last document of a shard comes end-of-text."""
        number = int(self._shard_starts.searchsorted(start, side="right")) - 1
        start -= int(self._shard_starts[number])
        tokens = self._shards[number].tokens[start : start + length]
        return tokens if len(tokens) == length else np.append(tokens, np.asarray([self._eot], tokens.dtype))

    def _draw(self, epoch: int) -> tuple[Permutation, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            key = int.from_bytes(keyed(self._seed, epoch, "packing")[:8], "little")
            draws = mix(np.arange(len(self._counts), dtype=np.uint64) + np.uint64(key))
            shifts = (draws % np.maximum(self._counts, 1).astype(np.uint64)).astype(np.int64)
            self._epoch = (epoch, Permutation(self.per_epoch, keyed(self._seed, epoch, "order")), shifts)
        return self._epoch[1:]

    def facts(self) -> str:
        """What packing costs, for people."""
        return (
            f"{self.per_epoch:,} rows, {100 * self.padded:.3g}% of the positions filled up, no token left out; "
            f"{self.cut:,} of {self.n_documents:,} documents longer than a row and cut"
        )
