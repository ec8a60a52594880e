"""float32 products on tensor cores of 16 bits against float64: output and both gradients."""

import pytest
import torch

from fusedlm.ops import float32_linear
from fusedlm.ops.float32 import reference, split
from fusedlm.testing import assert_close, error_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(130, 48, 16), (64, 37, 5), (200, 8, 1)]


def _inputs(n, k, m, dtype=torch.bfloat16, weight_dtype=torch.float32):
    g = torch.Generator().manual_seed(n + k + m)
    x = torch.randn(n, k, generator=g).to(DEVICE, dtype)
    weight = torch.randn(m, k, generator=g).to(DEVICE, weight_dtype)
    return x, weight, torch.randn(n, m, generator=g).to(DEVICE)


def _run(function, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))]


def _exact(x, weight, dy):
    return _run(lambda x, w: x @ w.t(), x.double(), weight.double(), dy.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_has_the_accuracy_of_float32(shape, poisoned):
    inputs = _inputs(*shape)
    found, exact = _run(split.float32_linear, *inputs), _exact(*inputs)
    assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert_close(found[0], exact[0], 3e-7, "y")
    assert_close(found[2], exact[2], 3e-7, "weight")
    # Rounded once, from a value of more bits.
    rounding = error_ratio(exact[1].bfloat16(), exact[1])
    assert_close(found[1], exact[1], 1.01 * rounding, "x")


def test_three_parts_are_needed():
    """What one part and two give: the bounds above tell them apart."""
    x, weight, dy = _inputs(*SHAPES[0])
    exact = x.double() @ weight.double().t()
    errors = []
    for n in (1, 2, 3):
        parts = split.parts_of(weight, n)
        errors.append(error_ratio(sum(x.float() @ part.float().t() for part in parts), exact))
    assert errors[0] > 1e-3 and 1e-6 < errors[1] < 1e-4 and errors[2] < 3e-7


def test_parts_are_the_value_to_its_last_bit():
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10000)
    parts = split.parts_of(x, 3)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


def test_leading_dimensions_and_few_rows():
    x, weight, _ = _inputs(130, 48, 16)
    whole = split.float32_linear(x.view(2, 5, 13, 48), weight)
    assert whole.shape == (2, 5, 13, 16) and torch.equal(whole.flatten(0, -2), split.float32_linear(x, weight))
    few = split.float32_linear(x[:1], weight)
    assert torch.equal(few, reference.float32_linear(x[:1], weight))


def test_weights_of_16_bits():
    inputs = _inputs(*SHAPES[0], weight_dtype=torch.bfloat16)
    found, exact = _run(split.float32_linear, *inputs), _exact(*inputs)
    assert found[2].dtype == torch.bfloat16
    assert_close(found[0], exact[0], 3e-7)
    assert_close(found[2], exact[2], 1.01 * error_ratio(exact[2].bfloat16(), exact[2]))


def test_gradients_that_are_not_needed():
    x, weight, dy = _inputs(*SHAPES[0])
    for leaf in (x, weight):
        leaf.requires_grad_()
        grads = torch.autograd.grad(split.float32_linear(x, weight), leaf, dy)
        assert grads[0].shape == leaf.shape
        leaf.requires_grad_(False)


def test_under_compile():
    """Compilers may leave out that a value is rounded and converted back, and then the other parts are zero."""
    torch._dynamo.reset()
    inputs = _inputs(*SHAPES[0])
    found = _run(torch.compile(split.float32_linear, fullgraph=True), *inputs)
    exact = _exact(*inputs)
    assert_close(found[0], exact[0], 3e-7, "y")
    assert_close(found[1], exact[1], 1.01 * error_ratio(exact[1].bfloat16(), exact[1]), "x")
    assert_close(found[2], exact[2], 3e-7, "weight")


@pytest.mark.parametrize("shapes", [((4, 3), (5, 4)), ((4,), (5, 4)), ((2, 4), (4,))])
def test_refused(shapes):
    x, weight = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="must be"):
        float32_linear(x, weight)


@pytest.mark.gpu
def test_on_a_gpu():
    n, width = 4096, 1024
    inputs = _inputs(n, width, 32)
    found, same = (_run(lambda x, w, b=b: float32_linear(x, w, backend=b), *inputs) for b in ("auto", "reference"))
    # Tensor cores add 16 products at a time and truncate the sum: at most half of the last bit on average, each time.
    terms = {"y": width, "x": 0, "weight": n}
    for (name, n_terms), a, s, e in zip(terms.items(), found, same, _exact(*inputs), strict=True):
        assert_close(a, e, max(2 * error_ratio(s, e), n_terms / 16 * 2**-25), name)
