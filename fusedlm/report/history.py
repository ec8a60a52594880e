"""The metrics of a run as columns."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusedlm.train.metrics import read_metrics

_STEP_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "loader_wait_seconds",
    "step_seconds",
    "routed_light",
    "routed_blend",
    "routed_full",
    "routed_flops_share",
    "routed_budget",
)
_VALIDATION_COLUMNS = ("step", "tokens", "val_bpb", "val_nll_per_token", "val_bpb_ema", "val_routed_flops_share")


@dataclass(frozen=True)
class History:
    """Columns by name, each (n,) float64 in order of steps; NaN where a value is missing, null or not finite."""

    steps: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    skipped: list[int]  # steps whose loss or gradient was not finite and which changed no weight


def read_history(run_dir: Path) -> History:
    """Read RUN/metrics.jsonl. A torn last line is left out; of two records for a step the later one counts.

    Raises:
        ValueError: the file is missing, holds no step, or a line is not a record; names the file and the line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {run_dir} is not the folder of a run, or the run has not begun")
    records, damaged = read_metrics(path)
    if damaged:
        raise ValueError(f"{path} line {damaged[0]}: not a JSON object with a step number; remove the line to go on")
    steps: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    # No line is damaged, so the records are the lines, one by one.
    for line, record in enumerate(records, start=1):
        for kind, key, columns in ((steps, "loss", _STEP_COLUMNS), (validation, "val_bpb", _VALIDATION_COLUMNS)):
            if key in record:
                row = {column: _number(record.get(column), f"{path} line {line}: {column}") for column in columns}
                if math.isnan(row["tokens"]):
                    raise ValueError(f"{path} line {line}: tokens is missing; every record needs it")
                kind[record["step"]] = row | {"skipped": record.get("skipped") is True}
    if not steps:
        raise ValueError(f"{path}: no training step is recorded yet; there is nothing to report")
    return History(
        steps=_columns(steps, _STEP_COLUMNS),
        validation=_columns(validation, _VALIDATION_COLUMNS),
        skipped=[step for step in sorted(steps) if steps[step]["skipped"]],
    )


def _number(value, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {str(value)[:40]!r}, which is not a number")
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _columns(rows: dict[int, dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.array([rows[step][name] for step in sorted(rows)], dtype=np.float64) for name in names}


def median(values: np.ndarray) -> float | None:
    """Of the finite values; None when there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def half_life(n: int) -> int:
    """Steps after which a value counts half in the smoothed curve of n steps."""
    return max(1, n // 100)


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Average of the values around each, those further off by the half-life in steps counting half. (n,) -> (n,).

    Two-sided, so that the curve does not lag behind a falling loss; missing values are passed over.
    """
    known = np.isfinite(values)
    columns = np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1)  # (n, 2): value, weight
    # What lies before a value, and what lies behind it, each including the value itself, which is taken off once.
    sums = _decayed_sums(columns, half_life) + _decayed_sums(columns[::-1], half_life)[::-1] - columns
    return np.where(known, sums[:, 0] / np.where(known, sums[:, 1], 1.0), np.nan)


def _decayed_sums(columns: np.ndarray, half_life: float) -> np.ndarray:
    keep = 0.5 ** (1 / half_life)
    running = np.zeros(columns.shape[1])
    out = np.empty_like(columns)
    for i, row in enumerate(columns):
        running = keep * running + row
        out[i] = running
    return out


def thin(x: np.ndarray, y: np.ndarray, most: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points that draw the same curve: the lowest and the highest of each stretch, in order."""
    finite = np.isfinite(y)
    if len(y) <= most or not finite.any():
        return x, y
    x, y = x[finite], y[finite]
    picked = [
        i
        for stretch in np.array_split(np.arange(len(y)), min(most // 2, len(y)))
        for i in sorted({stretch[y[stretch].argmin()], stretch[y[stretch].argmax()]})
    ]
    return x[picked], y[picked]
