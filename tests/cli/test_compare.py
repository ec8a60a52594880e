"""fusedlm compare: output, resuming, and refused arguments."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusedlm.compare.experiment import Outcome

EXPERIMENT = """
name: pair
base: small.yaml
match: params
variants:
  latent: [model.pattern=m]
  delta: [model.pattern=g]
seeds: 2
decode_lengths: [40]
"""


@pytest.fixture
def experiment(workspace: Path) -> Path:
    """A folder with pair.yaml, small.yaml and its prepared text, as the working directory."""
    Path("pair.yaml").write_text(EXPERIMENT)
    return workspace


def without_plots(monkeypatch) -> None:
    """They take longer than the rest of a report."""
    monkeypatch.setattr("fusedlm.compare.report.draw_plots", lambda results: [])


def test_a_dry_run_prints_the_grid_and_writes_nothing(experiment: Path, fusedlm):
    before = sorted(experiment.rglob("*"))
    outcome = fusedlm("compare", "pair.yaml", "train.steps=77", "--dry-run", "--out", "new")
    assert outcome.code == 0, outcome.err
    assert "pair: 4 runs, seeds 0, 1, match: params by ffn" in outcome.out
    assert "delta, to match: model.blocks.g.ffn.hidden 64 →" in outcome.out and "77" in outcome.out
    assert sorted(experiment.rglob("*")) == before
    timed = fusedlm("compare", "pair.yaml", "experiment.match=time", "--dry-run")
    assert "steps are timed and set when the experiment runs" in timed.out


def test_a_dry_run_prints_the_trials_of_learning_rates(experiment: Path, fusedlm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tune = "experiment.tune={lr_factors: [0.1, 1], steps: 1}"
    outcome = fusedlm("compare", "pair.yaml", tune, "train.optimizer={type: muon_adamw}", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "pair: 4 trials and 4 runs, seeds 0, 1, match: params by ffn" in outcome.out
    assert "trials of learning rates, seed 1000" in outcome.out
    row = r"delta\s+1\s+matrix.lr 0.002, rest.lr 0.0001\s+matrix.lr 0.02, rest.lr 0.001"
    assert re.search(row, outcome.out), outcome.out


def test_a_dry_run_without_the_tokenizer_file(experiment: Path, fusedlm):
    missing = "data.tokenizer={type: file, path: none.json}"
    assert "--vocab-size N" in fusedlm("compare", "pair.yaml", missing, "--dry-run").err
    assert fusedlm("compare", "pair.yaml", missing, "--dry-run", "--vocab-size", 300).code == 0


def test_an_experiment_runs_reports_and_is_not_repeated(experiment: Path, fusedlm, monkeypatch):
    monkeypatch.setattr("fusedlm.report.style.DPI", 30)
    outcome = fusedlm("compare", "pair.yaml", "experiment.seeds=1")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "[1/2] latent-seed0: 2 steps" in lines and any(
        line.startswith("[2/2] delta-seed0: step 2") for line in lines
    )
    assert "delta against latent: validation loss" in outcome.out and "one seed: no verdict" in outcome.out
    assert "state at 40" in outcome.out and "±" not in outcome.out
    assert lines[-1] == "runs/pair/report.html" and Path(lines[-1]).is_file()
    for name in ("results.csv", "results.json", "experiment.yaml", "plots/final.png"):
        assert (Path("runs/pair") / name).is_file()
    assert fusedlm("eval", "runs/pair/runs/delta-seed0").code == 0
    without_plots(monkeypatch)
    again = fusedlm("compare", "pair.yaml", "experiment.seeds=1")
    assert "step 2" not in again.out and again.out.splitlines()[-1] == lines[-1]
    more = fusedlm("compare", "pair.yaml", "--report-only")
    assert "2 of 4 runs are not finished yet" in more.out


def test_a_run_that_fails_is_one_line_after_the_report(experiment: Path, fusedlm, monkeypatch):
    """The second variant's sequences are longer than the text."""
    without_plots(monkeypatch)
    Path("pair.yaml").write_text(EXPERIMENT.replace("[model.pattern=g]", "[train.seq_len=1000000]"))
    outcome = fusedlm("compare", "pair.yaml", "experiment.match=none", "experiment.seeds=1")
    assert outcome.code == 2 and outcome.err.startswith("error: run delta-seed0: "), outcome
    assert outcome.err.count("\n") == 1 and "the same command tries failed ones again" in outcome.err
    assert outcome.out.splitlines()[-1] == "runs/pair/report.html"
    assert "delta failed on seed 0: " in outcome.out and "delta against latent: delta failed on seed 0" in outcome.out


