"""Layers whose products run in 8 bits while they are trained: when they do, what they leave alone, what they cost."""

import copy
from functools import partial

import pytest
import torch

from fusedlm.model.low_precision import (
    cast_weights,
    choose_layers,
    lower_precision,
    outlier_figures,
    precision_table,
)
from fusedlm.nn.linear import Linear
from fusedlm.nn.low_precision import LowPrecisionLinear, cast_gathered, low_precision_layers, replace_layers
from fusedlm.nn.module import roles
from fusedlm.nn.quantized import hidden_matrices
from fusedlm.ops import LowPrecision, low_precision_weight
from fusedlm.ops.low_precision import linear as operators
from fusedlm.ops.low_precision.cost import Rates, cast_bytes, speedup, weight_bytes
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, backend_of, error_ratio, part_model, randomise_

CPU = torch.device("cpu")
ATTENTION = MIXER_CASES["attention"][1]
CASES = [(cases[0], "{type: swiglu, hidden: 48}") for cases in MIXER_CASES.values()]
CASES += [(ATTENTION, cases[0]) for cases in FFN_CASES.values()]


def _tokens():
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def _lowered(mixer=ATTENTION, ffn="{type: swiglu, hidden: 48}", precision=LowPrecision("int8"), **options):  # noqa: B008
    """A model in training mode, and the same with 8-bit layers wherever widths allow."""
    model = randomise_(part_model(mixer, ffn)).train()
    lowered = copy.deepcopy(model)
    chosen = choose_layers(lowered, precision, device=CPU, dtype=torch.float32, n_tokens=18)
    lower_precision(lowered, chosen, precision, **options)
    return model, lowered


def _step(model):
    """Loss and the gradient of every parameter."""
    model.zero_grad()
    torch.manual_seed(0)
    output = model(_tokens(), targets=_tokens().roll(-1, 1))
    output.total().backward()
    return output.losses["nll"].detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("mixer", "ffn"), CASES, ids=lambda case: case[7:].partition(",")[0].rstrip("}"))
def test_every_part_trains_in_8_bits(mixer, ffn):
    model, lowered = _lowered(mixer, ffn)
    assert low_precision_layers(lowered)
    assert roles(lowered) == roles(model) and lowered.state_dict().keys() == model.state_dict().keys()
    (loss, gradients), (low_loss, low_gradients) = _step(model), _step(lowered)
    assert gradients.keys() == low_gradients.keys()
    assert 0 < abs(low_loss - loss) < 0.02 * loss
    ratio = error_ratio(
        torch.cat([g.flatten() for g in low_gradients.values()]), torch.cat([g.flatten() for g in gradients.values()])
    )
    assert 1e-4 < ratio < 0.1


def test_only_training_with_gradients_is_in_8_bits():
    model, lowered = _lowered()
    with torch.no_grad():
        assert torch.equal(lowered(_tokens()).logits, model(_tokens()).logits)
    assert torch.equal(lowered.eval()(_tokens()).logits, model.eval()(_tokens()).logits)
    assert not torch.equal(lowered.train()(_tokens()).logits, model.train()(_tokens()).logits)


def test_parts_and_transposed_products_are_those_of_the_weight():
    layer = Linear(16, 48, splits={"a": 16, "b": 32})
    torch.nn.init.normal_(layer.weight)
    low, x = LowPrecisionLinear(layer, LowPrecision()), torch.randn(3, 16)
    assert torch.equal(low(x, part="b"), layer(x, part="b")) and not torch.equal(low(x), layer(x))
    y = torch.randn(3, 48)
    assert torch.equal(low(y, transposed=True), layer(y, transposed=True))


def test_weights_are_cast_by_forward_passes_or_by_the_loop(monkeypatch):
    _, lowered = _lowered()
    casts = []
    cast = LowPrecisionLinear.cast_weight
    monkeypatch.setattr(LowPrecisionLinear, "cast_weight", lambda layer: casts.append(layer) or cast(layer))
    layers = list(low_precision_layers(lowered).values())
    first = _step(lowered)[0]
    assert casts == layers
    codes = [layer.codes.data_ptr() for layer in layers]
    optimizer = torch.optim.AdamW(lowered.parameters(), lr=0.01, fused=True)
    optimizer.step()
    before = _step(lowered)[0]
    assert casts == 2 * layers and before < first
    lowered.eval()(_tokens())
    cast_weights(lowered.train())
    assert casts == 3 * layers
    assert _step(lowered)[0] == before and casts == 3 * layers
    optimizer.step()
    cast_weights(lowered)
    assert _step(lowered)[0] < before and casts == 4 * layers
    assert [layer.codes.data_ptr() for layer in layers] == codes


