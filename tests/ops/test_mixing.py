"""The reference against the formula, the kernels against the reference in float64: outputs and every gradient."""

import pytest
import torch

from fusedlm.ops import explain, mix_inputs
from fusedlm.ops.mixing import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.mixing.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

SHAPES = [(2, 5, 16), (1, 1, 1), (13, 40), (2, 3, 200), (7,)]
PARTS = [  # mix_x, x0, skip
    (True, True, True),
    (True, True, False),
    (True, False, False),
    (False, False, True),
    (False, True, True),
    (True, False, True),
    (False, False, False),
]
NAMES = ("mixed", "normed", "x", "gain", "mix_x", "x0", "mix_x0", "skip", "skip_weight")


def _inputs(shape, parts, dtype=torch.float32):
    """Tensors, None where there is none, and upstream gradients of both outputs."""
    g = torch.Generator().manual_seed(sum(shape))
    mixes, has_x0, has_skip = parts

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    def pair(present):
        full, vector = draw(*shape).to(dtype), draw(shape[-1])
        return (full, vector) if present else (None, None)

    tensors = [draw(*shape).to(dtype), 1 + draw(shape[-1]), draw(shape[-1]) if mixes else None]
    return [*tensors, *pair(has_x0), *pair(has_skip)], [draw(*shape).to(dtype) for _ in range(2)]


