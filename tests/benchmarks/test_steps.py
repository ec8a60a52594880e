"""benchmarks/train_step.py and optimizer_step.py on a small recipe, and which variants end_to_end.py measures."""

from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, optimizer_step, train_step
from fusedlm import load_recipe

GPT = Path(__file__).parents[2] / "recipes/gpt-350m.yaml"
TINY = [
    "model.dim=32", "model.n_layers=1", "model.blocks.a.mixer.n_heads=2", "train.seq_len=8", "train.batch_size=4",
    "train.micro_batch_size=2", "runtime.device=cpu", "runtime.compile=false",
]  # fmt: skip


def _measure(*overrides, mean_document=None):
    recipe = load_recipe(GPT, [*TINY, *overrides])
    return train_step.measure(recipe, vocab_size=61, mean_document=mean_document, repeats=1, profiled=False)


@pytest.mark.parametrize("mean_document", [None, 3])
def test_a_step_is_measured_by_its_parts(mean_document):
    found = _measure("runtime.backends.attention=reference", "runtime.dtype=float32", mean_document=mean_document)
    step = 2 * found["micro_batch_seconds"] + found["optimizer_seconds"]
    assert found["tokens_per_second"] == pytest.approx(4 * 8 / step)
    assert found["backends"]["a.attention"] == "reference" and found["backends"]["a.relu2_mlp"] == "reference"
    assert found["mfu"] is None and found["peak_memory_gib"] is None


def test_what_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="runtime.cuda_graph=true: needs a CUDA device, not cpu"):
        _measure("runtime.cuda_graph=true")
    with pytest.raises(ValueError, match="runtime.cuda_graph=true: does not go with --documents"):
        _measure("runtime.cuda_graph=true", mean_document=8)
    with pytest.raises(ValueError, match="cudnn.*needs a CUDA device, not cpu"):
        _measure("runtime.backends.attention=cudnn")


def test_variants_switch_single_ops_and_keep_the_better_turn(monkeypatch):
    """On a stand-in for the measurement that gets slower with every call."""
    measured = []

    def measure(recipe, *, profiled, **_):
        named = recipe.runtime.backends
        measured.append((named, profiled))
        backends = {"a.q_rmsnorm_linear": "reference", "a.rmsnorm_linear": "reference", "a.relu2_mlp": "triton"}
        result = {"tokens_per_second": 100.0 - len(measured), "peak_memory_gib": None, "backends": backends}
        return result | ({"profile": len(measured)} if profiled else {})

    monkeypatch.setattr(end_to_end, "measure", measure)
    ops = ["rmsnorm_linear", "relu2_mlp", "swiglu_mlp"]
    found = end_to_end.measure_case("gpt", GPT, 61, TINY, ops, turns=2, profiled=("fused",))
    assert list(found) == ["fused", "reference", "with rmsnorm_linear", "relu2_mlp by reference"]
    reference = dict.fromkeys(end_to_end.FUSED, "reference")
    variants = [{}, reference, {"rmsnorm_linear": "auto"}, {"relu2_mlp": "reference"}]
    assert [named for named, _ in measured] == [*variants, *reversed(variants)]
    assert [profiled for _, profiled in measured] == [True] + 7 * [False]
    assert [result["tokens_per_second"] for result in found.values()] == [99, 98, 97, 96], "of the first turn"
    assert found["fused"]["profile"] == 1 and "profile" not in found["reference"]


def test_optimizer_steps_are_measured_beside_their_floors():
    recipe, cpu = load_recipe(GPT, TINY), torch.device("cpu")
    found = optimizer_step.measure(recipe, cpu, torch.float32, optimizer_step.CONTENDERS, vocab_size=61, repeats=1)
    assert [case["optimizer"] for case in found["cases"]] == list(optimizer_step.CONTENDERS)
    adamw, torch_muon, muon, normuon, turbo = found["cases"]
    total, hidden = found["parameters"], found["matrix_parameters"]
    assert 0 < hidden < total and adamw["bytes"] == 28 * total and adamw["flops"] == 0
    # One state less, the update four times in two bytes; NorMuon has a float of each row.
    assert muon["bytes"] == torch_muon["bytes"] == 28 * total
    assert 0 < normuon["bytes"] - muon["bytes"] < 8 * hidden / 16
    assert muon["flops"] == torch_muon["flops"] == normuon["flops"] > 0
    assert 0.5 < turbo["flops"] / normuon["flops"] < 0.9, "four polynomials for five"
    for case in found["cases"]:
        assert case["milliseconds"] >= case["host_milliseconds"] > 0 and case["floor_milliseconds"] > 0
        assert case["graph_milliseconds"] is None and "needs a CUDA device" in case["graph_reason"]
