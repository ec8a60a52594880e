"""The estimate of activations, against peaks that were recorded on a GPU and against saved tensors."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.lengths import mixers
from fusedlm.config import load_recipe
from fusedlm.model import build_model
from fusedlm.model.memory import activation_bytes, weight_copy_bytes
from fusedlm.testing import FFN_CASES, MIXER_CASES, NO_FFN, part_model

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks/results"
MOMENTS, BARE = 16, 8  # bytes per parameter of weights, gradients and AdamW; without the moments


def _steps(record):
    return record["cases"][0]["ways"]["fused"]["peak_memory_gib"]


def _variant(name):
    return lambda record: record["variants"][name]["peak_memory_bytes"]["mean"] / 2**30


def _run(record):
    return record["peak_memory_gib"]


RECORDS = [
    ("gpt-350m", [], 50257, MOMENTS, "steps.json", _steps),
    ("hybrid-350m", [], 50257, MOMENTS, "hybrid-350m.json", _run),
    ("shakespeare", [], 257, MOMENTS + 4, "shakespeare.json", _run),
    ("kepler-14m", [], 257, MOMENTS, "experiments/kepler-14m.json", _variant("mha")),
    ("kepler-512", [], 257, MOMENTS, "experiments/kepler-512.json", _variant("mla")),
    ("kepler-wiki", [], 50257, BARE, "experiments/kepler-wiki.json", _variant("mla")),
]
RECORDS += [
    (name, [f"model.blocks.a.mixer.type={mixer}"], *rest, _variant(mixer))
    for name, mixer, *rest in [
        ("kepler-512", "cmd_mla", 257, MOMENTS, "experiments/kepler-512.json"),
        ("kepler-512", "diff_mla", 257, MOMENTS, "experiments/kepler-512.json"),
        ("kepler-wiki", "cmd_mla", 50257, BARE, "experiments/kepler-wiki.json"),
    ]
]


@pytest.mark.parametrize(("name", "overrides", "vocab_size", "per_parameter", "file", "peak"), RECORDS)
def test_recorded_peaks(name, overrides, vocab_size, per_parameter, file, peak):
    recipe = load_recipe(REPOSITORY / f"recipes/{name}.yaml", overrides)
    model = build_model(recipe.model, vocab_size=vocab_size, device="meta")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_tokens = (recipe.train.micro_batch_size or recipe.train.batch_size) * recipe.train.seq_len
    estimate = per_parameter * n_parameters + weight_copy_bytes(model, torch.bfloat16)
    estimate += activation_bytes(model, n_tokens, torch.bfloat16, recipe.runtime.recompute)
    measured = peak(json.loads((RESULTS / file).read_text()))
    assert estimate / 2**30 == pytest.approx(measured, rel=0.11)


@pytest.mark.parametrize("file", sorted((RESULTS / "lengths").glob("*350m*.json")), ids=lambda file: file.stem)
def test_recorded_peaks_of_every_mixer(file):
    record = json.loads(file.read_text())
    for row in record["rows"]:
        mixer = [f"model.blocks.a.mixer={json.dumps(mixers(1024)[row['mixer']])}"] if row["mixer"] != "recipe" else []
        recipe = load_recipe(REPOSITORY / f"recipes/{record['name']}.yaml", mixer)
        model = build_model(recipe.model, vocab_size=50257, device="meta")
        n_tokens, recompute = max(row["length"], record["tokens"]), row["recompute"]
        estimate = MOMENTS * row["parameters"] + weight_copy_bytes(model, torch.bfloat16)
        estimate += activation_bytes(model, n_tokens, torch.bfloat16, recompute)
        assert estimate / 2**30 == pytest.approx(row["peak_memory_gib"], rel=0.11), row


def _saved_bytes(model, n_tokens: int) -> int:
    """Bytes of the tensors that a pass saves for backward, parameters aside, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps the storage alive, so that its address is not used again

    tokens = torch.randint(61, (1, n_tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, targets=tokens).total()
    return sum(storages.values())


@pytest.mark.parametrize("mixer", [cases[0] for cases in MIXER_CASES.values()], ids=list(MIXER_CASES))
@pytest.mark.parametrize("ffn", [*(cases[0] for cases in FFN_CASES.values()), NO_FFN], ids=[*FFN_CASES, "none"])
def test_an_eager_pass_saves_at_least_half_and_at_most_four_times_the_estimate(mixer, ffn):
    model = part_model(mixer, ffn)
    saved = _saved_bytes(model, 512) - _saved_bytes(model, 256)  # without what does not grow with the tokens
    estimate = activation_bytes(model, 512, torch.float32) - activation_bytes(model, 256, torch.float32)
    assert estimate / 2 < saved < 4 * estimate


def test_recomputation():
    model = build_model(load_recipe(REPOSITORY / "recipes/fusion-1b.yaml").model, vocab_size=8192, device="meta")
    none, mixer, block = (activation_bytes(model, 1024, torch.bfloat16, what) for what in ("none", "mixer", "block"))
    assert block < mixer < none
    deeper = build_model(
        load_recipe(REPOSITORY / "recipes/fusion-1b.yaml", ["model.n_layers=24"]).model, vocab_size=8192, device="meta"
    )
    # The inputs of six more blocks.
    assert activation_bytes(deeper, 1024, torch.bfloat16, "block") - block == 6 * 1024 * model.dim * 2


def test_wider_dtypes():
    model = part_model("{type: gdn, n_heads: 2}")
    assert activation_bytes(model, 64, torch.bfloat16) < activation_bytes(model, 64, torch.float32)
    assert weight_copy_bytes(model, torch.float32) == 0
