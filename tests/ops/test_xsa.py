"""The kernels against the reference in float64: output and both gradients."""

import pytest
import torch

from fusedlm.ops import exclude_own_value, explain
from fusedlm.ops.xsa import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.xsa.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 5, 4, 2, 16), (1, 1, 1, 1, 1), (2, 3, 3, 3, 7), (1, 7, 6, 1, 40), (1, 2, 2, 1, 256)]  # B, T, H, G, D
EMPTY = [(0, 3, 2, 1, 8), (2, 0, 2, 2, 8), (2, 3, 4, 2, 0)]
NAMES = ("output", "y", "v")


def _inputs(shape, dtype=torch.float32):
    batch, tokens, heads, groups, width = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(n_heads):
        return torch.randn(batch, tokens, n_heads, width, generator=g).to(DEVICE, dtype)

    return [draw(heads), draw(groups)], draw(heads)


def _run(function, tensors, upstream, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _check(function, tensors, upstream, floor):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream)
    same = _run(reference.exclude_own_value, tensors, upstream)
    exact = _run(reference.exclude_own_value, tensors, upstream, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def test_gradients_of_the_reference():
    tensors, _ = _inputs((1, 2, 4, 2, 3))
    assert torch.autograd.gradcheck(reference.exclude_own_value, [x.double().requires_grad_() for x in tensors])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, poisoned):
    tensors, upstream = _inputs(shape)
    if shape[4] == 1:  # all of y is along the value, and what is left is rounding error
        found = _run(kernels.exclude_own_value, tensors, upstream)
        assert all(x.abs().max() < 1e-5 for x in found)
    else:
        _check(kernels.exclude_own_value, tensors, upstream, 2e-6)


def test_several_tiles(poisoned, monkeypatch):
    """Of four rows; the last one is partly filled."""
    monkeypatch.setattr(kernels, "_TILE", 32)
    _check(kernels.exclude_own_value, *_inputs((2, 5, 6, 3, 8)), 2e-6)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_kernel_on_empty_tensors(shape):
    tensors, upstream = _inputs(shape)
    found = _run(kernels.exclude_own_value, tensors, upstream)
    for a, e in zip(found, _run(reference.exclude_own_value, tensors, upstream), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-11])
def test_short_values(length, poisoned):
    """Below 1e-12 the divisor of a value is constant."""
    (y, v), upstream = _inputs((1, 3, 4, 2, 8))
    v[:, 1] *= length / v[:, 1].norm(dim=-1, keepdim=True)
    found = _run(kernels.exclude_own_value, [y, v], upstream)
    exact = _run(reference.exclude_own_value, [y, v], upstream, torch.float64)
    for t in range(3):
        for name, a, e in zip(NAMES, found, exact, strict=True):
            assert_close(a[:, t], e[:, t], 2e-6, f"{name} of token {t}")


def test_gradients_have_the_dtypes_of_their_tensors():
    (y, v), upstream = _inputs((1, 3, 4, 2, 8))
    found = _run(kernels.exclude_own_value, [y, v.bfloat16()], upstream)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16]


def _packed(v):
    """v as the last part of a packed projection, whose other parts are NaN."""
    parts = [torch.full_like(v, float("nan"))] * 2
    return torch.cat([x.flatten(2) for x in (*parts, v)], -1)[..., 2 * v[0, 0].numel() :].view(v.shape)


def _heads_first(y):
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def test_kernel_on_slices_and_on_heads_before_tokens(poisoned):
    (y, v), upstream = _inputs((2, 5, 6, 2, 16))
    assert not _packed(v).is_contiguous()
    _check(lambda y, v: kernels.exclude_own_value(_heads_first(y), _packed(v)), [y, v], _heads_first(upstream), 2e-6)


def test_slices_are_not_copied(monkeypatch):
    (y, v), upstream = _inputs((2, 5, 6, 2, 16))
    y, v, upstream = _heads_first(y), _packed(v), _heads_first(upstream)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("a copy"))
    kernels.exclude_own_value(y, v)
    dy, dv = kernels._backward(upstream, y, v)
    assert dy.stride() == y.stride() and dv.stride() == (160, 32, 16, 1)


def test_dimensions_of_a_head_that_are_apart(poisoned):
    (y, v), upstream = _inputs((1, 3, 4, 2, 6))

    def function(y, v):
        y, v = (torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0] for x in (y, v))
        return kernels.exclude_own_value(y, v)

    _check(function, [y, v], torch.stack([upstream, upstream], -1)[..., 0], 2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 8), (2, 0, 4, 2, 8)], ids=str)
def test_operators_pass_opcheck(shape):
    (y, v), upstream = _inputs(shape)
    torch.library.opcheck(torch.ops.fusedlm.exclude_own_value.default, (y.requires_grad_(), v.requires_grad_()))
    arguments = (x.detach().transpose(0, 1) for x in (upstream, y, v))
    torch.library.opcheck(torch.ops.fusedlm.exclude_own_value_backward.default, tuple(arguments))


def test_full_graph():
    tensors, upstream = _inputs((2, 3, 4, 2, 8))

    def function(y, v):
        return kernels.exclude_own_value(2 * y, v)

    plain = _run(function, tensors, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_what_the_kernels_cannot_run():
    assert "needs heads of at most 256, not 257" in str(explain("exclude_own_value", head_dim=257))


def test_bad_input():
    y = torch.zeros(1, 2, 4, 8)
    for v in (y[:, :, :3], y[:, :, :0], y[..., :4], y[:, :1], y[0]):
        with pytest.raises(ValueError, match=r"y \(1, 2, 4, 8\) and v \(.*\) must be .* G a divisor of H"):
            exclude_own_value(y, v)
    with pytest.raises(ValueError, match=r"y \(2, 4, 8\) and v"):
        exclude_own_value(y[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(4, 1000, 8, 4, 64), (2, 300, 12, 1, 128), (2, 301, 3, 3, 77), (1, 50, 4, 2, 256)], ids=str
)
def test_kernel_in_half_precision(shape, dtype):
    _check(kernels.exclude_own_value, *_inputs(shape, dtype), 1e-5)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    y = torch.randn(2, 2**19 // 8 + 3, 128, 256, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(2, 2**19 // 8 + 3, 1, 256, device="cuda", dtype=torch.bfloat16)
    assert y.numel() > 2**31
    out = kernels.exclude_own_value(y, v)
    assert_close(out[:, -2:], reference.exclude_own_value(y[:, -2:], v[:, -2:]), 1e-2)
