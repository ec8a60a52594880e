"""Files that fsspec reads: `hf://datasets/...`, `s3://...`, `https://...` and others, by what a path begins with."""

import functools
import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import BinaryIO

_MAGIC = "*?["


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, with those methods of `pathlib.Path` that readers use."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        stem, dot, rest = self.name.rpartition(".")
        return dot + rest if stem else ""

    def open(self, mode: str = "rb") -> BinaryIO:
        system, path = _system(self.url)
        return system.open(path, mode)

    def stat(self) -> SimpleNamespace:
        """Size, and a number that changes with the content as far as the file system tells."""
        system, path = _system(self.url)
        return SimpleNamespace(st_size=int(system.size(path) or 0), st_mtime_ns=int(self.identity()[:15], 16))

    def identity(self) -> str:
        """What the file system says the content is, such as a checksum or a time, as 64 hexadecimal digits."""
        system, path = _system(self.url)
        return hashlib.sha256(f"{self.url} {system.size(path)} {system.ukey(path)}".encode()).hexdigest()


def is_remote(path: str) -> bool:
    return "://" in path


def find_remote(url: str, suffixes: tuple[str, ...] | None) -> list[RemoteFile]:
    """The files of a URL (a file, a folder or a glob), sorted; files and folders with a leading dot are skipped.

    Args:
        suffixes: of the files to take from a folder, in lower case; None: all.

    Raises:
        ValueError: there is no such file, or the package for this kind of URL is missing.
        OSError: it cannot be reached.
    """
    system, path = _system(url)
    if any(character in path for character in _MAGIC):
        found = [name for name in system.glob(path) if system.isfile(name)]
        nothing = "no file matches"
    elif system.isfile(path):
        found, nothing = [path], ""
    else:
        found = [name for name in system.find(path) if not _is_hidden(name.removeprefix(path))]
        if suffixes is not None:
            found = [name for name in found if name.lower().endswith(suffixes)]
        nothing = f"no {'file' if suffixes is None else suffixes[0] + ' file'} there"
    if not found:
        raise ValueError(f"{url}: {nothing}")
    return [RemoteFile(system.unstrip_protocol(name)) for name in sorted(found)]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


@functools.lru_cache(maxsize=4096)
def _system(url: str):
    """The file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{url}: {' '.join(str(error).split())}; name a file, a folder or another URL") from None
