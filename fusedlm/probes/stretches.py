"""Pieces of documents, spread evenly over all the text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_CONTEXT = 4  # tokens before a stretch that its first token may need to be decoded as it stands in the text


@dataclass(frozen=True)
class Stretch:
    tokens: np.ndarray  # (n,) int64 text tokens, without end-of-text
    before: np.ndarray  # the text tokens just before them, at most 4


class Spread:
    """At most `most` things of a stream, evenly spaced over it; fewer than twice as many are held at any time."""

    def __init__(self, most: int):
        self._most, self._every, self._seen = most, 1, 0
        self._kept: list = []

    def wants_next(self) -> bool:
        """Whether the next thing of the stream is to be kept; to be asked once for each."""
        wanted = self._seen % self._every == 0
        self._seen += 1
        return wanted

    def keep(self, thing) -> None:
        self._kept.append(thing)
        if len(self._kept) == 2 * self._most:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def things(self) -> list:
        if len(self._kept) <= self._most:
            return self._kept
        at = np.linspace(0, len(self._kept) - 1, self._most).round().astype(int)
        return [self._kept[i] for i in at]


def stretches(
    documents: Iterable[tuple[np.ndarray, int]], sizes: Iterable[tuple[int, int]], most: int
) -> tuple[dict[tuple[int, int], list[Stretch]], int]:
    """Cut documents into stretches of each size, in one pass over them; nothing is random.

    Args:
        documents: pairs of tokens (1 + n,), end-of-text first, and bytes, which are not used.
        sizes: (least, full): a document's text is cut from its beginning into stretches of `full` tokens; what is left
            at its end is one too if it has `least`.
        most: stretches of a size.

    Returns:
        For each size at most that many, evenly spaced over all there are, none when no document is long enough; and
        the text tokens of the longest document.
    """
    spreads = {size: Spread(most) for size in sizes}
    longest = 0
    for tokens, _ in documents:
        text = np.asarray(tokens[1:], dtype=np.int64)
        longest = max(longest, len(text))
        for (least, full), spread in spreads.items():
            for start in range(0, len(text) - least + 1, full):
                if spread.wants_next():
                    before = text[max(0, start - _CONTEXT) : start]
                    spread.keep(Stretch(text[start : start + full].copy(), before.copy()))
    return {size: spread.things() for size, spread in spreads.items()}, longest
