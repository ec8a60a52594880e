"""Take back a start that failed, so that the same command line can start again."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fusedlm.runs.folder import CHECKPOINTS, ENVIRONMENT, LOCK, METRICS, RECIPE, RunFolder
from fusedlm.runs.identity import IDENTITY
from fusedlm.runs.metrics import read_metrics
from fusedlm.train import loggers

# What the start of a run writes; a file of another name is of the user.
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
    """What is in a folder before a start. Made before the folder is.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path):
        self._path = path
        self._had_lock = (path / LOCK).exists()
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]

    @contextlib.contextmanager
    def taken_back(
        self, files: Iterable[str], holds_work: Callable[[], bool], keep: type[BaseException] | tuple = ()
    ) -> Iterator[None]:
        """Remove what the block writes if it raises. Files that were there before stay. The folder is locked.

        Args:
            files: names in the folder that the block may write.
            holds_work: whether the folder holds something to keep after all.
            keep: an exception that is a result.
        """
        before = {entry.name for entry in self._path.iterdir()}
        if not self._had_lock:
            before.discard(LOCK)
        try:
            yield
        except keep:
            raise
        except BaseException:
            if not holds_work():
                self._remove(set(files) - before)
            raise

    def run_taken_back(self, folder: RunFolder, keep: type[BaseException]) -> contextlib.AbstractContextManager:
        """`taken_back` for a run; a folder that holds a run already is left as it is."""
        if folder.holds_run():
            return contextlib.nullcontext()

        def holds_work() -> bool:
            records, _ = read_metrics(folder.metrics)
            return bool(folder.checkpoints.steps()) or any(record["step"] >= _STEPS for record in records)

        return self.taken_back(_FILES, holds_work, keep)

    def remove_empty_folders(self) -> None:
        """Remove the folders that were not there before, if nothing is in them."""
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _remove(self, names: set[str]) -> None:
        for name in names:
            path = self._path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
        self.remove_empty_folders()
