"""Which source each sample is of: a function of the sample counter, with the shares of the recipe at every prefix.

Sources are the leaves of a balanced binary tree. A node with weight q, of which its left half has w, sends its m-th
sample to the left if floor((m + 1) w / q + phase) is greater than floor(m w / q + phase), and the m-th sample has so
many before it on the left: a Sturmian sequence, whose counts are within 1 of m w / q for every m (Morse and Hedlund,
1940). Source and position in the source of any sample thus take one division per level, and the count of a source is
within a few samples of its share at every prefix. All arithmetic is in integers.

Weights are constant in pieces of the run: a stage, or a part of a stage whose weights change linearly. A piece starts
with the counts and the remainders of the piece before it, so that rounding does not add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedlm.config import Recipe
from fusedlm.data.order import keyed

_UNITS = 2**30  # the sum of the integer weights of a piece: products with them fit in 64 bits
_ANNEALING_PIECES = 256  # of a stage whose weights change


@dataclass(frozen=True)
class Span:
    """Samples from `first` on, to the next span, and their weights by source: at their start and at their end."""

    first: int
    begin: dict[str, float]
    end: dict[str, float]


class SourceSchedule:
    """Source, and position in it, of every sample.

    Args:
        spans: in order; the first begins at sample 0. The weights of the last one do not change.
        seed: of the phases.

    Attributes:
        names: of the sources, sorted.
    """

    def __init__(self, spans: Sequence[Span], seed: int):
        self.names = sorted({name for span in spans for name in (*span.begin, *span.end)})
        self.spans = list(spans)
        firsts, weights = _pieces(spans, self.names)
        self._firsts = np.asarray(firsts, np.int64)
        self._children: list[tuple[int, int]] = []  # of each node; -1 - i is source i
        self._leaves: list[tuple[int, int, int]] = []  # of each node: first source, first of the right half, end
        self._root = self._grow(0, len(self.names))
        # (pieces, nodes): index of the node's first sample, samples of the left half before it, w, q, remainder
        self._starts, self._lefts, self._shares, self._wholes, self._phases = self._tabulate(firsts, weights, seed)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the source in `names`, and samples of it before this one (int64 each), of int64 samples."""
        piece = self._firsts.searchsorted(samples, side="right") - 1
        node, index = np.full_like(samples, self._root), samples.copy()
        children = np.asarray(self._children, np.int64).reshape(-1, 2)
        while (inner := np.flatnonzero(node >= 0)).size:
            at, own = (piece[inner], node[inner]), index[inner]
            left, after = self._count_left(at, own), self._count_left(at, own + 1)
            goes_right = after == left
            index[inner] = np.where(goes_right, own - left, left)
            node[inner] = children[node[inner], goes_right.astype(np.int64)]
        return -1 - node, index

    def counts(self, n_samples: int) -> dict[str, int]:
        """Samples of each source among the first n_samples."""
        piece = int(self._firsts.searchsorted(n_samples, side="right")) - 1
        found, open_nodes = {}, [(self._root, n_samples)]
        while open_nodes:
            node, count = open_nodes.pop()
            if node < 0:
                found[self.names[-1 - node]] = count
                continue
            left = int(self._count_left((np.array([piece]), np.array([node])), np.array([count]))[0])
            open_nodes += zip(self._children[node], (left, count - left), strict=True)
        return {name: found[name] for name in self.names}

    def _count_left(self, at: tuple[np.ndarray, np.ndarray], index: np.ndarray) -> np.ndarray:
        share, whole = self._shares[at], self._wholes[at]
        # A product of the index could overflow.
        multiple, rest = np.divmod(index - self._starts[at], whole)
        return self._lefts[at] + share * multiple + (share * rest + self._phases[at]) // whole

    def _grow(self, first: int, end: int) -> int:
        if end - first == 1:
            return -1 - first
        node, middle = len(self._children), (first + end) // 2
        self._children.append((0, 0))
        self._leaves.append((first, middle, end))
        self._children[node] = (self._grow(first, middle), self._grow(middle, end))
        return node

    def _tabulate(self, firsts: list[int], weights: list[list[int]], seed: int) -> list[np.ndarray]:
        n_nodes = len(self._children)
        table = np.zeros((5, len(firsts), n_nodes), np.int64)
        counts = [[first] + [0] * (n_nodes - 1) for first in firsts]  # of each node, where each piece starts
        for node, (first, middle, end) in enumerate(self._leaves):  # parents before children
            left = 0
            remainder, unit = int.from_bytes(keyed(seed, node, "mixture")[:3], "little"), 2**24
            for piece, own in enumerate(weights):
                share, whole = sum(own[first:middle]), sum(own[first:end])
                if whole:
                    remainder, unit = remainder * whole // unit, whole
                # A node of a piece without weight gets no sample; the remainder waits for the next piece.
                table[:, piece, node] = counts[piece][node], left, share, max(1, whole), remainder if whole else 0
                for child, count in zip(self._children[node], (left, counts[piece][node] - left), strict=True):
                    if child >= 0:
                        counts[piece][child] = count
                if whole and piece + 1 < len(weights):
                    more, remainder = divmod(remainder + share * (counts[piece + 1][node] - counts[piece][node]), whole)
                    left += more
        return list(table)


