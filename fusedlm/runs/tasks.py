"""Results of benchmark tasks in a run folder."""

import json
from pathlib import Path

from fusedlm.files import write_atomic

TASKS = "tasks.json"
_KEYS = {"task": str, "checkpoint": int, "weights": str, "samples": int, "shots": int, "limit": int | None}


def read_tasks(run_dir: Path) -> list[dict]:
    """The entries of RUN/tasks.json, oldest first: task, checkpoint (step), weights, samples, shots, limit, max_length,
    dtype, and metrics by name. Empty if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(run_dir) / TASKS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON; remove the file") from None
    if not isinstance(found, list) or not all(map(_is_entry, found)):
        raise ValueError(f"{path}: not a list of results of tasks; remove the file")
    return found


def add_tasks(run_dir: Path, entries: list[dict]) -> None:
    """Add results; those of the same task, checkpoint, weights, shots and limit are replaced.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written.
    """
    new = {_identity(entry) for entry in entries}
    kept = [entry for entry in read_tasks(run_dir) if _identity(entry) not in new]
    write_atomic(Path(run_dir) / TASKS, json.dumps([*kept, *entries], indent=1) + "\n")


def _identity(entry: dict) -> tuple:
    return tuple(entry[key] for key in ("task", "checkpoint", "weights", "shots", "limit"))


def _is_entry(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
        return False
    typed = all(key in entry and isinstance(entry[key], kind) for key, kind in _KEYS.items())
    return typed and all(isinstance(value, int | float) for value in entry["metrics"].values())
