"""fusedlm quantize with calibration: integers, packed formats, budgets, what it refuses, and a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusedlm import load
from fusedlm.nn.quantized import quantized_layers
from fusedlm.quant.integer import stored_matrices
from fusedlm.quant.targets import named
from fusedlm.runs.checkpoint import Checkpoints

RUN = "runs/small"
GPTQ = ["--calibrate", "gptq", "--tokens", "320"]
FOLDER = Path("small/checkpoints/step-00000002")


def _bpb(fusedlm, run, *options) -> float:
    return json.loads(fusedlm("eval", run, "--json", *options).out)["bpb"]


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "int2", "--embedding", "int3"],
        ["--format", "int5", "--group", "8", *GPTQ, "--rank", "2", "--corrected", "4"],
        ["--format", "int8", "--storage", "integers", "--embedding", "none", "--calibrate", "gptq-lite"],
        ["--format", "int6", "--clip", "12.85", "--embedding-clip", "20", *GPTQ, "--no-order", "--damping", "0.1"],
    ],
    ids=lambda options: options[1],
)
def test_integers_are_stored_and_read_as_any_other_run(fusedlm, workspace, options):
    outcome = fusedlm("quantize", RUN, *options, "--out", "small", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    model, _, _ = load("small")
    source, _, _ = load(RUN)
    tensors, record = load_file(FOLDER / "model.safetensors"), json.loads((FOLDER / "quantization.json").read_text())
    matrices, own, stored = record["matrices"], source.state_dict(), stored_matrices(record, tensors)
    kinds = {name: target.kind for name, target in named(source).items()}
    assert set(matrices) == {name for name in kinds if "none" not in options or kinds[name] == "matrix"}
    for name, tensor in model.state_dict().items():
        if name not in matrices:
            assert name == "head.weight" or torch.equal(tensor, own[name])
            continue
        bits, group, rank = (matrices[name][key] for key in ("bits", "group", "rank"))
        assert bits == int((result["format"] if kinds[name] == "matrix" else "int3" if bits == 3 else "int8")[3:])
        matrix = stored[name]
        assert (matrix.bits, matrix.group) == (bits, group)
        values = matrix.values()
        if rank:
            values = values + tensors[f"{name}.left"].float() @ tensors[f"{name}.right"].float()
        assert torch.equal(values, tensor) and int(matrix.codes.abs().max()) < 2 ** (bits - 1)
    ranks = [kept["rank"] for kept in matrices.values()]
    assert ranks.count(2) == (4 if "--rank" in options else 0) and set(ranks) <= {0, 2}
    expected = sum(tensor.nbytes for tensor in tensors.values())
    codes = [(name, tensor) for name, tensor in tensors.items() if name.endswith(".codes")]
    expected -= sum(tensor.nbytes for _, tensor in codes)
    expected += sum(-(-t.numel() * matrices[name.removesuffix(".codes")]["bits"] // 8) for name, t in codes)
    assert result["tensor_bytes"] == expected and result["bytes_after"] < result["bytes_before"]
    assert result["bpb_before"] == _bpb(fusedlm, RUN) and result["bpb_after"] == _bpb(fusedlm, "small")
    assert 0 < abs(result["bpb_after"] - result["bpb_before"]) < 1
    assert fusedlm("generate", "small", "--prompt", "Doc", "--max-tokens", 5).code == 0
    rows = {row["name"]: row for row in result["matrices"]}
    assert len(rows) == len(matrices) and not Path("small/unfinished").exists()
    assert all((row["tokens"] > 0) == ("--calibrate" in options) for row in rows.values())


@pytest.mark.parametrize("format", ["mxfp4", "int4", "fp8", "int8"])
def test_packed_formats_are_compensated(fusedlm, workspace, format):
    results = {}
    for name, options in {"plain": [], "gptq": GPTQ, "lite": ["--calibrate", "gptq-lite", "--tokens", "320"]}.items():
        outcome = fusedlm("quantize", RUN, "--format", format, *options, "--out", name, "--json", "--no-score")
        assert (outcome.code, outcome.err) == (0, "")
        results[name] = json.loads(outcome.out)
        layers = quantized_layers(load(name)[0])
        assert {layer.format for layer in layers.values()} == {format} and len(layers) == len(results[name]["matrices"])
        assert fusedlm("eval", name).code == 0
    assert results["plain"]["bits_per_weight"] == results["gptq"]["bits_per_weight"]
    errors = {n: {r["name"]: r["output_error"] for r in results[n]["matrices"]} for n in ("gptq", "lite")}
    lower = [errors["gptq"][name] < errors["lite"][name] for name in errors["gptq"]]
    assert sum(lower) > 0.8 * len(lower)
    weight_errors = [sum(row["weight_error"] for row in results[name]["matrices"]) for name in ("plain", "gptq")]
    assert weight_errors[0] < weight_errors[1]  # compensation changes weights to keep outputs


def test_the_table_of_a_calibrated_run(fusedlm, workspace):
    outcome = fusedlm("quantize", RUN, "--format", "int3", *GPTQ, "--out", "small")
    *table, matrices, packed, disk, bits, following = outcome.out.splitlines()
    assert outcome.code == 0 and table[0].startswith("embedding ") and len(table) == 13
    assert all("% of the weight" in line and "% of the output" in line for line in table)
    assert matrices.startswith("13 matrices, ") and packed.startswith("all tensors, codes without gaps: ")


def test_a_budget_is_kept_to_the_byte(fusedlm, workspace):
    uniform = json.loads(fusedlm("quantize", RUN, "--format", "int4", "--storage", "integers", "--embedding", "int4",
                                 *GPTQ, "--out", "uniform", "--json").out)  # fmt: skip
    budget = uniform["tensor_bytes"]
    options = ["--format", "mixed", *GPTQ, "--rank", "1"]
    outcome = fusedlm("quantize", RUN, *options, "--budget", budget, "--out", "small", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    mixed = json.loads(outcome.out)
    assert budget - 40 < mixed["tensor_bytes"] <= budget == mixed["budget"]
    record = json.loads((FOLDER / "quantization.json").read_text())["matrices"]
    assert len({kept["bits"] for kept in record.values()}) > 1
    assert mixed["bpb_after"] == _bpb(fusedlm, "small")
    refused = fusedlm("quantize", RUN, *options, "--budget", 5000, "--out", "other")
    assert not Path("other").exists()
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "--budget 5000: the smallest widths take" in refused.err or "--budget 5000: the tensors" in refused.err


def test_a_budget_of_coded_bytes_is_that_of_the_packed_file(fusedlm, workspace):
    """But for header and tokenizer, which the estimate leaves out; scales are smaller than estimated."""
    options = ["--format", "coded", *GPTQ, "--no-score", "--budget", 9500]
    result = json.loads(fusedlm("quantize", RUN, *options, "--out", "small", "--json").out)
    assert 0.97 * 9500 < result["tensor_bytes"] <= 1.03 * 9500
    assert 5 < result["bits_per_weight"] < 6 and {row["format"] for row in result["matrices"]} == {"int8"}
    packed = json.loads(fusedlm("pack", "small", "--bytes", "20000", "--out", "small.flm", "--json").out)
    rows = {row["name"]: row for row in packed["tensors"] if row["shape"]}
    assert sum(row["bytes"] for row in rows.values()) == pytest.approx(result["tensor_bytes"], rel=0.12)
    stored = load("small", device="cpu")[0].state_dict()
    read = load("small.flm", device="cpu")[0].state_dict()
    assert all(torch.equal(stored[name], read[name]) for name, row in rows.items() if row["bits"] == 8)
    assert fusedlm("quantize", RUN, *options, "--out", "other").out.splitlines()[-3].startswith(
        f"all tensors, codes at their entropy: {result['tensor_bytes']:,} bytes of 9,500"
    )


def test_the_held_out_text_is_never_read(fusedlm, workspace, monkeypatch):
    """Codes are the same when all of it is other text of the same length."""
    assert fusedlm("quantize", RUN, "--format", "int3", *GPTQ, "--out", "small", "--no-score").code == 0
    seen = []
    from fusedlm.data.shards import TokenShards

    original = TokenShards.documents
    monkeypatch.setattr(TokenShards, "documents", lambda self: seen.append(self) or original(self))
    from fusedlm.data import samples

    read, opened = samples.Windows.read, []
    monkeypatch.setattr(samples.Windows, "read", lambda self, *a: opened.append(self) or read(self, *a))
    from fusedlm.quant import calibration

    shards = []
    batches = calibration.calibration_batches
    monkeypatch.setattr(
        calibration, "calibration_batches", lambda given, *a, **k: shards.append(given) or batches(given, *a, **k)
    )
    assert fusedlm("quantize", RUN, "--format", "int3", *GPTQ, "--out", "again", "--no-score").code == 0
    assert not seen and opened and len(shards) == 1
    manifest = json.loads(next(Path("prepared").rglob("manifest.json")).read_text())
    assert shards[0].n_tokens == manifest["splits"]["train"]["tokens"]
    tensors = [load_file(Path(name, "checkpoints/step-00000002/model.safetensors")) for name in ("small", "again")]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    other = [*GPTQ, "--seed", "1"]
    assert fusedlm("quantize", RUN, "--format", "int3", *other, "--out", "other", "--no-score").code == 0
    changed = load_file("other/checkpoints/step-00000002/model.safetensors")
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in tensors[0].items())


def test_a_killed_command_goes_on(fusedlm, workspace):
    arguments = ["quantize", RUN, "--format", "int3", *GPTQ, "--no-score"]
    assert fusedlm(*arguments, "--out", "straight").code == 0
    killing = (
        "import os, signal, sys\n"
        "from fusedlm.quant import unfinished\n"
        "save, saved = unfinished.UnfinishedFolder.save, []\n"
        "def killing(self, name, outcome):\n"
        "    save(self, name, outcome)\n"
        "    saved.append(name)\n"
        "    if len(saved) == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "unfinished.UnfinishedFolder.save = killing\n"
        "from fusedlm.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", killing, *arguments, "--out", "small"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(Path("small/unfinished").glob("*.safetensors"))) == 6 and not Path("small/checkpoints").exists()
    refused = fusedlm("quantize", RUN, "--format", "int4", "--storage", "integers", *GPTQ, "--out", "small")
    assert refused.code == 2 and "holds an unfinished quantisation with other settings" in refused.err
    assert fusedlm(*arguments, "--out", "small").code == 0 and not Path("small/unfinished").exists()
    files = [Path(name, "checkpoints/step-00000002/model.safetensors").read_bytes() for name in ("straight", "small")]
    assert files[0] == files[1]


@pytest.fixture
def small(fusedlm, workspace) -> Path:
    assert fusedlm("quantize", RUN, "--format", "int3", "--out", "small", "--no-score").code == 0
    return Path("small")


OUT = "blocks.0.mixer.out.weight"


def _forge(change, tensors=None) -> None:
    """Rewrite the record, or the tensors, with a manifest that agrees."""
    from safetensors.torch import save_file

    record = json.loads((FOLDER / "quantization.json").read_text())
    stored = load_file(FOLDER / "model.safetensors")
    change(record["matrices"], stored)
    (FOLDER / "quantization.json").write_text(json.dumps(record))
    save_file(stored, FOLDER / "model.safetensors")
    (FOLDER / "manifest.json").unlink()
    Checkpoints._seal(FOLDER, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, t: m.update({"head": m[OUT]}), "matrix 'head' is no parameter of the model"),
        (lambda m, t: m[OUT].update(bits=9), "bits=9 must be 2 to 8"),
        (lambda m, t: m[OUT].update(bits=True), "bits=True must be 2 to 8"),
        (lambda m, t: m[OUT].update(group=0), "group=0 must be at least 1"),
        (lambda m, t: m[OUT].update(group=8), "scales' has shape (16, 1), not (16, 2)"),
        (lambda m, t: m[OUT].update(bits=2), "a code is not from -1 to 1"),
        (lambda m, t: m[OUT].pop("rank"), "not what was written"),
        (lambda m, t: m[OUT].update(rank=2), "not what was written"),
        (lambda m, t: m.pop(OUT), f"'{OUT}' is in only one"),
        (lambda m, t: t.update({f"{OUT}.codes": t[f"{OUT}.codes"][:3]}), "codes' has shape (3, 16), not (16, 16)"),
        (lambda m, t: t.update({f"{OUT}.codes": t[f"{OUT}.codes"].float()}), "codes are torch.float32"),
    ],
)
def test_a_forged_record_is_refused(fusedlm, small, change, words):
    _forge(change)
    outcome = fusedlm("eval", small, "--text", "text.txt")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err
    assert str(FOLDER) in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "int1"], "--format 'int1' must be one of mxfp4,"),
        (["--format", "int3", "--storage", "packed"], "--storage packed: int3 is stored as integers only"),
        (["--format", "fp8", "--storage", "integers"], "--storage integers: fp8 has no integers"),
        (["--format", "int4", "--storage", "cubes"], "--storage 'cubes' must be packed or integers"),
        (["--format", "int4", "--embedding", "int8"], "--embedding int8: packed int4 has none; add --storage integers"),
        (["--format", "int4", *GPTQ, "--clip", "3"], "--clip 3: packed formats have no such scales"),
        (["--format", "int4", *GPTQ, "--rank", "2"], "--rank 2: packed int4 has none; add --storage integers"),
        (["--format", "int3", "--group", "0"], "--group 0 must be at least 1"),
        (["--format", "int3", "--embedding", "fp8"], "--embedding 'fp8' must be none, int2, int3"),
        (["--format", "int3", "--clip", "best"], "--clip 'best' must be max, search or a number"),
        (["--format", "int3", "--clip", "search"], "--clip 'search' needs the inputs of layers"),
        (["--format", "int3", "--clip", "-1"], "--clip -1.0 must be greater than 0"),
        (["--format", "int3", "--calibrate", "awq"], "--calibrate 'awq' must be one of plain, gptq-lite, gptq"),
        (["--format", "int3", "--calibrate", "gptq-lite", "--clip", "max"], "gptq-lite is the search of clips"),
        (["--format", "int3", *GPTQ, "--damping", "-1"], "--damping -1.0 must be from 0"),
        (["--format", "int3", "--rank", "2"], "--rank 2: estimates errors of outputs; add --calibrate gptq"),
        (["--format", "int3", *GPTQ, "--rank", "-1"], "--rank -1: must be from 0 to 1024"),
        (["--format", "int3", *GPTQ, "--corrected", "0"], "--corrected 0: must be at least 1"),
        (["--format", "int3", *GPTQ, "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--format", "int3", *GPTQ, "--seed", "-1"], "--seed -1: must be from 0"),
        (["--format", "int3", "--tokens", "64"], "--tokens: only for calibration"),
        (["--format", "mixed", *GPTQ], "--budget None: formats mixed and coded need a budget"),
        (["--format", "int3", *GPTQ, "--budget", "9"], "--budget 9: formats mixed and coded need a budget, and others"),
        (["--format", "coded", *GPTQ], "--budget None: formats mixed and coded need a budget"),
        (["--format", "coded", "--budget", "9"], "--budget 9: estimates errors of outputs; add --calibrate gptq"),
        (["--format", "coded", *GPTQ, "--budget", "9", "--clip", "3"], "--clip 3.0: of format coded the budget"),
        (["--format", "coded", *GPTQ, "--budget", "9", "--rank", "1"], "--rank 1: format coded has no corrections"),
        (["--format", "mixed", "--budget", "9999"], "--budget 9999: estimates errors of outputs; add --calibrate"),
        (["--format", "mixed", *GPTQ, "--budget", "0"], "--budget 0: must be a positive number of bytes"),
        (
            ["--format", "mixed", *GPTQ, "--budget", "9", "--embedding", "int8"],
            "the budget chooses the width of embedd",
        ),
    ],
)
def test_refusals_are_one_line(fusedlm, finished, monkeypatch, options, words):
    monkeypatch.chdir(finished)
    outcome = fusedlm("quantize", RUN, *options, "--out", "x")
    assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1 and words in outcome.err, outcome.err
    assert not Path("x").exists()


def test_integer_runs_are_neither_quantised_again_nor_trained(fusedlm, small):
    for arguments in (
        ["quantize", small, "--format", "int2", "--out", "x"],
        ["train", "small.yaml", "--out", small, "--resume"],
        ["export", small, "x"],
    ):
        outcome = fusedlm(*arguments)
        assert outcome.code == 2 and "quantised" in outcome.err and outcome.err.count("\n") == 1


def test_the_training_text_must_be_there(fusedlm, workspace):
    shutil.rmtree("prepared")
    Path("text.txt").unlink()
    outcome = fusedlm("quantize", RUN, "--format", "int3", *GPTQ, "--out", "x", "--no-score")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not Path("x").exists()


def test_experts_are_quantised_one_by_one(fusedlm, workspace):
    experts = "model.blocks.g.ffn={type: moe, n_experts: 4, top_k: 2, hidden: 8}"
    assert fusedlm("train", "small.yaml", experts, "--out", "moe").code == 0
    outcome = fusedlm("quantize", "moe", "--format", "int4", "--storage", "integers", *GPTQ, "--out", "small", "--json")
    rows = {row["name"]: row for row in json.loads(outcome.out)["matrices"]}
    assert (
        rows["blocks.0.ffn.experts.up"]["tokens"] == 640 and rows["blocks.0.ffn.experts.up"]["elements"] == 4 * 16 * 16
    )
    assert load("small")[0].blocks[0].ffn.experts.up.shape == (4, 16, 16)
    assert fusedlm("eval", "small").code == 0
