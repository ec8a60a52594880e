"""Reading prompts in chunks: which tokens of which sequences come next, and where their states are copied."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fusedlm.generation.steps import Predictor
from fusedlm.model.rows import Row, empty_row, join_rows, take_row, take_snapshot, take_tokens
from fusedlm.serve.prefix_cache import PrefixCache
from fusedlm.serve.prompt_steps import PromptSteps
from fusedlm.serve.requests import Sequence
from fusedlm.serve.sampling import scores


@dataclass(eq=False)
class Reading:
    """A sequence whose prompt is being read.

    position: tokens read. boundaries: lengths at which to stop and copy the state, ascending. row or state: what was
    read, of this sequence alone.
    """

    sequence: Sequence
    position: int
    boundaries: list[int]
    row: Row | None
    state: object = None

    def next_stop(self, chunk: int) -> int:
        """Tokens read after the next chunk."""
        while self.boundaries and self.boundaries[0] <= self.position:
            self.boundaries.pop(0)
        return min([self.position + chunk, len(self.sequence.ids), *self.boundaries[:1]])

    def take_row(self) -> Row:
        if self.row is None:
            self.row, self.state = take_row(self.state, 0), None
        return self.row


@dataclass(frozen=True)
class Read:
    """A sequence whose prompt has been read: its state, copied on request, and the logits after it, (V,)."""

    sequence: Sequence
    take_row: Callable[[], Row]
    logits_V: torch.Tensor


class Prefill:
    """Reads prompts, one chunk per call.

    A chunk has at most `chunk` tokens: of one long prompt, or of several short ones together, in the order in which
    they came. Short pieces are read by `short`, where it can. Prompts whose beginning is in the prefix cache start
    after it. Blocks go into the cache when the prompt has been read; of models with snapshots where another prompt may
    leave this one: at the last boundary of blocks before its end, where it leaves what the cache knows, and every
    chunk.
    """

    def __init__(self, predictor: Predictor, cache: PrefixCache, chunk: int, short: PromptSteps):
        self._predictor, self._cache, self._short = predictor, cache, short
        self.chunk = max(chunk, cache.block_size) // cache.block_size * cache.block_size
        self._readings: list[Reading] = []
        self.like: Row | None = None  # any row with a token, for the shapes of its parts
        self.n_tokens = 0  # read so far, those of the cache not counted

    def __len__(self) -> int:
        return len(self._readings)

    def start(self, sequence: Sequence) -> None:
        ids, size = sequence.ids, self._cache.block_size
        last = len(ids) - 1  # one token must be read, for its logits
        row, n_known = None, 0
        if not sequence.score_prompt:
            found = self._cache.find(ids, last)
            row, n_known = found.row, found.n_known
        row = row or empty_row()
        sequence.cached_tokens = row.length
        boundaries = []
        if self._cache.max_bytes > 0 and self._cache.snapshots:
            where = {last // size * size, n_known, *range(self.chunk, last + 1, self.chunk)}
            boundaries = sorted(n for n in where if n > row.length)
        self._readings.append(Reading(sequence, row.length, boundaries, row))

    def cancel(self, sequence: Sequence) -> bool:
        """Whether the sequence was being read."""
        found = [reading for reading in self._readings if reading.sequence is sequence]
        for reading in found:
            self._readings.remove(reading)
        return bool(found)

    def sequences(self) -> list[Sequence]:
        return [reading.sequence for reading in self._readings]

    def step(self) -> list[Read]:
        """Read a chunk; returns the sequences whose prompts have been read."""
        done, left = [], self.chunk
        while group := self._short_group(left):
            found, n_read = self._read_short(group)
            if not n_read:
                break
            done += found
            left -= n_read
        return done if left < self.chunk or not self._readings else self._read_chunk()

    def _read_chunk(self) -> list[Read]:
        group = self._next_group()
        stops = [reading.next_stop(self.chunk) for reading in group]
        new = self._new(group, stops)
        state = self._join(group, new)
        wants = [reading.sequence.score_prompt for reading in group]
        if any(wants):
            logits = self._all_logits(new, state)
            for b, (reading, ids) in enumerate(zip(group, new, strict=True)):
                if wants[b]:
                    self._score(reading, logits[b, : len(ids)])
            last_BV = torch.stack([logits[b, len(ids) - 1] for b, ids in enumerate(new)])
        else:
            last_BV = self._predictor.last_logits(dict(enumerate(new)), state)
        if self.like is None:
            self.like = take_row(state, 0, 1)
        done = []
        for b, (reading, stop) in enumerate(zip(group, stops, strict=True)):
            if self._advance(reading, stop, state, b):
                done.append(Read(reading.sequence, partial(take_row, state, b), last_BV[b]))
            elif len(group) == 1:
                reading.state, reading.row = state, None
            else:
                reading.state, reading.row = None, take_row(state, b)
        return done

    def _read_short(self, group: list[Reading]) -> tuple[list[Read], int]:
        """What has been read, and the number of tokens: 0 where nothing can be read like this."""
        stops = [reading.next_stop(self.chunk) for reading in group]
        new = self._new(group, stops)
        logits_BV = self._short.read([reading.take_row() for reading in group], new, self.like)
        if logits_BV is None:
            return [], 0
        done, last_BV = [], logits_BV.clone()  # the next read writes to the logits and to the rows
        for b, (reading, stop) in enumerate(zip(group, stops, strict=True)):
            is_done = self._advance(reading, stop, self._short.state, b)
            row = take_row(self._short.state, b, stop)
            if is_done:
                done.append(Read(reading.sequence, lambda row=row: row, last_BV[b]))
            else:
                reading.row = row
        return done, sum(map(len, new))

    @staticmethod
    def _new(group: list[Reading], stops: list[int]) -> list[list[int]]:
        return [reading.sequence.ids[reading.position : stop] for reading, stop in zip(group, stops, strict=True)]

    def _advance(self, reading: Reading, stop: int, state, b: int) -> bool:
        """Note that row b of the state has been read up to `stop`. Whether that is the end of the prompt."""
        self.n_tokens += stop - reading.position
        reading.position = stop
        self._keep(reading, state, b)
        is_done = stop == len(reading.sequence.ids)
        if is_done:
            self._readings.remove(reading)
        return is_done

    def _short_group(self, left: int) -> list[Reading]:
        """The first readings whose next pieces can be read together by `short`, of at most `left` tokens; empty: the
        first one is long, or wants all its logits."""
        group, width = [], 0
        for reading in self._readings if self.like is not None else ():
            width = max(width, reading.next_stop(self.chunk) - reading.position)
            n = len(group) + 1
            if reading.sequence.score_prompt or n * width > left or not self._short.fits(n, width):
                break
            group.append(reading)
        return group

    def _next_group(self) -> list[Reading]:
        """The first reading, and those after it that fit into the chunk with it."""
        group, width = [], 0
        for reading in self._readings:
            width = max(width, reading.next_stop(self.chunk) - reading.position)
            if group and (len(group) + 1) * width > self.chunk:
                break
            group.append(reading)
        return group

    def _join(self, group: list[Reading], new: list[list[int]]):
        if len(group) == 1:
            reading = group[0]
            if reading.state is None:
                return join_rows(self._predictor.model, [reading.row], len(reading.sequence.ids))
            return reading.state
        room = max(reading.position for reading in group) + max(map(len, new))
        return join_rows(self._predictor.model, [reading.take_row() for reading in group], room)

    def _all_logits(self, new: list[list[int]], state) -> torch.Tensor:
        width = max(map(len, new))
        lengths = [len(ids) for ids in new]
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in new], device=self._predictor.device)
        return self._predictor.logits(tokens, state, **({"lengths": lengths} if min(lengths) < width else {}))

    @staticmethod
    def _score(reading: Reading, logits_TV: torch.Tensor) -> None:
        """The log-probabilities of the tokens after these positions, except those after the prompt."""
        ids, n_top = reading.sequence.ids, reading.sequence.choosing.logprobs or 0
        known = ids[reading.position + 1 : reading.position + 1 + len(logits_TV)]
        if known:
            reading.sequence.prompt_scores += scores(logits_TV[: len(known)], known, n_top)

    def _keep(self, reading: Reading, state, b: int) -> None:
        """Put the state into the cache, at the boundaries that were planned, and without snapshots at the end."""
        stop, snapshot = reading.position, None
        if stop in reading.boundaries:
            snapshot = take_snapshot(state, b, stop)
        elif self._cache.snapshots or stop < len(reading.sequence.ids):
            return
        ids = reading.sequence.ids[: stop // self._cache.block_size * self._cache.block_size]
        self._cache.insert(ids, lambda first, last: take_tokens(state, b, first, last), snapshot)
