"""Steps and seconds to the baseline's final loss, on curves that are computed by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fusedlm.compare.report import write_report
from fusedlm.compare.tables import time_table
from fusedlm.compare.time_to_loss import (
    SECONDS,
    STEPS,
    add_time_to_loss,
    crossing,
    is_comparable,
    summarise_time,
    time_sentence,
    validation_curve,
)
from fusedlm.report.history import History
from tests.report.test_report import drawings, parse


def history(*losses: float, every: int = 10, seconds: float = 0.5, **columns) -> History:
    """Validations every 10 steps; the first step compiles for 100 seconds."""
    n = every * len(losses)
    spent = np.full(n, seconds)
    spent[0] = 100.0
    validation = {"step": np.arange(every, n + 1, every, dtype=float), "val_bpb": np.array(losses)}
    return History({"step": np.arange(1.0, n + 1), "step_seconds": spent}, validation | columns, [])


def row(variant: str, seed: int = 0, outcome: str = "finished") -> dict:
    return {"variant": variant, "seed": seed, "outcome": outcome, STEPS: None, SECONDS: None}


@pytest.mark.parametrize(
    ("target", "place"), [(3.0, 0.0), (2.75, 0.0), (2.25, 2 / 3), (2.0, 1.0), (1.5, 1.5), (0.5, None)]
)
def test_the_first_crossing_is_interpolated(target, place):
    """One that is lost again counts."""
    assert crossing(np.array([2.75, 2.0, 1.0, 2.5, 0.9]), target) == (place and pytest.approx(place))


def test_seconds_are_those_of_steps_without_compilation():
    steps, seconds, loss = validation_curve(history(3.0, 2.0, 1.0), "raw")
    assert steps.tolist() == [10, 20, 30] and seconds.tolist() == [5, 10, 15] and loss.tolist() == [3, 2, 1]


def test_scored_averages_have_their_own_curve():
    swa = np.array([np.nan, 1.9, 0.9])
    steps, seconds, loss = validation_curve(history(3.0, 2.0, 1.0, val_bpb_swa=swa), "swa")
    assert steps.tolist() == [20, 30] and seconds.tolist() == [10, 15] and loss.tolist() == [1.9, 0.9]


def test_ratios_are_to_the_totals_of_the_baseline():
    """The baselines end at 1.0 and 1.2 after 40 steps, so the loss is 1.1; the variants reach it half-way from step 20
    to 30, and at step 20."""
    histories = {
        ("base", 0): history(4.0, 3.0, 2.0, 1.0),
        ("base", 1): history(4.0, 3.0, 2.0, 1.2),
        ("fast", 0): history(3.0, 1.6, 0.6, 0.5, seconds=1.0),
        ("fast", 1): history(3.0, 1.1, 0.6, 0.5, seconds=1.0),
    }
    rows = [row(*key) for key in histories]
    assert add_time_to_loss(rows, histories, "base", "raw") == pytest.approx(1.1)
    assert [one[STEPS] for one in rows] == pytest.approx([40, 40, 25, 20])
    assert [one[SECONDS] for one in rows] == pytest.approx([20, 20, 25, 20])
    found = summarise_time(rows[2:], rows[:2])
    assert (found.n_runs, found.n_reached, found.steps) == (2, 2, 22.5)
    assert found.steps_ratio.mean == pytest.approx(0.5625) and found.seconds_ratio.mean == pytest.approx(1.125)
    half = 12.706205 * 0.0625  # t(1) std / sqrt(2) of 0.625 and 0.5
    assert found.steps_ratio.high - found.steps_ratio.mean == pytest.approx(half)
    assert time_sentence("fast", "base", found).startswith(
        "fast against base: final loss of base after 0.562 of its steps (95% interval -0.232 to 1.357) and 1.125 of"
    )


@pytest.mark.parametrize(
    ("second", "outcome", "runs"),
    [([3.0, 1.2], "finished", 2), ([3.0, 0.9], "diverged", 2), ([3.0, 1.2], "failed", 1), ([3.0, 1.2], "not run", 1)],
)
def test_no_mean_over_the_runs_that_reach_the_loss(second, outcome, runs):
    histories = {
        ("base", 0): history(3.0, 1.1),
        ("slow", 0): history(2.0, 1.0),
        ("slow", 1): history(*second),
    }
    rows = [row("base"), row("slow"), row("slow", 1, outcome)]
    add_time_to_loss(rows, histories, "base", "raw")
    assert rows[1][STEPS] == pytest.approx(19) and rows[2][STEPS] is None
    found = summarise_time(rows[1:], rows[:1])
    assert (found.n_runs, found.n_reached) == (runs, 1)
    if runs == 2:
        assert found.steps is found.seconds is found.steps_ratio.mean is None
        assert time_sentence("slow", "base", found).endswith(
            "final loss of base not reached by every run (1 of 2 runs)"
        )
    else:
        assert found.steps_ratio.mean == pytest.approx(0.95) and found.steps_ratio.low is None


def test_a_baseline_without_a_loss_gives_nothing():
    histories = {("base", 0): history(3.0, 1.0), ("other", 0): history(3.0, 1.0)}
    rows = [row("base", 0, "diverged"), row("other")]
    assert add_time_to_loss(rows, histories, "base", "raw") is None
    assert summarise_time(rows[1:], rows[:1]) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, True),
        ({"eval_tokens": 50}, {}, False),
        ({"eval_every": 0}, {"eval_every": 0}, False),
        ({"eval_every": 4}, {}, False),  # as many as steps
        ({"eval_tokens": None}, {"eval_tokens": None}, True),
    ],
)
def test_only_validations_of_the_same_text_are_compared(finished, first, second, expected):
    results = finished[0].results

    def changed(name, changes):
        recipe = results.variants[name].recipe
        train = recipe.train.model_copy(update=changes)
        return replace(results.variants[name], recipe=recipe.model_copy(update={"train": train}))

    assert is_comparable({"a": changed("latent", first), "b": changed("softmax", second)}) is expected


def test_results_and_page_have_them(finished, tmp_path, monkeypatch):
    """Those of the runs, then rows in which every run of the variant, and one of two, reaches the loss."""
    results, out = finished[0].results, finished[1]
    tree = json.loads((out / "results.json").read_text())
    lasts = [results.histories["latent", seed].validation["val_bpb"][-1] for seed in (0, 1)]
    assert tree["baseline_loss_in_training"] == pytest.approx(np.mean(lasts))
    assert tree["variants"]["latent"]["to_baseline_loss"]["steps_ratio"]["mean"] == 1
    assert [one[STEPS] for one in tree["runs"] if one["variant"] == "latent"] == [4, 4]
    monkeypatch.setattr("fusedlm.report.style.DPI", 30)
    rows = [one | ({STEPS: 2.0, SECONDS: 1.5} if one["variant"] == "softmax" else {}) for one in results.rows]
    reached = replace(results, rows=rows)
    _, (_, cells) = time_table(reached)
    assert cells[:5] == ("softmax", "2 of 2 runs", "2", "0.500", "0.500 to 0.500") and cells[5] == "1.5"
    page = parse(write_report(reached, tmp_path))
    for words in (
        "Steps and seconds to the baseline's loss",
        "2 of 2 runs",
        "Dashed: final loss of latent",
        "reference",
    ):
        assert words in page.text, words
    rows = [one | ({STEPS: None} if one["variant"] == "softmax" and one["seed"] else {}) for one in rows]
    _, (_, cells) = time_table(replace(results, rows=rows))
    assert cells[1] == "not reached (1 of 2 runs)" and set(cells[2:]) == {"–"}
    dashed = drawings((out / "report.html").read_text())["Validation loss against training time"]
    assert all("stroke-dasharray" in svg for svg in dashed)
