"""Runs that share a GPU: more at once, the same losses, and no times."""

import json
import shutil

import pytest

from fusedlm.compare import run_experiment
from fusedlm.compare.process import run_tasks
from fusedlm.config.experiment import load_experiment
from tests.compare import gpu_work

TIMES = ("tokens_per_second", "step_seconds", "training_seconds")


def test_runs_share_gpus_and_timings_do_not(experiment_file, monkeypatch, tmp_path):
    places = []

    def run_and_count(tasks, gpus, must_stop):
        places.append(sorted(gpus))
        return run_tasks(tasks, gpus, must_stop)

    monkeypatch.setattr("fusedlm.compare.experiment.choose_gpus", lambda count, recipes: ["3", "4"])
    monkeypatch.setattr("fusedlm.compare.experiment.write_report", lambda results, folder: None)
    monkeypatch.setattr("fusedlm.compare.experiment.train_run", gpu_work.all_at_once)
    monkeypatch.setattr("fusedlm.compare.experiment.calibrate", gpu_work.calibrate)
    monkeypatch.setattr("fusedlm.compare.experiment.run_tasks", run_and_count)
    overrides = ["experiment.match=time", "experiment.decode_lengths=[]"]
    outcome = run_experiment(*load_experiment(experiment_file, overrides), tmp_path / "out", gpus=2, runs_per_gpu=2)
    timings, *_, runs = places
    assert timings == ["3", "4"] and runs == ["3", "3", "4", "4"]
    assert sorted(failed.rpartition(" ")[2] for failed in outcome.failed) == ["3", "3", "4", "4"]


@pytest.fixture
def shared(experiment_file, in_process, with_plots, tmp_path):
    """The folder of the tiny experiment whose runs shared the device."""
    experiment = load_experiment(experiment_file, ["experiment.decode_lengths=[]"])
    run_experiment(*experiment, tmp_path / "out", runs_per_gpu=2)
    return tmp_path / "out"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_losses_are_the_same_and_times_are_left_out(finished, shared):
    alone, found = results(finished[1]), results(shared)
    for one, other in zip(alone["runs"], found["runs"], strict=True):
        assert one["val_loss"] == other["val_loss"] and one["steps_to_baseline_loss"] == other["steps_to_baseline_loss"]
        assert all(one[key] > 0 and other[key] is None for key in TIMES)
        assert other["seconds_to_baseline_loss"] is None and other["peak_memory_bytes"] > 0
    assert [variant["tokens_per_second"]["n"] for variant in found["variants"].values()] == [0, 0]
    assert found["shared_gpu"] == [f"{row['variant']}-seed{row['seed']}" for row in found["runs"]]
    assert not alone["shared_gpu"]
    page = (shared / "report.html").read_text()
    assert "All runs shared a GPU with others; their speeds and times are not given." in page
    assert "shared a GPU" not in (finished[1] / "report.html").read_text()
    plots = {path.stem for path in (shared / "plots").iterdir()}
    assert "validation" in plots and not plots & {"seconds", "cost"}


def test_times_return_when_a_run_is_made_again_alone(experiment_file, shared):
    name = "softmax-seed1"
    experiment = load_experiment(experiment_file, ["experiment.decode_lengths=[]"])
    (shared / f"records/{name}.json").unlink()
    run_experiment(*experiment, shared)
    assert results(shared)["runs"][3]["step_seconds"] is None, "resumed: its steps were made beside others"
    (shared / f"records/{name}.json").unlink()
    shutil.rmtree(shared / "runs" / name)
    outcome = run_experiment(*experiment, shared)
    *others, again = results(shared)["runs"]
    assert again["step_seconds"] > 0 and all(row["step_seconds"] is None for row in others)
    assert outcome.results.shared == ("latent-seed0", "latent-seed1", "softmax-seed0")
    assert "3 runs shared a GPU" in (shared / "report.html").read_text()


def test_none_at_once_is_one_line(experiment_file, tmp_path):
    with pytest.raises(ValueError, match=r"^--runs-per-gpu 0: must be at least 1$"):
        run_experiment(*load_experiment(experiment_file), tmp_path / "out", runs_per_gpu=0)
    assert not (tmp_path / "out").exists()