def test_codes_are_those_of_the_weight_on_its_device():
    layer = Linear(16, 32)
    torch.nn.init.normal_(layer.weight)
    low = LowPrecisionLinear(layer, LowPrecision(), outliers=3.5)
    low.cast_weight()
    expected, codes = low(torch.ones(2, 16)), low.codes.clone()
    low.to(torch.float64)
    assert low.codes.dtype == torch.uint8 and torch.equal(low.codes, codes)
    assert low.outlier_counts.dtype == torch.float32
    assert_close(low(torch.ones(2, 16).double()), expected, 1e-6)
    assert low.to("meta").codes.device.type == "meta"


@pytest.fixture
def fused():
    """The emulation as a backend that casts what norms and activations compute."""
    with backend_of("low_precision_linear", partial(operators.linear, backend="reference"), fused=True):
        yield


@pytest.mark.parametrize("ffn", ["{type: swiglu, hidden: 48}", "{type: relu2, slope: 0.5, hidden: 48}"])
def test_norm_and_activation_are_cast_as_they_are_computed(ffn, fused, monkeypatch):
    """All four products of a block, from the residual stream and from the up-projection; the losses and gradients are
    those of separate steps but for elements on the border of two values."""
    seen = []
    real = operators._forward
    monkeypatch.setattr(operators, "_forward", lambda *rest: seen.append(rest[8]) or real(*rest))
    _, lowered = _lowered(ffn=ffn)
    loss, gradients = _step(lowered)
    activation = "swiglu" if "swiglu" in ffn else "relu2"
    assert seen == ["norm", "none", "norm", activation] * len(lowered.blocks)
    separate = copy.deepcopy(lowered)
    monkeypatch.setattr(LowPrecisionLinear, "casts_input", False)
    seen.clear()
    expected_loss, expected = _step(separate)
    assert seen == ["none"] * 4 * len(lowered.blocks)
    assert abs(loss - expected_loss) < 2e-3 * loss
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 0.05, name)


def test_a_plain_layer_after_one_that_casts(fused):
    """The norm is cast by the up-projection, and the activation computed for the plain down-projection."""
    model, lowered = _lowered()
    names = [name for name in hidden_matrices(model) if "ffn.gate_up" in name]
    partly = copy.deepcopy(model)
    replace_layers(partly, names, LowPrecision("int8"))
    loss, _ = _step(partly)
    assert 0 < abs(loss - _step(model)[0]) < 0.01
    assert loss != _step(lowered)[0]


def test_recomputed_mixers_give_the_same_gradients(fused):
    _, lowered = _lowered()
    loss, gradients = _step(lowered)
    lowered.recompute("mixer")
    again, recomputed = _step(lowered)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_outliers_are_counted_and_taken_out():
    precision, options = LowPrecision("int8"), {"outliers": 3.5, "columns": 4}
    layer = Linear(64, 32)
    torch.nn.init.normal_(layer.weight)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=g).clamp(-1, 1) * torch.linspace(1, 1.2, 64)
    x[:, [5, 9]] = 100 * torch.randn(40, 2, generator=g)
    plain, isolated = LowPrecisionLinear(layer, precision), LowPrecisionLinear(layer, precision, **options)
    exact = layer(x)
    assert error_ratio(isolated(x), exact) < error_ratio(plain(x), exact) / 3
    model = torch.nn.ModuleList([plain, isolated])
    isolated(torch.ones(40, 64))
    assert outlier_figures(model) == {"outlier_share": 1 / 64, "outlier_missed": 0.0, "outlier_layers": [1 / 64]}
    x[:, 20:26] = 1000.0
    isolated(x)
    figures = outlier_figures(model)
    assert figures["outlier_share"] == 4 / 64 and figures["outlier_missed"] == 4 / 64
    assert outlier_figures(torch.nn.ModuleList([plain])) == {}


def test_a_sharded_weight_is_cast_when_it_is_gathered(monkeypatch):
    layer = LowPrecisionLinear(Linear(16, 16), LowPrecision())
    model = torch.nn.Sequential(layer)
    with monkeypatch.context() as patch:
        patch.setattr("fusedlm.nn.low_precision.DTensor", torch.nn.Parameter)
        layer.cast_weight()
        cast_gathered(model, ())  # of a unit outside of the one that gathers it
        assert layer.codes is None and layer.is_stale
    cast_gathered(model, ())
    assert torch.equal(layer.codes, low_precision_weight(layer.weight, LowPrecision()).codes) and not layer.is_stale
    with torch.no_grad():
        layer.weight.neg_()
    before = layer.codes.clone()
    cast_gathered(model, ())
    assert torch.equal(layer.codes, before)  # no update, no cast


