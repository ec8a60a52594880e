"""A folder that appears complete or not at all, written by one process at a time."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fusedlm.data.manifest import PREPARED_NAME
from fusedlm.files import sync


@contextlib.contextmanager
def exclusive(target: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a target folder. The system releases it when the process ends, killed or not.

    The lock is a file beside the target and is never removed: two processes could then lock different files.

    Args:
        waiting: called once if another process holds the lock.
    """
    with open(_lock_path(target), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target; when the block ends without an error it is flushed to the disk and renamed.

    The caller holds the lock of the target. If the block raises, the folder is removed; if the process is killed, it
    remains under its temporary name until the next preparation in the same directory.
    """
    temporary = _temporary_path(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def remove_leftovers(target: Path) -> None:
    """Remove temporary folders of killed processes, for any target in this directory. The caller holds the lock of
    `target`."""
    for temporary in target.parent.glob(".*.tmp"):
        owner = temporary.with_name(temporary.name[1 : -len(".tmp")])
        if owner == target:
            _remove(temporary)
            continue
        # The directory is the user's: only names that a preparation gives, with the lock that it leaves, are its own.
        if not PREPARED_NAME.search(owner.name) or not _lock_path(owner).exists():
            continue
        with open(_lock_path(owner), "a") as lock, contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(temporary)


def work_path(target: Path) -> Path:
    """The folder of a preparation at scale, which stays until the target is complete."""
    return target.with_name(f".{target.name}.work")


def remove_work(target: Path) -> None:
    """Remove the work folder of a target that is complete."""
    shutil.rmtree(work_path(target), ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")
