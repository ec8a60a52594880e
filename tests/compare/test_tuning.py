"""Equal tuning: every factor of every variant is tried once, and runs use the best."""

import csv
import json
import os
import shutil
import signal

import pytest

from fusedlm.compare import run_experiment
from fusedlm.compare.matching import match_variants
from fusedlm.compare.tuning import Trial, Tuning, trial_recipe
from fusedlm.config import dump_recipe, load_recipe
from fusedlm.config.experiment import load_experiment
from tests.report.test_report import curves, parse
from tests.train.runs import losses

RATES = {"latent": 0.01, "softmax": 0.02}
TUNED = [
    "experiment.variants={latent: [model.pattern=m], softmax: {model.pattern: a, train.optimizer.lr: 0.02}}",
    "experiment.tune={lr_factors: [0.5, 1, 2], seed: 7}",
    "experiment.seeds=1",
    "experiment.decode_lengths=[]",
]
TRIALS = [f"{name}-lrx{factor}" for factor in ("0.5", "1", "2") for name in RATES]
RUNS = ["latent-seed0", "softmax-seed0"]
WORK = "fusedlm.compare.experiment.train_run"


class Losses:
    """Replaces train_run: the loss of a run is set by its variant and learning rate; 3.0 where nothing is said."""

    def __init__(self, losses: dict[str, dict[float, float | str]]):
        self.losses = losses  # variant -> factor -> loss, or an outcome
        self.recipes = {}  # by the name of the run's folder

    def train_run(self, recipe, run_dir, text, weights, report) -> dict:
        self.recipes[run_dir.name] = recipe
        variant = run_dir.name.rpartition("-")[0]
        factor = round(recipe.train.optimizer.lr / RATES.get(variant, 0.01), 9)
        loss = self.losses.get(variant, {}).get(factor, 3.0)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
        record = {"step": 1, "loss": 4.0, "tokens": 64, "tokens_per_second": 1.0, "step_seconds": 1.0}
        (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        if isinstance(loss, str):
            return {"outcome": loss, "message": "by design", "final": None, "step": 1}
        score = {"val_nll_per_token": loss, "val_bpb": loss / 2, "val_tokens": 9, "val_bytes": 9}
        return {"outcome": "finished", "message": "", "final": score}


@pytest.fixture
def tuned(experiment_file, in_process, monkeypatch, tmp_path):
    """A function that runs the tuned experiment with these losses in tmp_path/out, and gives outcome and stand-in."""

    def run(losses: dict[str, dict[float, float | str]], *overrides: str, train: bool = True):
        in_process.calls.clear()
        stand_in = Losses(losses)
        monkeypatch.setattr(WORK, stand_in.train_run)
        loaded = load_experiment(experiment_file, [*TUNED, *overrides])
        return run_experiment(*loaded, tmp_path / "out", train=train), stand_in

    return run


def test_every_factor_is_tried_once_and_runs_use_the_best(tuned, in_process, tmp_path):
    outcome, stand_in = tuned({"latent": {0.5: 2.0}, "softmax": {1: 2.9}})
    assert in_process.trained() == TRIALS + RUNS and outcome.failed == ()
    rates = {name: recipe.train.optimizer.lr for name, recipe in stand_in.recipes.items()}
    assert [rates[name] for name in TRIALS] == pytest.approx([0.005, 0.01, 0.01, 0.02, 0.02, 0.04])
    assert rates["latent-seed0"] == 0.005 and rates["softmax-seed0"] == 0.02
    seeds = {name: recipe.train.seed for name, recipe in stand_in.recipes.items()}
    assert seeds == dict.fromkeys(TRIALS, 7) | dict.fromkeys(RUNS, 0)
    first = stand_in.recipes["softmax-lrx2"]
    assert first.name == "tiny-softmax-lrx2" and first.train.eval_every == 0
    assert first.model == outcome.results.variants["softmax"].recipe.model, "trials have the matched size"
    assert [row["lr_factor"] for row in outcome.results.rows] == [0.5, 1]
    remark = "latent: the best lr factor, 0.5, is the smallest that was tried; a smaller one might be better"
    assert remark in outcome.results.verdicts()
    before = (tmp_path / "out/results.json").read_text()
    again, _ = tuned({})
    assert in_process.calls == [] and (tmp_path / "out/results.json").read_text() == before
    tuned({"latent": {1: 2.0}}, "experiment.seeds=2")
    assert in_process.trained() == ["latent-seed1", "softmax-seed1"], "a seed is added, no trial"


def test_results_have_every_trial(tuned, with_plots, tmp_path):
    outcome, _ = tuned({"latent": {0.5: 2.5, 2: "diverged"}, "softmax": {1: 2.9}})
    tree = json.loads((tmp_path / "out/results.json").read_text())["variants"]["latent"]
    assert tree["tuning"]["factor"] == 0.5 and tree["tuning"]["rates"] == {"lr": 0.005}
    assert tree["tuning"]["edge"] == "smallest" and tree["recipe"]["train"]["optimizer"]["lr"] == 0.005
    assert [(trial["factor"], trial["outcome"], trial["val_loss"]) for trial in tree["tuning"]["trials"]] == [
        (0.5, "finished", 2.5),
        (1, "finished", 3.0),
        (2, "diverged", None),
    ]
    with (tmp_path / "out/trials.csv").open() as file:
        rows = [(row["variant"], row["lr_factor"], row["val_loss"], row["chosen"]) for row in csv.DictReader(file)]
    assert rows[0] == ("latent", "0.5", "2.5", "True") and rows[2] == ("latent", "2.0", "", "False") and len(rows) == 6
    page = parse(tmp_path / "out/report.html")
    for words in ("3 trials per variant, with seed 7", "0.5 (smallest)", "lr 0.005", "2.5000", "diverged", "×2"):
        assert words in page.text, words
    assert "are the best of 3 trials" in page.text and "none was tuned" not in page.text
    drawn = curves(page)["Tuning of the learning rates"][0]
    assert drawn["latent"][1:3] == [[0.5, 1], [2.5, 3]] and drawn["softmax"][1] == [0.5, 1, 2]


@pytest.mark.parametrize("how", ["diverged", "failed"])
def test_a_variant_without_a_rate_is_an_outcome(tuned, in_process, how):
    outcome, _ = tuned({"softmax": dict.fromkeys([0.5, 1, 2], how)})
    assert in_process.trained() == [*TRIALS, "latent-seed0"]
    assert [row["outcome"] for row in outcome.results.rows] == ["finished", how]
    first = outcome.results.verdicts()[0]
    assert first.startswith(f"softmax against latent: softmax {how} ") and first.endswith(": no verdict")
    assert "trials of its learning rate" in first
    assert outcome.failed == (
        () if how == "diverged" else ("softmax-seed0: since none of 3 trials of its learning rate finished: by design",)
    )
    again, _ = tuned({})
    if how == "diverged":
        assert in_process.trained() == [] and again.results.rows == outcome.results.rows
    else:
        assert in_process.trained() == [*TRIALS[1::2], "softmax-seed0"], "failed trials are tried again"


def test_a_failed_trial_is_the_worst_and_stays_so_once_runs_have_started(tuned, in_process):
    outcome, _ = tuned({"softmax": {2: "failed"}})
    assert outcome.failed == () and {row["outcome"] for row in outcome.results.rows} == {"finished"}
    remark = "softmax: the trial of lr factor 2 failed and counts as the worst: by design"
    assert remark in outcome.results.verdicts()
    tuned({"softmax": {2: 1.0}})
    assert in_process.calls == []


def test_an_added_factor_makes_its_trials_and_never_mixes_rates(tuned, in_process, tmp_path):
    """The choice of latent stays; that of softmax changes."""
    tuned({"latent": {1: 2.0}, "softmax": {1: 2.0}})
    more = "experiment.tune.lr_factors=[0.5, 1, 2, 4]"
    report, _ = tuned({}, more, train=False)
    assert {row["outcome"] for row in report.results.rows} == {"not run"}, "the choice is open until all are tried"
    problem = (
        r"out: softmax-seed0: trained with another learning rate than the best of softmax now, lr factor 4 \(lr 0.08\)"
    )
    for train in (True, True, False):
        with pytest.raises(ValueError, match=problem) as caught:
            tuned({"softmax": {4: 1.0}}, more, train=train)
        assert "\n" not in str(caught.value) and "latent" not in str(caught.value)
        assert in_process.trained() in (["latent-lrx4", "softmax-lrx4"], [])
    with pytest.raises(ValueError, match='tune.lr_factors 4 is "tried" there and absent now'):
        tuned({})
    shutil.rmtree(tmp_path / "out/runs/softmax-seed0")
    (tmp_path / "out/records/softmax-seed0.json").unlink()
    outcome, _ = tuned({}, more)
    assert in_process.trained() == ["softmax-seed0"]
    assert [row["lr_factor"] for row in outcome.results.rows] == [1, 4]
    assert load_recipe(tmp_path / "out/runs/softmax-seed0/recipe.yaml").train.optimizer.lr == 0.08


def test_a_variant_may_be_added_with_its_own_trials(tuned, in_process):
    tuned({})
    tuned({}, "experiment.variants.gdn=[model.pattern=g]")
    assert in_process.trained() == ["gdn-lrx0.5", "gdn-lrx1", "gdn-lrx2", "gdn-seed0"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("experiment.tune.seed=8", "tune.seed is 7 there and 8 now"),
        ("experiment.tune.steps=2", "tune.steps is null there and 2 now"),
        ("experiment.tune=null", "tune.seed is 7 there and absent now"),
    ],
)
def test_another_tuning_is_refused(tuned, override, named):
    tuned({})
    with pytest.raises(ValueError, match=named):
        tuned({}, override)


