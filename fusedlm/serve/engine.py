"""The engine: continuous batching of sequences whose prompts are read in chunks; without threads and without HTTP."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fusedlm.generation.sampling import NOT_FINITE
from fusedlm.generation.steps import Predictor
from fusedlm.model.rows import Snapshot, needs_snapshot, take_row
from fusedlm.serve.metrics import EngineMetrics
from fusedlm.serve.prefill import Prefill, Read
from fusedlm.serve.prefix_cache import PrefixCache
from fusedlm.serve.prompt_steps import PromptSteps
from fusedlm.serve.queue import WaitingQueue
from fusedlm.serve.requests import Piece, Sequence
from fusedlm.serve.running import RunningSequence
from fusedlm.serve.sampling import next_tokens
from fusedlm.serve.slots import Slots
from fusedlm.serve.steps import DecodeSteps
from fusedlm.serve.weights import WeightsVersion


@dataclass(frozen=True)
class Limits:
    """context: most tokens of a prompt and its continuation. sequences: decoded together. waiting: in the queue.
    chunk: tokens of prompts per step. cache_bytes: of the prefix cache; 0: none. block_size: of the prefix cache, in
    tokens."""

    context: int
    sequences: int = 16
    waiting: int = 256
    chunk: int = 512
    cache_bytes: int = 0
    block_size: int = 64

    def __post_init__(self):
        for name, least in (("context", 2), ("sequences", 1), ("chunk", 1), ("block_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("waiting", "cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


def default_chunk(device: torch.device) -> int:
    """Tokens of prompts to read between two decoding steps: more on a GPU, where launching the kernels of a chunk takes
    as long whatever its size."""
    return 2048 if device.type == "cuda" else 512


class Engine:
    """Generates many sequences at once.

    Every `step` reads one chunk of prompts and gives one token to every sequence that has been read. A greedy sequence
    has the text that it has alone, up to rounding, and so has a sampled one: its random numbers are its own.

    The weights may change while the engine is idle; what was computed with the old ones is then dropped.

    Args:
        model: a decoder in eval mode.
        dtype: of autocast.
        cuda_graph: whether decoding steps and short pieces of prompts are CUDA graphs; None: where possible.
        clock: seconds, for the metrics.

    Raises:
        ValueError: cuda_graph is True and a graph is not possible.
    """

    def __init__(
        self,
        model,
        tokenizer,
        limits: Limits,
        *,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graph: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self._device, self._dtype, self._cuda_graph, self._clock = device, dtype, cuda_graph, clock
        snapshots = needs_snapshot(model)
        self._weights_version = WeightsVersion(model)
        self.cache = PrefixCache(limits.cache_bytes, limits.block_size, snapshots, self._weights_version)
        self.metrics = EngineMetrics()
        self._start_empty()

    def _start_empty(self) -> None:
        self.queue = WaitingQueue(self.limits.waiting)
        # On the CPU rows are allocated as they are needed.
        at_once = partial(self._free_bytes, 2) if self._device.type == "cuda" else None
        self.slots = Slots(self.model, self.limits.sequences, self.limits.context, at_once)
        self._running: list[RunningSequence] = []  # by slot
        self._prepare()

    def _free_bytes(self, divisor: int) -> int:
        return torch.cuda.mem_get_info(self._device)[0] // divisor

    def _prepare(self) -> None:
        """What depends on the weights."""
        self._version = self._weights_version()
        self._predictor = predictor = Predictor(self.model, self.tokenizer, self._device, self._dtype)
        self._short = PromptSteps(predictor, self.limits.context, partial(self._free_bytes, 8), self._cuda_graph)
        self._prefill = Prefill(predictor, self.cache, self.limits.chunk, self._short)
        self._steps = DecodeSteps(predictor, self.slots, self._cuda_graph)

    def warm_up(self) -> None:
        """Capture the CUDA graphs now, while the engine is idle, and not when the first sequences need them. Where a
        device has none, this does nothing."""
        if not self.is_idle or (self._short.reason is not None and self._steps.reason is not None):
            return
        state = self.model.init_state(1)
        self._predictor.last_logits({0: [max(0, self.tokenizer.eot_id)]}, state)
        row = take_row(state, 0)
        self._prefill.like = row
        self._short.warm_up(row)
        self._steps.warm_up(row)

    @property
    def n_running(self) -> int:
        """Sequences that have a slot or whose prompt is being read."""
        return len(self._running) + len(self._prefill)

    @property
    def is_idle(self) -> bool:
        return not (self.n_running or len(self.queue))

    @property
    def graphed_steps(self) -> int:
        """Decoding steps that were replays of a CUDA graph."""
        return self._steps.graphed

    @property
    def graphed_prompts(self) -> int:
        """Pieces of prompts, of one or several sequences, that were replays of a CUDA graph."""
        return self._short.graphed

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue all of them.

        Raises:
            ValueError: a sequence does not fit into the context.
            QueueFull: there is no room for all; none is queued.
        """
        for sequence in sequences:
            if not sequence.ids or len(sequence.ids) + sequence.max_tokens > self.limits.context:
                raise ValueError(
                    f"a prompt of {len(sequence.ids)} tokens and max_tokens={sequence.max_tokens} do not fit into the "
                    f"context of {self.limits.context} tokens"
                )
        if self.is_idle and self._version != self._weights_version():
            self._prepare()
        self.queue.add(sequences, self.limits.sequences - self.n_running)
        for sequence in sequences:
            sequence.arrived = self._clock()

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it has; of one that has ended nothing happens."""
        slot = next((i for i, member in enumerate(self._running) if member.sequence is sequence), None)
        if slot is not None:
            self._free(slot)
        elif self.queue.cancel(sequence):
            if sequence.group is not None:
                sequence.group.take()
        elif self._prefill.cancel(sequence):
            if sequence.group is not None:
                sequence.group.is_reading = False  # another choice reads the prompt
                sequence.group.take()
        else:
            return
        self.metrics.cancelled += 1

    def drop_all(self) -> None:
        """Forget all sequences and all states, in whatever condition a step that failed has left them."""
        for sequence in self.sequences():
            self._finished(sequence, "error")
        self.cache.clear()  # the step may have failed for lack of memory
        self._start_empty()

    def sequences(self) -> list[Sequence]:
        """All that wait or run."""
        running = [member.sequence for member in self._running]
        return [*running, *self._prefill.sequences(), *self.queue.sequences()]

    def step(self) -> list[tuple[Sequence, Piece]]:
        """Read one chunk of prompts, then decode one token of every running sequence; returns what they got."""
        pieces: list[tuple[Sequence, Piece]] = []
        found = self._admit()
        if len(self._prefill):
            found += self._read()
        if found:
            self._begin(found, pieces)
        if self._running:
            self._decode(pieces)
        return pieces

    def _admit(self) -> list[Read]:
        """Start to read the prompts of waiting sequences; returns those whose prompt another choice has read."""
        ready = []
        for sequence in self.queue.admit(self.limits.sequences - self.n_running):
            group = sequence.group
            if group is not None and group.row is not None:
                ready.append(Read(sequence, lambda row=group.row: row, group.logits_V))
                sequence.prompt_scores = group.prompt_scores
                group.take()
            else:
                self._prefill.start(sequence)
                self.metrics.cached_tokens += sequence.cached_tokens
        return ready

    def _read(self) -> list[Read]:
        before = self._prefill.n_tokens
        found = self._prefill.step()
        self.metrics.prompt_tokens += self._prefill.n_tokens - before
        for i, read in enumerate(found):
            group = read.sequence.group
            if group is not None:
                if group.n_waiting > 1:
                    row = read.take_row()
                    group.keep(row, read.logits_V, read.sequence.prompt_scores)
                    found[i] = Read(read.sequence, lambda row=row: row, read.logits_V)
                group.take()
        return found

    def _begin(self, found: list[Read], pieces: list) -> None:
        """Give the first token to sequences whose prompt has been read, and a slot to those that go on."""
        drawn = [read for read in found if read.sequence.max_tokens]
        tokens = {}
        if drawn:
            logits_BV = torch.stack([read.logits_V for read in drawn])
            tokens = self._choose(logits_BV, [RunningSequence(read.sequence, self.tokenizer) for read in drawn])
        for read in found:
            if not read.sequence.max_tokens:
                pieces.append((read.sequence, Piece(finish="length")))
                self._finished(read.sequence, "length")
                continue
            member, piece = tokens[read.sequence.number]
            pieces.append((read.sequence, piece))
            if piece.finish:
                self._finished(read.sequence, piece.finish)
            else:
                self.slots.append(read.take_row())
                self._running.append(member)

    def _decode(self, pieces: list) -> None:
        logits_BV = self._steps.step([member.sequence.generated[-1] for member in self._running])
        self.metrics.steps += 1
        self.metrics.batch_sizes.observe(len(self._running))
        self._copy_snapshots()
        found = self._choose(logits_BV, self._running)
        ended = []
        for slot, member in enumerate(self._running):
            _, piece = found[member.sequence.number]
            pieces.append((member.sequence, piece))
            if piece.finish:
                ended.append(slot)
                self._finished(member.sequence, piece.finish)
        for slot in reversed(ended):
            self._keep(slot)
            self._free(slot)

    def _choose(
        self, logits_BV: torch.Tensor, running: list[RunningSequence]
    ) -> dict[int, tuple[RunningSequence, Piece]]:
        """The next token of each, by the number of the sequence."""
        tokens, scored = next_tokens(logits_BV, [member.sequence for member in running])
        now, found = self._clock(), {}
        for member, token, entry in zip(running, tokens, scored, strict=True):
            sequence = member.sequence
            piece = Piece(finish="error", error=NOT_FINITE) if token < 0 else member.accept(token, entry)
            self.metrics.token(sequence, now)
            sequence.last_token_at = now
            found[sequence.number] = member, piece
        return found

    def _copy_snapshots(self) -> None:
        """Of sequences at a boundary of blocks: the state there may be continued by the next turn of a chat."""
        if not (self.cache.max_bytes and self.cache.snapshots):
            return
        for slot, length in enumerate(self.slots.lengths):
            if length % self.cache.block_size == 0:
                self._running[slot].snapshot = length, self.slots.take_snapshot(slot)

    def _keep(self, slot: int) -> None:
        """Put the state of a sequence that has ended into the prefix cache."""
        if not self.cache.max_bytes:
            return
        member, size = self._running[slot], self.cache.block_size
        snapshot: Snapshot | None = None
        length = self.slots.lengths[slot] // size * size
        if self.cache.snapshots:
            if member.snapshot is None:
                return
            length, snapshot = member.snapshot
        ids = [*member.sequence.ids, *member.sequence.generated][:length]
        self.cache.insert(ids, lambda first, last: self.slots.take_tokens(slot, first, last), snapshot)

    def _free(self, slot: int) -> None:
        moved = self.slots.remove(slot)
        last = self._running.pop()
        if moved is not None:
            self._running[slot] = last

    def _finished(self, sequence: Sequence, reason: str) -> None:
        self.metrics.finish(sequence, reason, self._clock())
