"""fusedlm eval of a model with routed feed-forwards."""

import json

import pytest


def test_eval_of_a_routed_model_prints_its_routing(workspace, fusedlm):
    ffn = "{type: routed, hidden: 64, budget: 0.5}"
    trained = fusedlm("train", "small.yaml", f"model.blocks.m.ffn={ffn}", "--out", "runs/routed")
    assert trained.code == 0, trained.err
    result = json.loads(fusedlm("eval", "runs/routed", "--json").out)
    (layer,) = result["routed_layers"]
    assert layer == [result[f"routed_{level}"] for level in ("light", "blend", "full")]
    assert sum(layer) == pytest.approx(1)
    assert 0.25 < result["routed_flops_share"] < 2 and result["routed_budget"] == 0.5
    said = fusedlm("eval", "runs/routed").out
    assert f"{result['routed_flops_share']:.1%} of the full feed-forward FLOPs, measured (budget 50.0%)" in said
    assert f"routed layer 0: {layer[0]:.1%} light, {layer[1]:.1%} blended, {layer[2]:.1%} full" in said
    assert "routed" not in fusedlm("eval", "runs/small", "--json").out
    assert "full" not in fusedlm("eval", "runs/small").out
