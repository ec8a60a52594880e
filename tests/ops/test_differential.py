"""The reference against the formula, the kernels against the reference in float64: output and every gradient."""

import pytest
import torch

from fusedlm.ops import differential_combine
from fusedlm.ops.differential import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.differential.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

SHAPES = [(2, 5, 3, 16), (1, 1, 1, 1), (1, 130, 2, 40), (2, 3, 4, 64), (1, 2, 2, 200)]
EMPTY = [(0, 3, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)]
WEIGHTS = ["one", "head", "token"]
# Without the single element, for which the reference may happen to be exact.
HALF_SHAPES = [shape for shape in SHAPES if shape[-1] > 1]
OPTIONS = [(True, True), (True, False), (False, True), (False, False)]  # with gamma, with a scale
NAMES = ("output", "signal", "noise", "weight", "gamma")


def _inputs(shape, weights, with_gamma, with_scale, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    weight = {"one": draw(), "head": draw(shape[2]), "token": draw(*shape[:3])}[weights]
    tensors = [draw(*shape).to(dtype), draw(*shape).to(dtype), weight, 1 + draw(shape[3]) if with_gamma else None]
    scale = torch.tensor(0.7, device=DEVICE) if with_scale else None
    # Correlated with the noise, so that the gradient of a single lambda is a sum that does not cancel.
    return tensors, scale, (draw(*shape) + tensors[1]).to(dtype)


def _run(function, tensors, scale, upstream, dtype=None, eps=EPS):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, scale, eps)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], upstream.to(out.dtype))
    return [out.detach(), *gradients]


def _check(function, tensors, scale, upstream, floor, eps=EPS):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, scale, upstream, eps=eps)
    same = _run(reference.differential_combine, tensors, scale, upstream, eps=eps)
    exact = _run(reference.differential_combine, tensors, scale, upstream, torch.float64, eps)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=False):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def test_is_the_formula():
    (signal, noise, weight, gamma), scale, _ = _inputs((2, 3, 4, 8), "head", True, True)
    out = differential_combine(signal, noise, weight, gamma, scale, eps=EPS, backend="reference")
    z = signal[1, 2, 3] - weight[3] * noise[1, 2, 3]
    assert_close(out[1, 2, 3], z / (z.square().mean() + EPS).sqrt() * gamma * 0.7, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gamma, scale", OPTIONS)
def test_gradients_of_the_reference(weights, gamma, scale):
    tensors, scale, _ = _inputs((1, 2, 3, 4), weights, gamma, scale)
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: reference.differential_combine(*x, scale, EPS), leaves)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gamma, scale", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, weights, gamma, scale):
    tensors, scale, upstream = _inputs(shape, weights, gamma, scale)
    # The norm of a single element is its sign unless eps is large: its gradient is then only rounding error.
    _check(kernels.differential_combine, tensors, scale, upstream, 2e-6, eps=1.0 if shape[-1] == 1 else EPS)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gamma, scale", OPTIONS)
@pytest.mark.parametrize("shape", EMPTY)
def test_kernel_on_empty_tensors(shape, weights, gamma, scale):
    tensors, scale, upstream = _inputs(shape, weights, gamma, scale)
    found = _run(kernels.differential_combine, tensors, scale, upstream)
    expected = _run(reference.differential_combine, tensors, scale, upstream)
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


def test_programs_with_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    monkeypatch.setattr(kernels, "_TILE", 32)
    tensors, scale, upstream = _inputs((2, 5, 3, 16), "token", True, True)
    _check(kernels.differential_combine, tensors, scale, upstream, 2e-6)


@pytest.mark.parametrize("weights", ["one", "head"])
@pytest.mark.parametrize("n_programs", [2, 8])
@pytest.mark.parametrize("heads", [3, 5, 6, 7])
def test_heads_that_do_not_divide_the_tile(heads, n_programs, weights, poisoned, monkeypatch):
    """Four rows per tile and several tiles per program; 2 programs are fewer than some numbers of heads need."""
    monkeypatch.setattr(kernels, "_PROGRAMS", n_programs)
    monkeypatch.setattr(kernels, "_TILE", 32)
    tensors, scale, upstream = _inputs((1, 23, heads, 8), weights, True, True)
    _check(kernels.differential_combine, tensors, scale, upstream, 2e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 8), (2, 3, 5, 8), (1, 9, 6, 8)], ids=str)
