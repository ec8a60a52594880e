"""RUN/metrics.jsonl: one JSON object a line, for each step and each validation."""

import contextlib
import json
import math
import os
from pathlib import Path

from fusedlm.files import write_atomic


def read_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """Records of a metrics file, and the numbers (from 1) of lines that are not a record.

    A last line without its line feed is one whose writing was cut off: it is left out and not counted as damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    records, damaged = [], []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
        else:
            records.append(record)
    return records, damaged


class MetricsFile:
    """Appends records, each flushed as it is written. Numbers that are not finite are written as null."""

    def __init__(self, path: Path, after_step: int):
        """Open for appending behind the records of `after_step`; later ones are removed.

        A run resumed from the checkpoint of that step then leaves the file that a run without interruption leaves.
        """
        self.path = path
        records, self.damaged_lines = read_metrics(path)
        kept = [_line(record) for record in records if record["step"] <= after_step]
        write_atomic(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        """Raises OSError naming the file when the disk is full."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror or error}") from None

    def sync(self) -> None:
        """To the disk: no checkpoint may outlive the records before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        # Every record was flushed by `write`, which has reported a full disk; closing would only report it again.
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: dict) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
