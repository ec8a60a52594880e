"""Layers with quantised weights in every model: the products are those of the values that the codes stand for."""

import contextlib
import copy

import pytest
import torch

from fusedlm.config.train import AdamWConfig
from fusedlm.model.accounting import forward_flops
from fusedlm.model.cast_weights import CastWeights
from fusedlm.model.memory import quantized_bytes
from fusedlm.nn import quantized as quantized_module
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import roles
from fusedlm.nn.quantized import (
    QuantizedLinear,
    empty_weight,
    hidden_weights,
    quantized_layers,
    quantized_weights,
    replace_layers,
)
from fusedlm.ops import OPS, dequantize_weight
from fusedlm.ops.common.dispatch import recorded
from fusedlm.ops.quantized.reference import WEIGHT_FORMATS
from fusedlm.probes.training import fit
from fusedlm.quant.rounding import round_weights
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, backend_of, part_model, randomise_

ATTENTION = MIXER_CASES["attention"][1]
CASES = [(cases[1 % len(cases)], "{type: swiglu, hidden: 40}") for cases in MIXER_CASES.values()]
CASES += [(ATTENTION, cases[-1]) for cases in FFN_CASES.values()]


def _pair(mixer=ATTENTION, ffn="{type: relu2}", format="int8", extra=""):
    """A quantised model, and the same with the values of the quantised weights; float64."""
    model = randomise_(part_model(mixer, ffn, extra=extra)).eval()
    quantised, weights = copy.deepcopy(model), round_weights(model, format)
    replace_layers(quantised, weights)
    quantised, model = quantised.double(), model.double()
    for name, parameter in hidden_weights(model).items():
        parameter.data = dequantize_weight(weights[name], torch.float64).view_as(parameter)
    return quantised, model