def test_counts_of_a_model_without_memory_begin_at_zero():
    layer = LowPrecisionLinear(Linear(16, 16).to("meta"), LowPrecision(), outliers=3.5)
    assert layer.outlier_counts.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.outlier_counts, torch.zeros(3))


# Which layers

_NARROW = {"bf16": 6.5e14, "fp8 tensor": 1.1e15, "fp8 row": 1.2e15}
_WIDE = {"bf16": 6.9e14, "fp8 tensor": 1.4e15, "fp8 row": 1.3e15}
RATES = Rates(3e12, ((2048.0, _NARROW), (8192.0, _WIDE)), "test")


def test_rates_between_widths_and_beyond():
    assert RATES.product("bf16", 1024, 4096) == 6.5e14 == RATES.product("bf16", 64, 64)
    assert RATES.product("fp8 tensor", 4096, 4096) == pytest.approx(1.25e15)
    assert RATES.product("fp8 row", 2**15, 2**15) == 1.3e15
    assert RATES.product("int8", 1024, 1024) is None


def test_predicted_speedup():
    fp8 = LowPrecision()
    n, k, m = 16384, 4096, 14336
    # Three products, casts of 4 bytes per element at half of the copy bandwidth, 14 bytes of each weight.
    casts = (4 * n * (k + m) + 14 * k * m) / 1.5e12
    width = (k * m) ** 0.5
    kinds = "fp8 row", "fp8 row", "fp8 tensor"
    products = 2 * n * k * m * sum(1 / RATES.product(kind, width, width) for kind in kinds)
    bf16 = 6 * n * k * m / RATES.product("bf16", k, m) + 6 * k * m / 1.5e12
    assert speedup(RATES, n, k, m, fp8) == pytest.approx(bf16 / (products + casts), rel=0.01)
    assert cast_bytes(n, k, m, fp8) == 4 * n * (k + m) and weight_bytes(k, m, fp8) == 14 * k * m
    assert speedup(RATES, n, k, m, fp8, compiled=False) < speedup(RATES, n, k, m, fp8)
    assert speedup(RATES, n, k, m, fp8) < speedup(RATES, n, k, m, fp8, micro_batches=8)
    assert speedup(RATES, n, 256, 256, fp8) < 1 < speedup(RATES, n, k, m, fp8)
    assert speedup(RATES, n, k, m, LowPrecision("int8")) is None and speedup(RATES, n, k, m, LowPrecision("mxfp8")) < 1


def test_layers_by_role_width_speedup_and_name():
    model = part_model(ATTENTION, "{type: moe, n_experts: 4, top_k: 2, hidden: 24, n_shared: 1}")
    options = {"device": CPU, "dtype": torch.float32, "n_tokens": 2**16}
    chosen = {layer.name: layer for layer in choose_layers(model, LowPrecision(), exclude=["*.mixer.out"], **options)}
    assert chosen.keys() == hidden_matrices(model).keys()
    reasons = {name.partition(".")[2].partition(".")[2]: layer.reason for name, layer in chosen.items()}
    assert reasons["mixer.qkv"] is None and reasons["mixer.out"] == "excluded"
    assert reasons["ffn.shared.down"] == "needs widths that are multiples of 16, not 24 and 32"
    assert not any("router" in name or "embedding" in name or "head" in name for name in chosen)
    slow = choose_layers(model, LowPrecision(), rates=RATES, least_speedup=1.05, **options)
    assert {layer.reason for layer in slow if not layer.reason or "slower" in layer.reason} == {
        "would be slower than 1.05 times bf16"
    }
    fast = choose_layers(model, LowPrecision(), rates=RATES, least_speedup=0.01, **options)
    assert fast[0].reason is None and 0 < fast[0].speedup < 1
    lower_precision(model, slow, LowPrecision())
    assert not low_precision_layers(model)


def test_table():
    model = part_model(ATTENTION, "{type: swiglu, hidden: 40}")
    chosen = choose_layers(model, LowPrecision(), device=CPU, dtype=torch.float32, n_tokens=64, rates=RATES)
    lines = precision_table(chosen)
    predicted, out = f"{chosen[0].speedup:.2f}x", str(chosen[0].out_features)
    assert lines[0].split() == ["blocks.*.mixer.qkv", "32", "->", out, "x2", predicted, "8", "bits"]
    assert lines[-1].endswith("no: needs widths that are multiples of 16, not 40 and 32")
    assert precision_table([]) == []
