"""Checkpoint folders: safetensors and JSON files, checksummed, written atomically, pruned; `state` fills them, and
`writer` writes those of a run that is training."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from fusedlm.files import sha256_file, sync
from fusedlm.runs.shards import DamagedTable, StoredTensors, file_name, table_files
from fusedlm.runs.tensor_file import write_tensor_file

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"(step-([0-9]{8,}))(?:\.((?:damaged|foreign)(?:-[0-9]+)?))?")
# What is removed without being looked at has a name that nobody else gives.
_TEMPORARY = re.compile(r"\.fusedlm-(step-([0-9]{8,}))\.(tmp|replaced)")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

class DamagedCheckpoint(ValueError):
    """A checkpoint whose content is not what was written; the message names the file and the damage.

    kind: "damaged", for messages and for the name that it is set aside under.
    """

    kind = "damaged"


class ForeignCheckpoint(DamagedCheckpoint):
    """A checkpoint that is intact, but of another run or another step than its place says."""

    kind = "foreign"


class RemovedCheckpoint(OSError):
    """A checkpoint that was there and is not any more: the run that is training removed it."""


class Checkpoints:
    """The checkpoints of one run, a folder `step-00000100` each.

    A checkpoint is complete or absent: it is written under a temporary name, flushed, and renamed. `manifest.json`
    holds the SHA-256 and the size of every other file.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def temporary(self, step: int, kind: Literal["tmp", "replaced"] = "tmp") -> Path:
        """Where a checkpoint is written or removed, or is kept while another of its step replaces it."""
        return self.directory / f".fusedlm-{self.path(step).name}.{kind}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, intact or not, ascending."""
        return sorted(step for entry, step, kind in self._entries() if not kind and entry.is_dir())

    def set_aside_names(self) -> list[str]:
        """Names of the checkpoints that an earlier resume set aside."""
        kinds = (DamagedCheckpoint.kind, ForeignCheckpoint.kind)
        return sorted(entry.name for entry, _, kind in self._entries() if kind in kinds)

    def _entries(self) -> list[tuple[os.DirEntry, int, str]]:
        """(entry, step, "" or "tmp", "damaged" ...) of what this class named; all else in the folder is the user's.

        Raises:
            OSError: the folder cannot be listed.
        """
        try:
            entries = list(os.scandir(self.directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for entry in entries:
            match = _NAME.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)
            # step-000000061 would be read as the step of step-00000061.
            if match and match[1] == self.path(int(match[2])).name:
                found.append((entry, int(match[2]), (match[3] or "").partition("-")[0]))
        return found

    def save(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], texts: dict[str, str]) -> Path:
        """Write a checkpoint, replacing one of the same step.

        Args:
            tensors: file stem -> full tensors by name, each in memory only while it is written.
            texts: file name -> text.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are unchanged.
        """
        with self.reporting_failure(step):
            folder = self.begin(step)
            files = {}
            for name, table in ((file_name(stem), table) for stem, table in tensors.items()):
                files[name] = write_tensor_file(folder / name, table)
            self.finish(step, files, texts)
        return self.path(step)

    @contextmanager
    def reporting_failure(self, step: int, *, clean: bool = True) -> Iterator[None]:
        """An OSError inside of the context says which checkpoint could not be written, and which one is the last.

        Args:
            clean: whether what was written is removed.
        """
        try:
            yield
        except OSError as error:
            if clean:
                self.discard(step)
            reason = getattr(error, "strerror", None) or str(error)
            kept = self.steps()
            last = f"the last one is {self.path(kept[-1])}" if kept else "there is none before it"
            raise OSError(f"checkpoint {self.path(step)} could not be written: {reason}; {last}") from None

    def begin(self, step: int) -> Path:
        """The new folder that the files of a checkpoint are written into, before `finish`."""
        folder = self.temporary(step)
        self.directory.mkdir(parents=True, exist_ok=True)
        _make_way(folder)
        folder.mkdir()
        return folder

    def discard(self, step: int) -> None:
        """Remove what was written after `begin`."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def finish(self, step: int, files: dict[str, dict], texts: dict[str, str]) -> None:
        """Write the texts and the manifest, and give the folder its name, replacing a checkpoint of the same step.

        Args:
            files: SHA-256 and size, as `write_tensor_file` returns them, of the files in the folder, which are flushed.
                Other files are read for theirs.
        """
        final, temporary, replaced = self.path(step), self.temporary(step), self.temporary(step, "replaced")
        self._seal(temporary, texts, files)
        _make_way(replaced)
        if final.is_dir():
            os.rename(final, replaced)
        else:
            _make_way(final)
        os.rename(temporary, final)
        sync(self.directory)
        _remove(replaced)

    @staticmethod
    def _seal(folder: Path, texts: dict[str, str], files: Mapping[str, dict] | None = None) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        found = dict(files or {})
        for name, known in found.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != known["bytes"]:
                raise OSError(
                    f"{name} was written by another process and is not there; the run's folder must be on a file "
                    "system that all processes share"
                )
        for path in sorted(folder.iterdir()):
            if path.name not in found:
                sync(path)
                found[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        (folder / MANIFEST).write_text(_manifest_text(found), encoding="utf-8")
        sync(folder / MANIFEST)
        sync(folder)

    def files(self, step: int) -> dict[str, dict]:
        """The manifest's table: file name -> {"sha256", "bytes"}.

        Raises:
            DamagedCheckpoint: the manifest is missing or is not what was written.
            RemovedCheckpoint: there is no such checkpoint any more.
            OSError: the system cannot read it, which says nothing about its content.
        """
        path = self.path(step) / MANIFEST
        with self._reading(step, path):
            content = path.read_bytes()
        try:
            text = content.decode("utf-8")
            files = dict(json.loads(text)["files"])
            # The manifest has no checksum; it must be, byte for byte, what its content serialises to.
            intact = text == _manifest_text(files) and all(map(_FILE_NAME.fullmatch, files))
        except (ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise DamagedCheckpoint(f"{path}: not the manifest that was written")
        return files

    def verify(self, step: int, only: tuple[str, ...] | None = None) -> None:
        """Check sizes and checksums of all files, or of the named ones.

        Raises:
            DamagedCheckpoint: a file is missing, truncated, changed, or not in the manifest.
            RemovedCheckpoint, OSError: as `files`.
        """
        files = self.files(step)
        for name in only if only is not None else files:
            path = self.path(step) / name
            if name not in files:
                raise DamagedCheckpoint(f"{path}: not in the manifest")
            with self._reading(step, path):
                found = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            if found != files[name]:
                raise DamagedCheckpoint(f"{path}: its {found['bytes']} bytes are not the ones that were written")

    def table_files(self, step: int, stem: str) -> list[str]:
        """Names of the files with the tensors of a table. Errors as of `files`."""
        return table_files(stem, self.files(step))

    def read_tensors(self, step: int, stem: str) -> dict[str, torch.Tensor]:
        """The full tensors of one table by name, on the CPU. `verify` first; errors as there."""
        return dict(self.open_tensors(step, stem))

    def open_tensors(self, step: int, stem: str) -> Mapping[str, torch.Tensor]:
        """The full tensors of one table by name, each read when it is requested, on the CPU, whatever number of
        processes wrote them. `verify` first; errors as there."""
        stored = StoredTensors()
        try:
            for path in (self.path(step) / name for name in self.table_files(step, stem)):
                with self._reading(step, path):
                    stored.add(path)
            stored.check()
        except DamagedTable as damage:
            raise DamagedCheckpoint(str(damage)) from None
        return stored

    def read_text(self, step: int, name: str) -> str:
        """The text of one file. `verify` first; errors as there."""
        path = self.path(step) / name
        with self._reading(step, path):
            content = path.read_bytes()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedCheckpoint(f"{path}: byte {error.start} is not UTF-8") from None

    def read_json(self, step: int, name: str) -> dict:
        """The object in one JSON file. `verify` first; errors as there."""
        text = self.read_text(step, name)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise DamagedCheckpoint(f"{self.path(step) / name}: not a JSON object")
        return found

    @contextmanager
    def _reading(self, step: int, path: Path) -> Iterator[None]:
        """Tells damage from errors of the system, which name the file, and from a checkpoint that was removed."""
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait
                raise DamagedCheckpoint(f"{path}: not a file")
            yield
        except FileNotFoundError as error:
            # A checkpoint is renamed before it is removed, so that it is complete or absent.
            if not self.path(step).is_dir():
                raise RemovedCheckpoint(f"checkpoint {self.path(step)} was removed while it was read") from None
            raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
        except OSError as error:
            if error.errno is None:
                raise OSError(f"{path}: {error}") from None
            raise OSError(error.errno, error.strerror, str(path)) from None

    def set_aside(self, step: int, kind: str = DamagedCheckpoint.kind) -> Path:
        """Rename a damaged or foreign checkpoint, so that it is kept but not read."""
        source = self.path(step)
        target = _free_name(source, kind)
        os.rename(source, target)
        sync(self.directory)
        return target

    def clean(self) -> None:
        """Remove the leftovers of an interrupted `save` or `prune`."""
        for entry, step, kind in self._entries():
            if kind == "replaced" and entry.is_dir() and not os.path.lexists(self.path(step)):
                os.rename(entry.path, self.path(step))
        for entry, _, kind in self._entries():
            if kind in ("tmp", "replaced") and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and the one of step `best`. A folder without a manifest of ours
        is not a checkpoint, and stays."""
        for step in list(filter(self._has_manifest, self.steps()))[:-keep]:
            if step != best:
                # Renamed first: an interrupted removal must not look like a damaged checkpoint.
                doomed = self.temporary(step)
                _make_way(doomed)
                os.rename(self.path(step), doomed)
                _remove(doomed)

    def _has_manifest(self, step: int) -> bool:
        try:
            self.files(step)
        except (DamagedCheckpoint, OSError):
            return False
        return True


def _remove(path: Path) -> None:
    """Remove a checkpoint, or the link to one that the user has put on another disk."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _make_way(path: Path) -> None:
    """Remove a leftover folder of this name; anything else is not ours, and is renamed."""
    if path.is_symlink() or path.is_file():
        os.rename(path, _free_name(path, "kept"))
    elif path.is_dir():
        shutil.rmtree(path)


def _free_name(path: Path, suffix: str) -> Path:
    target = path.with_name(f"{path.name}.{suffix}")
    number = 2
    while os.path.lexists(target):
        target = path.with_name(f"{path.name}.{suffix}-{number}")
        number += 1
    return target


def _manifest_text(files: dict) -> str:
    return json.dumps({"format": _FORMAT, "files": files}, indent=2, sort_keys=True) + "\n"
