"""The grid: what is run, what is not run again, what is refused."""

import os
import shutil
import signal

import pytest

from fusedlm.compare import plan_experiment, run_experiment
from fusedlm.config import load_recipe
from fusedlm.config.experiment import load_experiment
from tests.train.runs import losses, records

ALL = ["latent-seed0", "softmax-seed0", "latent-seed1", "softmax-seed1"]


def test_the_grid_is_variants_by_seeds_each_a_run(finished):
    outcome, out, calls = finished
    assert [folder for name, folder in calls if name == "train_run"] == ALL
    assert [name for name, _ in calls].count("measure") == 2
    assert not outcome.stopped and outcome.report == out / "report.html"
    for name in ALL:
        run = out / "runs" / name
        recipe = load_recipe(run / "recipe.yaml")
        variant, seed = name.split("-seed")
        assert recipe.name == f"tiny-{name}" and recipe.train.seed == int(seed)
        assert recipe.model == outcome.results.variants[variant].recipe.model
        assert recipe.model.pattern == {"latent": "m", "softmax": "a"}[variant]
        assert len(losses(run)) == 4
    assert losses(out / "runs/latent-seed0") != losses(out / "runs/latent-seed1")


def test_a_finished_experiment_trains_nothing_again(finished, experiment_file, in_process, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    before = (tmp_path / "out/results.json").read_text()
    (tmp_path / "out/report.html").unlink()
    outcome = run_experiment(*load_experiment(experiment_file), tmp_path / "out")
    assert in_process.calls == []
    assert (tmp_path / "out/results.json").read_text() == before and outcome.report.exists()


def test_an_interruption_repeats_nothing(finished, experiment_file, in_process, tmp_path):
    """A signal in the second run; resuming repeats neither the first run nor the steps before the signal."""

    def interrupt(name, arguments, report):
        def relay(kind, content):
            if kind == "step" and arguments[1].name == "softmax-seed0":
                os.kill(os.getpid(), signal.SIGINT)
            report(kind, content)

        return relay

    in_process.before = interrupt
    loaded = load_experiment(experiment_file)
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert outcome.stopped and in_process.trained() == ALL[:2]
    assert [row["outcome"] for row in outcome.results.rows] == ["finished", "not run", "not run", "not run"]
    assert "3 of 4 runs are not finished yet" in outcome.results.verdicts()
    done = len(losses(tmp_path / "out/runs/softmax-seed0"))
    assert 0 < done < 4
    in_process.calls.clear()
    in_process.before = None
    starts = []
    in_process.before = lambda name, arguments, report: (
        lambda kind, content: starts.append(content) if kind == "begin" else None
    )
    assert not run_experiment(*loaded, tmp_path / "out").stopped
    assert in_process.trained() == ALL[1:] and starts == [done, 0, 0]
    for name in ALL:
        assert records(tmp_path / "out/runs" / name) == records(finished[1] / "runs" / name)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.steps=5"], "train.steps of variant latent is 4 there and 5 now"),
        (["train.optimizer.lr=1e-4"], "train.optimizer.lr of variant latent is 0.01 there and 0.0001 now"),
        (["experiment.match=none"], 'match is "params" there and "none" now'),
        (["experiment.seeds=[0]"], 'seed 1 is "run" there and absent now'),
        (["experiment.seeds=[1, 2]"], "seed 0"),
        (["experiment.variants={latent: [model.pattern=m]}"], "variant softmax"),
        (["experiment.variants={softmax: [model.pattern=a], latent: [model.pattern=m]}"], 'baseline is "latent" there'),
        (["data.split.fraction=0.3"], "data.split.fraction"),
        (["experiment.name=other"], "name is"),
        (["experiment.weights=ema", "train.ema=0.9"], 'weights is absent there and "ema" now'),
    ],
)
def test_a_changed_experiment_is_refused(finished, experiment_file, in_process, tmp_path, overrides, named):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished[1] / "identity.json", out)
    shutil.copytree(finished[1] / "records", out / "records")
    with pytest.raises(ValueError) as caught:
        run_experiment(*load_experiment(experiment_file, overrides), out)
    text = str(caught.value)
    assert named in text and "holds another experiment" in text and "--out" in text and "\n" not in text
    assert in_process.calls == []


