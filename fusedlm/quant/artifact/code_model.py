"""The probability model of integer weights: what the entropy coder expects of each code of a matrix.

A code is expected near the value that a model of low rank gives it, at a distance that the level of its row and the
distances in its column so far say. Levels of the rows and their weights in the model of low rank are stored before the
codes; all that concerns columns is learnt from the rows decoded so far. Codes of equal expectation share an adaptive
table. Rows are coded in blocks, so that a block is one vectorised step. Integers throughout: an expectation must be the
same wherever a file is read.
"""

from dataclasses import dataclass
from functools import cache
from math import factorial, isqrt
from typing import Protocol

import numpy as np

from fusedlm.quant.artifact.tables import Tables

LEVELS = 48  # quarter octaves of the expected distance: 2**-4 to 2**7.75
LARGEST_WEIGHT = 15  # of a row in the model of low rank
LARGEST_RANK = 3

_BLOCK = 4096  # most elements of a block that has several rows
_LEAST_BLOCKS = 16  # of a matrix, as long as it has the rows: columns are learnt from block to block
_FRACTION = 8  # values are in units of 2**-8 of a code
_LOWEST = 4 * (_FRACTION - 4)  # quarter octaves of level 0, in these units
_NORMAL = 16  # the distance of a code over that of its row is in units of 2**-16
_COLUMN_PRIOR = 6  # rows of average distance that every column begins with
_COLUMN_RANGE = 12  # most quarter octaves of a column above or below its rows
_RANK_PRIOR = 24  # sum of squared weights that every column begins with in the model of low rank
_WEIGHT_STEPS = 4  # weights per root mean square of the weights
_OFFSETS = 4  # tables by the distance of the expected value from the nearest code: eighths of a code
_PRIOR_TOTAL, _STEP = 1 << 12, 48
_ROUNDED, _ROUNDED_VARIANCE = 180, 5200  # below 0.7 codes, a variance of 0.08
_INTEGRATION = (-96, -32, 32, 96)  # where the density of a code is taken


def _power_of_two(eighths: int) -> int:
    """floor(2**(eighths / 8))."""
    return isqrt(isqrt(isqrt(1 << eighths)))


# A quarter octave is centred on 2**(i / 4): it begins an eighth of an octave lower.
_BOUNDS = np.array([_power_of_two(max(2 * i - 1, 0)) for i in range(4 * 40)])
_MAGNITUDES = np.array([_power_of_two(2 * (_LOWEST + level)) for level in range(LEVELS)])


def _quarter_octaves(values: np.ndarray) -> np.ndarray:
    """round(4 log2(values)) of positive integers, 0 for 0; a little off below 16."""
    return np.maximum(np.searchsorted(_BOUNDS, values, side="right") - 1, 0)


@dataclass(frozen=True)
class Layout:
    """How a matrix is coded. transposed: its columns are the rows of the model. rank: of the model of low rank, 0 to
    LARGEST_RANK. level: of a typical row, 0 to LEVELS - 1."""

    transposed: bool
    rank: int
    level: int


class Channel(Protocol):
    """Where symbols go to, or come from."""

    def code(self, contexts: np.ndarray, tables: Tables, symbols: np.ndarray | None) -> np.ndarray:
        """Encode symbols, or decode and return them if they are None. contexts and symbols (n,) int64."""