def test_gradients_of_weights_sum_every_row_once(shape, weights, poisoned, monkeypatch):
    """Integers, whose sums are exact in any order; also with more programs than tiles."""
    monkeypatch.setattr(kernels, "_TILE", 32)
    (signal, noise, weight, _), _, upstream = _inputs(shape, weights, False, False)
    tensors, upstream = [(8 * signal).round(), (8 * noise).round(), weight, None], (8 * upstream).round()
    found, same = (
        _run(f, tensors, None, upstream)[3] for f in (kernels.differential_combine, reference.differential_combine)
    )
    assert torch.equal(found, same)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in rows that are never written
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_beyond_the_last_add_nothing(weights, poisoned):
    """Not even without eps, where their norm divides by zero."""
    tensors, scale, upstream = _inputs((1, 5, 3, 8), weights, True, True)
    _check(kernels.differential_combine, tensors, scale, upstream, 2e-6, eps=0.0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_have_the_dtypes_of_their_tensors(weights):
    (signal, noise, weight, gamma), scale, upstream = _inputs((2, 5, 3, 16), weights, True, True)
    tensors = [signal, noise, weight.double(), gamma.double()]
    _check(kernels.differential_combine, tensors, scale, upstream, 2e-6)
    found = _run(kernels.differential_combine, [signal, noise, weight.bfloat16(), gamma.half()], scale, upstream)
    assert [x.dtype for x in found[3:]] == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("weights, with_gamma", [("head", True), ("one", False), ("token", True), ("token", False)])
def test_partial_gradients_are_reduced_by_one_kernel(weights, with_gamma, monkeypatch):
    """All of them, and none where no gradient needs it."""
    kernels_run = []

    def spy(name):
        function = getattr(kernels, name)

        def spied(*arguments):
            kernels_run.append([x.shape[1] for x in arguments if isinstance(x, torch.Tensor)])
            return function(*arguments)

        monkeypatch.setattr(kernels, name, spied)

    spy("column_sums")
    spy("column_sums_of_two")
    _run(kernels.differential_combine, *_inputs((2, 5, 3, 16), weights, with_gamma, True))
    widths = {"one": [1], "head": [3], "token": []}[weights] + [16] * with_gamma
    assert kernels_run == [widths] * bool(widths)


def test_kernel_on_heads_before_tokens_and_on_slices():
    """As attention returns them: a transposed signal, noise that is a slice."""
    tensors, scale, upstream = _inputs((2, 5, 3, 16), "head", True, True)
    larger = torch.full((2, 5, 3, 20), float("nan"), device=DEVICE)
    larger[..., :16] = tensors[1]

    def function(signal, noise, *rest):
        heads_first = signal.transpose(1, 2).contiguous().transpose(1, 2)
        return kernels.differential_combine(heads_first, torch.cat([noise, noise], -1)[..., :16], *rest)

    _check(function, tensors, scale, upstream.transpose(1, 2).contiguous().transpose(1, 2), 2e-6)
    found = kernels.differential_combine(tensors[0], larger[..., :16], *tensors[2:], scale, EPS)
    assert_close(found, reference.differential_combine(*tensors, scale, EPS), 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gamma, scale", [(True, True), (False, False)])
@pytest.mark.parametrize("shape", [(2, 3, 2, 8), (2, 0, 2, 8)], ids=str)
def test_operators_pass_opcheck(shape, gamma, scale, weights):
    tensors, scale, upstream = _inputs(shape, weights, gamma, scale)
    leaves = [None if x is None else x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.differential_combine.default, (*leaves, scale, EPS))
    transposed = [x.detach().transpose(0, 1) for x in (upstream, *tensors[:2])]
    weight, gamma = (None if x is None else x.detach() for x in tensors[2:])
    arguments = (*transposed, weight.transpose(0, 1) if weight.ndim == 3 else weight, gamma, scale, EPS)
    torch.library.opcheck(torch.ops.fusedlm.differential_combine_backward.default, arguments)


def test_full_graph():
    tensors, scale, upstream = _inputs((2, 3, 2, 8), "token", True, True)

    def function(signal, *rest):
        return kernels.differential_combine(2 * signal, *rest)

    plain = _run(function, tensors, scale, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, scale, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    heads = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"weight \(2,\) must be"):
        differential_combine(heads, heads, torch.zeros(2))
    with pytest.raises(ValueError, match=r"noise \(1, 2, 3, 1\)"):
        differential_combine(heads, heads[..., :1], torch.zeros(3))
    with pytest.raises(ValueError, match="scale requires a gradient and gets none"):
        differential_combine(heads, heads, torch.zeros(3), None, torch.ones((), requires_grad=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("gamma, scale", OPTIONS)
@pytest.mark.parametrize("shape", [*HALF_SHAPES, (4, 1000, 8, 64)])
def test_kernel_in_half_precision(shape, weights, gamma, scale, dtype):
    tensors, scale, upstream = _inputs(shape, weights, gamma, scale, dtype)
    _check(kernels.differential_combine, tensors, scale, upstream, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_are_reproducible(weights):
    tensors, scale, upstream = _inputs((4, 1000, 7, 64), weights, True, True, torch.bfloat16)
    first, second = (_run(kernels.differential_combine, tensors, scale, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    signal, noise = torch.randn(2, 2**19 // 8 + 3, 128, 128, device="cuda", dtype=torch.bfloat16)[:, None]
    weight, gamma = torch.randn(128, device="cuda"), torch.ones(128, device="cuda")
    out = kernels.differential_combine(signal, noise, weight, gamma, None, EPS)
    last = reference.differential_combine(signal[:, -2:], noise[:, -2:], weight, gamma, None, EPS)
    assert_close(out[:, -2:], last, 1e-2)
