"""How single runs end: finished, diverged or failed; the rest of the experiment continues and says so."""

import json
import shutil
from dataclasses import replace

import pytest

from fusedlm.compare import run_experiment, work
from fusedlm.compare.report import write_report
from fusedlm.compare.tables import loss_table, summary_table
from fusedlm.config.experiment import load_experiment
from fusedlm.evaluate import NotFinite
from fusedlm.train import TrainingDiverged
from tests.report.test_report import parse

HOT = "{latent: [model.pattern=m], hot: {model.pattern: a, train.optimizer.lr: 1.0e+38}}"


def outcomes(outcome) -> list[str]:
    return [row["outcome"] for row in outcome.results.rows]


def test_a_validation_that_is_not_finite_is_a_result(experiment_file, in_process, with_plots, tmp_path):
    """The first update makes the weights overflow; the validation after step 2 is not finite."""
    overrides = [f"experiment.variants={HOT}", "experiment.seeds=2", "experiment.match=none"]
    loaded = load_experiment(experiment_file, overrides)
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert outcomes(outcome) == ["finished", "finished", "diverged", "diverged"] and outcome.failed == ()
    first, *_ = outcome.results.verdicts()
    assert first == "hot against latent: hot diverged on seeds 0 (step 2) and 1 (step 2): no verdict"
    assert "likelihood is not finite" in outcome.results.of("hot", "diverged")[0]["message"]
    assert [row[2] for row in loss_table(outcome.results)[1]][1] == "diverged"
    assert summary_table(outcome.results)[1][1][:4][0::3] == ("hot (0 of 2 seeds)", "diverged")
    page = parse(tmp_path / "out/report.html")
    assert first in page.text and "Left out: hot diverged" in page.text
    assert json.loads((tmp_path / "out/results.json").read_text())["variants"]["hot"]["val_loss"]["n"] == 0
    in_process.calls.clear()
    assert outcomes(run_experiment(*loaded, tmp_path / "out")) == outcomes(outcome)
    assert in_process.calls == []


@pytest.mark.parametrize("error", [NotFinite("document 3: nan"), TrainingDiverged("loss was not finite")])
def test_verdicts_of_the_surviving_seeds_say_which_are_missing(
    finished, experiment_file, in_process, monkeypatch, tmp_path, error
):
    def train(recipe, run_dir, **options):
        if run_dir.name == "softmax-seed0":
            raise error
        return real(recipe, run_dir, **options)

    real = work.train
    monkeypatch.setattr(work, "train", train)
    shutil.copytree(finished[1], tmp_path / "out")
    (tmp_path / "out/records/softmax-seed0.json").unlink()
    results = run_experiment(*load_experiment(experiment_file), tmp_path / "out").results
    assert results.verdicts()[0].startswith(
        "softmax against latent: softmax diverged on seed 0 (step 4); on the one seed that both finished: validation "
    )
    assert results.verdict("softmax").difference.n == 1 and results.summary("softmax", "val_loss").n == 1
    assert results.label("softmax") == "softmax (1 of 2 seeds)" and results.label("latent") == "latent"
    assert "softmax diverged on seed 0 (step 4); diverged runs are in no mean" in results.verdicts()


