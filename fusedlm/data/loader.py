"""Batches of packed tokens whose order is a function of (seed, sample counter) alone.

An epoch cuts every ring of n tokens into n // seq_len windows from a random phase on, and visits each window of all
rings once, in pseudo-random order. A ring is a shard, or several that are too short for a window (`fusedlm.data.ring`).
Seed and epoch give phase and order; sample i of the run is sample i % windows of epoch i // windows. Any sample is
located in constant time: resuming at any counter is immediate, and the samples of a global batch do not depend on the
number of ranks.
"""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.data.ring import rings
from fusedlm.data.shards import TokenShards

_ROUNDS = 8


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the loader's device.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, the token after each; the loader masks none (-100).
        documents: (B, T) int64, from 0 in each row, plus one at every end-of-text; None without document mask.
        n_valid: targets of this part that are not masked.
        next_sample: global samples drawn up to the end of this batch; a loader that starts there resumes after it.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    n_valid: int
    next_sample: int


class Permutation:
    """A keyed pseudo-random permutation of range(size), any element in constant time: a Feistel network on the bits
    of size - 1, applied until the value is in the range (cycle walking; Black and Rogaway, 2002).

    Args:
        size: from 1 to 2**62.
        key: bytes; the first 64 are used.
    """

    def __init__(self, size: int, key: bytes):
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._widths = (bits - bits // 2, bits // 2)
        self._keys = np.frombuffer(key[: 8 * _ROUNDS], "<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of int64 indices in [0, size), as int64."""
        values = self._encrypt(indices.astype(np.uint64))
        while (outside := values >= self._size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        high, low = self._widths
        a, b = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
        for key in self._keys:
            a, b = b, a ^ (_mix(b + key) & np.uint64((1 << high) - 1))
            high, low = low, high
        return (a << np.uint64(low)) | b


class WindowOrder:
    """Where each sample lies in the rings.

    Args:
        lengths: tokens of each ring.
        seq_len: tokens per window; one more is read as the last target.
        seed: of phases and order.
    """

    def __init__(self, lengths: list[int], seq_len: int, seed: int):
        self._lengths, self._seed = lengths, seed
        self._seq_len = seq_len
        self._ends = np.cumsum([length // seq_len for length in lengths], dtype=np.int64)
        self.windows = int(self._ends[-1]) if lengths else 0
        self._epoch: tuple[int, Permutation, np.ndarray] | None = None

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the ring and of the first token in it (int64 each), of int64 samples."""
        rings, starts = np.empty_like(samples), np.empty_like(samples)
        epochs = samples // self.windows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            permutation, phases = self._draw(int(epoch))
            window = permutation(samples[chosen] % self.windows)
            ring = np.searchsorted(self._ends, window, side="right")
            in_ring = window - np.concatenate([[0], self._ends])[ring]
            lengths = np.asarray(self._lengths, dtype=np.int64)[ring]
            rings[chosen], starts[chosen] = ring, (phases[ring] + in_ring * self._seq_len) % lengths
        return rings, starts

    def _draw(self, epoch: int) -> tuple[Permutation, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            permutation = Permutation(self.windows, _key(self._seed, epoch, "order"))
            draws = [_key(self._seed, epoch, f"phase {i}") for i in range(len(self._lengths))]
            phases = [
                int.from_bytes(draw[:16], "little") % length for draw, length in zip(draws, self._lengths, strict=True)
            ]
            self._epoch = (epoch, permutation, np.asarray(phases, dtype=np.int64))
        return self._epoch[1:]


class Loader:
    """Iterates endlessly over the batches of one rank, which a thread prepares ahead.

    The stream of tokens is that of the windows in their order. A step of another shape has its next windows in rows of
    another length: a shorter row is a part of a window, and the parts of a window follow each other.

    Args:
        shards: the split.
        seq_len: T.
        batch_size: sequences of the global batch, of which each rank has a contiguous slice of batch_size / world_size.
        seed: of the order.
        document_mask: whether batches have `documents`.
        start_sample: global samples already drawn (the `next_sample` of the last batch used).
        start_step: steps already taken.
        step_shape: sequences of the global batch, and tokens per sequence, of a step from 0: a divisor of seq_len, and
            together whole windows of seq_len. None: batch_size and seq_len in every step.
        rank, world_size: this process and the number of processes.
        device: of the batches; copies to CUDA go through pinned memory, on a stream of their own.
        prefetch: batches prepared ahead.

    Attributes:
        windows: global samples per epoch.
        wait_seconds: total time that the consumer waited for batches; assign 0 to restart.

    Raises:
        ValueError: the text is shorter than one window, or a value is out of range.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        document_mask: bool = True,
        start_sample: int = 0,
        start_step: int = 0,
        step_shape: Callable[[int], tuple[int, int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int = 4,
    ):
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("start_sample", start_sample, 0),
            ("start_step", start_step, 0),
            ("world_size", world_size, 1),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {world_size} ranks that share it")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in 0..{world_size - 1}")
        if shards.n_tokens < seq_len:
            raise ValueError(
                f"seq_len={seq_len} is longer than the text: {shards.n_tokens} tokens; lower seq_len or add text"
            )
        self._rings = rings(shards.shards, seq_len)
        self._order = WindowOrder([len(ring) for ring in self._rings], seq_len, seed)
        self.windows = self._order.windows
        self._seq_len, self._document_mask = seq_len, document_mask
        self._step_shape = step_shape or (lambda _: (batch_size, seq_len))
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._prefetch = prefetch
        self._ready: deque[tuple[torch.Tensor, torch.cuda.Event | None, int]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self.wait_seconds = 0.0
        self._thread = threading.Thread(
            target=self._fill, args=(start_sample, start_step), name="fusedlm-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise RuntimeError("the loader is closed")
            if not self._ready:
                raise self._error
            data, copied, next_sample = self._ready.popleft()
            self._changed.notify_all()
        self.wait_seconds += time.perf_counter() - started
        if copied is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(copied)
            data.record_stream(consumer)
        tokens, targets = data[0], data[1]
        documents = data[2] if self._document_mask else None
        return Batch(tokens, targets, documents, tokens.numel(), next_sample)

    def close(self) -> None:
        """Stop the thread and wait for it; drawing further batches raises RuntimeError."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _fill(self, sample: int, step: int) -> None:
        try:
            if self._copies is not None:
                torch.cuda.set_device(self._device)  # per thread; pinning memory would create a context on device 0
            while True:
                batch_size, seq_len = self._checked_shape(step)
                data, copied = self._send(self._read(sample, batch_size, seq_len))
                sample += batch_size * seq_len // self._seq_len
                step += 1
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._prefetch or self._closed)
                    if self._closed:
                        return
                    self._ready.append((data, copied, sample))
                    self._changed.notify_all()
        except BaseException as error:  # raised again in the consumer
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _checked_shape(self, step: int) -> tuple[int, int]:
        batch_size, seq_len = self._step_shape(step)
        if self._seq_len % seq_len or batch_size * seq_len % self._seq_len:
            raise ValueError(
                f"step {step}: {batch_size} rows of {seq_len} tokens are not whole windows of {self._seq_len}"
            )
        if batch_size % self._world_size:
            raise ValueError(
                f"step {step}: batch_size={batch_size} is not a multiple of the {self._world_size} ranks that share it"
            )
        return batch_size, seq_len

    def _read(self, sample: int, batch_size: int, seq_len: int) -> torch.Tensor:
        """Tokens, targets and documents of this rank's rows of a batch that begins with a global sample: (2 or 3, B, T)
        int64 on the host."""
        n_rows, parts = batch_size // self._world_size, self._seq_len // seq_len  # parts of a window
        first = sample * parts + self._rank * n_rows
        windows, part = np.divmod(np.arange(first, first + n_rows), parts)
        shape = (3 if self._document_mask else 2, n_rows, seq_len)
        host = torch.empty(shape, dtype=torch.int64, pin_memory=self._copies is not None)
        rows = host.numpy()
        for row, (i, begin) in enumerate(zip(*self._order.locate(windows), strict=True)):
            ring = self._rings[i]
            start = (int(begin) + int(part[row]) * seq_len) % len(ring)
            window = ring.read(start, seq_len + 1)
            rows[0, row], rows[1, row] = window[:-1], window[1:]
            if self._document_mask:
                rows[2, row] = 0
                rows[2, row, ring.boundaries(start, seq_len)] = 1
                rows[2, row, 0] = 0  # documents of a row are numbered from 0
        if self._document_mask:
            np.cumsum(rows[2], axis=1, out=rows[2])
        return host

    def _send(self, host: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copies is None:
            return host, None
        # torch's caching host allocator does not reuse the pinned block before the copy is done.
        with torch.cuda.stream(self._copies):
            data = host.to(self._device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copies)
        return data, copied


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014) on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{seed} {epoch} {purpose}".encode()).digest()