def test_an_experiment_without_runs_may_be_changed(finished, experiment_file, in_process, tmp_path):
    """A match that is impossible, or a stop before the first run, leaves nothing that blocks the next try."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished[1] / "identity.json", out)
    with pytest.raises(ValueError, match="cannot be met within"):
        run_experiment(*load_experiment(experiment_file, ["experiment.match_by=depth"]), tmp_path / "new")
    assert not (tmp_path / "new/identity.json").exists()
    overrides = ["experiment.match=none", "experiment.seeds=1", "train.steps=1", "experiment.decode_lengths=[]"]
    overrides.append("experiment.variants={softmax: [model.pattern=a]}")
    outcome = run_experiment(*load_experiment(experiment_file, overrides), out)
    assert [row["outcome"] for row in outcome.results.rows] == ["finished"]


def test_changed_text_is_refused(finished, experiment_file, in_process, monkeypatch, tmp_path):
    from fusedlm.compare import experiment

    shutil.copytree(finished[1], tmp_path / "out")
    with monkeypatch.context() as patch:
        real = experiment.identify

        def identify(config, recipes, data, device, dtype):
            return real(config, recipes, data | {"softmax": data["softmax"] | {"text": "another"}}, device, dtype)

        patch.setattr(experiment, "identify", identify)
        with pytest.raises(ValueError, match='text of variant softmax is "[0-9a-f]+" there and "another" now'):
            run_experiment(*load_experiment(experiment_file), tmp_path / "out")


def test_seeds_and_variants_may_be_added(finished, experiment_file, in_process, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    more = "{latent: [model.pattern=m], softmax: [model.pattern=a], gdn: [model.pattern=g]}"
    overrides = [f"experiment.variants={more}", "experiment.seeds=[0, 1, 7]", "experiment.decode_lengths=[20]"]
    outcome = run_experiment(*load_experiment(experiment_file, overrides), tmp_path / "out")
    assert in_process.trained() == ["gdn-seed0", "gdn-seed1", "latent-seed7", "softmax-seed7", "gdn-seed7"]
    assert [name for name, _ in in_process.calls].count("measure") == 1
    assert outcome.results.summary("gdn", "val_loss").n == 3


def test_time_is_measured_once_and_sets_the_steps(experiment_file, in_process, monkeypatch, tmp_path):
    seconds = {"latent": 0.25, "softmax": 0.1}

    def calibrate(recipe, folder, report):
        assert recipe.train.steps == 12 and recipe.train.checkpoint_every == 0
        folder.mkdir(parents=True)
        return seconds[folder.name]

    monkeypatch.setattr("fusedlm.compare.experiment.calibrate", calibrate)
    overrides = ["experiment.match=time", "experiment.calibration_steps=12", "experiment.seeds=1"]
    loaded = load_experiment(experiment_file, overrides)
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert [variant.recipe.train.steps for variant in outcome.results.variants.values()] == [4, 10]
    assert len(losses(tmp_path / "out/runs/softmax-seed0")) == 10
    schedule = [record["lr"] for record in records(tmp_path / "out/runs/softmax-seed0") if "lr" in record]
    assert schedule[-1] < schedule[-3]  # the schedule reaches its end
    seconds.clear()  # timing again would fail
    again = run_experiment(*loaded, tmp_path / "out")
    assert again.results.variants["softmax"].recipe.train.steps == 10
    assert not (tmp_path / "out/calibration").exists() or not any((tmp_path / "out/calibration").iterdir())


def test_a_step_is_timed_on_a_run_that_leaves_nothing(experiment_file, tmp_path):
    from fusedlm.compare.work import calibrate

    recipe = load_experiment(experiment_file)[1]["latent"]
    assert 0 < calibrate(recipe, tmp_path / "timing", lambda kind, content: None) < 60


def test_reporting_changes_nothing_of_the_experiment(finished, experiment_file, in_process, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    before = (tmp_path / "out/identity.json").read_text()
    loaded = load_experiment(experiment_file, ["experiment.seeds=3"])
    outcome = run_experiment(*loaded, tmp_path / "out", train=False, gpus=2)  # on a machine without them
    assert in_process.calls == [] and "2 of 6 runs are not finished yet" in outcome.results.verdicts()
    assert (tmp_path / "out/identity.json").read_text() == before


def test_reporting_needs_neither_the_text_nor_the_device(finished, experiment_file, in_process, monkeypatch, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    monkeypatch.setattr("fusedlm.compare.experiment.device_name", lambda device: "another GPU")
    loaded = load_experiment(experiment_file)
    with pytest.raises(ValueError, match='device is ".+" there and "another GPU" now'):
        run_experiment(*loaded, tmp_path / "out")
    monkeypatch.delattr("fusedlm.compare.experiment.prepare")
    outcome = run_experiment(*loaded, tmp_path / "out", train=False)
    assert outcome.results.verdicts() == finished[0].results.verdicts()
    more = "experiment.variants={latent: [model.pattern=m], softmax: {model.pattern: a}, gdn: []}"
    with pytest.raises(ValueError, match="has no variant gdn yet"):
        run_experiment(*load_experiment(experiment_file, [more]), tmp_path / "out", train=False)


def test_planning_trains_nothing(experiment_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    variants = plan_experiment(*load_experiment(experiment_file))
    assert {name: variant.vocab_size for name, variant in variants.items()} == {"latent": 257, "softmax": 257}
    assert variants["softmax"].changes and list(tmp_path.iterdir()) == []


def test_variants_must_hold_out_the_same_text(experiment_file, tmp_path):
    override = "experiment.variants={a: [model.pattern=m], b: [data.split.fraction=0.5]}"
    with pytest.raises(ValueError, match="a and b differ in data.split; their losses are not comparable"):
        run_experiment(*load_experiment(experiment_file, [override]), tmp_path / "out")


def test_other_folders_are_refused(finished, experiment_file, tmp_path):
    loaded = load_experiment(experiment_file)
    with pytest.raises(ValueError, match="holds a run"):
        run_experiment(*loaded, finished[1] / "runs/latent-seed0")
    with pytest.raises(ValueError, match="is a file"):
        run_experiment(*loaded, experiment_file)
    with pytest.raises(ValueError, match="holds no experiment yet"):
        run_experiment(*loaded, tmp_path / "out", train=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/identity.json").write_text("{")
    with pytest.raises(ValueError, match="identity.json: damaged"):
        run_experiment(*loaded, tmp_path / "out")
