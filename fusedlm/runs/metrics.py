"""RUN/metrics.jsonl: one JSON object per line, for each step and each validation."""

import contextlib
import json
import math
import os
from pathlib import Path

from fusedlm.files import write_atomic


def read_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """The records of a metrics file, and the numbers (from 1) of damaged lines.

    A last line without a line feed was interrupted while it was written: it is skipped, and not counted as damaged.
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
    """Appends records and flushes each. Numbers that are not finite are written as null."""

    def __init__(self, path: Path, after_step: int):
        """Open for appending after the records of `after_step`; later records are removed.

        A run that resumes from the checkpoint of that step then ends with the file of an uninterrupted run.
        """
        self.path = path
        records, self.damaged_lines = read_metrics(path)
        kept = [_line(record) for record in records if record["step"] <= after_step]
        write_atomic(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        """Append a record. Raises OSError with the name of the file when the disk is full."""
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror or error}") from None

    def sync(self) -> None:
        """Sync to disk. Before each checkpoint: after a crash, no checkpoint may be ahead of the records."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        # `write` flushed every record and reported a full disk; closing would report it again.
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: dict) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
