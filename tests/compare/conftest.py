"""A tiny experiment whose work runs in this process and is counted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from fusedlm.compare import run_experiment
from fusedlm.compare.plots import draw_plots
from fusedlm.compare.process import Task
from fusedlm.config import dump_recipe
from fusedlm.config.experiment import load_experiment
from tests.train.runs import tiny_recipe

EXPERIMENT = """
name: tiny
description: <b>Two</b> mixers & two seeds.
base: base.yaml
match: params
variants:
  latent: [model.pattern=m]
  softmax: {model.pattern: a}
seeds: 2
decode_lengths: [20, 70]
"""


@dataclass(frozen=True)
class Ended:
    task: Task
    result: Callable  # runs the task, in this process


@dataclass
class InProcess:
    """Replaces run_in_process and run_tasks; `calls` are the names of the work and of its folder."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    before: object = None  # called with (name of the work, its arguments, report); may raise or return another report

    def run_in_process(self, work, *arguments, report, stop=None, gpu=None):
        folder = next((argument.name for argument in arguments if isinstance(argument, Path)), "")
        self.calls.append((work.__name__, folder))
        if self.before is not None:
            report = self.before(work.__name__, arguments, report) or report
        return work(*arguments, report)

    def run_tasks(self, tasks, gpus, must_stop):
        for task in tasks:
            yield Ended(task, partial(self.run_in_process, task.work, *task.arguments, report=task.report))
            if must_stop():
                return

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("fusedlm.compare.experiment.run_in_process", self.run_in_process)
        patch.setattr("fusedlm.compare.experiment.run_tasks", self.run_tasks)

    def trained(self) -> list[str]:
        return [folder for name, folder in self.calls if name == "train_run"]


@pytest.fixture
def in_process(monkeypatch) -> InProcess:
    """Work runs here, and pages are written without their plots, which take longer than the runs."""
    stand_in = InProcess()
    stand_in.replace(monkeypatch)
    monkeypatch.setattr("fusedlm.compare.report.draw_plots", lambda results: [])
    return stand_in


@pytest.fixture
def with_plots(in_process, monkeypatch) -> None:
    """Pages have their plots."""
    monkeypatch.setattr("fusedlm.compare.report.draw_plots", draw_plots)
    monkeypatch.setattr("fusedlm.report.style.DPI", 30)


@pytest.fixture(scope="session")
def experiment_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    recipe = tiny_recipe(folder, "train.steps=4", "train.eval_every=2", "train.checkpoint_every=2")
    (folder / "base.yaml").write_text(dump_recipe(recipe))
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def finished(experiment_file, tmp_path_factory):
    """(Outcome, folder, calls) of the tiny experiment; read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stand_in = InProcess()
        stand_in.replace(patch)
        patch.setattr("fusedlm.report.style.DPI", 30)
        outcome = run_experiment(*load_experiment(experiment_file), out)
    return outcome, out, stand_in.calls
