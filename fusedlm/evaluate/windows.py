"""Sliding windows over documents, and batches of windows of about the same length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A span of one document, and which of its predictions are scored."""

    document: int  # index of the document in the evaluation
    inputs: np.ndarray  # (n,) token ids
    targets: np.ndarray  # (n,) the token after each input
    n_scored: int  # the last n_scored predictions are scored; those before them are context


def window_spans(n: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Spans (start, stop, first) over n predictions: window i reads inputs [i * stride, i * stride + window), cut at n,
    and scores [first, stop), the predictions that no earlier window has scored. 1 <= stride <= window."""
    start = first = 0
    while first < n:
        stop = min(start + window, n)
        yield start, stop, first
        first = stop
        start += stride


def document_windows(document: int, tokens: np.ndarray, window: int, stride: int) -> Iterator[Window]:
    """The windows of one document; tokens (1 + n,) starts with end-of-text, which is context and is not scored."""
    for start, stop, first in window_spans(len(tokens) - 1, window, stride):
        yield Window(document, tokens[start:stop], tokens[start + 1 : stop + 1], stop - first)


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
