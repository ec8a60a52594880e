"""Sliding windows over documents, and batches of windows of about the same length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A span of one document, and which of its predictions are scored."""

    document: int | None  # index of the document in the evaluation; None: all of them, as one sequence
    first: int  # index in the document of the first prediction that is scored
    inputs: np.ndarray  # (n,) token ids
    targets: np.ndarray  # (n,) the token after each input; -100 where it is not scored by any window
    n_scored: int  # the last n_scored predictions are scored; those before them are context


IGNORED = -100  # as a target: not scored


def window_spans(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Spans (start, stop, first) over n predictions: window i reads inputs [i * stride, i * stride + window), cut at n,
    and scores [first, stop), the predictions that no earlier window has scored. 1 <= stride <= window."""
    start = first = 0
    while first < n:
        stop = min(start + window, n)
        yield start, stop, first
        first = stop
        start += stride


def document_windows(
    document: int | None, tokens: np.ndarray, window: int, stride: int, targets: np.ndarray | None = None
) -> Iterator[Window]:
    """The windows of one document; tokens (1 + n,) starts with end-of-text, which is context and is not scored.
    targets: (n,), with -100 for tokens that are not scored; None: the tokens from the second on."""
    targets = tokens[1:] if targets is None else targets
    for start, stop, first in window_spans(len(tokens) - 1, window, stride):
        yield Window(document, first, tokens[start:stop], targets[start:stop], stop - first)


def join_documents(documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All documents as one sequence, tokens (1 + n,) int64, and the targets (n,) after each, -100 for the end-of-text
    between two documents. Without documents both are empty."""
    parts = [np.asarray(tokens, dtype=np.int64) for tokens in documents]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    tokens = np.concatenate(parts)
    targets = tokens.copy()
    targets[np.cumsum([0, *map(len, parts[:-1])])] = IGNORED
    return tokens, targets[1:]


def pad_rows(rows: list[Window], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (rows, width) int64 of a batch. Context and padding have target -100: the head runs on scored
    tokens only."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for r, row in enumerate(rows):
        n = len(row.inputs)
        ids[r, :n] = row.inputs
        targets[r, n - row.n_scored : n] = row.targets[n - row.n_scored :]
    return ids, targets


def batches(windows: Iterable[Window], longest: int, batch_tokens: int) -> Iterator[tuple[list[Window], int]]:
    """Group windows of all documents into (rows, width) with len(rows) * width <= batch_tokens, at least one row.

    Widths are multiples of a sixteenth of the longest window: padding per row is less than that, a compiled model sees
    few shapes, and at most sixteen batches are being filled at any time.
    """
    step = max(8, -(-longest // 16))
    buckets: dict[int, list[Window]] = {}
    for window in windows:
        width = min(-(-len(window.inputs) // step) * step, longest)
        rows = buckets.setdefault(width, [])
        rows.append(window)
        if (len(rows) + 1) * width > batch_tokens:
            yield buckets.pop(width), width
    for width in sorted(buckets):
        yield buckets[width], width