def source_schedule(recipe: Recipe) -> SourceSchedule | None:
    """The schedule of a recipe; None: it has a single source."""
    data, train = recipe.data, recipe.train
    if data.sources is None:
        return None
    ends = [round(tokens / train.seq_len) for tokens in data.stage_ends(train.total_tokens())]
    weights = [_normalised(stage, data.sources) for stage in data.weights()]
    spans = []
    for index, (first, begin) in enumerate(zip([0, *ends], weights, strict=True)):
        anneal = bool(data.stages) and data.stages[index].anneal
        spans.append(Span(first, begin, weights[index + 1] if anneal else begin))
    return SourceSchedule(spans, train.seed)


def stage_lines(recipe: Recipe) -> list[str]:
    """The stages of a recipe in words: `web 60%, code 40%, to 1,000,000 tokens`; empty: it has none."""
    data, total = recipe.data, recipe.train.total_tokens()
    if not data.stages:
        return []
    lines = []
    for stage, end in zip(data.stages, [*data.stage_ends(total), None], strict=True):
        shares = _normalised(stage.weights, sorted(stage.weights))
        line = ", ".join(f"{name} {100 * share:.3g}%" for name, share in shares.items() if share)
        line += ", annealed to those of the next stage" if stage.anneal else ""
        if end is not None:
            line += f", to {end:,} tokens" + (" (after the run)" if end > total else "")
        lines.append(line)
    return lines


def total_samples(recipe: Recipe) -> int:
    """Samples of a run: windows of train.seq_len tokens."""
    return recipe.train.total_tokens() // recipe.train.seq_len


def _normalised(weights: dict[str, float], names) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: weights.get(name, 0.0) / total for name in names}


def _pieces(spans: Sequence[Span], names: list[str]) -> tuple[list[int], list[list[int]]]:
    """First sample and integer weights of each piece. A part of a span has the weights of its middle."""
    firsts, weights = [], []
    for number, span in enumerate(spans):
        n_parts, length = 1, 0
        if span.begin != span.end:
            length = spans[number + 1].first - span.first
            n_parts = min(_ANNEALING_PIECES, length)
        for part in range(n_parts):
            firsts.append(span.first + part * length // n_parts)
            done = (part + 0.5) / n_parts
            mean = [span.begin.get(name, 0.0) * (1 - done) + span.end.get(name, 0.0) * done for name in names]
            weights.append([max(1, round(weight * _UNITS)) if weight > 0 else 0 for weight in mean])
    return firsts, weights
