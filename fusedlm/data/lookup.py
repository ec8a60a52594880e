"""Prepared text by its fingerprint, wherever its folder is now and whatever happened to its source."""

from collections.abc import Iterable
from pathlib import Path

from fusedlm.data.manifest import MANIFEST, is_folder_of, read_manifest


def find_prepared(fingerprint: str, directories: Iterable[Path]) -> Path | None:
    """The folder of a fingerprint: a directory itself, or a folder in it, of the first that has one. None: none has.

    A folder is known by its manifest, so that one that was renamed is found and one that was swapped is not mistaken.
    A folder whose manifest cannot be read is given if it has the name of the fingerprint and no other is found: opening
    it says what is wrong.
    """
    unreadable = None
    for directory in directories:
        # Hidden folders are preparations that have not ended.
        manifests = [*directory.glob(MANIFEST), *directory.glob(f"[!.]*/{MANIFEST}")]
        # Names of this fingerprint first: in most cases one manifest is read.
        for folder in sorted((path.parent for path in manifests), key=lambda f: (not is_folder_of(f, fingerprint), f)):
            try:
                if read_manifest(folder)["fingerprint"] == fingerprint:
                    return folder
            except (ValueError, OSError):
                if is_folder_of(folder, fingerprint):
                    unreadable = unreadable or folder
    return unreadable


def places(data_dir: str, run_dir: Path) -> list[Path]:
    """Directories that may hold the prepared text of a run: `data.dir` from the working directory, then below the run
    folder and each folder that holds it, where it is after all of them have moved together."""
    given = Path(data_dir).expanduser()
    tails = [Path(given.name)] if given.is_absolute() else [given, Path(given.name)]
    run_dir = run_dir.absolute()
    moved = [folder / tail for tail in tails for folder in (run_dir, *run_dir.parents)]
    return list(dict.fromkeys([given.absolute(), *moved]))
