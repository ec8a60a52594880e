"""Checkpoint folders: safetensors and JSON files, checksummed, written atomically, pruned; `state` fills them."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fusedlm.distributed import World
from fusedlm.files import sync

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})$")

# (folder, file stem, tensors by name, world): every process calls it, and it writes this process's part of the tensors.
Writer = Callable[[Path, str, dict[str, torch.Tensor], World], None]


def write_safetensors(folder: Path, stem: str, tensors: dict[str, torch.Tensor], world: World) -> None:
    """One file of full tensors, written by the main process: every process must hold the same ones."""
    if not world.is_main:
        return
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / f"{stem}.safetensors")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose content is not what was written; the message names the file and the damage."""


class Checkpoints:
    """The checkpoints of one run, a folder `step-00000100` each.

    A checkpoint is complete or absent: it is written under a temporary name, flushed, and renamed. `manifest.json`
    holds the SHA-256 and the size of every other file.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, intact or not, ascending."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.match(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def set_aside_names(self) -> list[str]:
        """Names of damaged checkpoints that an earlier resume set aside."""
        if not self.directory.is_dir():
            return []
        return sorted(entry.name for entry in self.directory.iterdir() if ".damaged" in entry.name)

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, torch.Tensor]],
        texts: dict[str, str],
        *,
        write: Writer = write_safetensors,
        world: World | None = None,
    ) -> Path:
        """Write a checkpoint, replacing one of the same step.

        Args:
            tensors: file stem -> tensors by name.
            texts: file name -> text.
            write: writes each table of tensors.
            world: the processes of the run, all of which call this; the main one writes texts and manifest and renames.
                None: this process alone.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are unchanged.
        """
        world = world or World()
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            if world.is_main:
                self.directory.mkdir(parents=True, exist_ok=True)
                temporary.mkdir()
            world.barrier()
            for stem, table in tensors.items():
                write(temporary, stem, table, world)
            world.barrier()
            if world.is_main:
                self._seal(temporary, texts)
                replaced = final.with_name(final.name + ".replaced")
                if final.exists():
                    os.rename(final, replaced)
                os.rename(temporary, final)
                sync(self.directory)
                shutil.rmtree(replaced, ignore_errors=True)
            world.barrier()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            kept = self.steps()
            last = f"the last one is {self.path(kept[-1])}" if kept else "there is none before it"
            raise OSError(f"checkpoint {final} could not be written: {reason}; {last}") from None
        return final

    @staticmethod
    def _seal(folder: Path, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        files = {}
        for path in sorted(folder.iterdir()):
            sync(path)
            files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        (folder / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
        sync(folder / MANIFEST)
        sync(folder)

    def files(self, step: int) -> dict[str, dict]:
        """The manifest's table: file name -> {"sha256", "bytes"}.

        Raises:
            DamagedCheckpoint: the manifest is missing or is not what was written.
        """
        path = self.path(step) / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            files = dict(json.loads(text)["files"])
            # The manifest has no checksum; it must be, byte for byte, what its content serialises to.
            intact = text == _manifest_text(files)
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise DamagedCheckpoint(f"{path}: not the manifest that was written")
        return files

    def verify(self, step: int, only: tuple[str, ...] | None = None) -> None:
        """Check sizes and checksums of all files, or of the named ones.

        Raises:
            DamagedCheckpoint: a file is missing, truncated, changed, or not in the manifest.
        """
        files = self.files(step)
        for name in only if only is not None else files:
            path = self.path(step) / name
            if name not in files:
                raise DamagedCheckpoint(f"{path}: not in the manifest")
            try:
                found = {"sha256": _sha256(path), "bytes": path.stat().st_size}
            except OSError as error:
                raise DamagedCheckpoint(f"{path}: {error.strerror or error}") from None
            if found != files[name]:
                raise DamagedCheckpoint(f"{path}: its {found['bytes']} bytes are not the ones that were written")

    def read_tensors(self, step: int, stem: str) -> dict[str, torch.Tensor]:
        """The tensors of one file by name, on the CPU. `verify` first."""
        return load_file(self.path(step) / f"{stem}.safetensors")

    def read_json(self, step: int, name: str) -> dict:
        """The object in one JSON file. `verify` first."""
        return json.loads((self.path(step) / name).read_text(encoding="utf-8"))

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it is kept but not read."""
        source = self.path(step)
        target = source.with_name(source.name + ".damaged")
        number = 2
        while target.exists():
            target = source.with_name(f"{source.name}.damaged-{number}")
            number += 1
        os.rename(source, target)
        sync(self.directory)
        return target

    def clean(self) -> None:
        """Remove the leftovers of an interrupted `save`."""
        if not self.directory.is_dir():
            return
        for replaced in self.directory.glob("step-*.replaced"):
            final = replaced.with_suffix("")
            if not final.exists():
                os.rename(replaced, final)
        for pattern in ("step-*.tmp", "step-*.replaced"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and the one of step `best`."""
        for step in self.steps()[:-keep]:
            if step != best:
                # Renamed first: an interrupted removal must not look like a damaged checkpoint.
                doomed = self.path(step).with_name(self.path(step).name + ".tmp")
                os.rename(self.path(step), doomed)
                shutil.rmtree(doomed)


def _manifest_text(files: dict) -> str:
    return json.dumps({"format": _FORMAT, "files": files}, indent=2, sort_keys=True) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