class CodeModel:
    """The tables of all matrices of one number of bits, which go on learning from matrix to matrix.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int):
        self.largest = 2 ** (bits - 1) - 1
        self._codes = Tables(_prior(self.largest), _STEP)
        self._levels = Tables(_peaked(LEVELS), 4)
        self._weights = Tables(np.full((LARGEST_RANK, 2 * LARGEST_WEIGHT + 1), 4), 4)

    def copy(self) -> "CodeModel":
        """A model that learns from here on by itself."""
        other = CodeModel.__new__(CodeModel)
        other.largest = self.largest
        other._codes, other._levels, other._weights = self._codes.copy(), self._levels.copy(), self._weights.copy()
        return other

    def encode(self, channel: Channel, codes: np.ndarray, *, transposed: bool, rank: int) -> Layout:
        """Send a matrix (rows, columns) int64, neither 0, through a channel, and learn from it."""
        codes = np.ascontiguousarray(codes.T) if transposed else codes
        weights = _row_weights(codes, rank)
        levels = _row_levels(codes, weights)
        layout = Layout(transposed, rank, int(np.bincount(levels).argmax()))
        self._run(channel, codes.shape, layout, codes, levels, weights)
        return layout

    def decode(self, channel: Channel, shape: tuple[int, int], layout: Layout) -> np.ndarray:
        """A matrix of a shape, int8, from a channel; learns from it."""
        if layout.transposed:
            return np.ascontiguousarray(self._run(channel, shape[::-1], layout).T)
        return self._run(channel, shape, layout)

    def _run(
        self,
        channel: Channel,
        shape: tuple[int, int],
        layout: Layout,
        codes: np.ndarray | None = None,
        levels: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        n_rows, n_columns = shape
        levels = _side(channel, self._levels, 0, np.full(n_rows, layout.level), levels)
        middle = np.full(n_rows, LARGEST_WEIGHT)
        given = [None] * layout.rank if weights is None else weights + middle
        found = np.zeros((layout.rank, n_rows), np.int64)
        for component, of_rows in enumerate(given):
            found[component] = _side(channel, self._weights, component, middle, of_rows) - middle
        weights = found
        low_rank, columns = _LowRank(layout.rank, n_columns), _Columns(n_columns)
        n_symbols = 2 * self.largest + 1
        result = np.empty(shape, np.int8)
        for rows in _blocks(shape):
            expected = low_rank.expect(weights[:, rows])
            centre = np.clip((expected + (1 << _FRACTION - 1)) >> _FRACTION, -self.largest, self.largest)
            offset = expected - (centre << _FRACTION)
            side = np.where(offset < 0, -1, 1)
            tables = np.minimum(np.abs(offset) >> _FRACTION - 3, _OFFSETS - 1)
            contexts = (tables * LEVELS + columns.expect(levels[rows])).ravel()
            symbols = None
            if codes is not None:
                symbols = (((codes[rows] - centre) * side + self.largest) % n_symbols).ravel()
            symbols = channel.code(contexts, self._codes, symbols)
            self._learn(contexts, symbols)
            found = centre + side * (symbols.reshape(side.shape) - self.largest)
            found = (found + self.largest) % n_symbols - self.largest
            result[rows] = found
            columns.learn(levels[rows], np.abs((found << _FRACTION) - expected))
            low_rank.learn(weights[:, rows], found)
        return result

    def _learn(self, contexts: np.ndarray, symbols: np.ndarray) -> None:
        """Where the expected value is a code, opposite distances are equally likely: each is counted as both."""
        even = contexts < LEVELS
        mirrored = 2 * self.largest - symbols[even]
        self._codes.learn(np.concatenate([contexts, contexts[even]]), np.concatenate([symbols, mirrored]))


def _blocks(shape: tuple[int, int]) -> list[slice]:
    """The rows of each step."""
    n_rows, n_columns = shape
    size = max(1, min(_BLOCK // n_columns, n_rows // _LEAST_BLOCKS))
    return [slice(first, min(first + size, n_rows)) for first in range(0, n_rows, size)]


def _side(channel: Channel, tables: Tables, context: int, typical: np.ndarray, values: np.ndarray | None) -> np.ndarray:
    """Send one value per row, in the circle of the table's symbols, as its distance from a typical one."""
    n = tables.n_symbols
    contexts = np.full(len(typical), context)
    symbols = channel.code(contexts, tables, None if values is None else (values - typical) % n)
    tables.learn(contexts, symbols)
    return (symbols + typical) % n