def _tokens(batch=2, n=9):
    return torch.randint(61, (batch, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _decoded(model, n=9):
    """Logits of a prompt, of steps of one token with a growing state, and of one with a static state."""
    state, tokens = model.init_state(2), _tokens(n=n)
    logits = [model(tokens[:, : n - 3], state=state).logits]
    logits += [model(tokens[:, i : i + 1], state=state).logits for i in (n - 3, n - 2)]
    state.make_static(n + 1)
    return torch.cat([*logits, model(tokens[:, -1:], state=state).logits], 1)


@pytest.mark.parametrize(("mixer", "ffn"), CASES, ids=lambda case: case[7:].partition(",")[0].rstrip("}"))
@pytest.mark.parametrize("format", ["int4", "mxfp4"])
def test_a_quantised_model_computes_with_the_values_of_its_codes(mixer, ffn, format):
    quantised, model = _pair(mixer, ffn, format)
    assert quantized_weights(quantised).keys() == hidden_weights(model).keys() and not hidden_weights(quantised)
    expected = model(_tokens()).logits
    assert_close(quantised(_tokens()).logits, expected, 1e-12)
    assert_close(_decoded(quantised), _decoded(model), 1e-12)
    assert forward_flops(quantised, 9) == forward_flops(model, 9)


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_products_of_a_layer(format):
    """All rows, those of a split, groups of them, and the transpose."""
    layer = Linear(40, 24, splits={"a": 8, "b": 16})
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    parent = torch.nn.Sequential(layer)
    replace_layers(parent, round_weights(parent, format))
    quantised = parent[0].double()
    layer.weight.data = dequantize_weight(quantised.quantized_weight(), torch.float64)
    x, y = torch.randn(2, 3, 40, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    assert_close(quantised(x), layer(x), 1e-14)
    assert quantised(x[:0]).shape == (0, 3, 24)
    assert torch.equal(quantised.weight_of("b"), dequantize_weight(quantised.quantized_weight())[8:])
    for part in ("a", "b"):
        assert_close(quantised(x, part=part), layer(x, part=part), 1e-14)
    assert_close(quantised(y, part="b", transposed=True), layer(y, part="b", transposed=True), 1e-14)
    grouped = torch.randn(2, 4, 3, 40, dtype=torch.float64)
    assert_close(quantised(grouped, part="b", groups=4), layer(grouped, part="b", groups=4), 1e-14)
    assert quantised(x, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_other_roles_stay_as_they_are():
    quantised, _ = _pair(ATTENTION, "{type: routed}", extra="tie_embeddings: false")
    assert {role.kind for role in roles(quantised).values()} == {"embedding", "head", "router", "gain", "per_head"}
    assert type(quantised.blocks[0].ffn.router) is Linear


def test_codes_and_scales_keep_their_dtypes():
    layer = Linear(8, 4)
    torch.nn.init.normal_(layer.weight)
    parent = torch.nn.Sequential(layer)
    for format in WEIGHT_FORMATS:
        model = torch.nn.Sequential(layer)
        replace_layers(model, round_weights(parent, format))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for dtype in (torch.bfloat16, torch.float64):
            for name, tensor in model.to(dtype).state_dict().items():
                assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert model.to("meta")[0].codes.is_meta


def test_a_model_is_allocated_and_loaded_bit_for_bit():
    quantised, _ = _pair(format="fp8")
    meta = part_model(ATTENTION, "{type: relu2}").double().to("meta")
    replace_layers(meta, {name: empty_weight(weight, "fp8", None) for name, weight in hidden_weights(meta).items()})
    meta.to_empty(device="cpu").load_state_dict(quantised.state_dict())
    assert torch.equal(meta(_tokens()).logits, quantised(_tokens()).logits)


def test_the_ops_that_run_are_shown():
    quantised, model = _pair()
    with recorded() as found, torch.no_grad():
        quantised(_tokens())
        _decoded(quantised)
    names = {name for name, _, _ in found}
    shown = {choice.op for choice in quantised.explain("cpu", torch.float64).values()}
    assert "quantized_linear" in names <= shown
    assert "quantized_linear" not in {choice.op for choice in model.explain("cpu", torch.float64).values()}


def test_fused_backends_leave_quantised_layers_out():
    """As on a GPU: layers before and after them compute their own step, in training and of one token."""
    quantised, model = _pair()
    ops = ("relu2_mlp", "rmsnorm_linear", "token_linear")
    for m in (quantised, model):
        m.use_backends(dict.fromkeys(ops, "auto"))
    expected = model(_tokens()).logits
    one = model(_tokens(1, 1), state=model.init_state(1)).logits
    with contextlib.ExitStack() as stack:
        for op in ops:
            OPS[op].backends["reference"].load()
            stack.enter_context(backend_of(op, OPS[op].backends["reference"].run))
        assert_close(quantised(_tokens()).logits, expected, 1e-12)
        with torch.no_grad():
            assert_close(quantised(_tokens(1, 1), state=quantised.init_state(1)).logits, one, 1e-5)


def test_autocast_and_cast_weights():
    """As decoding runs on a GPU: products in bfloat16; codes are not copied."""
    quantised, model = (m.float() for m in _pair(format="int4"))
    results = []
    for m in (quantised, model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastWeights(m, torch.bfloat16).in_use():
            results.append(m(_tokens()).logits.float())
    assert_close(results[0], results[1], 1e-6)


def test_hooks_fire_and_gradients_reach_the_input():
    quantised, model = _pair()
    fired = set()
    for name, layer in quantized_layers(quantised).items():
        layer.register_forward_hook(lambda *_, name=name: fired.add(name))
    for m in (quantised, model):
        m(_tokens(), targets=_tokens()).total().backward()
    assert fired == set(quantized_layers(quantised))
    assert_close(quantised.embedding.weight.grad, model.embedding.weight.grad, 1e-12)


def test_layers_compile_as_one_graph():
    quantised, model = _pair(MIXER_CASES["mla"][0], format="mxfp4")
    for block in quantised.blocks:
        block.compile(backend="eager", fullgraph=True)
    loss = quantised(_tokens(), targets=_tokens()).total()  # parts run compiled with gradients
    assert_close(loss, model(_tokens(), targets=_tokens()).total(), 1e-12)


def test_refusals():
    quantised, _ = _pair()
    with pytest.raises(ValueError, match="the model is quantised already"):
        round_weights(quantised, "int8")
    with pytest.raises(ValueError, match="quantised weights, which are not trained"):
        options = {"optimizer": AdamWConfig(lr=1e-3), "device": torch.device("cpu"), "dtype": torch.float64}
        fit(quantised, iter(()), steps=1, **options)
    weight = empty_weight(Linear(8, 4).weight, "int8", None)
    with pytest.raises(ValueError, match=r"weight of shape \(4, 8\) does not fit a layer of \(5, 8\)"):
        QuantizedLinear(Linear(8, 5), weight)


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_the_planned_size_is_that_of_the_tensors(format):
    model = part_model(ATTENTION, "{type: routed}")
    planned = quantized_bytes(model.to("meta"), format)
    model = part_model(ATTENTION, "{type: routed}")
    replace_layers(model, round_weights(model, format))
    live = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert planned == sum(live.values())


def test_absorbed_products_decode_their_weight_once(monkeypatch):
    """And again when the codes have changed, or have moved."""
    quantised, _ = _pair(MIXER_CASES["mla"][0])
    layer = next(m for name, m in quantized_layers(quantised).items() if name.endswith("kv_up"))
    x = torch.randn(3, layer.out_features, dtype=torch.float64)
    calls = []
    decode = quantized_module.dequantize_weight
    monkeypatch.setattr(quantized_module, "dequantize_weight", lambda *a: calls.append(a) or decode(*a))
    first, second = (layer(x, transposed=True) for _ in range(2))
    assert len(calls) == 1 and torch.equal(first, second)
    layer(x.float(), transposed=True)
    assert len(calls) == 2, "of another dtype"
    layer.codes[0] ^= 1
    expected = x @ decode(layer.quantized_weight(), torch.float64)
    assert_close(layer(x, transposed=True), expected, 1e-12)
    assert not torch.equal(layer(x, transposed=True), first)
    layer.scales = layer.scales.clone()
    layer(x, transposed=True)
    assert len(calls) == 4
