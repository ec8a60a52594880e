"""The reference against the formula, the kernels against the reference in float64: output and every gradient."""

import pytest
import torch

from fusedlm.ops import swiglu_mlp
from fusedlm.ops.swiglu import reference
from fusedlm.testing import RecordedOperators, assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.swiglu.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "x", "w_gate_up", "w_down")
SHAPES = [(70, 24, 136), (33, 20, 44), (1, 16, 40), (5, 3, 7), (40, 31, 70), (4, 1, 9), (9, 4, 1), (3, 4, 1100)]
EMPTY = [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)]


def _inputs(shape, dtype=torch.float32, weight_dtype=None):
    n, d, h = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size, scale=1.0, dtype=dtype):
        return (scale * torch.randn(size, generator=g)).to(DEVICE, dtype)

    weights = [
        draw(2 * h, d, scale=max(d, 1) ** -0.5, dtype=weight_dtype or dtype),
        draw(d, h, scale=max(h, 1) ** -0.5, dtype=weight_dtype or dtype),
    ]
    return [draw(n, d), *weights], draw(n, d)


def _run(function, tensors, upstream, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _check(function, tensors, upstream, floor):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream)
    same = _run(reference.swiglu_mlp, tensors, upstream)
    exact = _run(reference.swiglu_mlp, tensors, upstream, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def test_is_the_formula():
    (x, w_gate_up, w_down), _ = _inputs((5, 8, 12))
    gate, up = x @ w_gate_up[:12].t(), x @ w_gate_up[12:].t()
    expected = (gate / (1 + (-gate).exp()) * up) @ w_down.t()
    assert_close(swiglu_mlp(x, w_gate_up, w_down, backend="reference"), expected, 1e-6)


def test_gradients_of_the_reference():
    tensors, _ = _inputs((3, 4, 6), torch.float64)
    assert torch.autograd.gradcheck(reference.swiglu_mlp, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, poisoned):
    _check(kernels.swiglu_mlp, *_inputs(shape), 2e-6)


def test_kernel_on_single_elements():
    tensors, upstream = _inputs((1, 1, 1))
    expected = _run(reference.swiglu_mlp, tensors, upstream)
    for a, e in zip(_run(kernels.swiglu_mlp, tensors, upstream), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", EMPTY)
def test_kernel_on_empty_tensors(shape, poisoned):
    tensors, upstream = _inputs(shape)
    expected = _run(reference.swiglu_mlp, tensors, upstream)
    for a, e in zip(_run(kernels.swiglu_mlp, tensors, upstream), expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


def test_kernel_on_views():
    """Slices, transposed weights, an expanded upstream gradient."""
    tensors, upstream = _inputs((33, 24, 40))

    def function(x, w_gate_up, w_down):
        x = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :24]
        return kernels.swiglu_mlp(x, w_gate_up.t().contiguous().t(), w_down)

    _check(function, tensors, upstream[:1].expand(33, 24), 2e-6)


def test_the_hidden_layer_is_not_saved_for_backward():
    tensors, _ = _inputs((33, 24, 40))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        kernels.swiglu_mlp(*(x.requires_grad_() for x in tensors))
    assert sorted(saved) == sorted([(33, 24), (80, 24), (24, 40), (33, 80)])


def test_backward_allocates_no_zeros():
    """As autograd does for the gradients of further outputs, unless told otherwise."""
    tensors, upstream = _inputs((33, 24, 40))
    leaves = [x.requires_grad_() for x in tensors]
    out = kernels.swiglu_mlp(*leaves)
    with RecordedOperators() as ran:
        torch.autograd.grad(out, leaves, upstream)
    assert ran.names and not any("zeros" in name for name in ran.names)


def test_backward_twice():
    tensors, upstream = _inputs((33, 24, 40))
    leaves = [x.requires_grad_() for x in tensors]
    out = kernels.swiglu_mlp(*leaves)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, upstream), first, strict=True))


def test_operators_pass_opcheck():
    tensors, upstream = _inputs((9, 8, 12))
    detached = [x.detach() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.swiglu_mlp.default, leaves)
    torch.library.opcheck(torch.ops.fusedlm.swiglu_mlp_inference.default, detached)
    gate_up = torch.ops.fusedlm.swiglu_mlp(*detached)[1]
    torch.library.opcheck(torch.ops.fusedlm.swiglu_mlp_backward.default, (upstream, *detached, gate_up))


def test_full_graph():
    tensors, upstream = _inputs((9, 8, 12))

    def function(x, *rest):
        return kernels.swiglu_mlp(2 * x, *rest)

    plain = _run(function, tensors, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    (x, w_gate_up, w_down), _ = _inputs((5, 8, 12))
    with pytest.raises(ValueError, match=r"x \(5, 7\), w_gate_up \(24, 8\) and w_down \(8, 12\) must be"):
        swiglu_mlp(x[:, :7], w_gate_up, w_down)
    with pytest.raises(ValueError, match=r"w_gate_up \(23, 8\)"):
        swiglu_mlp(x, w_gate_up[1:], w_down)
    with pytest.raises(ValueError, match=r"w_down \(8,\)"):
        swiglu_mlp(x, w_gate_up, w_down[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 24, 136), (129, 31, 77), (1, 64, 256), (4096, 512, 1408), (1000, 2048, 5464)])
def test_kernel_in_half_precision(shape, dtype, poisoned):
    _check(kernels.swiglu_mlp, *_inputs(shape, dtype), 1e-5)


@pytest.mark.gpu
def test_weights_in_float32():
    """As under autocast: cast for the matrix products, with float32 gradients."""
    tensors, upstream = _inputs((1000, 256, 768), torch.bfloat16, torch.float32)
    found = _run(kernels.swiglu_mlp, tensors, upstream)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    _check(kernels.swiglu_mlp, tensors, upstream, 1e-5)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, d, h = 2**31 // 16384 + 130, 64, 8192
    x, w_gate_up, w_down = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16) / 8 for size in ((n, d), (2 * h, d), (d, h))
    )
    leaves = [leaf.requires_grad_() for leaf in (x, w_gate_up, w_down)]
    upstream = torch.randn_like(x)
    out = kernels.swiglu_mlp(*leaves)
    dx = torch.autograd.grad(out, leaves, upstream)[0]
    tail = x[-100:].detach().requires_grad_()
    expected = reference.swiglu_mlp(tail, w_gate_up, w_down)
    assert_close(out[-100:], expected, 1e-2)
    assert_close(dx[-100:], torch.autograd.grad(expected, tail, upstream[-100:])[0], 1e-2)
