"""Mixtures of experts with weights in few bits: codes stay as they are, and layers compute with their values."""

import copy

import pytest
import torch

from fusedlm.model.accounting import count_parameters
from fusedlm.model.cast_weights import CastWeights
from fusedlm.model.memory import quantized_bytes
from fusedlm.nn.ffn.divided_experts import DividedExperts
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.quantized import (
    QuantizedExperts,
    decode_layers,
    empty_weight,
    hidden_weights,
    quantized_weights,
    replace_layers,
)
from fusedlm.ops import dequantize_weight, quantize_weight, routed_experts
from fusedlm.ops.common.dispatch import recorded
from fusedlm.ops.quantized.reference import WEIGHT_FORMATS
from fusedlm.quant.rounding import round_weights
from fusedlm.testing import MIXER_CASES, assert_close, part_model, randomise_

ATTENTION = MIXER_CASES["attention"][1]
MOE = "{type: moe, n_experts: 6, top_k: 2, hidden: 40, activation: ACTIVATION}"
UP, DOWN = "blocks.0.ffn.experts.up", "blocks.0.ffn.experts.down"


def _model(activation="swiglu"):
    return randomise_(part_model(ATTENTION, MOE.replace("ACTIVATION", activation))).eval()


def _tokens(batch=2, n=9):
    return torch.randint(61, (batch, n), generator=torch.Generator().manual_seed(0))


def _quantised(model, format, group=None):
    model = copy.deepcopy(model)
    replace_layers(model, round_weights(model, format, group))
    return model


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_experts_compute_with_the_values_of_their_codes(format, activation):
    experts = Experts(dim=48, hidden=40, n_experts=5, activation=activation, slope=0.3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    up, down = (quantize_weight(p.flatten(0, 1), format) for p in (experts.up, experts.down))
    quantised = QuantizedExperts(experts, up, down).double()
    x, weights = torch.randn(7, 48, dtype=torch.float64, requires_grad=True), torch.rand(7, 3, dtype=torch.float64)
    indices = torch.rand(7, 5).argsort(-1)[:, :3]
    values = (dequantize_weight(w, torch.float64).view_as(p) for w, p in ((up, experts.up), (down, experts.down)))
    y = routed_experts(x, *values, indices, weights, activation=activation, slope=0.3)
    found = quantised(x, indices, weights)
    assert_close(found, y, 1e-14)
    assert_close(*(torch.autograd.grad(a.square().sum(), x)[0] for a in (found, y)), 1e-13)
    assert quantised.flops(7) == experts.flops(7) and quantised.saved_elements() == experts.saved_elements()
    assert not list(quantised.parameters())


def test_codes_stay_when_the_model_is_cast_or_moved():
    model = _model()
    quantised = _quantised(model, "int4", 32)
    expected = {name: quantize_weight(p.flatten(0, -2), "int4", 32) for name, p in hidden_weights(model).items()}
    assert {UP, DOWN} < expected.keys()
    for dtype in (torch.bfloat16, torch.float64):
        found = quantized_weights(quantised.to(dtype))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name].codes, weight.codes) and torch.equal(found[name].scales, weight.scales)
            assert (found[name].codes.dtype, found[name].scales.dtype) == (torch.uint8, torch.bfloat16)
    assert quantised.to("meta").get_submodule(UP).codes.is_meta


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_the_planned_size_is_that_of_the_tensors(format):
    model = _model()
    planned = quantized_bytes(copy.deepcopy(model).to("meta"), format)
    # Balance biases and loads are buffers that a plan does not count.
    fixed = sum(buffer.nbytes for buffer in model.buffers())
    quantised = _quantised(model, format)
    live = {id(tensor): tensor.nbytes for tensor in (*quantised.parameters(), *quantised.buffers())}
    assert planned == sum(live.values()) - fixed


def test_parameters_are_counted_without_codes():
    quantised = _quantised(_model(), "int8")
    found = count_parameters(quantised)
    assert found.total == found.active == sum(p.numel() for p in quantised.parameters())


def test_the_op_that_runs_is_shown_and_can_be_chosen():
    quantised = _quantised(_model(), "mxfp4")
    with recorded() as found, torch.no_grad():
        quantised(_tokens())
    names = {op for op, _, _ in found}
    shown = {choice.op for choice in quantised.explain("cpu", torch.float32).values()}
    assert "quantized_experts" in names & shown and "routed_experts" not in names | shown
    quantised.use_backends({"quantized_experts": "triton"})
    with pytest.raises(ValueError, match="op quantized_experts: backend 'triton' cannot run: needs a CUDA device"):
        quantised(_tokens())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_waits_for_the_device_where_its_experts_run_one_by_one(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for model, waits in ((_model(), False), (_quantised(_model(), "int8"), dtype == torch.float16)):
        assert model.blocks[0].ffn.waits_for_device(torch.device("cuda"), dtype) == waits


def test_autocast_and_cast_weights_leave_codes():
    """As decoding runs on a GPU."""
    model = _model()
    quantised = _quantised(model, "int4")
    for name, parameter in hidden_weights(model).items():
        parameter.data = dequantize_weight(quantized_weights(quantised)[name]).view_as(parameter)
    results = []
    for m in (quantised, model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastWeights(m, torch.bfloat16).in_use():
            results.append(m(_tokens()).logits.float())
    assert_close(results[0], results[1], 1e-6)


def test_a_block_compiles_as_one_graph():
    quantised = _quantised(_model(), "mxfp4")
    with torch.no_grad():
        expected = quantised(_tokens()).logits
        for block in quantised.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert_close(quantised(_tokens()).logits, expected, 1e-6)


def test_layers_and_experts_are_decoded_for_who_needs_floats():
    model = _model()
    quantised, weights = _quantised(model, "fp8"), round_weights(model, "fp8")
    decode_layers(quantised)
    assert not quantized_weights(quantised) and quantised.state_dict().keys() == model.state_dict().keys()
    found = hidden_weights(quantised)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[name], dequantize_weight(weight).view_as(found[name]))
    assert quantised.blocks[0].ffn.experts.training is False


def test_refusals():
    model = _model()
    weights = round_weights(model, "int8")
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.experts: only up is quantised; the experts need both"):
        replace_layers(model, {UP: weights[UP]})
    with pytest.raises(ValueError, match=r"up of shape \(\d+, \d+\) does not fit 6 experts of"):
        replace_layers(model, {UP: weights[DOWN], DOWN: weights[DOWN]})
    assert type(model.blocks[0].ffn.experts) is Experts
    replace_layers(model, weights)
    with pytest.raises(ValueError, match="the model is quantised already"):
        round_weights(model, "int8")
    with pytest.raises(ValueError, match="experts in few bits run on one device"):
        DividedExperts(model.blocks[0].ffn.experts, None)
    with pytest.raises(ValueError, match="format='int3' must be one of"):
        empty_weight(torch.empty(2, 3, 4), "int3", None)
