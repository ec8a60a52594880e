"""Spans of held-out tokens, and training documents that have one.

A span of n tokens is known by a 64-bit polynomial of hashed token ids, which for all spans of a text takes a few
operations per token. Another span has the same value with a probability of about 2^-64, and would cost one more
training document.
"""

from collections.abc import Iterator

import numpy as np

from fusedlm.data.pipeline.work import LENGTHS, Work, WorkStep
from fusedlm.data.split import TRAIN, VALIDATION

_CHUNK = 1 << 20  # tokens
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, and so with an inverse
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


def span_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """The hash of every span of `length` tokens: (n,) integers -> (n - length + 1,) uint64."""
    if len(tokens) < length:
        return np.empty(0, np.uint64)
    powers = _powers(_BASE, len(tokens))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(_mixed(tokens.astype(np.uint64)) * powers, out=sums[1:])
    return _mixed((sums[length:] - sums[:-length]) * _powers(_INVERSE, len(tokens) - length + 1))


def _powers(base: np.uint64, n: int) -> np.ndarray:
    """base^0 ... base^(n-1), modulo 2^64."""
    powers = np.full(n, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A one-to-one mixing of 64 bits (the finalizer of SplitMix64)."""
    values = values + _BASE
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SpanSet:
    """Whether hashes are among those of a set.

    Args:
        hashes: (n,) uint64, in ascending order.
    """

    def __init__(self, hashes: np.ndarray):
        self._hashes = hashes
        # A table of one bit or more per hash answers most of the others without a search.
        self._shift = np.uint64(64 - max(16, int(16 * len(hashes)).bit_length()))
        self._table = np.zeros(1 << (61 - int(self._shift)), np.uint8)
        for start in range(0, len(hashes), _CHUNK):
            places = hashes[start : start + _CHUNK] >> self._shift
            bits = np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
            np.bitwise_or.at(self._table, places >> np.uint64(3), bits)

    def contains(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) uint64 -> (n,) bool."""
        places = hashes >> self._shift
        found = (self._table[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)) & 1 == 1
        maybe = np.flatnonzero(found)
        at = np.searchsorted(self._hashes, hashes[maybe])
        known = at < len(self._hashes)
        known[known] = self._hashes[at[known]] == hashes[maybe][known]
        found[maybe] = known
        return found


def documents_with_spans(tokens: np.ndarray, lengths: np.ndarray, length: int, spans: SpanSet) -> np.ndarray:
    """Which documents have a span of the set.

    Args:
        tokens: of all documents; each begins with end-of-text, which no span of the set has.
        lengths: (documents,) of each.
        length: of a span.

    Returns:
        (documents,) bool
    """
    ends = np.cumsum(lengths)
    found = np.zeros(len(lengths), bool)
    for start in range(0, len(tokens), _CHUNK):
        hits = np.flatnonzero(spans.contains(span_hashes(tokens[start : start + _CHUNK + length - 1], length)))
        found[np.searchsorted(ends, hits + start, side="right")] = True
    return found


class HeldOutSpans(WorkStep):
    """Writes the hashes of all spans of held-out documents."""

    type = "spans"
    name = "held-out spans"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        hashes = [span_hashes(tokens, self._work.span) for tokens in self._documents()]
        np.save(self._work.path("spans.npy"), np.unique(np.concatenate([np.empty(0, np.uint64), *hashes])))

    def _documents(self) -> Iterator[np.ndarray]:
        for task in range(self._work.n_tasks):
            tokens, rows = open_tokens(self._work, task, VALIDATION)
            ends = np.cumsum(rows["tokens"])
            for start, end in zip(ends - rows["tokens"], ends, strict=True):
                yield tokens[start + 1 : end]


class SearchSpans(WorkStep):
    """Writes which training documents of a task have a span of held-out text."""

    type = "spans"
    name = "search"

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        spans = SpanSet(np.load(self._work.folder / "spans.npy", mmap_mode="r"))
        tokens, rows = open_tokens(self._work, rank, TRAIN)
        found = documents_with_spans(tokens, rows["tokens"], self._work.span, spans)
        np.save(self._work.path("found", f"{rank:05d}.npy"), found)


def open_tokens(work: Work, task: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) and LENGTHS (documents,) of a split of a task."""
    rows = np.load(work.folder / "tokens" / f"{task:05d}.{split}.npy")
    path = work.folder / "tokens" / f"{task:05d}.{split}.bin"
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, work.dtype), np.empty(0, LENGTHS)
    return np.memmap(path, work.dtype, mode="r"), rows
