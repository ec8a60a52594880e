"""Log-likelihoods of continuations; each context is read once, and all that follow it continue from its state."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fusedlm.model.precision import autocast
from fusedlm.model.rows import Row, empty_row, join_rows, take_row

_WIDEST = 1024  # tokens of a row per pass
_LEAST_SHARED = 16  # tokens: a shorter common beginning is not worth a pass of its own
_LOGITS = 256  # rows of logits that are in float64 at a time

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """nll: nats of all its tokens. is_greedy: each of them is the most likely one."""

    nll: float
    is_greedy: bool


class ContinuationScorer:
    """Scores pairs of a context and a continuation.

    Continuations of one context share its state, whatever the mixers, and contexts that begin alike, as with the same
    examples before each question, share the state of that beginning. All are read in batches of rows of any lengths;
    results are those of one pair alone, up to rounding. Sums are in float64.

    n_read: tokens that went through the model, padding not counted.
    """

    def __init__(self, model, device: torch.device, dtype: torch.dtype, batch_tokens: int | None = None):
        """
        Args:
            dtype: of autocast.
            batch_tokens: most tokens of the states of a batch, padding included (at least one context). None: 65536 on
                CUDA devices, 8192 elsewhere.
        """
        self._model, self._device, self._dtype = model, device, dtype
        self._batch_tokens = batch_tokens or (65536 if device.type == "cuda" else 8192)
        self.n_read = 0

    @torch.no_grad()
    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
    ) -> list[Continuation]:
        """
        Args:
            pairs: (context, continuation), ids; a context has at least one.
            progress: called with the number of pairs that have been scored.

        Raises:
            ValueError: a context is empty, an id is not in the vocabulary, or the likelihood is not finite.
        """
        groups: dict[Ids, list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not context:
                raise ValueError(f"pair {index} has no context; begin with end-of-text")
            if any(not 0 <= i < self._model.vocab_size for i in itertools.chain(context, continuation)):
                raise ValueError(f"pair {index} has ids outside of the vocabulary of {self._model.vocab_size}")
            groups.setdefault(tuple(context), []).append(index)
        found: list[Continuation | None] = [None] * len(pairs)
        n_done = 0
        batches = list(self._batches(groups, pairs))
        path = _Path(self)
        for number, batch in enumerate(batches):
            row = path.to(batch, batches[number + 1 :])
            for index, result in self._batch(batch, row, groups, pairs):
                found[index] = result
                n_done += 1
            if progress is not None:
                progress(n_done)
        return found

    def _batches(self, groups: dict[Ids, list[int]], pairs) -> Iterator[list[Ids]]:
        """Contexts, those with a common beginning next to one another."""
        batch, n_rows, width = [], 0, 0
        for context in sorted(groups):
            rows = len(groups[context])
            longest = len(context) + max(len(pairs[index][1]) for index in groups[context])
            if batch and (n_rows + rows) * max(width, longest) > self._batch_tokens:
                yield batch
                batch, n_rows, width = [], 0, 0
            batch.append(context)
            n_rows, width = n_rows + rows, max(width, longest)
        if batch:
            yield batch

    def _batch(self, batch: list[Ids], row: Row, groups, pairs) -> Iterator[tuple[int, Continuation]]:
        """Of every continuation of these contexts, which all begin with the tokens of the row."""
        rows = self.read([row] * len(batch), [context[row.length : -1] for context in batch])
        # Those of one length next to one another: less padding.
        read = zip(batch, rows, strict=True)
        entries = [(own, context[-1], index) for context, own in read for index in groups[context]]
        entries.sort(key=lambda entry: len(pairs[entry[2]][1]))
        starts, indices = [entry[:2] for entry in entries], [entry[2] for entry in entries]
        for first in range(0, len(indices), n := self._rows_at_once(starts, indices, pairs)):
            part = slice(first, first + n)
            yield from self._continue(starts[part], indices[part], pairs)

    def _rows_at_once(self, starts, indices, pairs) -> int:
        longest = max(row.length + len(pairs[i][1]) for (row, _), i in zip(starts, indices, strict=True))
        return max(1, self._batch_tokens // max(1, longest))

    def _continue(self, starts, indices, pairs) -> Iterator[tuple[int, Continuation]]:
        targets = [list(pairs[index][1]) for index in indices]
        inputs = [[last, *own[:-1]][: len(own)] for (_, last), own in zip(starts, targets, strict=True)]
        nlls: list[list[float]] = [[] for _ in indices]
        greedy = [True] * len(indices)
        state = join_rows(self._model, [row for row, _ in starts])
        for offset, lengths, logits in self._feed(state, inputs, with_logits=True):
            owners = [b for b, n in enumerate(lengths) for _ in range(n)]
            wanted = [id for b, n in enumerate(lengths) for id in targets[b][offset : offset + n]]
            for b, nll, is_greedy in zip(owners, *_scored(logits, wanted), strict=True):
                nlls[b].append(nll)
                greedy[b] &= is_greedy
        for index, own, is_greedy in zip(indices, nlls, greedy, strict=True):
            nll = math.fsum(own)
            if not math.isfinite(nll):
                raise ValueError(
                    f"pair {index}: the likelihood is not finite ({nll}); the weights are damaged or diverged, or "
                    "values overflow in this precision (try float32)"
                )
            yield index, Continuation(nll, is_greedy)

    def read(self, rows: list[Row], ids: list[Sequence[int]]) -> list[Row]:
        """The rows after these ids too."""
        if not any(ids):
            return rows
        state = join_rows(self._model, rows)
        for _ in self._feed(state, ids, with_logits=False):
            pass
        return [take_row(state, b) for b in range(len(rows))]

    def _feed(
        self, state, ids: list[Sequence[int]], with_logits: bool
    ) -> Iterator[tuple[int, list[int], torch.Tensor]]:
        """Append ids to each row, a few at a time; yields their place among the ids, how many each row has there, and
        the logits after each of these, row by row."""
        longest = max(map(len, ids), default=0)
        step = max(1, min(_WIDEST, self._batch_tokens // len(ids)))
        for offset in range(0, longest, step):
            parts = [list(own[offset : offset + step]) for own in ids]
            lengths = [len(part) for part in parts]
            width = max(lengths)
            self.n_read += sum(lengths)
            tokens = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self._device)
            places = [b * width + t for b, n in enumerate(lengths) for t in range(n)] if with_logits else [0]
            padding = {"lengths": lengths} if min(lengths) < width else {}
            select = torch.tensor(places, device=self._device)
            with autocast(self._device, self._dtype):
                output = self._model(tokens, state=state, select=select, **padding)
            yield offset, lengths, output.logits


class _Path:
    """States of the beginnings that a batch shares with those after it, shortest first."""

    def __init__(self, scorer: ContinuationScorer):
        self._scorer = scorer
        self._kept: list[tuple[Ids, Row]] = []

    def to(self, batch: list[Ids], later: list[list[Ids]]) -> Row:
        """The state of what all contexts of a batch begin with, their last token excepted."""
        shared = _common(batch[0], batch[-1], min(map(len, batch)) - 1)
        ids = batch[0][:shared]
        self._kept = [(own, row) for own, row in self._kept if ids[: len(own)] == own]
        begun, row = self._kept[-1] if self._kept else ((), empty_row())
        for stop in [*self._shared_later(batch, later, len(begun), shared), shared]:
            if stop - row.length < _LEAST_SHARED:
                continue
            (row,) = self._scorer.read([row], [ids[row.length : stop]])
            self._kept.append((ids[:stop], row))
        return row

    @staticmethod
    def _shared_later(batch, later, least: int, most: int) -> list[int]:
        """Lengths from which later batches continue, ascending."""
        stops, length = set(), most
        for before, after in itertools.pairwise([batch, *later]):
            length = min(length, _common(before[-1], after[0], min(map(len, after)) - 1))
            if length <= least:
                break
            stops.add(length)
        return sorted(stops)


def _common(a: Ids, b: Ids, most: int) -> int:
    """Length of the common beginning, at most `most`."""
    n = 0
    for x, y in zip(a[:most], b[:most], strict=False):
        if x != y:
            break
        n += 1
    return n


def _scored(logits_NV: torch.Tensor, wanted: list[int]) -> tuple[list[float], list[bool]]:
    """Nats of the wanted ids, in float64, and whether they are the most likely ones."""
    nlls, greedy = [], []
    ids_N = torch.tensor(wanted, device=logits_NV.device)
    for logits, ids in zip(logits_NV.split(_LOGITS), ids_N.split(_LOGITS), strict=True):
        logprobs = logits.double().log_softmax(-1)
        nlls += (-logprobs.gather(1, ids[:, None])[:, 0]).tolist()
        greedy += (logits.argmax(-1) == ids).tolist()
    return nlls, greedy
