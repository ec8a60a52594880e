"""Counts of n-grams in the text before each token, exact and for all tokens at once.

An n-gram is known by an index that is unique to it, never by a hash: counts of different n-grams are never added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NgramCounts:
    """What is known of each of n tokens, before it is read, from the tokens before it. Arrays are (orders, n) int64.

    The context of a token at order k is the k - 1 tokens before it. Only `target` and `of_target` know the token.
    """

    orders: tuple[int, ...]
    target: np.ndarray  # (n,) the tokens
    total: np.ndarray  # how often the context was followed by a token; 0: it is new, or crosses a document
    distinct: np.ndarray  # by how many different tokens
    highest: np.ndarray  # by the most frequent one
    most_frequent: np.ndarray  # that token, of several the one that got there last; -1: there is none
    of_target: np.ndarray  # how often by the token that is to be scored


def count_ngrams(documents: Sequence[np.ndarray], orders: Sequence[int], *, reset: bool = False) -> NgramCounts:
    """Counts before each token of the documents' text, in order.

    Time is that of sorting the tokens, twice per order up to the highest.

    Args:
        documents: tokens (1 + n,) of integers from 0, end-of-text first, which is context and is not counted.
        orders: lengths of n-grams, from 1, increasing.
        reset: whether each document begins with no counts.

    Raises:
        ValueError: the orders are not increasing numbers from 1.
    """
    orders = tuple(orders)
    if not orders or orders[0] < 1 or list(orders) != sorted(set(orders)):
        raise ValueError(f"orders={list(orders)} must be increasing numbers from 1")
    lengths = [len(tokens) for tokens in documents]
    stream = np.concatenate([np.zeros(0, np.int64), *(np.asarray(tokens, dtype=np.int64) for tokens in documents)])
    starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, dtype=np.int64)
    place = np.arange(len(stream)) - np.repeat(starts, lengths)  # in the document
    target = place > 0
    vocab = int(stream.max(initial=0)) + 1
    # grams[i]: index of the n-gram that ends at i, for the current n; of 0 tokens, the document if counts are its own.
    grams = np.repeat(np.arange(len(lengths)), lengths) if reset else np.zeros(len(stream), dtype=np.int64)
    found = []
    for order in range(1, orders[-1] + 1):
        context = np.concatenate([grams[:1], grams[:-1]])  # of the token at i: the n-gram before it
        known = target & (place >= order - 1)
        grams = _index(context * vocab + stream, place >= order - 1)
        if order in orders:
            found.append(_before(context[known], grams[known], stream[known], known[target]))
    return NgramCounts(orders, stream[target], *(np.stack(arrays) for arrays in zip(*found, strict=True)))


def _index(pairs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Each pair's index among the different ones; of others 0."""
    index = np.zeros(len(pairs), dtype=np.int64)
    index[valid] = np.unique(pairs[valid], return_inverse=True)[1]
    return index


def _before(context: np.ndarray, gram: np.ndarray, token: np.ndarray, where: np.ndarray) -> list[np.ndarray]:
    """The arrays of `NgramCounts` of one order.

    Args:
        context, gram, token: of each token with a context, in the order of the text.
        where: which of all tokens they are.
    """
    n = len(context)
    by_context = np.argsort(context, kind="stable")
    total = _rank(context, by_context)
    of_target = _rank(gram, np.argsort(gram, kind="stable"))
    segment = np.cumsum(np.diff(context[by_context], prepend=-1) != 0)
    sorted_total, count = total[by_context], of_target[by_context] + 1  # of the token, itself included
    fresh = np.cumsum(count == 1)
    distinct = fresh - (count == 1)
    distinct -= distinct[np.arange(n) - sorted_total]  # less those of the contexts before
    # Running maxima in a segment: keys of a later segment are higher than all before, and its first token leads it.
    running = np.maximum.accumulate(segment * (n + 1) + count) - segment * (n + 1)
    leader = np.maximum.accumulate(np.where(count == running, np.arange(n), 0))
    known = sorted_total > 0
    highest = np.where(known, np.roll(running, 1), 0)
    frequent = np.where(known, token[by_context][np.roll(leader, 1)], -1)
    arrays = []
    for values in (distinct, highest, frequent):
        unsorted = np.empty(n, dtype=np.int64)
        unsorted[by_context] = values
        arrays.append(unsorted)
    distinct, highest, frequent = arrays
    return [
        _spread(values, where, other)
        for values, other in ((total, 0), (distinct, 0), (highest, 0), (frequent, -1), (of_target, 0))
    ]


def _rank(index: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many equal elements come before each element. order: a stable sort."""
    rank = np.empty(len(index), dtype=np.int64)
    ordered = index[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank[order] = np.arange(len(index)) - np.repeat(first, np.diff(np.append(first, len(index))))
    return rank


def _spread(values: np.ndarray, where: np.ndarray, other: int) -> np.ndarray:
    spread = np.full(len(where), other, dtype=np.int64)
    spread[where] = values
    return spread
