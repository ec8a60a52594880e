"""RUN/run.json: the id of a run, and the checksums of the files that `fusedlm train` wrote beside its checkpoints."""

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from fusedlm.files import write_atomic
from fusedlm.runs.seal import seal, unseal

IDENTITY = "run.json"


@dataclass(frozen=True)
class Identity:
    """run: id of the run, also in each of its checkpoints. files: SHA-256 by file name. replaced: of former contents of
    these files, which they still have if the process that replaced them was killed."""

    run: str
    files: dict[str, str]
    replaced: dict[str, list[str]] = field(default_factory=dict)

    def wrote(self, path: Path) -> bool:
        """Whether a file of the run folder is as it was written."""
        known = (self.files.get(path.name), *self.replaced.get(path.name, ()))
        return path.is_file() and _sha256(path.read_bytes()) in known


def new_run_id() -> str:
    """32 random hexadecimal digits; torch's random numbers are not touched."""
    return secrets.token_hex(16)


def identity_of(run: str, contents: dict[str, bytes], before: Identity | None = None) -> Identity:
    """The identity of files of these contents, by name, or of those that they replace.

    Args:
        before: of the files that are replaced; None: their contents are not accepted.
    """
    files = {name: _sha256(content) for name, content in contents.items()}
    if before is None:
        return Identity(run, files)
    replaced = {name: {before.files.get(name), *before.replaced.get(name, ())} - {None, files[name]} for name in files}
    return Identity(run, files, {name: sorted(former) for name, former in replaced.items() if former})


def write_identity(run_dir: Path, identity: Identity) -> None:
    """Write run.json."""
    record = {"format": 1, "run": identity.run, "files": identity.files}
    if identity.replaced:
        record["replaced"] = identity.replaced
    write_atomic(run_dir / IDENTITY, json.dumps(seal(record, IDENTITY), indent=1) + "\n")


def read_identity(run_dir: Path) -> Identity | None:
    """The content of run.json; None if there is none: a run of an earlier version.

    Raises:
        ValueError: it is not what was written.
        OSError: it cannot be read.
    """
    path = run_dir / IDENTITY
    try:
        record = unseal(json.loads(path.read_bytes()), IDENTITY)
        files = dict(record["files"])
        if any(Path(name).name != name for name in files):
            raise ValueError
        replaced = {name: list(known) for name, known in record.get("replaced", {}).items()}
        return Identity(str(record["run"]), files, replaced)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not what was written; fusedlm train --resume writes it again") from None


def changed_files(run_dir: Path, identity: Identity) -> list[str]:
    """Names of the files that are missing or not as they were written."""
    return [name for name in sorted(identity.files) if not identity.wrote(run_dir / name)]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
