"""fusedlm eval --tasks: benchmark tasks of lm-eval."""

import sys
from typing import Annotated

import typer

from fusedlm.cli.common import LoadedRun, integer
from fusedlm.strict_json import dumps

TasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE,...",
        help="Tasks of lm-eval by name, or files that need no network: YAML, or JSONL of questions.",
        show_default=False,
    ),
]
ShotsOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="With --tasks: examples before each question (default: as the task says).",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="With --tasks: most questions of each task (default: all).",
        show_default=False,
    ),
]
_TAKES = ("window", "yarn")


def check_task_options(tasks: str | None, shots: int | None, limit: int | None, others: dict) -> None:
    """Raises ValueError if an option does not go with --tasks, or needs it."""
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1)):
        if value is not None and tasks is None:
            raise ValueError(f"--{name} is an option of --tasks")
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    if tasks is not None:
        for name, value in others.items():
            if value is not None and name not in _TAKES:
                raise ValueError(f"--{name} is not an option of --tasks")


def run_tasks(
    loaded: LoadedRun,
    tasks: str,
    shots: int | None,
    limit: int | None,
    window: int | None,
    weights: str,
    yarn: float | None,
    *,
    as_json: bool,
) -> None:
    """Run tasks, print their results, and write them into the folder and the report of a run.

    window: most tokens that the model sees at once; None: those of training, times yarn.
    """
    from fusedlm.harness import evaluate_tasks
    from fusedlm.runs.folder import RECIPE
    from fusedlm.runs.tasks import add_tasks

    if window is not None and window < 2:
        raise ValueError(f"--window {window}: must be at least 2 with --tasks")
    trained = loaded.recipe.train.seq_len
    max_length = window or int(trained * max(1.0, yarn or 1.0))
    results, _ = evaluate_tasks(
        loaded.model,
        loaded.tokenizer,
        [name.strip() for name in tasks.split(",")],
        max_length=max_length,
        device=loaded.device,
        dtype=loaded.dtype,
        n_shots=shots,
        limit=limit,
        quiet=not sys.stderr.isatty(),
    )
    shared = {
        "checkpoint": loaded.step,
        "weights": weights,
        "limit": limit,
        "max_length": max_length,
        "yarn": yarn,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    entries = [
        {"task": r.task, "samples": r.n_samples, "shots": r.n_shots, "metrics": r.metrics} | shared for r in results
    ]
    if (loaded.run / RECIPE).is_file():  # a model that is no run stays as it is
        add_tasks(loaded.run, entries)
        _update_report(loaded)
    if as_json:
        print(dumps(entries))
        return
    for entry in entries:
        metrics = entry["metrics"]
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr")
                spread = "" if error is None else f" ± {error:.4f}"
                print(f"{entry['task']:20} {name:12} {value:.4f}{spread}  ({entry['samples']:,} questions)")


def _update_report(loaded: LoadedRun) -> None:
    """Of a run with metrics: an imported one has none, and no report."""
    from fusedlm.report import write_report
    from fusedlm.runs.folder import METRICS

    if (loaded.run / METRICS).exists():
        write_report(loaded.run)
