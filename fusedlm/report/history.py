"""The metrics of a run as columns, and their smoothing and thinning for plots."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fusedlm.runs.metrics import read_metrics

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
    "checkpoint_seconds",
    "routed_light",
    "routed_blend",
    "routed_full",
    "routed_flops_share",
    "routed_budget",
    "moe_entropy",
    "moe_max_load",
    "moe_dead",
)
_VALIDATION_COLUMNS = (
    "step",
    "tokens",
    "val_bpb",
    "val_nll_per_token",
    "val_bpb_ema",
    "val_bpb_swa",
    "val_bpb_qat",
    "val_window",
    "val_stride",
    "val_routed_flops_share",
    "val_moe_max_load",
)
_TIMES = ("tokens_per_second", "mfu", "loader_wait_seconds", "step_seconds", "checkpoint_seconds")
_LAYER_LOADS = "moe_layers"  # of each layer: entropy of the loads, highest over mean load, dead experts
_LAYER_LOSS = "loss_"  # prefix of the losses of layers
_SOURCE_TOKENS, _SOURCE_EPOCHS = "source_tokens_", "source_epochs_"  # prefixes, of several sources


@dataclass(frozen=True)
class History:
    """Columns by name, each (n,) float64 in order of steps; NaN if a value is missing, null or not finite."""

    steps: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    skipped: list[int]  # steps that were skipped because loss or gradient was not finite
    layer_losses: dict[str, np.ndarray] = field(default_factory=dict)  # of each step, by name without the prefix
    sources: dict[str, tuple[float, float]] = field(default_factory=dict)  # tokens and epochs at the last step, by name
    # (n, layers) float64, the highest over the mean load of the experts of each layer at each step; None: no experts.
    max_loads: np.ndarray | None = None


def read_history(run_dir: Path) -> History:
    """Read RUN/metrics.jsonl. An incomplete last line is skipped; of two records of a step the later one counts.

    Raises:
        ValueError: the file is missing or has no step, or a line is not a record; names the file and the line.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {run_dir} is not the folder of a run, or the run has not started")
    records, damaged = read_metrics(path)
    if damaged:
        raise ValueError(f"{path} line {damaged[0]}: not a JSON object with a step number; remove the line")
    steps: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    loads: dict[int, list[float]] = {}
    names = sorted({key for record in records for key in record if key.startswith(_LAYER_LOSS)})
    sources = sorted({key for record in records for key in record if key.startswith(_SOURCE_TOKENS)})
    sources = [key.removeprefix(_SOURCE_TOKENS) for key in sources]
    counts = [prefix + name for name in sources for prefix in (_SOURCE_TOKENS, _SOURCE_EPOCHS)]
    step_columns = (*_STEP_COLUMNS, *names, *counts)
    # No line is damaged, so record n is line n.
    for line, record in enumerate(records, start=1):
        for kind, key, columns in ((steps, "loss", step_columns), (validation, "val_bpb", _VALIDATION_COLUMNS)):
            if key in record:
                row = {column: _number(record.get(column), f"{path} line {line}: {column}") for column in columns}
                if math.isnan(row["tokens"]):
                    raise ValueError(f"{path} line {line}: tokens is missing; remove the line")
                kind[record["step"]] = row | {"skipped": record.get("skipped") is True}
        if "loss" in record and _LAYER_LOADS in record:
            loads[record["step"]] = _max_loads(record[_LAYER_LOADS], f"{path} line {line}: {_LAYER_LOADS}")
    if not steps:
        raise ValueError(f"{path}: no training step is recorded yet")
    last = steps[max(steps)]
    return History(
        steps=_columns(steps, _STEP_COLUMNS),
        validation=_columns(validation, _VALIDATION_COLUMNS),
        skipped=[step for step in sorted(steps) if steps[step]["skipped"]],
        sources={name: (last[_SOURCE_TOKENS + name], last[_SOURCE_EPOCHS + name]) for name in sources},
        layer_losses={name.removeprefix(_LAYER_LOSS): column for name, column in _columns(steps, names).items()},
        max_loads=_table([loads.get(step, []) for step in sorted(steps)]),
    )


def _max_loads(layers, where: str) -> list[float]:
    """Of each layer, from the value of `moe_layers`."""
    if not isinstance(layers, list) or not all(isinstance(row, list) and len(row) == 3 for row in layers):
        raise ValueError(f"{where}={str(layers)[:40]!r}: not three numbers for each layer")
    return [_number(highest, where) for _, highest, _ in layers]


def _table(rows: list[list[float]]) -> np.ndarray | None:
    """Rows that may lack values at their end; None: all are empty."""
    width = max(map(len, rows))
    return np.array([row + [math.nan] * (width - len(row)) for row in rows], dtype=np.float64) if width else None


def _number(value, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}={str(value)[:40]!r}: not a number")
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _columns(rows: dict[int, dict], names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.array([rows[step][name] for step in sorted(rows)], dtype=np.float64) for name in names}


def median(values: np.ndarray) -> float | None:
    """The median of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def total(values: np.ndarray) -> float | None:
    """The sum of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.sum()) if len(finite) else None


def without_times(history: History) -> History:
    """The same without times of steps and what is computed from them."""
    unknown = np.full(len(history.steps["step"]), np.nan)
    return replace(history, steps=history.steps | dict.fromkeys(_TIMES, unknown))


def half_life(n: int) -> int:
    """The half-life, in steps, of the smoothing of a curve of n steps."""
    return max(1, n // 100)


def smooth(values: np.ndarray, half_life: float) -> np.ndarray:
    """Two-sided exponential average, (n,) -> (n,): a value `half_life` steps away has half the weight.

    Two-sided, so that the curve does not lag. Missing values have no weight.
    """
    known = np.isfinite(values)
    columns = np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1)  # (n, 2): value, weight
    # Sums up to each value and from each value on; both include the value itself.
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
    """At most about `most` points that draw the same curve: the lowest and the highest of each interval, in order."""
    finite = np.isfinite(y)
    if len(y) <= most or not finite.any():
        return x, y
    x, y = x[finite], y[finite]
    picked = [
        i
        for interval in np.array_split(np.arange(len(y)), min(most // 2, len(y)))
        for i in sorted({interval[y[interval].argmin()], interval[y[interval].argmax()]})
    ]
    return x[picked], y[picked]
