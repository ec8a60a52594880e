"""The order of samples: a keyed pseudo-random permutation, and the windows of a stream that it visits.

An epoch cuts every ring of n tokens into n // seq_len windows from a random phase on, and visits each window of all
rings once, in pseudo-random order. Seed and epoch give phase and order; sample i is sample i % windows of epoch
i // windows. Any sample is located in constant time.
"""

import hashlib

import numpy as np

_ROUNDS = 8


class Permutation:
    """A keyed pseudo-random permutation of range(size), any element in constant time: a Feistel network on the bits
    of size - 1, applied until the value is in the range (cycle walking; Black and Rogaway, 2002).

    Args:
        size: from 1 to 2**62.
        key: bytes; the first 64 are used.
    """

    def __init__(self, size: int, key: bytes):
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._widths = (bits - bits // 2, bits // 2)
        self._keys = np.frombuffer(key[: 8 * _ROUNDS], "<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of int64 indices in [0, size), as int64."""
        values = self._encrypt(indices.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        high, low = self._widths
        a, b = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
        for key in self._keys:
            a, b = b, a ^ (mix(b + key) & np.uint64((1 << high) - 1))
            high, low = low, high
        return (a << np.uint64(low)) | b


class WindowOrder:
    """Where each sample lies in the rings.

    Args:
        lengths: tokens of each ring.
        seq_len: tokens per window; one more is read as the last target.
        seed: of phases and order: a number, or text of a number and the name of a source.
    """

    def __init__(self, lengths: list[int], seq_len: int, seed: int | str):
        self._lengths, self._seed = lengths, seed
        self._seq_len = seq_len
        self._ends = np.cumsum([length // seq_len for length in lengths], dtype=np.int64)
        self.windows = int(self._ends[-1]) if lengths else 0
        self._epoch: tuple[int, Permutation, np.ndarray] | None = None

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the ring and of the first token in it (int64 each), of int64 samples."""
        rings, starts = np.empty_like(samples), np.empty_like(samples)
        epochs = samples // self.windows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            permutation, phases = self._draw(int(epoch))
            window = permutation(samples[chosen] % self.windows)
            ring = np.searchsorted(self._ends, window, side="right")
            in_ring = window - np.concatenate([[0], self._ends])[ring]
            lengths = np.asarray(self._lengths, dtype=np.int64)[ring]
            rings[chosen], starts[chosen] = ring, (phases[ring] + in_ring * self._seq_len) % lengths
        return rings, starts

    def _draw(self, epoch: int) -> tuple[Permutation, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            permutation = Permutation(self.windows, keyed(self._seed, epoch, "order"))
            draws = [keyed(self._seed, epoch, f"phase {i}") for i in range(len(self._lengths))]
            phases = [
                int.from_bytes(draw[:16], "little") % length for draw, length in zip(draws, self._lengths, strict=True)
            ]
            self._epoch = (epoch, permutation, np.asarray(phases, dtype=np.int64))
        return self._epoch[1:]


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed(seed: int | str, epoch: int, purpose: str) -> bytes:
    """64 bytes of a purpose in an epoch."""
    return hashlib.blake2b(f"{seed} {epoch} {purpose}".encode()).digest()