class _Columns:
    """How far from the expected values the codes of each column have been, over the distance that is typical of their
    rows."""

    def __init__(self, n_columns: int):
        self._distance = np.full(n_columns, _COLUMN_PRIOR << _NORMAL, np.int64)
        self._rows = _COLUMN_PRIOR

    def expect(self, levels: np.ndarray) -> np.ndarray:
        """Levels (rows, columns) of the codes of rows with these levels."""
        relative = _quarter_octaves(self._distance // self._rows) - 4 * _NORMAL
        return np.clip(levels[:, None] + np.clip(relative, -_COLUMN_RANGE, _COLUMN_RANGE), 0, LEVELS - 1)

    def learn(self, levels: np.ndarray, distances: np.ndarray) -> None:
        self._distance += ((distances << _NORMAL) // _MAGNITUDES[levels][:, None]).sum(0)
        self._rows += len(levels)


class _LowRank:
    """The model of low rank: a row is expected to be the sum of its weights times the vectors, which are learnt."""

    def __init__(self, rank: int, n_columns: int):
        self._product = np.zeros((rank, n_columns), np.int64)
        self._square = np.full(rank, _RANK_PRIOR, np.int64)

    def _parts(self, weights: np.ndarray) -> np.ndarray:
        """(rank, rows, columns), in units of 2**-_FRACTION."""
        return weights[:, :, None] * (self._product // self._square[:, None])[:, None]

    def expect(self, weights: np.ndarray) -> np.ndarray:
        """weights (rank, rows) -> expected values (rows, columns)."""
        return self._parts(weights).sum(0)

    def learn(self, weights: np.ndarray, codes: np.ndarray) -> None:
        if len(weights):
            parts = self._parts(weights)
            # What the vectors before it leave over.
            rest = (codes << _FRACTION) - (np.cumsum(parts, 0) - parts)
            self._product += (weights[:, :, None] * rest).sum(1)
            self._square += (weights * weights).sum(1)


def _row_weights(codes: np.ndarray, rank: int) -> np.ndarray:
    """(rank, rows) int64: the first left singular vectors, rounded. They are stored, so floats do no harm here."""
    if not rank:
        return np.zeros((0, len(codes)), np.int64)
    x = codes.astype(np.float64)
    draw = np.random.default_rng(0)
    right = draw.standard_normal((codes.shape[1], min(rank + 2, *codes.shape)))
    for _ in range(8):  # of subspace iteration
        right = np.linalg.qr(x.T @ (x @ right))[0]
    left, size, _ = np.linalg.svd(x @ right, full_matrices=False)
    left = np.pad(left, ((0, 0), (0, max(0, rank - left.shape[1]))))[:, :rank].T
    scale = np.sqrt((left * left).mean(1, keepdims=True)) + 1e-30
    weights = np.rint(left / scale * _WEIGHT_STEPS)
    return np.clip(weights, -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int64)


def _row_levels(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(rows,) int64: of the mean distance of each row from its expected values."""
    low_rank = _LowRank(len(weights), codes.shape[1])
    levels = []
    for rows in _blocks(codes.shape):
        distance = np.abs((codes[rows] << _FRACTION) - low_rank.expect(weights[:, rows]))
        levels.append(_quarter_octaves(distance.sum(1) // codes.shape[1]) - _LOWEST)
        low_rank.learn(weights[:, rows], codes[rows])
    return np.clip(np.concatenate(levels), 0, LEVELS - 1)


@cache
def _prior(largest: int) -> np.ndarray:
    """(contexts, symbols): counts before the first code, of a discretised normal distribution."""
    distances = np.arange(-largest, largest + 1) << _FRACTION
    steps = 64  # of the table of exp(-x), per unit of x
    one = sum((-1) ** n * (1 << 60) // (steps**n * factorial(n)) for n in range(12))  # exp(-1 / steps)
    decay = [1 << 60]
    while len(decay) < 16 * steps:
        decay.append(decay[-1] * one >> 60)
    table = np.array([value >> 28 for value in decay] + [0])
    counts = []
    for offset in range(_OFFSETS):
        mean = (2 * offset + 1) << _FRACTION - 4 if offset else 0
        for magnitude in _MAGNITUDES.tolist():
            # E |x| is 0.8 standard deviations; most of what is nearer than that to zero is rounded to it.
            variance = magnitude * magnitude * 25 // 16 + (_ROUNDED_VARIANCE if magnitude < _ROUNDED else 0)
            weights = sum(
                table[np.minimum((distances + shift - mean) ** 2 * steps // (2 * variance), len(table) - 1)]
                for shift in _INTEGRATION
            )
            counts.append(1 + weights * _PRIOR_TOTAL // max(int(weights.sum()), 1))
    return np.stack(counts)


def _peaked(n: int) -> np.ndarray:
    """Counts of a table whose symbol is most often 0, or near it in the circle of n."""
    distance = np.minimum(np.arange(n), n - np.arange(n))
    return (64 >> np.minimum(2 * distance, 6))[None]
