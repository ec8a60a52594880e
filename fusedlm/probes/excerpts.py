"""Excerpts of documents, evenly spaced over all the text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_CONTEXT = 4  # tokens before an excerpt on which the decoding of its first token can depend


@dataclass(frozen=True)
class Excerpt:
    tokens: np.ndarray  # (n,) int64 text tokens, without end-of-text
    before: np.ndarray  # the text tokens just before them, at most 4


class EvenSample:
    """At most `size` items of a stream, evenly spaced over it; never holds twice as many."""

    def __init__(self, size: int):
        self._size, self._every, self._seen = size, 1, 0
        self._kept: list = []

    def wants_next(self) -> bool:
        """Whether to `add` the next item of the stream; call it once per item."""
        wanted = self._seen % self._every == 0
        self._seen += 1
        return wanted

    def add(self, item) -> None:
        self._kept.append(item)
        if len(self._kept) == 2 * self._size:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def items(self) -> list:
        if len(self._kept) <= self._size:
            return self._kept
        at = np.linspace(0, len(self._kept) - 1, self._size).round().astype(int)
        return [self._kept[i] for i in at]


def excerpts(
    documents: Iterable[tuple[np.ndarray, int]], lengths: Iterable[tuple[int, int]], most: int
) -> tuple[dict[tuple[int, int], list[Excerpt]], int]:
    """Cut documents into excerpts of each length, in one pass and without randomness.

    Args:
        documents: pairs of tokens (1 + n,), end-of-text first, and bytes, which are not used.
        lengths: (least, full): a document's text is cut from its beginning into excerpts of `full` tokens; the rest at
            its end is an excerpt too if it has at least `least`.
        most: excerpts per length.

    Returns:
        For each length at most `most` excerpts, evenly spaced over all there are, none if no document is long enough;
        and the number of text tokens of the longest document.
    """
    samples = {length: EvenSample(most) for length in lengths}
    longest = 0
    for tokens, _ in documents:
        text = np.asarray(tokens[1:], dtype=np.int64)
        longest = max(longest, len(text))
        for (least, full), sample in samples.items():
            for start in range(0, len(text) - least + 1, full):
                if sample.wants_next():
                    before = text[max(0, start - _CONTEXT) : start]
                    sample.add(Excerpt(text[start : start + full].copy(), before.copy()))
    return {length: sample.items() for length, sample in samples.items()}, longest
