"""Runs that are spread over GPUs: at once, each in a process that sees one, with the results of one after another.

Processes are real, GPUs are not: `choose_gpus` is replaced where the grid uses it.
"""

import json
import os
import signal

import pytest
import torch

from fusedlm.compare import gpus as gpus_module
from fusedlm.compare import run_experiment
from fusedlm.compare.gpus import VISIBLE_GPUS, choose_gpus
from fusedlm.compare.process import Task, run_tasks
from fusedlm.compare.progress import GridDisplay
from fusedlm.config.experiment import load_experiment
from tests.compare import gpu_work
from tests.train.runs import records

RUNS = ["latent-seed0", "softmax-seed0", "latent-seed1", "softmax-seed1"]


@pytest.fixture
def two_gpus(monkeypatch):
    """A function that sets the work of the runs of an experiment on two GPUs."""
    monkeypatch.setattr("fusedlm.compare.experiment.choose_gpus", lambda count, recipes: ["3", "4"])
    monkeypatch.setattr("fusedlm.compare.experiment.write_report", lambda results, folder: None)
    return lambda work: monkeypatch.setattr("fusedlm.compare.experiment.train_run", work)


def run_on_two(experiment_file, out, *overrides):
    overrides = ["experiment.decode_lengths=[]", *overrides]
    return run_experiment(*load_experiment(experiment_file, overrides), out, gpus=2)


def test_tasks_run_at_once_each_with_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE_GPUS, "5,6")
    a, b, taken = tmp_path / "a", tmp_path / "b", []

    def tasks():
        for pair in ((a, b), (b, a), (a, b)):
            taken.append(len(seen))
            yield Task(gpu_work.meet, pair, lambda kind, content: None)

    seen = []
    for child in run_tasks(tasks(), ["5", "GPU-6"], lambda: False):
        seen.append(child.result())
    assert sorted(seen[:2]) == [("5", False), ("GPU-6", False)] and seen[2] in seen[:2]
    assert taken == [0, 0, 1], "the third waits for a GPU that is free"
    assert os.environ[VISIBLE_GPUS] == "5,6"


def test_results_are_those_of_one_after_another(finished, experiment_file, two_gpus, tmp_path):
    outcome = run_on_two(experiment_file, tmp_path / "out")
    alone, out = finished[0], finished[1]
    assert outcome.results.verdicts() == alone.results.verdicts()
    for name in RUNS:
        assert records(tmp_path / "out/runs" / name) == records(out / "runs" / name)
        ours, theirs = (json.loads((folder / f"records/{name}.json").read_text()) for folder in (tmp_path / "out", out))
        for record in (ours, theirs):
            record["content"].pop("files")  # checksums of files with times
        assert ours["content"] == theirs["content"] and ours["about"] == theirs["about"]


def test_a_run_that_fails_stops_no_other_and_timings_are_spread_too(experiment_file, two_gpus, monkeypatch, tmp_path):
    two_gpus(gpu_work.one_fails)
    monkeypatch.setattr("fusedlm.compare.experiment.calibrate", gpu_work.calibrate)
    monkeypatch.setattr("fusedlm.compare.experiment.measure", gpu_work.measure)
    outcome = run_on_two(experiment_file, tmp_path / "out", "experiment.match=time", "experiment.decode_lengths=[20]")
    killed, *others = outcome.failed
    assert killed.startswith("latent-seed0: its process ended by signal 9") and not outcome.stopped
    assert others == [f"{name}: by design" for name in RUNS[1:]]
    assert outcome.results.decoding == {"latent": {"20": [3, 1.0]}, "softmax": {"20": [3, 1.0]}}


def test_a_signal_stops_all_that_run(experiment_file, two_gpus, monkeypatch, tmp_path):
    two_gpus(gpu_work.until_stopped)
    begun = []

    def report(self, name, kind, content):
        begun.append(name)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(GridDisplay, "report", report)
    outcome = run_on_two(experiment_file, tmp_path / "out")
    assert outcome.signal is signal.SIGTERM and sorted(begun) == RUNS[:2]
    saved = {path.parent.name: path.read_text() for path in tmp_path.glob("out/runs/*/saved")}
    assert saved == dict.fromkeys(RUNS[:2], "SIGINT")
    assert not (tmp_path / "out/records").exists()


def test_a_full_disk_lets_the_others_save(experiment_file, two_gpus, tmp_path):
    two_gpus(gpu_work.full_disk)
    with pytest.raises(OSError, match="^latent-seed0: No space left on device; finished runs are kept$"):
        run_on_two(experiment_file, tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("out/runs/*/*")] == [
        "out/runs/softmax-seed0/saved"
    ]


@pytest.fixture
def machine(monkeypatch):
    """A function that sets the GPUs that torch sees, and CUDA_VISIBLE_DEVICES."""

    def make(names: list[str], visible: str | None = None) -> None:
        monkeypatch.setattr(gpus_module, "gpu_names", lambda: names)
        device = torch.device("cuda" if names else "cpu")
        monkeypatch.setattr(gpus_module, "resolve_device", lambda device_name: device)
        monkeypatch.delenv(VISIBLE_GPUS, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE_GPUS, visible)

    return make


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [(None, ["0", "1"]), ("3, 1,0", ["3", "1"]), ("GPU-8f, GPU-1c,GPU-00", ["GPU-8f", "GPU-1c"])],
)
def test_gpus_are_the_first_that_are_visible(machine, experiment_file, visible, chosen):
    _, recipes = load_experiment(experiment_file)
    machine(["H100", "H100", "L4"], visible)
    assert choose_gpus(2, recipes) == chosen
    assert choose_gpus(1, recipes) == [None]


@pytest.mark.parametrize(
    ("count", "names", "problem"),
    [
        (0, ["H100"], "--gpus 0: must be at least 1"),
        (2, [], r"--gpus 2: variant latent runs on the CPU \(runtime.device=\w+\); use --gpus 1"),
        (3, ["H100", "H100"], "--gpus 3: torch sees 2 GPUs; use at most that many"),
        (3, ["H100", "H100", "L4"], "--gpus 3: cuda:0 is H100 and cuda:2 is L4, .* name GPUs of one model in CUDA_VIS"),
    ],
)
def test_gpus_that_are_impossible_are_one_line(machine, experiment_file, tmp_path, count, names, problem):
    machine(names)
    with pytest.raises(ValueError, match=f"^{problem}") as caught:
        run_experiment(*load_experiment(experiment_file), tmp_path / "out", gpus=count)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