@pytest.mark.parametrize(
    ("lost", "outcome"),
    [
        (["softmax"], "diverged"),
        (["latent"], "failed"),
        (["latent"], "not run"),
        (["latent", "softmax"], "diverged"),
        (["latent", "softmax"], "not run"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_pages_of_variants_without_a_loss(finished, tmp_path, monkeypatch, lost, outcome):
    """Tables and plots when all seeds of a variant, of the baseline or of all ended without a loss."""
    monkeypatch.setattr("fusedlm.report.style.DPI", 30)
    results = finished[0].results
    bare = {"val_loss": None, "val_bpb": None, "outcome": outcome, "message": "<b>out of memory"}
    rows = [row | (bare if row["variant"] in lost else {}) for row in results.rows]
    changed = replace(results, rows=rows)
    page = parse(write_report(changed, tmp_path))
    assert "no verdict" in page.text and "nan" not in page.text.split()
    if outcome != "not run":
        assert f"{lost[0]} {outcome} on seeds 0" in page.text
        assert ("Left out" in page.text) == (len(lost) == 1)  # without any loss there is no plot of one
    summary_table(changed)


def test_failed_runs_do_not_stop_the_others_and_are_tried_again(experiment_file, in_process, tmp_path):
    """One is killed, one meets a defect of a library, one does not fit its recipe."""

    def fail(name, arguments, report):
        if name == "train_run" and arguments[1].name == "latent-seed0":
            raise ValueError("its process ended by signal 9; signal 9 can mean that the machine is out of memory")
        if name == "train_run" and arguments[1].name == "softmax-seed0":
            raise RuntimeError("the process of the run failed:\nTraceback\n  File x\nRuntimeError: CUDA error")

    in_process.before = fail
    overrides = ["experiment.decode_lengths=[]", "experiment.seeds=[0, 1]"]
    loaded = load_experiment(experiment_file, overrides)
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert outcomes(outcome) == ["failed", "finished", "failed", "finished"]
    assert outcome.failed[0].startswith("latent-seed0: its process ended by signal 9")
    assert outcome.failed[1] == "softmax-seed0: RuntimeError: CUDA error"
    assert "Traceback" in (tmp_path / "out/records/softmax-seed0.json").read_text()
    sentences = outcome.results.verdicts()
    assert any(sentence.startswith("softmax failed on seed 0: RuntimeError: CUDA error") for sentence in sentences)
    assert "failed runs are in no mean; running the experiment again tries them again" in sentences
    report = run_experiment(*loaded, tmp_path / "out", train=False)
    assert outcomes(report) == outcomes(outcome) and report.failed == ()
    in_process.calls.clear()
    in_process.before = None
    again = run_experiment(*loaded, tmp_path / "out")
    assert in_process.trained() == ["latent-seed0", "softmax-seed0"] and set(outcomes(again)) == {"finished"}


def train_run(monkeypatch, tmp_path, error):
    def train(*arguments, **options):
        raise error

    monkeypatch.setattr(work, "train", train)
    return work.train_run(None, tmp_path, "", "raw", lambda kind, content: None)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NotFinite("nan"), "diverged"),
        (TrainingDiverged("nan"), "diverged"),
        (ValueError("data.source has 3 tokens"), "failed"),
        (MemoryError(), "failed"),
        (OSError("No space left on device"), "system"),
    ],
)
def test_how_an_error_ends_a_run(monkeypatch, tmp_path, error, outcome):
    record = train_run(monkeypatch, tmp_path, error)
    assert record["outcome"] == outcome and record["message"] and record["final"] is None
    assert record.get("step") == (0 if outcome == "diverged" else None)


def test_a_full_disk_ends_the_experiment(experiment_file, in_process, monkeypatch, tmp_path):
    """Other runs would meet it too."""

    def train(*arguments, **options):
        raise OSError("metrics.jsonl could not be written: No space left on device")

    monkeypatch.setattr(work, "train", train)
    with pytest.raises(OSError, match="^latent-seed0: metrics.jsonl could not be written.*finished runs are kept"):
        run_experiment(*load_experiment(experiment_file), tmp_path / "out")
    assert len(in_process.trained()) == 1 and not (tmp_path / "out/records").exists()


def test_a_length_at_which_decoding_is_killed_costs_no_other(
    finished, experiment_file, in_process, with_plots, monkeypatch, tmp_path
):
    def measure(recipe, run, vocab_size, lengths, report):
        report("decoded", (lengths[0], (100, 5.0)))
        raise ValueError("its process ended by signal 9")

    monkeypatch.setattr("fusedlm.compare.experiment.measure", measure)
    shutil.copytree(finished[1], tmp_path / "out")
    shutil.rmtree(tmp_path / "out/decoding")
    results = run_experiment(*load_experiment(experiment_file), tmp_path / "out").results
    assert results.decoding == {"latent": {"20": [100, 5.0]}, "softmax": {"20": [100, 5.0]}}
    page = parse(tmp_path / "out/report.html")
    assert "Decoding" in page.text


def test_steps_that_cannot_be_timed_cost_their_variant_alone(experiment_file, in_process, monkeypatch, tmp_path):
    def calibrate(recipe, folder, report):
        if folder.name in broken:
            raise ValueError("its process ended by signal 9")
        folder.mkdir(parents=True)
        return 0.25

    broken = {"softmax"}
    monkeypatch.setattr("fusedlm.compare.experiment.calibrate", calibrate)
    overrides = ["experiment.match=time", "experiment.seeds=1", "experiment.decode_lengths=[]"]
    loaded = load_experiment(experiment_file, overrides)
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert outcomes(outcome) == ["finished", "failed"] and in_process.trained() == ["latent-seed0"]
    assert outcome.failed == ("softmax-seed0: its steps could not be timed: its process ended by signal 9",)
    assert outcomes(run_experiment(*loaded, tmp_path / "out", train=False)) == ["finished", "failed"]
    broken.add("latent")
    with pytest.raises(ValueError, match="^timing of latent, the baseline: its process ended by signal 9$"):
        run_experiment(*loaded, tmp_path / "other")
    broken.clear()
    assert outcomes(run_experiment(*loaded, tmp_path / "out")) == ["finished", "finished"]
