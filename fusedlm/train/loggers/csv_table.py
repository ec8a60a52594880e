"""RUN/metrics.csv: one row for each record of metrics.jsonl, one column for each of its keys with numbers."""

import csv
import io
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.files import write_atomic
from fusedlm.runs.folder import METRICS
from fusedlm.runs.metrics import read_metrics
from fusedlm.train.loggers.tags import is_number


class CSVLogger:
    """Appends rows. A key that appears later becomes a new last column, for which the file is written again.

    Starts with the records of metrics.jsonl up to the checkpoint that the run resumes from, so that the table is that
    of an uninterrupted run, also if the logger is new to the run or failed before.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        self._path = run_dir / "metrics.csv"
        if not start_step and self._path.exists() and not (run_dir / METRICS).exists():
            raise ValueError(f"{self._path} exists and is not of this run; move it away")
        records, _ = read_metrics(run_dir / METRICS)
        rows = [_row(record) for record in records if record["step"] <= start_step]
        self._columns = list(dict.fromkeys(column for row in rows for column in row)) or ["step"]
        self._file = None
        self._write(rows)

    def log(self, record: dict) -> None:
        row = _row(record)
        new = [column for column in row if column not in self._columns]
        if new:
            self._file.close()
            with self._path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._write([*rows, row])
            return
        self._file.write(self._text([row]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, rows: list[dict]) -> None:
        """Replace the file by these rows, and open it for appending."""
        head = dict(zip(self._columns, self._columns, strict=True))
        write_atomic(self._path, self._text([head, *rows]))
        self._file = self._path.open("a", encoding="utf-8", newline="")

    def _text(self, rows: list[dict]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()


def _row(record: dict) -> dict:
    return {key: int(value) if isinstance(value, bool) else value for key, value in record.items() if is_number(value)}