def test_real_trials_resume_where_they_were_interrupted(experiment_file, in_process, tmp_path):
    """A signal in the second trial; one factor, so that runs have the rates of the recipe, bit for bit."""

    def interrupt(name, arguments, report):
        def relay(kind, content):
            if kind == "step" and arguments[1].name == "softmax-lrx1":
                os.kill(os.getpid(), signal.SIGINT)
            report(kind, content)

        return relay

    overrides = ["experiment.tune={lr_factors: [1.0], steps: 3}", "experiment.seeds=1", "experiment.decode_lengths=[]"]
    loaded = load_experiment(experiment_file, overrides)
    in_process.before = interrupt
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert outcome.stopped and in_process.trained() == ["latent-lrx1", "softmax-lrx1"]
    assert outcome.report is None and {row["outcome"] for row in outcome.results.rows} == {"not run"}
    done = len(losses(tmp_path / "out/runs/softmax-lrx1"))
    assert 0 < done < 3
    in_process.calls.clear()
    starts = []
    in_process.before = lambda name, arguments, report: (
        lambda kind, content: starts.append(content) if kind == "begin" else None
    )
    outcome = run_experiment(*loaded, tmp_path / "out")
    assert in_process.trained() == ["softmax-lrx1", *RUNS] and starts == [done, 0, 0]
    assert len(losses(tmp_path / "out/runs/softmax-lrx1")) == 3 and outcome.results.tunings["latent"].edge is None
    _, recipes = load_experiment(experiment_file)
    trained = load_recipe(tmp_path / "out/runs/latent-seed0/recipe.yaml").train
    assert trained.optimizer == recipes["latent"].train.optimizer


