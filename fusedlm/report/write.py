"""Write the report of a run folder."""

import json
import math
from pathlib import Path

import numpy as np

from fusedlm import __version__
from fusedlm.config.reading import parse_yaml
from fusedlm.files import write_atomic
from fusedlm.report.facts import header_facts
from fusedlm.report.history import History, median, read_history
from fusedlm.report.page import Page, render
from fusedlm.report.plots import draw_plots
from fusedlm.report.units import count, duration, memory, percent
from fusedlm.runs.integrity import check_run
from fusedlm.runs.tasks import read_tasks


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html, one self-contained page, and its plots as RUN/plots/*.png.

    Runs that are not finished or have no validation get a page too.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder holds no run, or its metrics or environment are damaged; names file and line.
        OSError: the page or a plot cannot be written.
    """
    run_dir = Path(run_dir)
    history = read_history(run_dir)
    environment = _read_environment(run_dir / "environment.json")
    recipe = _read_text(run_dir / "recipe.yaml")
    tree = _tree(recipe)
    plots = draw_plots(history)
    head, rows = _validation_table(history)
    tasks_head, tasks = _tasks_table(read_tasks(run_dir))
    page = Page(
        title=str(tree.get("name") or "") or run_dir.resolve().name,
        description=str(tree.get("description") or ""),
        facts=header_facts(tree, environment, float(history.steps["tokens"].max()), history.sources),
        key_figures=_key_figures(history, environment),
        plots=plots,
        notes=_notes(history) + check_run(run_dir),
        validation_head=head,
        validation=rows,
        best_row=_best(history),
        tasks_head=tasks_head,
        tasks=tasks,
        sample=_read_text(run_dir / "sample.txt"),
        recipe=recipe,
        environment=_flatten(environment | _counted(environment.get("optimizer"))),
        version=__version__,
    )
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    for plot in plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    path = run_dir / "report.html"
    write_atomic(path, render(page))
    return path


def _read_text(path: Path) -> str | None:
    """The text of a file; None if there is none. Bytes that are not UTF-8 become U+FFFD."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace").strip("\n") or None
    except FileNotFoundError:
        return None


def _read_environment(path: Path) -> dict:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        environment = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path} line {line}: not JSON; remove the file") from None
    if not isinstance(environment, dict):
        raise ValueError(f"{path} line 1: not a JSON object; remove the file")
    return environment


def _tree(recipe: str | None) -> dict:
    """The recipe as plain values; empty if it cannot be read, since a report must not fail on an older recipe."""
    try:
        tree = parse_yaml(recipe or "")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _best(history: History) -> int | None:
    bpb = history.validation["val_bpb"]
    return int(np.nanargmin(bpb)) if np.isfinite(bpb).any() else None


def _key_figures(history: History, environment: dict) -> list[tuple[str, str, str]]:
    steps = history.steps
    figures = []
    if parameters := _parameters(environment):
        figures.append(parameters)
    best = _best(history)
    if best is not None:
        bpb, at = history.validation["val_bpb"], history.validation["step"]
        last = int(np.flatnonzero(np.isfinite(bpb))[-1])
        figures.append(("Validation, last", f"{bpb[last]:.4f}", f"bits per byte, step {at[last]:.0f}"))
        if best != last:
            figures.append(("Validation, best", f"{bpb[best]:.4f}", f"bits per byte, step {at[best]:.0f}"))
    saved = history.validation["val_routed_flops_share"]
    if np.isfinite(saved).any():
        share = float(saved[np.isfinite(saved)][-1])
        figures.append(("Feed-forward FLOPs", percent(share), "of full ones, last validation"))
    loads = history.validation["val_moe_max_load"]
    if np.isfinite(loads).any():
        highest = float(loads[np.isfinite(loads)][-1])
        figures.append(("Highest expert load", f"{highest:.2f}", "of the mean, worst layer, last validation"))
    figures.append(("Tokens trained", count(float(steps["tokens"].max())), f"in {len(steps['step']):,} steps"))
    seconds = float(np.nansum(steps["step_seconds"]))
    if seconds:
        figures.append(("Training time", duration(seconds), "without validation"))
    rate = median(steps["tokens_per_second"])
    if rate is not None:
        figures.append(("Tokens per second", count(rate), "median"))
    mfu = median(steps["mfu"])
    if mfu is not None:
        figures.append(("Model FLOPs utilisation", percent(mfu), "median"))
    if np.isfinite(steps["peak_memory_bytes"]).any():
        figures.append(("Peak memory", memory(float(np.nanmax(steps["peak_memory_bytes"]))), ""))
    if seconds and np.isfinite(steps["loader_wait_seconds"]).any():
        waited = float(np.nansum(steps["loader_wait_seconds"])) / seconds
        figures.append(("Waiting for data", percent(waited), "of training time"))
    stalled = float(np.nansum(steps["checkpoint_seconds"]))
    if seconds and stalled:
        figures.append(("Waiting for checkpoints", percent(stalled / (seconds + stalled)), "of training and waiting"))
    return figures


def _parameters(environment: dict) -> tuple[str, str, str] | None:
    """From `parameters` of the environment: a number, or total and active."""
    recorded = environment.get("parameters")
    if isinstance(recorded, dict):
        total, active = recorded.get("total"), recorded.get("active")
    else:
        total = active = recorded
    if isinstance(total, bool) or not isinstance(total, int | float):
        return None
    differs = isinstance(active, int | float) and active != total
    return "Parameters", count(total), f"{count(active)} active" if differs else ""


def _notes(history: History) -> list[str]:
    notes = []
    if history.skipped:
        shown = ", ".join(str(step) for step in history.skipped[:12])
        more = f" and {len(history.skipped) - 12} more" if len(history.skipped) > 12 else ""
        noun = "step was" if len(history.skipped) == 1 else "steps were"
        notes.append(f"{len(history.skipped)} {noun} skipped because loss or gradient was not finite: {shown}{more}.")
    if _best(history) is None:
        notes.append("No validation is recorded.")
    return notes


def _validation_table(history: History) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows. Columns that a run does not have are omitted."""
    columns = history.validation
    shown = {
        "Step": (columns["step"], ",.0f"),
        "Tokens": (columns["tokens"], ",.0f"),
        "Bits per byte": (columns["val_bpb"], ".4f"),
        "of ema weights": (columns["val_bpb_ema"], ".4f"),
        "of swa weights": (columns["val_bpb_swa"], ".4f"),
        "quantised": (columns["val_bpb_qat"], ".4f"),
        "Nats per token": (columns["val_nll_per_token"], ".4f"),
        "Window": (columns["val_window"], ",.0f"),
        "Stride": (columns["val_stride"], ",.0f"),
    }
    for optional in ("of ema weights", "of swa weights", "quantised", "Window", "Stride"):
        if not np.isfinite(shown[optional][0]).any():
            del shown[optional]
    cells = [[format(v, how) if math.isfinite(v) else "–" for v in values.tolist()] for values, how in shown.values()]
    return tuple(shown), list(zip(*cells, strict=True))


def _tasks_table(entries: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: one for each metric of each result, with its standard error."""
    rows = []
    for entry in entries:
        of = f"first {entry['limit']:,}" if entry["limit"] else "all"
        where = (f"{entry['checkpoint']:,} {entry['weights']}", f"{entry['samples']:,} ({of})", f"{entry['shots']}")
        metrics = entry["metrics"]
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                spread = "" if error is None else f" ± {error:.4f}"
                rows.append((entry["task"], name, f"{value:.4f}{spread}", *where))
    return ("Task", "Metric", "Value", "Checkpoint", "Questions", "Examples"), rows


def _counted(split) -> dict:
    """The optimizer's split with the number of tensors in each group instead of their names."""
    groups = split.items() if isinstance(split, dict) else ()
    return {"optimizer": {label: f"{len(names):,} tensors" for label, names in groups if isinstance(names, list)}}


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Rows of dotted names and values, without null values."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
        elif value is not None:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
