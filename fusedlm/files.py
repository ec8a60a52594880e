"""Files that survive a crash: written under a temporary name, flushed to the disk, renamed; and their checksums."""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20
_TEMPORARY = re.compile(r"\.fusedlm-[0-9a-f]{16}\.tmp")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file; `advance` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Make a file hold bytes, or text as UTF-8. After a crash it holds either the old or the new content.

    A file that already holds the content is not written. A new file has the mode that the umask gives, a replaced one
    keeps its mode. Leftovers of killed processes in the same folder are removed.

    Raises:
        OSError: the folder cannot be written, or the path is a folder or a device; the file is unchanged.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        mode = _replaced_mode(path)
        if mode is not None and _holds(path, data):
            return
        remove_leftovers(path.parent)
        _replace(path, data, mode)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_atomic` whose processes were killed."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return  # a folder that cannot be listed may still be written
    for entry in entries:
        if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        # A process that still writes holds the lock.
        with contextlib.suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _replaced_mode(path: Path) -> int | None:
    """The mode of the file at the path; None: there is none. A link is replaced by a file, as a missing one."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it exists and is not a file")  # a rename would replace a device
    return stat.S_IMODE(status.st_mode)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False  # it may be replaced although it cannot be read


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    descriptor, temporary = _create(path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                with contextlib.suppress(PermissionError):  # a file system without modes
                    os.fchmod(descriptor, mode)
            os.fsync(descriptor)
            # Still open, and with it locked: not a leftover before it is renamed.
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create(folder: Path) -> tuple[int, Path]:
    """An open, locked temporary file of a name that no other process has; a link of that name is not followed."""
    while True:
        temporary = folder / f".fusedlm-{secrets.token_hex(8)}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks; there, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # removed as a leftover between its creation and its lock
