"""Records of several seeds of a recipe."""

import json

import pytest
import yaml

from benchmarks.record_run import summarise_seeds

RECIPE = {
    "name": "r",
    "model": {"dim": 8, "n_layers": 1, "pattern": "a", "blocks": {"a": {"mixer": {"type": "attention", "n_heads": 1}}}},
    "train": {"steps": 2, "seq_len": 8, "batch_size": 1},
}
ENVIRONMENT = {"date": "2026-01-02T03:04", "device_name": "GPU", "fusedlm": "1", "python": "3", "torch": "2"}


@pytest.fixture
def make_run(tmp_path):
    def make(seed, bpb, **train):
        run = tmp_path / f"{seed}-{bpb}"
        run.mkdir()
        recipe = RECIPE | {"name": f"seed-{seed}", "train": RECIPE["train"] | {"seed": seed} | train}
        recipe["model"]["blocks"]["a"]["ffn"] = {"type": "swiglu"}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (run / "environment.json").write_text(json.dumps(ENVIRONMENT | {"triton": None, "git_commit": "c"}))
        step = {"step": 2, "loss": 3.0, "tokens": 16, "step_seconds": 4.0, "loader_wait_seconds": 1.0}
        step |= {"tokens_per_second": 5.0, "mfu": None, "peak_memory_bytes": 2**30}
        validation = {"step": 2, "val_bpb": bpb, "val_nll_per_token": 2 * bpb}
        (run / "metrics.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(validation) + "\n")
        return run

    return make


def test_the_mean_and_each_seed(make_run):
    runs = [make_run(0, 1.0), make_run(1, 1.5)]
    (runs[1] / "eval.json").write_text('{"bpb": 1.25}')
    record = summarise_seeds(runs, "r", "command")
    assert record["val_bpb"] == 1.25 and record["training_seconds"] == 4.0
    figures = [(s["seed"], s["val_bpb"], s["val_nll_per_token"]) for s in record["seeds"]]
    assert figures == [(0, 1.0, 2.0), (1, 1.5, 3.0)]
    assert ["eval" in s for s in record["seeds"]] == [False, True] and record["seeds"][1]["eval"]["bpb"] == 1.25


def test_other_recipes_and_the_same_seed_are_refused(make_run):
    with pytest.raises(ValueError, match="runs of the same seed: 0, 0"):
        summarise_seeds([make_run(0, 1.0), make_run(0, 2.0)], "r", "command")
    with pytest.raises(ValueError, match="not the recipe of"):
        summarise_seeds([make_run(0, 3.0), make_run(1, 1.0, batch_size=2)], "r", "command")
