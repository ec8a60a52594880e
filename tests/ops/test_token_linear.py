"""The projection of one token against the reference in float64."""

import pytest
import torch

from fusedlm.ops import token_linear
from fusedlm.ops.one_token import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.one_token.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    {},
    {"residual": True},
    {"gain": True},
    {"activation": "relu2", "slope": 0.3, "residual": True},
    {"activation": "swiglu", "residual": True},
]


def _inputs(width, n_out, case, dtype=torch.float32):
    g = torch.Generator().manual_seed(width + n_out)
    x = torch.randn(1, 1, width * (2 if case.get("activation") == "swiglu" else 1), generator=g).to(DEVICE, dtype)
    weight = torch.randn(n_out, width, generator=g).to(DEVICE, dtype)
    gain = torch.randn(width, generator=g).to(DEVICE) if "gain" in case else None
    residual = torch.randn(1, 1, n_out, generator=g).to(DEVICE, dtype) if "residual" in case else None
    return x, weight, gain, 1e-5, case.get("activation"), case.get("slope", 0.0), residual


def _check(width, n_out, case, dtype, floor):
    tensors = _inputs(width, n_out, case, dtype)
    found = kernels.token_linear(*tensors, dtype)
    double = [x.double() if isinstance(x, torch.Tensor) else x for x in tensors]
    exact, same = reference.token_linear(*double, torch.float64), reference.token_linear(*tensors, dtype)
    assert found.dtype == dtype and found.shape == (1, 1, n_out)
    assert_close(found.double(), exact, max(2 * error_ratio(same.double(), exact), floor))


@pytest.mark.parametrize(("width", "n_out"), [(1, 1), (16, 8), (33, 7), (1280, 5), (2048, 9), (2049, 2), (4100, 4)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel(case, width, n_out):
    _check(width, n_out, case, torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "n_out"), [(1280, 3840), (5120, 1280), (1, 1), (1025, 50304), (2049, 7)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu(case, width, n_out, dtype):
    _check(width, n_out, case, dtype, 1e-6)


@pytest.mark.parametrize(("width", "rows", "columns"), [(3, 4, 16), (1280, 4, 2048), (2048, 4, 2048), (2049, 1, 2048)])
def test_rows_of_a_program(width, rows, columns):
    config = kernels.config_of(width)
    assert (config["ROWS"], config["COLUMNS"]) == (rows, columns)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_public_function_by_the_reference(case):
    x, weight, gain, eps, activation, slope, residual = _inputs(20, 6, case)
    options = {"gain_D": gain, "eps": eps, "activation": activation, "slope": slope, "residual": residual}
    found = token_linear(x, weight, **options, backend="reference")
    assert torch.equal(found, reference.token_linear(*_inputs(20, 6, case), torch.float32))
    y = reference.prepared(x, gain, eps, activation, slope) @ weight.T
    assert_close(found, y if residual is None else y + residual, 1e-6)


def test_more_tokens_and_gradients_run_the_reference():
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    arguments = (None, 1e-6, None, 0.0, None, torch.float32)
    assert torch.equal(kernels.token_linear(x, weight, *arguments), x @ weight.T)
    weight.requires_grad_()
    kernels.token_linear(x[:1], weight, *arguments).sum().backward()
    assert_close(weight.grad, x[:1].expand(5, -1), 1e-6)


def test_a_weight_of_any_strides():
    weight = torch.randn(40, 30, device=DEVICE)
    for part in (weight[3:20, 4:20], weight.T[:7, :16]):
        x = torch.randn(1, 16, device=DEVICE)
        found = kernels.token_linear(x, part, None, 1e-6, None, 0.0, None, torch.float32)
        assert_close(found, x @ part.T, 1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator_passes_opcheck(case):
    torch.library.opcheck(torch.ops.fusedlm.token_linear.default, (*_inputs(20, 6, case), torch.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_ED": torch.ones(3, 5)}, r"x \(1, 4\) and weight \(3, 5\) must be"),
        ({"activation": "gelu"}, "activation='gelu' must be one of relu2, swiglu"),
        ({"activation": "relu2", "gain_D": torch.ones(4)}, "without a gain"),
        ({"activation": "swiglu"}, r"must be \(..., D\), or \(..., 2 D\) with swiglu"),
        ({"gain_D": torch.ones(3)}, r"gain \(3,\) must be \(4,\)"),
        ({"residual": torch.ones(3)}, r"residual \(3,\) must be \(1, 3\)"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        token_linear(**({"x": torch.ones(1, 4), "weight_ED": torch.ones(3, 4)} | change))