def test_steps_of_trials_are_in_proportion_to_those_of_the_runs(experiment_file):
    overrides = ["experiment.match=time", "train.steps=100", "experiment.tune={lr_factors: [0.5], steps: 20}"]
    experiment, recipes = load_experiment(experiment_file, overrides)
    sizes = dict.fromkeys(recipes, 257)
    variants = match_variants(experiment, recipes, sizes, {"latent": 0.2, "softmax": 0.1})
    steps = [trial_recipe(experiment, one, variants["latent"], 0.5).train.steps for one in variants.values()]
    assert steps == [20, 40] and variants["softmax"].recipe.train.steps == 200
    full = experiment.model_copy(update={"tune": experiment.tune.model_copy(update={"steps": None})})
    assert trial_recipe(full, variants["softmax"], variants["latent"], 0.5).train.steps == 200


def test_equal_losses_choose_the_lower_rate_and_open_trials_nothing():
    trials = [Trial(0.5, {}, "finished", 2.0), Trial(1, {}, "finished", 2.0), Trial(2, {}, "finished", 2.5)]
    assert Tuning("a", tuple(trials)).best.factor == 0.5
    assert Tuning("a", (*trials, Trial(4, {}, "not run"))).best is None
    assert Tuning("a", (trials[2], trials[1], trials[2])).edge is None
