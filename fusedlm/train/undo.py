"""Take back a start that failed, so that the same command line can start again."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from fusedlm.runs.folder import CHECKPOINTS, ENVIRONMENT, LOCK, METRICS, RECIPE, RunFolder
from fusedlm.runs.identity import IDENTITY
from fusedlm.runs.metrics import read_metrics
from fusedlm.train import loggers

# What a start writes; a file of another name is of the user.
_FILES = (
    RECIPE,
    ENVIRONMENT,
    IDENTITY,
    METRICS,
    CHECKPOINTS,
    LOCK,
    "tokenizer.json",
    "tokenizer.meta.json",
    *loggers.FILES,
)
_STEPS = 2  # the second one may capture a CUDA graph


class StartUndo:
    """What is in a run folder before a start. Made before the folder is.

    Args:
        path: the run folder; it need not exist.
    """

    def __init__(self, path: Path):
        self._path = path
        self._had_lock = (path / LOCK).exists()
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]

    @contextlib.contextmanager
    def taken_back(self, folder: RunFolder, keep: type[BaseException]) -> Iterator[None]:
        """Remove what the block writes if it raises, unless there is work in it: a checkpoint, or steps in the metrics.

        A folder that holds a run already is left as it is, and so is every file that was there before.

        Args:
            folder: locked.
            keep: an exception that is a result.
        """
        if folder.holds_run():
            yield
            return
        before = {entry.name for entry in self._path.iterdir()}
        if not self._had_lock:
            before.discard(LOCK)
        try:
            yield
        except keep:
            raise
        except BaseException:
            if not self._holds_work(folder):
                self._remove(before)
            raise

    def remove_empty_folders(self) -> None:
        """Remove the folders that were not there before, if nothing is in them."""
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _holds_work(self, folder: RunFolder) -> bool:
        records, _ = read_metrics(folder.metrics)
        return bool(folder.checkpoints.steps()) or any(record["step"] >= _STEPS for record in records)

    def _remove(self, before: set[str]) -> None:
        for name in _FILES:
            path = self._path / name
            if name in before:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        self.remove_empty_folders()
