"""Confidence interval of a gain in bits per byte, by resampling the text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_RESAMPLES = 4000
_DOCUMENTS = 20  # fewest that are resampled; with fewer, blocks are
_BLOCKS, _BLOCK_TOKENS = 200, 256  # most blocks, and fewest tokens of one


@dataclass(frozen=True)
class Gain:
    """Bits per byte that an adapted score has less than the plain one of the same text, 95% interval, and what was
    resampled. low and high are None for a text too short to be cut."""

    gain: float
    low: float | None
    high: float | None
    units: str  # "documents" or "blocks"
    n_units: int


def paired_gain(
    plain: np.ndarray, adapted: np.ndarray, lengths: Sequence[int], n_bytes: Sequence[int], seed: int = 0
) -> Gain:
    """The gain over a text, with the percentile interval of a paired bootstrap (Efron and Tibshirani, 1993, chapter
    13): units of the text are drawn with replacement, each with its nats under both scores and its bytes.

    Units are documents if there are at least 20 with text, otherwise up to 200 blocks of at least 256 consecutive
    tokens; a token of a block counts its document's mean bytes per token. Units are taken as independent: a score that
    adapts over units has an interval that is somewhat too narrow.

    Args:
        plain, adapted: (n,) nats of each token, in the order of the text.
        lengths, n_bytes: tokens and bytes of each document.
    """
    bits = (plain - adapted) / math.log(2)
    lengths, n_bytes = np.asarray(lengths), np.asarray(n_bytes, dtype=np.float64)
    held = lengths > 0
    lengths, n_bytes = lengths[held], n_bytes[held]
    if len(lengths) >= _DOCUMENTS:
        units, starts = "documents", np.cumsum([0, *lengths[:-1]])
        per_unit = n_bytes
    else:
        units, n_blocks = "blocks", max(1, min(_BLOCKS, len(bits) // _BLOCK_TOKENS))
        starts = np.linspace(0, len(bits), n_blocks, endpoint=False).astype(np.int64)
        per_unit = np.add.reduceat(np.repeat(n_bytes / lengths, lengths), starts)
    saved = np.add.reduceat(bits, starts)
    gain = math.fsum(bits) / float(n_bytes.sum())
    n = len(starts)
    if n < 2:
        return Gain(gain, None, None, units, n)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    low, high = np.quantile(draws @ saved / (draws @ per_unit), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Gain(gain, float(low), float(high), units, n)
