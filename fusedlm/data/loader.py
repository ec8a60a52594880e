"""Batches of packed tokens whose order is a function of (seed, sample counter) alone.

`fusedlm.data.samples` locates any sample in constant time: resuming at any counter is immediate, and the samples of a
global batch do not depend on the number of ranks.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.data.packing import IGNORED
from fusedlm.data.samples import Samples, Windows
from fusedlm.data.shards import TokenShards


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the loader's device.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, the token after each; -100 where a packed row is filled up, and nowhere else.
        documents: (B, T) int64, from 0 in each row, plus one where a document starts; None without document mask.
        n_valid: targets of this part that are not masked.
        next_sample: global samples drawn up to the end of this batch; a loader that starts there resumes after it.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    n_valid: int
    next_sample: int


class Loader:
    """Iterates endlessly over the batches of one rank, which a thread prepares ahead.

    The stream of tokens is that of the windows in their order. A step of another shape has its next windows in rows of
    another length: a shorter row is a part of a window, and the parts of a window follow each other.

    Args:
        shards: the split.
        seq_len: T.
        batch_size: sequences of the global batch, of which each rank has a contiguous slice of batch_size / world_size.
        seed: of the order.
        samples: what the samples are, in rows of seq_len tokens; None: windows of the stream of all shards.
        document_mask: whether batches have `documents`.
        start_sample: global samples already drawn (the `next_sample` of the last batch used).
        start_step: steps already taken.
        step_shape: sequences of the global batch, and tokens per sequence, of a step from 0: a divisor of seq_len, and
            together whole windows of seq_len. None: batch_size and seq_len in every step.
        rank, world_size: this process and the number of processes.
        device: of the batches; copies to CUDA go through pinned memory, on a stream of their own.
        prefetch: batches prepared ahead.

    Attributes:
        samples: what the samples are.
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
        samples: Samples | None = None,
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
        self.samples = samples or Windows(shards, seq_len, seed)
        self._seq_len, self._document_mask = seq_len, document_mask
        self._step_shape = step_shape or (lambda _: (batch_size, seq_len))
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._prefetch = prefetch
        self._ready: deque[tuple[torch.Tensor, torch.cuda.Event | None, int, int]] = deque()
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
            data, copied, n_valid, next_sample = self._ready.popleft()
            self._changed.notify_all()
        self.wait_seconds += time.perf_counter() - started
        if copied is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(copied)
            data.record_stream(consumer)
        tokens, targets = data[0], data[1]
        documents = data[2] if self._document_mask else None
        return Batch(tokens, targets, documents, n_valid, next_sample)

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
                host = self._read(sample, batch_size, seq_len)
                n_valid = int((host[1] != IGNORED).sum())
                data, copied = self._send(host)
                sample += batch_size * seq_len // self._seq_len
                step += 1
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._prefetch or self._closed)
                    if self._closed:
                        return
                    self._ready.append((data, copied, n_valid, sample))
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
        for row, place in enumerate(self.samples.locate(windows)):
            tokens, targets, starts = self.samples.read(place, int(part[row]) * seq_len, seq_len)
            rows[0, row], rows[1, row] = tokens, targets
            if self._document_mask:
                rows[2, row] = 0
                rows[2, row, starts] = 1
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
