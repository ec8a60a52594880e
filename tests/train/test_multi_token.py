"""Runs with multi-token prediction: records, the weight by step, stopping and resuming, text from the run."""

import json

import pytest
import torch

import fusedlm
from fusedlm.cli import main
from fusedlm.generation import Speculation
from fusedlm.model import Decoder
from fusedlm.train import train
from tests.train.runs import assert_same_run, records, resume, tiny_recipe

MTP = "model.mtp={depth: 2, block: g, weight: 0.5, final_weight: 0.25, final_from: 0.5}"
MUON = "train.optimizer={type: muon_adamw}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    recipe = tiny_recipe(folder, MTP, MUON)
    weights, set_weight = [], Decoder.set_mtp_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "set_mtp_weight", lambda self, w: weights.append(w) or set_weight(self, w))
        train(recipe, folder / "run")
    return recipe, folder / "run", weights


def test_records(run):
    _, folder, weights = run
    assert weights == [0.5] * 6 + [0.25] * 6
    steps = [record for record in records(folder) if "loss" in record]
    for step, weight in zip(steps, weights, strict=True):
        first, second = step["mtp_loss"]
        # Each module has fewer targets than the model, by whose number their sums are divided.
        assert 0.8 * weight * (first + second) / 2 < step["loss_mtp"] < weight * (first + second) / 2
    assert steps[-1]["mtp_loss"][0] < steps[0]["mtp_loss"][0]
    assert not any("mtp_loss" in record for record in records(folder) if "val_bpb" in record)
    header = json.loads((folder / "environment.json").read_text())
    assert header["parameters"]["mtp"] > 0


def test_stopping_and_resuming_gives_the_same_run(run, tmp_path):
    recipe, folder, _ = run
    stopped, step = tmp_path / "run", Decoder.set_mtp_weight

    def stop(self, weight):
        stop.calls += 1
        if stop.calls > 9:
            raise KeyboardInterrupt
        step(self, weight)

    stop.calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "set_mtp_weight", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stopped)
    assert "resuming from step 8" in resume(recipe, stopped)
    assert_same_run(stopped, folder)


def test_text_from_the_run(run, capsys):
    _, folder, _ = run
    model, tokenizer, _ = fusedlm.load(folder, device="cpu")
    speculation = Speculation(3)
    plain = fusedlm.generate(model, tokenizer, "tea", max_tokens=40, temperature=0)
    assert fusedlm.generate(model, tokenizer, "tea", max_tokens=40, temperature=0, speculate=speculation) == plain
    command = ["generate", str(folder), "--prompt", "tea", "--max-tokens", "40", "--temperature", "0"]
    assert main([*command, "--speculate", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "tea" + plain + "\n"
    shares = ", ".join(f"{share:.1%}" for share in speculation.acceptance())
    assert err == f"drafts kept, by position: {shares}; {speculation.tokens_per_step():.2f} tokens per step\n"
    for wrong in ("0", "-3", "99"):
        assert main([*command, "--speculate", wrong]) == 2
        err = capsys.readouterr().err
        assert f"speculate={wrong} must be an integer from 1 to 32" in err and err.count("\n") == 1


def test_the_average_holds_the_modules(run):
    _, folder, _ = run
    own, average = (fusedlm.load(folder, device="cpu", weights=which)[0] for which in ("raw", "ema"))
    pairs = list(zip(own.mtp.parameters(), average.mtp.parameters(), strict=True))
    assert pairs and not all(torch.equal(a, b) for a, b in pairs)
