"""RUN/metrics.jsonl: one JSON object per line, for each step and each validation.

Each line ends with a check: a digest of its record and of the check of the line before it. So a line that was changed
or removed shows, and the last check stands for all lines up to it.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from fusedlm.files import write_atomic
from fusedlm.strict_json import finite_or_none

_CHECK = "check"


@dataclass
class Audit:
    """The records of a metrics file, and what does not fit.

    Attributes:
        records: without their checks.
        raw: the line of each record, without its line feed.
        damaged: numbers of the lines that are not records.
        problems: a sentence for each range of steps that is missing, and for each line that is not the one written.
        check: of the last record; "" if there is none.
    """

    records: list[dict] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    check: str = ""


def read_metrics(path: Path) -> tuple[list[dict], list[int]]:
    """The records of a metrics file, and the numbers (from 1) of damaged lines.

    A last line without a line feed was interrupted while it was written: it is skipped, and not counted as damaged.
    """
    found = audit_metrics(path)
    return found.records, found.damaged


def audit_metrics(path: Path, up_to_step: int | None = None, up_to_check: str | None = None) -> Audit:
    """Read a metrics file, and check that its lines are the ones that were written, with a record of every step.

    Args:
        up_to_step, up_to_check: the position of a checkpoint, whose records are read and must be there; the check is
            None in checkpoints of earlier versions. None, None: read all.
    """
    try:
        content = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        content = []
    audit, step, checked = Audit(), 0, False
    for number, line in enumerate(content, start=1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise TypeError
            found = record.pop(_CHECK, None)
            expected = _digest(audit.check, record)
        except (ValueError, KeyError, TypeError, RecursionError):
            audit.damaged.append(number)
            continue
        if up_to_step is not None and (record["step"] > up_to_step or audit.check == up_to_check):
            continue
        # After a line that was changed, the next one is compared with the check that it was written after. The first
        # lines may be of an earlier version and have none.
        fits = found == expected if checked or found is not None else True
        checked = checked or found is not None
        audit.check = expected if found is None else str(found)
        audit.records.append(record)
        audit.raw.append(line)
        problem = _sequence(record, step)
        if "loss" in record:
            step = record["step"]
        if problem is None and not fits:
            problem = f"line {number} (step {record['step']}) was changed, or a line before it was removed"
        if problem is not None:
            audit.problems.append(problem)
    if up_to_step is not None and step < up_to_step:
        audit.problems.append(_missing(step, up_to_step + 1))
    elif up_to_check is not None and audit.check != up_to_check and not audit.problems:
        audit.problems.append(f"the records up to step {up_to_step} are not those of its checkpoint")
    return audit


def _sequence(record: dict, last: int) -> str | None:
    """What is wrong with the step of a record after the record of step `last`."""
    step = record["step"]
    if "loss" not in record:  # a validation belongs to the last step
        return None if step <= last else _missing(last, step + 1)
    if step <= last:
        return f"step {step} is recorded after step {last}"
    return None if step == last + 1 else _missing(last, step)


def _missing(before: int, after: int) -> str:
    first, last = before + 1, after - 1
    return f"step {first} is missing" if first == last else f"steps {first} to {last} are missing"


class MetricsFile:
    """Appends records and flushes each. Numbers that are not finite are written as null.

    Attributes:
        damaged_lines: numbers of the lines that were not records, and were removed.
        problems: as of `Audit`, of the records that were kept.
        check: stands for all records so far.
    """

    def __init__(self, path: Path, after_step: int, after_check: str | None = None):
        """Open for appending after the records of a checkpoint (`audit_metrics`); later records are removed.

        A run that resumes from the checkpoint of that step then ends with the file of an uninterrupted run.
        """
        self.path = path
        audit = audit_metrics(path, after_step, after_check)
        self.damaged_lines, self.problems, self.check = audit.damaged, audit.problems, audit.check
        write_atomic(path, b"".join(line + b"\n" for line in audit.raw))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict) -> None:
        """Append a record. Raises OSError with the name of the file when the disk is full."""
        clean = finite_or_none(record)
        check = _digest(self.check, clean)
        try:
            self._file.write(json.dumps(clean | {_CHECK: check}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror or error}") from None
        self.check = check

    def sync(self) -> None:
        """Sync to disk. Before each checkpoint: after a crash, no checkpoint may be ahead of the records."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        # `write` flushed every record and reported a full disk; closing would report it again.
        with contextlib.suppress(OSError):
            self._file.close()


def _digest(check: str, record: dict) -> str:
    return hashlib.sha256(f"{check}\n{json.dumps(record)}".encode()).hexdigest()[:16]
