"""Evaluate a model on tasks of lm-eval."""

import contextlib
import io
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusedlm.harness.tasks import find_tasks

_SHOTS_SEED = 1234  # of lm-eval


@dataclass(frozen=True)
class TaskResult:
    """task: its name. n_samples: questions. n_shots: examples before each. metrics: by name, and by name_stderr."""

    task: str
    n_samples: int
    n_shots: int
    metrics: dict[str, float]


def evaluate_tasks(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    max_length: int,
    device: torch.device,
    dtype: torch.dtype,
    n_shots: int | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    quiet: bool = True,
) -> tuple[list[TaskResult], dict[str, list[dict]]]:
    """Results of tasks, and by task the samples with their answers, as lm-eval gives them.

    Args:
        tasks: names of lm-eval, or files (`fusedlm.harness.tasks`).
        max_length: most tokens that the model sees at once.
        n_shots: examples before each question; None: as the task says.
        limit: most questions of each task; None: all.
        quiet: without the progress bars of lm-eval.

    Raises:
        ValueError: lm-eval is not installed, a task is unknown or cannot be loaded, or the model's likelihoods are not
            finite.
    """
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(f"--tasks needs {error.name}: pip install 'fusedlm[eval-harness]'") from None
    from fusedlm.harness.model import RunModel

    found = find_tasks(list(tasks))
    wrapped = RunModel(model, tokenizer, max_length, device=device, dtype=dtype, batch_tokens=batch_tokens, quiet=quiet)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [task for task in found if isinstance(task, str)]
    with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
        manager = TaskManager(include_defaults=bool(names))
        _check_names(names, manager)
        try:
            loaded = manager.load(found)
        except Exception as error:  # whatever a file's keys or the data set's library raise
            line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"--tasks {','.join(tasks)}: cannot be loaded ({line}); a file needs no network") from None
        for task in loaded["tasks"].values():
            _set_shots(task, n_shots)
        results = evaluate(wrapped, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return [_result(name, results) for name in results["results"]], results["samples"]


def _set_shots(task, n_shots: int | None) -> None:
    """As lm-eval does it: a task that says 0 itself keeps that."""
    own = task.get_config("num_fewshot")
    if own is None or (n_shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=n_shots or 0)
    task.set_fewshot_seed(seed=_SHOTS_SEED)


def _check_names(names: list[str], manager) -> None:
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise ValueError(f"--tasks {name}: lm-eval has no task of this name; give a name of its list, or a file")


def _result(name: str, results: dict) -> TaskResult:
    metrics = {}
    for key, value in results["results"][name].items():
        metric, _, _ = key.partition(",")
        if "," in key and not metric.endswith("_stderr") and isinstance(value, int | float):
            metrics[metric] = float(value)
    samples = results["samples"].get(name, [])
    for metric in list(metrics):
        own = [sample[metric] for sample in samples if isinstance(sample.get(metric), int | float)]
        # The mean of a quantity from 0 to 1, such as an accuracy.
        if len(own) > 1 and all(0 <= x <= 1 for x in own):
            metrics[f"{metric}_stderr"] = statistics.stdev(own) / len(own) ** 0.5
    n_samples = results["n-samples"].get(name, {}).get("effective", 0)
    return TaskResult(name, n_samples, int(results["n-shot"].get(name) or 0), metrics)
