"""fusedlm eval of a model whose layers report metrics."""

import json

import pytest


def test_eval_prints_the_metrics_of_layers(workspace, fusedlm):
    ffn = "{type: routed, hidden: 64, budget: 0.5}"
    trained = fusedlm("train", "small.yaml", f"model.blocks.m.ffn={ffn}", "--out", "runs/routed")
    assert trained.code == 0, trained.err
    result = json.loads(fusedlm("eval", "runs/routed", "--json").out)
    (layer,) = result["routed_layers"]
    assert layer == [result[f"routed_{level}"] for level in ("light", "blend", "full")]
    assert sum(layer) == pytest.approx(1)
    assert 0.25 < result["routed_flops_share"] < 2 and result["routed_budget"] == 0.5
    said = fusedlm("eval", "runs/routed").out
    assert f"routed_flops_share: {result['routed_flops_share']:.4g}\nrouted_budget: 0.5\n" in said
    assert f"routed_layers 0: {layer[0]:.4g} {layer[1]:.4g} {layer[2]:.4g}\n" in said
    assert "routed" not in fusedlm("eval", "runs/small", "--json").out
    assert "routed" not in fusedlm("eval", "runs/small").out
