"""fusedlm pack: the file that it writes, its budget, what reads it, and what it refuses."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fusedlm import load
from fusedlm.evaluate import score_documents, text_documents
from fusedlm.quant.artifact.contents import contents
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.plain_rounding import Rounding, round_model

RUN = "runs/small"
PACK = ("pack", RUN, "--bytes", "100000", "--out", "model.flm")


def rounded_in_memory(run: str, group: int | None = None):
    """The model of a run with the weights that `fusedlm pack` gives it."""
    model, tokenizer, _ = load(run, device="cpu")
    found = round_model(model, Rounding(6, 12.85, group), Rounding(8, 20.0, group))
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in contents(model, found, torch.float16).items():
            values = tensor.values() if isinstance(tensor, IntegerMatrix) else tensor
            own[name].copy_(values.reshape(own[name].shape))
    return model, tokenizer


def test_a_packed_model_scores_as_the_same_weights_in_memory(fusedlm, workspace):
    outcome = fusedlm(*PACK)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == "next: fusedlm eval model.flm"
    model, tokenizer = rounded_in_memory(RUN)
    packed, packed_tokenizer, recipe = load("model.flm", device="cpu")
    assert packed_tokenizer.files() == tokenizer.files() and recipe == load(RUN)[2]
    assert not packed.training and packed.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, packed.state_dict()[name]) for name, tensor in model.state_dict().items())
    scores = [
        score_documents(
            each, text_documents(Path("text.txt").read_text(), tokenizer), window=16, device="cpu", dtype=torch.float32
        ).bpb
        for each in (model, packed)
    ]
    assert abs(scores[0] - scores[1]) < 1e-6
    evaluated = json.loads(fusedlm("eval", "model.flm", "--text", "text.txt", "--json").out)
    assert abs(evaluated["bpb"] - scores[0]) < 1e-6 and evaluated["checkpoint"] == 2
    # Without --text, what the run held out is found as it is for the run.
    held_out = json.loads(fusedlm("eval", "model.flm", "--json").out)
    assert held_out["tokens"] == json.loads(fusedlm("eval", RUN, "--json").out)["tokens"]
    generated = fusedlm("generate", "model.flm", "--prompt", "Doc", "--max-tokens", 5)
    assert (generated.code, generated.err) == (0, "") and generated.out


def test_it_is_read_anywhere(fusedlm, workspace, tmp_path_factory, monkeypatch):
    assert fusedlm(*PACK).code == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Path("model.flm").rename(elsewhere / "renamed")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("socket.socket.connect", None)
    (elsewhere / "text").write_text("Document 3.\n")
    assert fusedlm("eval", "renamed", "--text", "text").code == 0
    assert "give other text to score with --text FILE" in fusedlm("eval", "renamed").err


def test_the_same_run_gives_the_same_bytes(fusedlm, workspace):
    assert fusedlm(*PACK).code == fusedlm(*PACK[:-1], "other.flm").code == 0
    assert Path("model.flm").read_bytes() == Path("other.flm").read_bytes()


def test_the_budget_is_in_decimal_bytes_and_hard(fusedlm, workspace):
    result = json.loads(fusedlm(*PACK, "--json").out)
    size = Path("model.flm").stat().st_size
    assert result["bytes"] == size == round(sum(row["bytes"] for row in result["tensors"]))
    Path("model.flm").unlink()
    assert fusedlm("pack", RUN, "--bytes", size, "--out", "model.flm").code == 0
    Path("model.flm").unlink()
    outcome = fusedlm("pack", RUN, "--bytes", size - 1, "--out", "model.flm")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not Path("model.flm").exists()
    assert f"{size:,} bytes, 1 more than --bytes {size - 1}; nothing was written" in outcome.err
    table = outcome.out.splitlines()
    assert table[0].split() == ["bytes", "bits", "coded", "coder", "tensor"] and "embedding.weight" in outcome.out
    assert f"{size:,} of {size - 1:,} bytes" in table[-1]
    outcome = fusedlm("pack", RUN, "--bytes", size - 1, "--out", "model.flm", "--json")
    assert outcome.code == 2 and json.loads(outcome.out)["bytes"] == size


def test_fewer_bits_take_fewer_bytes(fusedlm, workspace):
    options = {"8": [], "2": [], "6": ["--group", "8"], "5": ["--deviations", "0", "--floats", "bfloat16"]}
    sizes = {}
    for bits, more in options.items():
        outcome = fusedlm("pack", RUN, "--bytes", 100000, "--out", bits, "--bits", bits, "--json", *more)
        assert (outcome.code, outcome.err) == (0, "")
        sizes[bits] = json.loads(outcome.out)["bytes"]
        assert load(bits)[0]
    assert sizes["2"] < sizes["8"]


def test_experts_are_packed_as_one_matrix(fusedlm, workspace):
    experts = "model.blocks.g.ffn={type: moe, n_experts: 4, top_k: 2, hidden: 8}"
    assert fusedlm("train", "small.yaml", experts, "--out", "moe").code == 0
    assert fusedlm("pack", "moe", "--bytes", 100000, "--out", "moe.flm", "--group", 8).code == 0
    model, _ = rounded_in_memory("moe", group=8)
    packed = load("moe.flm")[0].state_dict()
    assert any(tensor.ndim == 3 for tensor in packed.values())
    assert all(torch.equal(tensor, packed[name]) for name, tensor in model.state_dict().items())


def test_inspect_shows_the_table(fusedlm, workspace):
    written = json.loads(fusedlm(*PACK, "--json").out)
    outcome = fusedlm("pack", "--inspect", "model.flm")
    assert outcome.code == 0 and "all checksums agree" in outcome.out and "blocks.0.ffn.up.weight (" in outcome.out
    shown = json.loads(fusedlm("pack", "model.flm", "--inspect", "--json").out)
    assert shown["tensors"] == written["tensors"] and shown["version"] == 1 and shown["step"] == 2
    last = shown["sections"][-1]
    assert last["offset"] + last["bytes"] == shown["bytes"]
    content = bytearray(Path("model.flm").read_bytes())
    content[-1] ^= 1
    Path("model.flm").write_bytes(content)
    for command in (
        ["pack", "--inspect", "model.flm"],
        ["eval", "model.flm"],
        ["generate", "model.flm", "--prompt", "a"],
    ):
        outcome = fusedlm(*command)
        assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1
        assert "model.flm: codes of " in outcome.err and "its checksum differs" in outcome.err


def test_code_counts_in_the_budget(fusedlm, workspace, monkeypatch):
    monkeypatch.setattr("fusedlm.quant.artifact.standalone.code_archive", lambda artifact: bytes(5000))
    assert fusedlm(*PACK).code == 0
    total = Path("model.flm").stat().st_size + 5000
    Path("model.flm").unlink()
    for budget, code in ((total - 1, 2), (total, 0)):
        outcome = fusedlm("pack", RUN, "--bytes", budget, "--out", "model.flm", "--code", "code.tar.xz")
        assert outcome.code == code and f"5,000 bytes of code; {total:,} together" in outcome.out
        assert Path("code.tar.xz").exists() == Path("model.flm").exists() == (code == 0)
        assert code == 0 or f"{total:,} bytes, 5,000 of them code, 1 more than" in outcome.err


def test_the_code_that_is_counted_scores_alone(fusedlm, workspace, tmp_path_factory):
    outcome = fusedlm("pack", RUN, "--bytes", "1000000", "--out", "model.flm", "--code", "code.tar.xz", "--json")
    assert outcome.code == 0 and Path("code.tar.xz").stat().st_size == json.loads(outcome.out)["code_bytes"]
    alone = tmp_path_factory.mktemp("alone")
    with tarfile.open("code.tar.xz") as archive:
        assert "fusedlm/cli/pack.py" not in archive.getnames()
        archive.extractall(alone, filter="data")
    where = "import fusedlm, sys; print(fusedlm.__file__); sys.argv = ['score.py', *sys.argv[1:]]; "
    run = where + "exec(open('score.py').read())"
    command = [sys.executable, "-c", run, str(workspace / "model.flm"), str(workspace / "text.txt")]
    done = subprocess.run(command, cwd=alone, capture_output=True, text=True, check=True)
    file, bpb = done.stdout.split()
    assert file == str(alone / "fusedlm/__init__.py")
    evaluated = fusedlm("eval", "model.flm", "--text", "text.txt", "--json", "runtime.dtype=float32")
    assert abs(float(bpb) - json.loads(evaluated.out)["bpb"]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/none", "--bytes", "1", "--out", "x"], "runs/none holds no run"),
        ([RUN, "--out", "x"], "--bytes N is missing"),
        ([RUN, "--bytes", "1"], "--out FILE is missing"),
        ([RUN, "--bytes", "16MB", "--out", "x"], "'16MB' is not an integer"),
        ([RUN, "--bytes", "0", "--out", "x"], "--bytes 0: must be at least 1"),
        ([RUN, "--bytes", "1", "--out", "runs"], "runs is a folder; name a file"),
        ([RUN, "--bytes", "1", "--out", "x", "--bits", "9"], "--bits 9 must be 2 to 8"),
        ([RUN, "--bytes", "1", "--out", "x", "--table-bits", "1"], "--table-bits 1 must be 2 to 8"),
        ([RUN, "--bytes", "1", "--out", "x", "--deviations", "-1"], "--deviations -1 must be a positive number"),
        ([RUN, "--bytes", "1", "--out", "x", "--group", "0"], "--group 0 must be at least 1"),
        ([RUN, "--bytes", "1", "--out", "x", "--floats", "fp8"], "--floats 'fp8' must be one of float32"),
        ([RUN, "--bytes", "1", "--out", "x", "--weights", "ema"], "has no ema weights"),
        (["text.txt", "--inspect"], "text.txt: file: its first bytes are not those of an artifact"),
        (["nowhere", "--inspect"], "nowhere: No such file"),
        (["text.txt", "--bytes", "1", "--out", "x"], "text.txt holds no run"),
    ],
)
def test_refusals_are_one_line(fusedlm, workspace, arguments, words):
    outcome = fusedlm("pack", *arguments)
    assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1 and words in outcome.err
    assert not Path("x").exists()


def test_an_artifact_is_not_a_run(fusedlm, workspace):
    assert fusedlm(*PACK).code == 0
    for command in (
        ["pack", "model.flm", "--bytes", "1", "--out", "x"],
        ["quantize", "model.flm", "--format", "fp8", "--out", "x"],
    ):
        outcome = fusedlm(*command)
        assert outcome.code == 2 and "model.flm holds no run" in outcome.err and outcome.err.count("\n") == 1
    outcome = fusedlm("eval", "model.flm", "--weights", "ema")
    assert outcome.code == 2 and "model.flm is an artifact and has one checkpoint" in outcome.err


QUANTIZE = ("quantize", RUN, "--format", "int4", "--storage", "integers", "--no-score", "--out", "small")


def test_integers_of_a_quantised_run_are_kept(fusedlm, workspace):
    """Bit for bit, and what it left as floats is rounded as of any other run."""
    options = ["--calibrate", "gptq", "--tokens", "320", "--embedding", "none", "--group", "8"]
    assert fusedlm(*QUANTIZE, *options).code == 0
    assert fusedlm("pack", "small", *PACK[2:]).code == 0
    quantised, packed, source = (load(run, device="cpu")[0].state_dict() for run in ("small", "model.flm", RUN))
    plain = round_model(load(RUN, device="cpu")[0], Rounding(6, 12.85), Rounding(8, 20.0))
    rows = {row["name"]: row for row in json.loads(fusedlm("pack", "--inspect", "model.flm", "--json").out)["tensors"]}
    kept = {name for name, row in rows.items() if row["bits"] == 4}
    assert len(kept) > 4
    for name in plain:
        expected = quantised[name] if name in kept else plain[name].values().view(source[name].shape)
        assert torch.equal(packed[name], expected)
        assert not torch.equal(packed[name], source[name])


def test_a_quantised_run_whose_codes_are_not_all_is_refused(fusedlm, workspace):
    for format in ("int4", "fp8"):
        assert fusedlm("quantize", RUN, "--format", format, "--no-score", "--out", format).code == 0
        outcome = fusedlm("pack", format, *PACK[2:])
        assert outcome.code == 2 and f"is in {format}; quantise the run that it is from with --format" in outcome.err
    calibrated = ["--calibrate", "gptq", "--tokens", "320", "--rank", "1"]
    assert fusedlm(*QUANTIZE, *calibrated).code == 0
    outcome = fusedlm("pack", "small", *PACK[2:])
    assert outcome.code == 2 and "has a correction of rank 1, which an artifact does not hold" in outcome.err
    assert not Path("model.flm").exists()
