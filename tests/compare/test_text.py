"""All runs of an experiment have the text that it began with."""

import json

from fusedlm.compare import run_experiment
from fusedlm.config import dump_recipe
from fusedlm.config.experiment import load_experiment
from fusedlm.runs.checkpoint import Checkpoints
from tests.compare.conftest import EXPERIMENT
from tests.train.runs import tiny_recipe


def test_a_source_that_changes_or_goes_changes_no_run(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("fusedlm.compare.experiment.write_report", lambda *_: None)
    recipe = tiny_recipe(tmp_path, "train.steps=1", "train.eval_every=0", "train.checkpoint_every=0", "train.ema=null")
    (tmp_path / "base.yaml").write_text(dump_recipe(recipe))
    experiment, text, out = tmp_path / "tiny.yaml", tmp_path / "text.txt", tmp_path / "out"
    plan = EXPERIMENT.replace("decode_lengths: [20, 70]", "decode_lengths: [20]")

    def change(work, arguments, report):
        if work == "train_run":
            text.write_text(text.read_text() + "\n---\nmore tea")

    in_process.before = change
    experiment.write_text(plan.replace("seeds: 2", "seeds: 1"))
    run_experiment(*load_experiment(experiment), out)
    text.unlink()
    in_process.before = None
    experiment.write_text(plan)
    run_experiment(*load_experiment(experiment), out)
    states = [Checkpoints(run / "checkpoints").read_json(1, "state.json") for run in (out / "runs").iterdir()]
    began_with = json.loads((out / "identity.json").read_text())["variants"]["latent"]["text"]
    assert [state["data"] for state in states] == [began_with] * 4
