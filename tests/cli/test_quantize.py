"""fusedlm quantize: the run that it writes, its figures, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedlm import load
from fusedlm.nn.quantized import hidden_matrices, hidden_weights, quantized_layers, quantized_weights
from fusedlm.ops import dequantize_weight, quantize_weight
from fusedlm.testing import assert_close

RUN = "runs/small"
OUT = "blocks.0.mixer.out"
FORMATS = [("mxfp4", []), ("int4", ["--group", "32"]), ("fp8", []), ("int8", [])]


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_the_quantised_run_is_read_as_any_other(fusedlm, workspace, format, options):
    outcome = fusedlm("quantize", RUN, "--format", format, *options, "--out", "small", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    model, tokenizer, recipe = load("small")
    source, _, source_recipe = load(RUN)
    assert recipe == source_recipe
    expected = hidden_matrices(source)
    layers = quantized_layers(model)
    assert layers.keys() == expected.keys() and not hidden_matrices(model)
    for name, layer in layers.items():
        group = 32 if format == "int4" else None
        value = dequantize_weight(quantize_weight(expected[name].weight, format, group), torch.float64)
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        assert_close(layer(x), x @ value.T, 1e-14)
    others = {
        name: tensor for name, tensor in source.state_dict().items() if name.removesuffix(".weight") not in expected
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())

    assert result["bytes_after"] == next(Path("small").rglob("model.safetensors")).stat().st_size
    assert result["bytes_before"] == Path(RUN, "checkpoints/step-00000002/model.safetensors").stat().st_size
    assert result["bytes_after"] < result["bytes_before"] and result["layers"] == len(layers)
    stored = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers.values())
    weights = sum(layer.weight.numel() for layer in expected.values())
    assert (result["quantized_weights"], result["bits_per_weight"]) == (weights, 8 * stored / weights)
    before = json.loads(fusedlm("eval", RUN, "--json").out)
    after = json.loads(fusedlm("eval", "small", "--json").out)
    assert (result["bpb_before"], result["bpb_after"]) == (before["bpb"], after["bpb"])
    assert 0 < abs(after["bpb"] - before["bpb"]) < 0.1
    generated = fusedlm("generate", "small", "--prompt", "Doc", "--max-tokens", 5)
    assert (generated.code, generated.err) == (0, "") and generated.out


def test_the_figures_are_shown(fusedlm, workspace):
    outcome = fusedlm("quantize", RUN, "--format", "int4", "--out", "small", "--text", "text.txt", "--window", 8)
    *table, layers, size, bits, following = outcome.out.splitlines()
    assert len(table) == 12 and table[0].startswith("blocks.0.mixer.qkv    int4 in groups of 64  error   8.")
    assert all(line.endswith("% of the weight") for line in table)
    assert outcome.code == 0 and layers.startswith("12 layers, ") and ": int4 in groups of 64, " in layers
    assert layers.endswith(" bits per weight") and size.startswith("model on disk: ")
    assert bits.startswith("bits per byte: ") and following == "next: fusedlm eval small"


def test_without_scoring_no_text_is_needed(fusedlm, workspace):
    shutil.rmtree("prepared")
    Path("text.txt").unlink()
    outcome = fusedlm("quantize", RUN, "--format", "fp8", "--out", "small", "--no-score")
    assert outcome.code == 0 and "bits per byte" not in outcome.out
    refused = fusedlm("quantize", RUN, "--format", "fp8", "--out", "other")
    assert refused.code == 2 and not Path("other").exists()


@pytest.fixture
def small(fusedlm, workspace) -> Path:
    assert fusedlm("quantize", RUN, "--format", "int4", "--out", "small", "--no-score").code == 0
    return Path("small")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "quantization.json", "state.json", "recipe.yaml", "manifest.json"]
)
def test_a_damaged_file_is_named(fusedlm, small, name):
    path = small / "checkpoints/step-00000002" / name
    original = path.read_bytes()
    content = bytearray(original)
    content[len(content) // 2] ^= 1
    for damaged in (content, original + b" "):  # the second is still JSON
        path.write_bytes(damaged)
        for command in (["eval", small], ["generate", small, "--prompt", "a"]):
            outcome = fusedlm(*command)
            assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1
            assert str(path) in outcome.err
    path.unlink()
    assert str(path) in fusedlm("eval", small).err


def _forge(small: Path, change) -> None:
    """Rewrite quantization.json, with a manifest that agrees."""
    from fusedlm.runs.checkpoint import Checkpoints

    folder = small / "checkpoints/step-00000002"
    record = json.loads((folder / "quantization.json").read_text())
    change(record)
    (folder / "quantization.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    Checkpoints._seal(folder, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(version=4), "version 4, this one reads 1 to 3; quantise the run again"),
        (lambda r: r.pop("layers"), "not what was written"),
        (lambda r: r.update(layers=[1]), "not what was written"),
        (lambda r: r["layers"].update({"head": {"format": "int8", "group": 0}}), "layer 'head' is no hidden matrix"),
        (lambda r: r["layers"].update({OUT: {"format": "int2", "group": 0}}), "format='int2' must be"),
        (lambda r: r["layers"].update({OUT: {"format": "fp8", "group": 9}}), "fp8 has no groups of 9"),
        (lambda r: r["layers"].update({OUT: {"format": "int4"}}), "not what was written"),
        (
            lambda r: r["layers"].update({OUT: {"format": "fp8", "group": 0}}),
            "tensor 'blocks.0.mixer.out.codes' has shape (16, 32)",
        ),
        (lambda r: r["layers"].pop(OUT), "'blocks.0.mixer.out.codes' is in only one"),
    ],
)
def test_a_forged_record_is_refused(fusedlm, small, change, words):
    _forge(small, change)
    outcome = fusedlm("eval", small, "--text", "text.txt")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err
    assert str(small / "checkpoints/step-00000002") in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/none", "--format", "fp8", "--out", "x"], "runs/none holds no run"),
        ([RUN, "--out", "x"], "Missing option '--format'"),
        ([RUN, "--format", "fp8"], "Missing option '--out'"),
        ([RUN, "--format", "fp4", "--out", "x"], "--format 'fp4' must be one of mxfp4, int4, fp8, int8, int2"),
        ([RUN, "--format", "int4", "--group", "16", "--out", "x"], "--group 16 must be one of 32, 64, 128"),
        ([RUN, "--format", "fp8", "--group", "32", "--out", "x"], "--group 32: only int4 has groups to choose, fp8"),
        ([RUN, "--format", "fp8", "--out", RUN], f"--out {RUN} already holds a run; name another folder"),
        ([RUN, "--format", "fp8", "--out", "text.txt"], "--out text.txt is a file; name a folder"),
        ([RUN, "--format", "fp8", "--out", "x", "--weights", "ema"], "has no ema weights"),
        ([RUN, "--format", "fp8", "--out", "x", "--no-score", "--window", "8"], "--window: only for scoring"),
        ([RUN, "--format", "fp8", "--out", "x", "--text", "a", "--data", "b"], "give only one of them"),
        (["small", "--format", "fp8", "--out", "x"], "small is quantised already; quantise the run that it is from"),
    ],
)
def test_refusals_are_one_line(fusedlm, small, arguments, words):
    outcome = fusedlm("quantize", *arguments)
    assert (outcome.code, outcome.out) == (2, "") and outcome.err.count("\n") == 1 and words in outcome.err
    assert not Path("x").exists()


def test_weights_that_are_not_finite_are_named(fusedlm, workspace):
    from fusedlm.runs.checkpoint import Checkpoints

    folder = Path(RUN, "checkpoints/step-00000002")
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.ffn.up.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    (folder / "manifest.json").unlink()
    Checkpoints._seal(folder, {})
    outcome = fusedlm("quantize", RUN, "--format", "fp8", "--out", "x", "--no-score")
    assert outcome.code == 2 and "blocks.0.ffn.up: weight has NaN or infinity" in outcome.err
    assert outcome.err.count("\n") == 1 and not Path("x").exists()


def test_a_quantised_run_is_not_trained(fusedlm, small):
    outcome = fusedlm("train", "small.yaml", "--out", small, "--resume")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "run small has quantised weights, which are not trained" in outcome.err
    assert fusedlm("eval", small, "--weights", "ema").code == 2
    assert "no validated checkpoint yet" in fusedlm("eval", small, "--checkpoint", "best").err


@pytest.fixture
def mixture(fusedlm, workspace) -> Path:
    experts = "model.blocks.g.ffn={type: moe, n_experts: 4, top_k: 2, hidden: 8}"
    assert fusedlm("train", "small.yaml", experts, "--out", "moe").code == 0
    return Path("moe")


def _stacks(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in hidden_weights(model).items() if parameter.ndim == 3}


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_experts_are_loaded_as_codes(fusedlm, mixture, format, options):
    outcome = fusedlm("quantize", mixture, "--format", format, *options, "--out", "small", "--no-score", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    expected, model = _stacks(load(mixture)[0]), load("small")[0]
    found = quantized_weights(model)
    assert not hidden_weights(model) and expected and not any(p.ndim == 3 for p in model.parameters())
    for name, weight in expected.items():
        own = quantize_weight(weight.flatten(0, 1), format, 32 if format == "int4" else None)
        assert torch.equal(found[name].codes, own.codes) and torch.equal(found[name].scales, own.scales)
    result = json.loads(outcome.out)
    assert result["expert_weights"] == sum(weight.numel() for weight in expected.values()) == 1536
    assert result["expert_bytes"] == sum(found[name].nbytes for name in expected)
    record = json.loads(next(Path("small").rglob("quantization.json")).read_text())
    assert record["version"] == 3 and record["layers"].keys() == found.keys()


def test_calibrated_experts_compute_with_the_codes_that_were_written(fusedlm, mixture):
    """After GPTQ the run scores as it did in memory; its stored values are those that the layers multiply with."""
    options = ["--calibrate", "gptq", "--tokens", "64"]
    outcome = fusedlm("quantize", mixture, "--format", "int4", *options, "--out", "small", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(fusedlm("eval", "small", "--json").out)["bpb"] == json.loads(outcome.out)["bpb_after"]
    source, model = load(mixture)[0], load("small")[0]
    plain = {name: quantize_weight(p.flatten(0, 1), "int4") for name, p in _stacks(source).items()}
    stored = quantized_weights(model)
    assert any(not torch.equal(stored[name].codes, weight.codes) for name, weight in plain.items())
    for name, parameter in hidden_weights(source).items():
        parameter.data = dequantize_weight(stored[name]).view_as(parameter)
    tokens = torch.arange(12)[None] % 7
    with torch.no_grad():
        assert_close(model(tokens).logits, source(tokens).logits, 1e-6)
    generated = fusedlm("generate", "small", "--prompt", "Doc", "--max-tokens", 5)
    assert (generated.code, generated.err) == (0, "") and generated.out


def test_what_experts_take_is_shown(fusedlm, mixture):
    outcome = fusedlm("quantize", mixture, "--format", "int8", "--out", "small", "--no-score")
    shown = "of these, experts: 1.54 k weights in 2.5 KiB of codes and scales, 6 KiB in float32"
    assert outcome.out.splitlines()[-3] == shown
    refused = fusedlm("pack", "small", "--bytes", 100000, "--out", "small.flm")
    assert refused.code == 2 and refused.err.count("\n") == 1 and "is in int8; quantise the run" in refused.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layers, name: layers.pop(name), "experts: only down is quantised; the experts need both up and down"),
        (lambda layers, name: layers[name].update(group=9), "int8 has no groups of 9"),
        (lambda layers, name: layers.update({name + "s": layers.pop(name)}), "experts.ups' is no hidden matrix"),
    ],
)
def test_a_forged_record_of_experts_is_refused(fusedlm, mixture, change, words):
    assert fusedlm("quantize", mixture, "--format", "int8", "--out", "small", "--no-score").code == 0
    folder = Path("small")
    record = json.loads(next(folder.rglob("quantization.json")).read_text())
    name = next(name for name in record["layers"] if name.endswith("experts.up"))
    _forge(folder, lambda record: change(record["layers"], name))
    outcome = fusedlm("eval", folder, "--text", "text.txt")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err


def test_a_run_whose_experts_are_floats_is_still_read(fusedlm, mixture):
    """As runs were written before experts had codes."""
    source = load(mixture)[0]
    assert fusedlm("quantize", mixture, "--format", "int8", "--out", "small", "--no-score").code == 0
    model = load("small")[0]
    stacks = quantized_weights(model).keys() & _stacks(source).keys()
    path = next(Path("small").rglob("model.safetensors"))
    tensors = load_file(path)
    for name in stacks:
        del tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        tensors[name] = _stacks(source)[name].detach()
    save_file(tensors, path)

    def earlier(record):
        record["version"] = 1
        for name in stacks:
            del record["layers"][name]

    _forge(Path("small"), earlier)
    found = load("small")[0]
    for name, weight in _stacks(source).items():
        assert torch.equal(_stacks(found)[name], weight)
