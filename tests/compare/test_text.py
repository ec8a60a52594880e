"""All runs of an experiment have the text that it began with."""

import json

import torch

from fusedlm.compare import run_experiment
from fusedlm.compare.work import train_run
from fusedlm.config import dump_recipe
from fusedlm.config.experiment import load_experiment
from fusedlm.data import prepare
from fusedlm.evaluate import score_documents
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.text import open_text
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


def test_the_weights_that_an_experiment_names_are_scored(tmp_path):
    recipe = tiny_recipe(tmp_path, "train.steps=3", "train.eval_every=0", "train.checkpoint_every=0")
    text = prepare(recipe.data).manifest["fingerprint"]
    finals = {}
    for weights in ("raw", "ema", "swa"):
        ended = train_run(recipe, tmp_path / "run", text, weights, lambda kind, content: None)
        finals[weights] = ended["final"] and ended["final"]["val_bpb"]
    model, tokenizer, _ = load(tmp_path / "run", weights="ema", device="cpu")
    shards = open_text(recipe, text, tmp_path / "run", remedy="").validation
    options = {"window": 16, "stride": 16, "device": torch.device("cpu"), "dtype": torch.float32}
    score = score_documents(model, shards.documents(), longest=shards.longest, **options)
    assert finals["ema"] == score.bpb != finals["raw"]
    assert finals["swa"] is None and "has no swa weights" in ended["message"] and ended["outcome"] == "failed"
