"""The files that a path names: a file, a folder or a glob. Links are followed, and a folder is read once however many
lead to it. What cannot be read is an error, what fusedlm wrote is left out."""

import fnmatch
import os
import stat
from pathlib import Path

from fusedlm.data.notes import warn_once
from fusedlm.data.written import what_fusedlm_wrote

_MAGIC = "*?["
_ANY_DEPTH = "**"
_ALL = (_ANY_DEPTH,)  # the rest of a pattern that takes every file of a folder, at any depth
_NAMED = 3  # of what is left out


def find_files(path: str, suffixes: tuple[str, ...] | None) -> list[Path]:
    """The files of a path, sorted; `~` is the home folder. Hidden files and folders are skipped unless a pattern names
    them with a dot.

    Args:
        suffixes: of the files to take from folders, in lower case; None: all.

    Raises:
        ValueError: there is no such file, or something that is named cannot be read: a link to nothing, a device.
        OSError: a folder cannot be listed.
    """
    expanded = os.path.expanduser(path)
    search = _Search(path, suffixes)
    if _exists(expanded):
        found = Path(expanded)
        if not stat.S_ISDIR(_mode(found)):
            return [found]
        if what := what_fusedlm_wrote(found):
            raise ValueError(f"{path}: {what} of fusedlm, not text; name the text that it was made from")
        search.walk(found, _ALL)
        return search.result(f"no {_kind(suffixes)} in this directory")
    if not _is_pattern(expanded):
        raise ValueError(f"{path}: no such file or directory")
    parts = [part for part in expanded.split("/") if part]
    if expanded.endswith("/"):
        parts.append(_ANY_DEPTH)  # folders alone
    search.walk(Path("/") if expanded.startswith("/") else Path(), tuple(parts))
    return search.result("no file matches")


class _Search:
    def __init__(self, name: str, suffixes: tuple[str, ...] | None):
        self._name, self._suffixes = name, suffixes
        self._files: set[Path] = set()
        self._written: set[str] = set()
        self._repeated: set[str] = set()  # links to folders that are read anyway
        self._others: set[str] = set()  # files without one of the suffixes
        self._visited: set[tuple] = set()
        self._folders: list[tuple[Path, tuple[str, ...]]] = []
        self._links: list[tuple[Path, tuple[str, ...]]] = []

    def walk(self, top: Path, parts: tuple[str, ...]) -> None:
        """Take the files below a folder that match.

        Args:
            parts: of the pattern, between the slashes.
        """
        self._push(top, parts)
        while self._folders or self._links:
            if not self._folders:  # after all that is no link, so that a text has the path without links
                self._links.sort(reverse=True)
                self._folders.append(self._links.pop())
            folder, (part, *rest) = self._folders.pop()
            path = folder / part
            if not _is_pattern(part) or ("[" in part and _exists(path)):  # a folder can be called a[1]
                if _exists(path):
                    self._add(path, tuple(rest), named=True)
            elif self._enter(folder, (part, *rest)):
                self._list(folder, part, tuple(rest))

    def _list(self, folder: Path, part: str, rest: tuple[str, ...]) -> None:
        everything = part == _ANY_DEPTH
        if everything and rest:  # no folder between
            self._push(folder, rest)
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            if name.startswith(".") and not part.startswith("."):
                continue
            path = folder / name
            if not everything:
                if fnmatch.fnmatchcase(name, part):
                    self._add(path, rest, named=True)
            elif stat.S_ISDIR(_mode(path)):
                self._push(path, (part, *rest))
            elif not rest:
                self._add(path, (), named=False)

    def _add(self, path: Path, rest: tuple[str, ...], *, named: bool) -> None:
        """Take a file that matches, or search a folder; a named file needs no suffix."""
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            self._push(path, rest or _ALL)
        elif rest:
            return  # a file where the pattern has a folder
        elif not named and self._suffixes is not None and not path.name.lower().endswith(self._suffixes):
            self._others.add(str(path))
        elif not stat.S_ISREG(mode):
            raise ValueError(f"{path}: neither a file nor a folder; remove it, or name the files to read")
        else:
            self._files.add(path)

    def _push(self, folder: Path, parts: tuple[str, ...]) -> None:
        (self._links if folder.is_symlink() else self._folders).append((folder, parts))

    def _enter(self, folder: Path, parts: tuple[str, ...]) -> bool:
        status = os.stat(folder)
        place = (status.st_dev, status.st_ino, parts)
        if place in self._visited:
            if folder.is_symlink():
                self._repeated.add(str(folder))
            return False
        self._visited.add(place)
        if what_fusedlm_wrote(folder):
            self._written.add(str(folder))
            return False
        return True

    def result(self, nothing: str) -> list[Path]:
        """The files, sorted; says what was left out.

        Raises:
            ValueError: `nothing`, if there are none.
        """
        left_out = []
        if self._written:
            left_out.append(f"what fusedlm wrote ({_some(self._written)})")
        if self._repeated:
            left_out.append(f"links to folders that are read already ({_some(self._repeated)})")
        if self._others:
            n = len(self._others)
            files = "1 file that is" if n == 1 else f"{n} files that are"
            left_out.append(f"{files} not {self._suffixes[0]} ({_some(self._others)})")
        said = " and ".join(left_out)
        if not self._files:
            raise ValueError(f"{self._name}: {nothing}{said and f'; left out {said}'}")
        if left_out:
            warn_once(f"{self._name}: left out {said}")
        return sorted(self._files, key=lambda file: file.as_posix())


def _kind(suffixes: tuple[str, ...] | None) -> str:
    return "file" if suffixes is None else f"{suffixes[0]} file"


def _is_pattern(path: str) -> bool:
    return any(character in path for character in _MAGIC)


def _exists(path: str | Path) -> bool:
    """Whether there is something, if only a link to nothing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the name
        return False
    return True


def _mode(path: Path) -> int:
    """The mode of what a path leads to.

    Raises:
        ValueError: it is a link that leads nowhere.
    """
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if isinstance(error, PermissionError) or not path.is_symlink():
            raise
        target = f"a link to {os.readlink(path)!r}, which cannot be read ({error.strerror})"
        raise ValueError(f"{path}: {target}; mend or remove it") from None


def _some(paths: set[str]) -> str:
    shown = ", ".join(sorted(paths)[:_NAMED])
    return shown if len(paths) <= _NAMED else f"{shown} and {len(paths) - _NAMED} more"
