"""The reference against the formula, the kernels against the reference in float64: output and every gradient."""

import pytest
import torch

from fusedlm.ops import explain, gated_rmsnorm
from fusedlm.ops.gated_norm import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.gated_norm.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

SHAPES = [(2, 5, 3, 16), (1, 1, 1, 1), (1, 13, 2, 40), (2, 3, 1, 200)]
EMPTY = [(0, 3, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)]
OPTIONS = [(grouped, skip, first) for grouped in (False, True) for skip in (False, True) for first in (False, True)]
NAMES = ("output", "y", "z", "gamma", "x", "skip")


def _inputs(shape, grouped, with_skip, dtype=torch.float32, per_head=8):
    g = torch.Generator().manual_seed(sum(shape))
    channels = shape[2] * shape[3]

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    gamma = 1 + draw(*(shape[2:] if grouped else shape[3:]))
    x, skip = (draw(*shape).to(dtype), draw(channels // per_head)) if with_skip else (None, None)
    return [draw(*shape).to(dtype), draw(*shape).to(dtype), gamma, x, skip], draw(*shape).to(dtype)


def _run(function, tensors, upstream, gate_first, dtype=None, eps=EPS):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, gate_first, eps)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], upstream.to(out.dtype))
    return [out.detach(), *gradients]


def _check(function, tensors, upstream, gate_first, floor, eps=EPS):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream, gate_first, eps=eps)
    same = _run(reference.gated_rmsnorm, tensors, upstream, gate_first, eps=eps)
    exact = _run(reference.gated_rmsnorm, tensors, upstream, gate_first, torch.float64, eps)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=False):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def _silu(x):
    return x / (1 + torch.exp(-x))


def test_is_the_formula():
    (y, z, gamma, x, skip), _ = _inputs((2, 3, 2, 36), True, True)
    out = gated_rmsnorm(y, z, gamma, x_BTGW=x, skip_H=skip, gate_first=True, eps=EPS)
    u = (y[1, 2, 1] + skip.repeat_interleave(8)[36:] * x[1, 2, 1]) * _silu(z[1, 2, 1])
    assert_close(out[1, 2, 1], u / (u.square().mean() + EPS).sqrt() * gamma[1], 1e-6)
    out = gated_rmsnorm(y, z, gamma[0], eps=EPS)
    y, z = y[1, 2, 1], z[1, 2, 1]
    assert_close(out[1, 2, 1], y / (y.square().mean() + EPS).sqrt() * gamma[0] * _silu(z), 1e-6)


@pytest.mark.parametrize("grouped, skip, gate_first", OPTIONS)
def test_gradients_of_the_reference(grouped, skip, gate_first):
    tensors, _ = _inputs((1, 2, 3, 4), grouped, skip, per_head=2)
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: reference.gated_rmsnorm(*x, gate_first, EPS), leaves)


@pytest.mark.parametrize("grouped, skip, gate_first", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, grouped, skip, gate_first, poisoned):
    tensors, upstream = _inputs(shape, grouped, skip, per_head=1 if shape[3] == 1 else 8)
    # The norm of a single element is its sign unless eps is large: its gradient is then only rounding error.
    _check(kernels.gated_rmsnorm, tensors, upstream, gate_first, 2e-6, eps=1.0 if shape[3] == 1 else EPS)


