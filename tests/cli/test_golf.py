"""fusedlm golf: from a recipe to a scored file of at most so many bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedlm as fusedlm_package
from fusedlm import load
from fusedlm.nn.fake_quantized import FakeQuantization
from fusedlm.quant.artifact import read_artifact
from fusedlm.quant.integer import IntegerMatrix

GOLF = ("golf", "small.yaml", "--out", "golf", "--tokens", "320", "--stride", "4")
LIMIT = 9300
CODE = 700


@pytest.fixture
def code(monkeypatch):
    """Tracing the code takes a process of its own; test_pack.py has it."""
    monkeypatch.setattr("fusedlm.quant.artifact.standalone.code_archive", lambda artifact: bytes(CODE))


@pytest.fixture
def trained(fusedlm, workspace):
    """The training of the command is done: the run of the recipe is what it would be."""
    shutil.copytree("runs/small", "golf/run")


def test_the_whole_chain(fusedlm, workspace, code):
    outcome = fusedlm(*GOLF, "--bytes", LIMIT)
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(Path("golf/golf.json").read_text())
    size = Path("golf/model.flm").stat().st_size
    assert size == record["bytes"] == round(sum(row["bytes"] for row in record["tensors"]))
    assert 0.98 * LIMIT < size <= LIMIT == record["limit"] and size in record["files_tried"]
    assert Path("golf/code.tar.xz").stat().st_size == record["code_bytes"] == CODE
    # The figures are those of fusedlm eval.
    for run, key, stride in (("run", "float", 16), ("model.flm", "plain", 16), ("model.flm", "sliding", 4)):
        scored = json.loads(fusedlm("eval", f"golf/{run}", "--stride", stride, "--json").out)
        assert record[key] == {name: scored[name] for name in ("bpb", "tokens", "bytes", "window", "stride")}
    assert record["float"]["bpb"] != record["plain"]["bpb"] != record["sliding"]["bpb"]
    lines = outcome.out.splitlines()
    assert f"file: {size:,} of 9,300 bytes, {record['bits_per_weight']:.3f} bits per weight" in lines
    assert f"with the code of a reader, 700 bytes: {size + CODE:,}" in lines
    page = Path("golf/golf.md").read_text()
    assert "embedding.weight (320, 16)" in page and all(line in page for line in lines[-8:-2])
    assert Path("golf/run/report.html").exists()
    # Steps differ by matrix, and are fine where the loss needs it.
    steps = {
        name: float((matrix.scales.float().squeeze(1) / load("golf/run")[0].state_dict()[name].std(1)).median())
        for name, matrix in read_artifact("golf/model.flm").tensors.items()
        if isinstance(matrix, IntegerMatrix)
    }
    assert len({round(step, 3) for step in steps.values()}) > 3

    # Repeated, it is quantised again, for another size, without training.
    again = json.loads(fusedlm(*GOLF, "--bytes", "8000", "--json").out.splitlines()[-1])
    assert again["bytes"] <= 8000 and again["float"] == record["float"]
    assert len(list(Path("golf/run/checkpoints").iterdir())) == 2


@pytest.mark.gpu
def test_the_chain_on_a_gpu(fusedlm, workspace, code):
    outcome = fusedlm(*GOLF, "runtime.device=cuda", "--bytes", LIMIT, "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out.splitlines()[-1])
    assert record["environment"]["device"] == "cuda" and record["bytes"] <= LIMIT
    scored = json.loads(fusedlm("eval", "golf/model.flm", "--stride", 16, "--json").out)
    assert record["plain"]["bpb"] == scored["bpb"]


def test_too_few_bytes_are_an_error_with_the_bytes_of_each_tensor(fusedlm, trained, code):
    outcome = fusedlm(*GOLF, "--bytes", "4000")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "more than --bytes 4000" in outcome.err
    assert "embedding.weight (320, 16)" in outcome.out and "of 4,000 bytes" in outcome.out
    assert not Path("golf/model.flm").exists() and not Path("golf/golf.json").exists()


def test_the_code_counts_where_it_is_wanted(fusedlm, trained, code):
    outcome = fusedlm(*GOLF, "--bytes", LIMIT, "--with-code", "--json")
    record = json.loads(outcome.out.splitlines()[-1])
    assert outcome.code == 0 and record["code_counts"]
    assert 0.95 * LIMIT < Path("golf/model.flm").stat().st_size + CODE <= LIMIT


def test_quantisation_aware_training_keeps_its_grid(fusedlm, workspace, code):
    qat = "train.qat={bits: 3, start: 0.5, embedding_bits: 6, clip: 2.0}"
    assert fusedlm("golf", "small.yaml", qat, *GOLF[2:], "--bytes", "20000").code == 0
    model, _, recipe = load("golf/run", device="cpu")
    FakeQuantization(model, **recipe.train.qat.model_dump(exclude={"start"})).write()
    expected, packed = model.state_dict(), read_artifact("golf/model.flm").tensors
    matrices = {name: tensor for name, tensor in packed.items() if isinstance(tensor, IntegerMatrix)}
    assert {matrix.bits for matrix in matrices.values()} == {3, 6}
    assert all(torch.equal(matrix.values(), expected[name]) for name, matrix in matrices.items())
    outcome = fusedlm("golf", "small.yaml", qat, *GOLF[2:], "--bytes", "5000")
    assert outcome.code == 2 and "more than --bytes 5000" in outcome.err


def test_a_fresh_process_gives_the_same_score(fusedlm, trained, code, tmp_path_factory):
    """Nothing but the file and a text: no run, no prepared text, no variables of this process."""
    assert fusedlm(*GOLF, "--bytes", LIMIT).code == 0
    here = json.loads(fusedlm("eval", "golf/model.flm", "--text", "text.txt", "--json").out)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in ("golf/model.flm", "text.txt"):
        shutil.copy(path, elsewhere)
    for path in ("golf", "runs", "prepared"):
        shutil.rmtree(path)
    command = [sys.executable, "-m", "fusedlm", "eval", "model.flm", "--text", "text.txt", "--json"]
    source = str(Path(fusedlm_package.__file__).parents[1])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": source, "HOME": str(elsewhere), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True)
    there = json.loads(done.stdout)
    assert abs(there["bpb"] - here["bpb"]) < 1e-6 and there["tokens"] == here["tokens"] > 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bytes", "0"], "--bytes 0: must be at least 1"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--stride", "-1"], "--stride -1: must be at least 1"),
        (["--eval-tokens", "0"], "--eval-tokens 0: must be at least 1"),
        (["--bytes", "16MB"], "'16MB' is not an integer"),
        (["--weights", "ema"], "--weights ema: the recipe keeps none; set train.ema"),
    ],
)
def test_refusals_are_one_line(fusedlm, trained, options, words):
    outcome = fusedlm(*GOLF, *options)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err
    assert not Path("golf/model.flm").exists()