def test_a_signal_stops_with_its_code_and_the_command_to_resume_is_printed(experiment: Path, fusedlm):
    arguments = ["compare", "pair.yaml", "train.steps=100000", "train.checkpoint_every=0", "--out", "runs/a b"]
    code = "import sys; from fusedlm.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    seen = []
    for line in child.stdout:
        seen.append(line)
        if "step 1 of" in line:
            child.send_signal(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    wanted = "resume with: fusedlm compare pair.yaml train.steps=100000 train.checkpoint_every=0 --out 'runs/a b'\n"
    assert seen[-1].endswith(wanted), seen
    checkpoints = sorted(path.name for path in Path("runs/a b/runs/latent-seed0/checkpoints").iterdir())
    assert len(checkpoints) == 1
    unfinished = fusedlm("compare", *arguments[1:], "--report-only")
    assert unfinished.code == 0 and "no run is finished yet" in unfinished.out


def test_gpus_reach_the_library_and_the_command_to_resume(experiment: Path, fusedlm, monkeypatch):
    def run_experiment(config, recipes, folder, *, gpus, **options):
        assert gpus == 4
        return Outcome(None, signal.SIGTERM, None)

    monkeypatch.setattr("fusedlm.compare.run_experiment", run_experiment)
    outcome = fusedlm("compare", "pair.yaml", "--gpus", "4")
    assert outcome.code == 128 + signal.SIGTERM
    assert outcome.out.endswith("fusedlm compare pair.yaml --out runs/pair --gpus 4\n")


def edited(old: str, new: str):
    def edit():
        assert old in EXPERIMENT
        Path("pair.yaml").write_text(EXPERIMENT.replace(old, new))
        return []

    return edit


def another_folder():
    folder = Path("runs/pair")
    (folder / "records").mkdir(parents=True)
    (folder / "records/x-seed0.json").write_text("{}")
    identity = {"experiment": {"name": "other"}, "device": "x", "dtype": "float32", "seeds": [], "variants": {}}
    (folder / "identity.json").write_text(json.dumps(identity))
    return []


BAD = {
    "missing": (lambda: ["none.yaml"], "experiment none.yaml: No such file"),
    "folder": (lambda: ["runs"], "experiment runs: Is a directory"),
    "recipe-given": (lambda: ["small.yaml"], "unknown key"),
    "misspelt": (edited("match:", "matched:"), "did you mean 'match'"),
    "no-base": (edited("base: small.yaml", "base: none.yaml"), "base recipe none.yaml: No such file"),
    "variant-key": (edited("model.pattern=g", "model.patern=g"), "variant delta of small.yaml: model.patern"),
    "variant-value": (edited("model.pattern=g", "model.pattern=x"), "'x'"),
    "override-key": (lambda: ["pair.yaml", "train.stepz=1"], "did you mean 'steps'"),
    "override-experiment": (lambda: ["pair.yaml", "experiment.seed=1"], "did you mean 'seeds'"),
    "tune-seed": (lambda: ["pair.yaml", "experiment.tune={seed: 1}"], "tune.seed=1: one of seeds"),
    "tune-rate": (lambda: ["pair.yaml", "experiment.tune={lr_factors: [0]}"], "tune.lr_factors.0: got 0"),
    "override-masked": (lambda: ["pair.yaml", "model.pattern=g"], "does not reach variant latent"),
    "impossible": (lambda: ["pair.yaml", "experiment.match_by=depth"], "cannot be met within 0.01 by model.n_layers"),
    "two-texts": (edited("model.pattern=g", "data.split.fraction=0.5"), "differ in data.split"),
    "vocab-size": (lambda: ["pair.yaml", "--vocab-size", "300"], "is only for --dry-run"),
    "vocab-size-zero": (lambda: ["pair.yaml", "--dry-run", "--vocab-size", "0"], "--vocab-size 0"),
    "gpus-zero": (lambda: ["pair.yaml", "--gpus", "0"], "--gpus 0: must be at least 1"),
    "gpus-of-a-cpu": (lambda: ["pair.yaml", "--gpus", "2"], "runs on the CPU (runtime.device=cpu); use --gpus 1"),
    "out-is-a-run": (lambda: ["pair.yaml", "--out", "runs/small"], "holds a run"),
    "out-is-a-file": (lambda: ["pair.yaml", "--out", "text.txt"], "text.txt is a file"),
    "out-is-another": (another_folder, "holds another experiment: name is"),
    "nothing-to-report": (lambda: ["pair.yaml", "--report-only"], "holds no experiment yet"),
    "no-text": (lambda: ["pair.yaml", "data.source.path=none.txt"], "none.txt"),
}


@pytest.mark.parametrize(("edit", "named"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(experiment: Path, fusedlm, edit, named: str):
    arguments = edit() or ["pair.yaml"]
    outcome = fusedlm("compare", *arguments)
    assert outcome.code == 2, outcome
    assert named in outcome.err and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    # The folder of another experiment was there, and has its lock now.
    left = {path.name for path in Path("runs/pair").iterdir()} if Path("runs/pair").exists() else set()
    assert left in (set(), {"identity.json", "records", ".lock"})