def _run(function, tensors, upstream, dtype=None, eps=EPS):
    """By name: both outputs, and the gradient of each tensor."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    outputs = function(*leaves, eps)
    present = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(outputs, present, [u.to(outputs[0].dtype) for u in upstream]))
    found = [*(x.detach() for x in outputs), *(None if x is None else next(gradients) for x in leaves)]
    return {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def _check(function, tensors, upstream, floor, eps=EPS):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream, eps=eps)
    same = _run(reference.mix_inputs, tensors, upstream, eps=eps)
    exact = _run(reference.mix_inputs, tensors, upstream, torch.float64, eps)
    assert found.keys() == exact.keys()
    for name, s in same.items():
        assert found[name].dtype == s.dtype and found[name].shape == s.shape, name
        assert_close(found[name], exact[name], max(4 * error_ratio(s, exact[name]), floor), name)


def test_is_the_formula():
    (x, gain, mix_x, x0, mix_x0, skip, weight), _ = _inputs((2, 3, 36), (True, True, True))
    options = {"mix_x_D": mix_x, "x0": x0, "mix_x0_D": mix_x0, "skip": skip, "skip_weight_D": weight}
    mixed, normed = mix_inputs(x, gain, **options, eps=EPS)
    expected = mix_x * (x[1, 2] + weight * skip[1, 2]) + mix_x0 * x0[1, 2]
    assert_close(mixed[1, 2], expected, 1e-6)
    assert_close(normed[1, 2], expected / (expected.square().mean() + EPS).sqrt() * gain, 1e-6)
    mixed, normed = mix_inputs(x, gain, skip=skip, skip_weight_D=weight, eps=EPS)
    assert_close(mixed[1, 2], x[1, 2] + weight * skip[1, 2], 1e-6)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_gradients_of_the_reference(parts):
    tensors, _ = _inputs((2, 3), parts)
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: reference.mix_inputs(*x, EPS), leaves)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, parts, poisoned):
    # The norm of a single element is its sign unless eps is large: its gradient is then only rounding error.
    _check(kernels.mix_inputs, *_inputs(shape, parts), 2e-6, eps=1.0 if shape[-1] == 1 else EPS)


@pytest.mark.parametrize("parts", PARTS[:4], ids=str)
@pytest.mark.parametrize("n_programs", [1, 2, 5])
def test_programs_with_several_tiles(n_programs, parts, poisoned, monkeypatch):
    """Of four rows each; the last one is partly filled."""
    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(kernels, name, {"tile": 32, "per_warp": 32, "programs": n_programs})
    _check(kernels.mix_inputs, *_inputs((2, 11, 7), parts), 2e-6)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # in rows that are never written
def test_rows_beyond_the_last_add_nothing(poisoned):
    """Not even without eps, where their norm divides by zero."""
    _check(kernels.mix_inputs, *_inputs((5, 24), PARTS[0]), 2e-6, eps=0.0)


@pytest.mark.parametrize("parts", PARTS[:4], ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_kernel_on_empty_tensors(shape, parts):
    tensors, upstream = _inputs(shape, parts)
    found = _run(kernels.mix_inputs, tensors, upstream)
    for name, e in _run(reference.mix_inputs, tensors, upstream).items():
        assert found[name].shape == e.shape and found[name].dtype == e.dtype and not found[name].any(), name


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_is_used(used, poisoned):
    """The gradient of the other is zero."""
    tensors, upstream = _inputs((3, 8), PARTS[0])

    def gradients(function):
        leaves = [x.detach().requires_grad_() for x in tensors]
        inputs = leaves if used else [x for x in leaves if x is not leaves[1]]  # the gain is that of the norm
        return torch.autograd.grad(function(*leaves, EPS)[used], inputs, upstream[used])

    for a, e in zip(gradients(kernels.mix_inputs), gradients(reference.mix_inputs), strict=True):
        assert_close(a, e, 2e-6)


def test_gradients_have_the_dtypes_of_their_tensors():
    (x, gain, mix_x, x0, mix_x0, skip, weight), upstream = _inputs((3, 8), PARTS[0])
    tensors = [x.bfloat16(), gain, mix_x.half(), x0, mix_x0.bfloat16(), skip.half(), weight]
    found = _run(kernels.mix_inputs, tensors, upstream)
    assert [x.dtype for x in found.values()] == [torch.bfloat16] * 2 + [x.dtype for x in tensors]


def test_kernel_on_transposed_tensors(poisoned):
    tensors, upstream = _inputs((3, 5, 8), PARTS[0])

    def transposed(x):
        return x if x.ndim < 3 else x.transpose(0, 1).contiguous().transpose(0, 1)

    def function(*arguments):
        return kernels.mix_inputs(*map(transposed, arguments[:-1]), arguments[-1])

    _check(function, tensors, [transposed(x) for x in upstream], 2e-6)


@pytest.mark.parametrize("parts", PARTS[:4], ids=str)
def test_operators_pass_opcheck(parts):
    for shape in ((2, 3, 8), (2, 0, 8)):
        tensors, upstream = _inputs(shape, parts)
        plain = (*upstream, *tensors, EPS)
        torch.library.opcheck(torch.ops.fusedlm.mix_inputs_backward.default, plain)
        leaves = [None if x is None else x.requires_grad_() for x in tensors]
        torch.library.opcheck(torch.ops.fusedlm.mix_inputs.default, (*leaves, EPS))


def test_full_graph():
    tensors, upstream = _inputs((2, 3, 8), PARTS[0])

    def function(x, *rest):
        return kernels.mix_inputs(2 * x, *rest)

    plain = _run(function, tensors, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream)
    assert all(torch.equal(compiled[name], x) for name, x in plain.items())


def test_what_the_kernels_cannot_run():
    assert "needs rows of at most 8192, not 8193" in str(explain("mix_inputs", width=8193))


def test_bad_input():
    x, vector = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"x \(2, 3, 0\) must be \(..., D\) with D at least 1"):
        mix_inputs(x[..., :0], vector)
    with pytest.raises(ValueError, match="skip and its factor are given together or not at all"):
        mix_inputs(x, vector, skip=x)
    with pytest.raises(ValueError, match=r"x0 \(2, 1, 4\) must have the shape of x, \(2, 3, 4\)"):
        mix_inputs(x, vector, x0=x[:, :1], mix_x0_D=vector)
    with pytest.raises(ValueError, match=r"mix_x_D \(3,\) must be \(4,\), the width of x"):
        mix_inputs(x, vector, mix_x_D=vector[:3])


WIDE = [((3000, 77), PARTS[0]), ((300, 3000), PARTS[1]), ((301, 8192), PARTS[0])]


@pytest.mark.gpu
@pytest.mark.parametrize("shape, parts", [((4, 1000, 512), parts) for parts in PARTS] + WIDE, ids=str)
def test_kernel_in_half_precision(shape, parts):
    _check(kernels.mix_inputs, *_inputs(shape, parts, torch.bfloat16), 1e-5)


@pytest.mark.gpu
def test_kernel_in_float16():
    _check(kernels.mix_inputs, *_inputs((4, 1000, 512), PARTS[0], torch.float16), 1e-5)


@pytest.mark.gpu
def test_gradients_are_reproducible():
    arguments = _inputs((4, 1000, 512), PARTS[0], torch.bfloat16)
    first, second = (_run(kernels.mix_inputs, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], x) for name, x in second.items())


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**19 + 3, 4096, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    vector = torch.ones(4096, device="cuda")
    mixed, normed = kernels.mix_inputs(x, vector, vector, None, None, None, None, EPS)
    expected = reference.mix_inputs(x[-2:], vector, vector, None, None, None, None, EPS)
    assert_close(mixed[-2:], expected[0], 1e-2)
    assert_close(normed[-2:], expected[1], 1e-2)
