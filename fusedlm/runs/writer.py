"""Write the checkpoints of a run that is training, in the background and in parts of each process."""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fusedlm.distributed import World
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.host_copy import HostCopy
from fusedlm.runs.shards import TensorFile, own_files
from fusedlm.runs.tensor_file import Cancelled, write_tensor_file


@dataclass
class _Writing:
    """A checkpoint between `begin` and `finish`: this process's files, written by a thread."""

    step: int
    texts: dict[str, str]
    best: int | None
    cancelled: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    written: dict[str, dict] = field(default_factory=dict)  # SHA-256 and size by file name
    error: Exception | None = None

    def write(self, folder: Path, files: list[TensorFile]) -> None:
        try:
            # On a file system of several machines, that the main process has made it may not be seen yet.
            folder.mkdir(exist_ok=True)
            for file in files:
                path, cancelled = folder / file.name, self.cancelled.is_set
                self.written[file.name] = write_tensor_file(path, file.tensors, file.metadata, cancelled=cancelled)
        except Cancelled:
            pass
        except OSError as error:  # without its number and the name of a temporary file
            self.error = OSError(error.strerror or str(error))
        except Exception as error:  # raised where the checkpoint is finished
            self.error = error


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. All processes make one and call it alike.

    `begin` copies the tensors, and a thread of each process writes the copies while training continues. `is_written`
    says when the thread of this process is done; once all are, `finish` makes the checkpoint: only then the main
    process writes its manifest and gives it its name. As a context, it ends what is being written when an error leaves
    it.

    Args:
        keep: as of `Checkpoints.prune`, which follows each checkpoint.
        in_background: False: `begin` writes the tensors themselves, and returns when the checkpoint is there.
        device: of the tensors.
    """

    def __init__(
        self, checkpoints: Checkpoints, world: World, *, keep: int, in_background: bool, device: torch.device
    ):
        self._checkpoints, self._world, self._keep = checkpoints, world, keep
        self._copies = HostCopy(pinned=device.type == "cuda") if in_background else None
        self._writing: _Writing | None = None
        self._seconds = 0.0

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        texts: dict[str, str],
        best: int | None = None,
    ) -> None:
        """Begin a checkpoint, after the one before it is finished; the tensors may change on return.

        Args:
            tensors: file stem -> tensors by name, sharded or the same in all processes.
            texts: file name -> text.
            best: step of the best checkpoint, which is not removed.

        Raises:
            OSError: as `finish`, of this checkpoint or the one before it.
        """
        self.finish()
        started = time.perf_counter()
        files = own_files(tensors, self._world)
        with self._checkpoints.reporting_failure(step, clean=self._world.is_main):
            self._world.together(lambda: self._checkpoints.begin(step), only_main=True)
        writing, folder = _Writing(step, texts, best), self._checkpoints.temporary(step)
        if self._copies is None:
            writing.write(folder, files)
        else:
            # Daemon: a process that has to end does not wait for it.
            arguments = (folder, self._copied(files))
            writing.thread = threading.Thread(target=writing.write, args=arguments, name="checkpoint", daemon=True)
            writing.thread.start()
        self._writing = writing
        self._seconds += time.perf_counter() - started
        if self._copies is None:
            self.finish()

    def _copied(self, files: list[TensorFile]) -> list[TensorFile]:
        copies = iter(self._copies.take([tensor for file in files for tensor in file.tensors.values()]))
        return [replace(file, tensors={name: next(copies) for name in file.tensors}) for file in files]

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was begun and is not finished; the same in all processes."""
        return self._writing is not None

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part, so that `finish` does not wait for it."""
        return self._writing is None or self._writing.thread is None or not self._writing.thread.is_alive()

    def finish(self) -> float:
        """Wait until the checkpoint that was begun is there, and remove those that are not kept.

        Returns:
            The seconds that this took.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are unchanged.
        """
        writing = self._writing
        if writing is None:
            return 0.0
        started = time.perf_counter()
        if writing.thread is not None:
            writing.thread.join()
        self._writing = None
        with self._checkpoints.reporting_failure(writing.step, clean=self._world.is_main):
            self._world.raise_together(writing.error)
            parts = self._world.gathered(writing.written)
            files = {name: found for part in parts for name, found in part.items()}
            finish = self._checkpoints.finish
            self._world.together(lambda: finish(writing.step, files, writing.texts), only_main=True)
        prune = self._checkpoints.prune
        self._world.together(lambda: prune(self._keep, writing.best), only_main=True)
        seconds = time.perf_counter() - started
        self._seconds += seconds
        return seconds

    def take_seconds(self) -> float:
        """Seconds that this process stood still for checkpoints since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Finish what is being written. After an error only a process alone does; one of several, whose others may be
        gone, and one that was interrupted give it up."""
        if self._writing is None or kind is None:
            self.finish()
            return
        if self._world.size == 1 and issubclass(kind, Exception):
            with suppress(OSError):  # the first error is the one to tell
                self.finish()
            return
        writing, self._writing = self._writing, None
        writing.cancelled.set()
        if writing.thread is not None:
            writing.thread.join()
        if self._world.is_main:
            self._checkpoints.discard(writing.step)