@pytest.mark.parametrize("grouped, skip, gate_first", OPTIONS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_kernel_on_empty_tensors(shape, grouped, skip, gate_first):
    tensors, upstream = _inputs(shape, grouped, skip)
    if skip and not tensors[4].numel():
        tensors[4] = torch.ones(1, device=DEVICE)
    found = _run(kernels.gated_rmsnorm, tensors, upstream, gate_first)
    expected = _run(reference.gated_rmsnorm, tensors, upstream, gate_first)
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


@pytest.mark.parametrize("grouped, skip", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("n_programs", [2, 8])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_programs_with_several_tiles(groups, n_programs, grouped, skip, poisoned, monkeypatch):
    """Four rows per tile; 2 programs are fewer than some numbers of groups need."""
    monkeypatch.setattr(kernels, "_PROGRAMS", n_programs)
    monkeypatch.setattr(kernels, "_TILE", 32)
    tensors, upstream = _inputs((1, 11, groups, 8), grouped, skip, per_head=4)
    _check(kernels.gated_rmsnorm, tensors, upstream, True, 2e-6)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in rows that are never written
@pytest.mark.parametrize("gate_first", [True, False])
def test_rows_beyond_the_last_add_nothing(gate_first, poisoned):
    """Not even without eps, where their norm divides by zero."""
    tensors, upstream = _inputs((1, 5, 3, 8), True, True)
    _check(kernels.gated_rmsnorm, tensors, upstream, gate_first, 2e-6, eps=0.0)


def test_gradients_have_the_dtypes_of_their_tensors():
    (y, z, gamma, x, skip), upstream = _inputs((1, 3, 2, 8), False, True)
    found = _run(kernels.gated_rmsnorm, [y, z, gamma.bfloat16(), x, skip.half()], upstream, True)
    assert [a.dtype for a in found] == [*[torch.float32] * 3, torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("gate_first", [True, False])
def test_kernel_on_slices_and_on_heads_before_tokens(gate_first, poisoned):
    """z and x from packed projections, y and the upstream gradient transposed."""
    tensors, upstream = _inputs((2, 5, 3, 16), True, True)

    def sliced(x):
        return torch.cat([torch.full_like(x.flatten(2), float("nan")), x.flatten(2)], -1)[..., 48:].view(x.shape)

    def function(y, z, gamma, x, *rest):
        heads_first = y.transpose(1, 2).contiguous().transpose(1, 2)
        return kernels.gated_rmsnorm(heads_first, sliced(z), gamma, sliced(x), *rest)

    _check(function, tensors, upstream.transpose(1, 2).contiguous().transpose(1, 2), gate_first, 2e-6)


@pytest.mark.parametrize("grouped, skip", [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [(2, 3, 2, 8), (2, 0, 2, 8)], ids=str)
def test_operators_pass_opcheck(shape, grouped, skip):
    tensors, upstream = _inputs(shape, grouped, skip)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.gated_rmsnorm.default, (*leaves, True, EPS))
    plain = [None if x is None else x.detach() for x in tensors]
    arguments = (upstream.transpose(0, 1), *(x.transpose(0, 1) for x in plain[:2]), plain[2])
    x = None if plain[3] is None else plain[3].transpose(0, 1)
    torch.library.opcheck(torch.ops.fusedlm.gated_rmsnorm_backward.default, (*arguments, x, plain[4], True, EPS))


def test_full_graph():
    tensors, upstream = _inputs((2, 3, 2, 8), True, True)

    def function(y, *rest):
        return kernels.gated_rmsnorm(2 * y, *rest)

    plain = _run(function, tensors, upstream, True)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream, True)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_what_the_kernels_cannot_run():
    assert "needs groups of at most 8192, not 8193" in str(explain("gated_rmsnorm", width=8193))


def test_bad_input():
    y, gamma = torch.zeros(1, 2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"z \(1, 2, 3, 1\) and gamma"):
        gated_rmsnorm(y, y[..., :1], gamma)
    with pytest.raises(ValueError, match=r"gamma \(3,\) must be"):
        gated_rmsnorm(y, y, gamma[:3])
    with pytest.raises(ValueError, match="x_BTGW and skip_H are given together"):
        gated_rmsnorm(y, y, gamma, x_BTGW=y)
    with pytest.raises(ValueError, match=r"skip \(5,\) must be \(1, 2, 3, 4\) and \(H,\), H a divisor of 12 channels"):
        gated_rmsnorm(y, y, gamma, x_BTGW=y, skip_H=torch.zeros(5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouped, skip, gate_first", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (4, 1000, 8, 64), (2, 300, 1, 2048), (2, 300, 3, 1000)], ids=str)
def test_kernel_in_half_precision(shape, grouped, skip, gate_first, dtype):
    _check(kernels.gated_rmsnorm, *_inputs(shape, grouped, skip, dtype), gate_first, 1e-5)


@pytest.mark.gpu
def test_gradients_are_reproducible():
    arguments = (*_inputs((4, 1000, 7, 64), True, True, torch.bfloat16), True)
    first, second = (_run(kernels.gated_rmsnorm, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    y, z = torch.randn(2, 2**19 // 8 + 3, 128, 256, device="cuda", dtype=torch.bfloat16)[:, None]
    gamma = torch.ones(256, device="cuda")
    out = kernels.gated_rmsnorm(y, z, gamma, None, None, False, EPS)
    last = reference.gated_rmsnorm(y[:, -2:], z[:, -2:], gamma, None, None, False, EPS)
    assert_close(out[:, -2:], last, 1e-2)
