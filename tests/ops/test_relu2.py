"""The reference against the formula, the kernels against the reference in float64: output and every gradient."""

import pytest
import torch

from fusedlm.ops import relu2_mlp
from fusedlm.ops.common import Call
from fusedlm.ops.relu2 import reference
from fusedlm.ops.relu2.op import RELU2_MLP
from fusedlm.testing import RecordedOperators, assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.relu2.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPES = [0.0, 0.5]
NAMES = ("output", "x", "w_up", "w_down")
# N, D, H. Rows of a multiple of 16 bytes, which TMA can load, and others.
ALIGNED = [(70, 24, 136), (130, 32, 200), (33, 20, 44), (1, 16, 40)]
ODD = [(5, 3, 7), (40, 31, 70), (70, 24, 135), (70, 21, 136), (4, 1, 9), (9, 4, 1), (1, 5, 6)]
EMPTY = [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)]


def _inputs(shape, dtype=torch.float32, weight_dtype=None):
    n, d, h = shape
    g = torch.Generator().manual_seed(sum(shape))

    def draw(*size, scale=1.0, dtype=dtype):
        return (scale * torch.randn(size, generator=g)).to(DEVICE, dtype)

    weights = [
        draw(h, d, scale=max(d, 1) ** -0.5, dtype=weight_dtype or dtype),
        draw(d, h, scale=max(h, 1) ** -0.5, dtype=weight_dtype or dtype),
    ]
    return [draw(n, d), *weights], draw(n, d)


def _run(function, tensors, upstream, slope, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, slope)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _check(function, tensors, upstream, slope, floor):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(function, tensors, upstream, slope)
    same = _run(reference.relu2_mlp, tensors, upstream, slope)
    exact = _run(reference.relu2_mlp, tensors, upstream, slope, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype, name
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def _uses_tma(monkeypatch) -> list[bool]:
    """Whether each launch from now on uses TMA."""
    used, can_use_tma = [], kernels.can_use_tma
    monkeypatch.setattr(kernels, "can_use_tma", lambda *matrices: used.append(can_use_tma(*matrices)) or used[-1])
    return used


@pytest.mark.parametrize("slope", SLOPES)
def test_is_the_formula(slope):
    (x, w_up, w_down), _ = _inputs((5, 8, 12))
    z = x @ w_up.t()
    a = torch.where(z > 0, z, slope * z)
    assert_close(relu2_mlp(x, w_up, w_down, slope=slope, backend="reference"), (a * a) @ w_down.t(), 1e-6)


@pytest.mark.parametrize("slope", SLOPES)
def test_gradients_of_the_reference(slope):
    tensors, _ = _inputs((3, 4, 6), torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: reference.relu2_mlp(*x, slope), leaves)


@pytest.mark.parametrize("slope", [*SLOPES, 1.0, -0.25])
@pytest.mark.parametrize("shape", [*ALIGNED, *ODD])
def test_kernel(shape, slope, poisoned, monkeypatch):
    used = _uses_tma(monkeypatch)
    _check(kernels.relu2_mlp, *_inputs(shape), slope, 2e-6)
    has_tma = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert used == [shape in ALIGNED and has_tma] * 2


@pytest.mark.parametrize("slope", SLOPES)
def test_kernel_on_single_elements(slope):
    tensors, upstream = _inputs((1, 1, 1))
    found = _run(kernels.relu2_mlp, tensors, upstream, slope)
    expected = _run(reference.relu2_mlp, tensors, upstream, slope)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("shape", EMPTY)
def test_kernel_on_empty_tensors(shape, slope, poisoned):
    tensors, upstream = _inputs(shape)
    found = _run(kernels.relu2_mlp, tensors, upstream, slope)
    expected = _run(reference.relu2_mlp, tensors, upstream, slope)
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype and not a.any()


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("n_subtiles", [1, 2, 4])
@pytest.mark.parametrize("shape", [(70, 40, 600), (50, 17, 300)])
def test_kernel_in_many_small_tiles(shape, n_subtiles, slope, poisoned, monkeypatch):
    """Several tiles per program, several groups of tiles, several steps of the inner loop."""
    small = kernels._CONFIGS["float32"] | {
        "BLOCK_M": 16, "BLOCK_N": 64 * n_subtiles, "BLOCK_K": 16, "GROUP_M": 2, "SUBTILES": n_subtiles, "FLATTEN": True
    }  # fmt: skip
    monkeypatch.setitem(kernels._CONFIGS, "float32", small)
    _check(kernels.relu2_mlp, *_inputs(shape), slope, 2e-6)


@pytest.mark.parametrize("slope", SLOPES)
def test_kernel_on_views(slope, monkeypatch):
    """Slices, transposed weights, an expanded upstream gradient, an unaligned base."""
    tensors, upstream = _inputs((33, 24, 40))
    upstream = upstream[:1].expand(33, 24)

    def function(x, w_up, w_down, slope):
        x, w_up, w_down = (
            torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :24],
            w_up.t().contiguous().t(),
            w_down[:, :],
        )
        return kernels.relu2_mlp(x, w_up, w_down, slope)

    _check(function, tensors, upstream, slope, 2e-6)
    used = _uses_tma(monkeypatch)

    def unaligned(x, w_up, w_down, slope):
        return kernels.relu2_mlp(torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x), w_up, w_down, slope)

    _check(unaligned, tensors, upstream, slope, 2e-6)
    assert used[0] is False


def test_a_single_row_may_have_any_stride():
    (x, w_up, w_down), _ = _inputs((33, 24, 40))
    row = x.as_strided((1, 24), (7, 1), 24)
    assert_close(kernels.relu2_mlp(row, w_up, w_down, 0.5), reference.relu2_mlp(x[1:2], w_up, w_down, 0.5), 2e-6)


@pytest.mark.parametrize("slope", SLOPES)
def test_nan_stays_in_its_row(slope):
    (x, w_up, w_down), _ = _inputs((5, 8, 12))
    x[3, 2] = float("nan")
    out = kernels.relu2_mlp(x, w_up, w_down, slope)
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("slope", SLOPES)
def test_one_matrix_of_the_hidden_layer_is_saved_for_backward(slope):
    """And with a slope one bit per element, padded to groups of 64."""
    tensors, upstream = _inputs((33, 24, 40))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.shape, x.dtype)) or x, lambda x: x):
        kernels.relu2_mlp(*(x.requires_grad_() for x in tensors), slope)
    shapes = [shape for shape, dtype in saved if dtype == torch.float32]
    assert sorted(shapes) == sorted([(33, 24), (40, 24), (24, 40), (33, 40)])
    assert [x for x in saved if x[1] != torch.float32] == [((33 if slope else 0, 8), torch.uint8)]


@pytest.mark.parametrize("slope", SLOPES)
def test_matrices_of_the_hidden_layer_that_are_allocated(slope, monkeypatch):
    """h, and in backward the gradient of z. The signs are written only in training with a slope."""
    tensors, upstream = _inputs((33, 24, 40))
    allocated, launched = [], []
    launch = kernels._launch
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *x, f=make, **rest: allocated.append(f(*x, **rest)) or allocated[-1])

    def record(which, *x, **rest):
        if which == "up":
            launched.append(rest["SAVE_SIGNS"])
        return launch(which, *x, **rest)

    monkeypatch.setattr(kernels, "_launch", record)
    for training in (False, True):
        allocated.clear()
        with torch.set_grad_enabled(training):
            leaves = [x.requires_grad_() for x in tensors]
            out = kernels.relu2_mlp(*leaves, slope)
        assert sum(x.shape == (33, 40) for x in allocated) == 1
    allocated.clear()
    torch.autograd.grad(out, leaves, upstream)
    assert sum(x.shape == (33, 40) for x in allocated) == 1, "the gradient of z"
    assert launched == [False, slope > 0]


@pytest.mark.parametrize("slope", SLOPES)
def test_backward_allocates_no_zeros(slope):
    """As autograd does for the gradients of further outputs, unless told otherwise."""
    tensors, upstream = _inputs((33, 24, 40))
    leaves = [x.requires_grad_() for x in tensors]
    out = kernels.relu2_mlp(*leaves, slope)
    with RecordedOperators() as ran:
        torch.autograd.grad(out, leaves, upstream)
    assert ran.names and not any("zeros" in name for name in ran.names)


def test_backward_twice():
    tensors, upstream = _inputs((33, 24, 40))
    leaves = [x.requires_grad_() for x in tensors]
    out = kernels.relu2_mlp(*leaves, 0.5)
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, upstream), first, strict=True))


@pytest.mark.parametrize("slope", SLOPES)
def test_operators_pass_opcheck(slope):
    tensors, upstream = _inputs((9, 8, 12))
    detached = [x.detach() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.relu2_mlp.default, (*leaves, slope))
    torch.library.opcheck(torch.ops.fusedlm.relu2_mlp_inference.default, (*detached, slope))
    saved = torch.ops.fusedlm.relu2_mlp(*detached, slope)[1:]
    torch.library.opcheck(torch.ops.fusedlm.relu2_mlp_backward.default, (upstream, *detached, *saved, slope))


@pytest.mark.parametrize("slope", SLOPES)
def test_full_graph(slope):
    tensors, upstream = _inputs((9, 8, 12))

    def function(x, *rest):
        return kernels.relu2_mlp(2 * x, *rest)

    plain = _run(function, tensors, upstream, slope)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream, slope)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    (x, w_up, w_down), _ = _inputs((5, 8, 12))
    with pytest.raises(ValueError, match=r"x \(5, 7\), w_up \(12, 8\) and w_down \(8, 12\) must be"):
        relu2_mlp(x[:, :7], w_up, w_down)
    with pytest.raises(ValueError, match=r"w_down \(12, 8\) must be"):
        relu2_mlp(x, w_up, w_down.t())
    with pytest.raises(ValueError, match=r"x \(8,\)"):
        relu2_mlp(x[0], w_up, w_down)
    with pytest.raises(ValueError, match="slope=nan must be finite"):
        relu2_mlp(x, w_up, w_down, slope=float("nan"))


def test_where_the_kernel_runs(monkeypatch):
    def reason(dtype=torch.bfloat16, capability=(9, 0), dim=512, hidden=1536, device="cuda"):
        monkeypatch.setattr(Call, "capability", capability)
        call = Call(torch.device(device), dtype)
        return RELU2_MLP.select("auto", call, dim=dim, hidden=hidden).unsupported.get("triton")

    assert reason() is None and reason(torch.float16, (10, 0)) is None
    assert "needs bfloat16 or float16" in reason(torch.float32)
    assert "multiples of 8, not 512 and 1540" in reason(hidden=1540)
    assert "this is 8.0" in reason(capability=(8, 0)) and "this is 12.0" in reason(capability=(12, 0))
    assert "needs a CUDA device" in reason(device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(
    "shape", [(70, 24, 136), (33, 48, 200), (129, 31, 77), (1, 64, 256), (4096, 512, 1536), (1000, 2048, 6144)]
)
def test_kernel_in_half_precision(shape, slope, dtype, poisoned):
    _check(kernels.relu2_mlp, *_inputs(shape, dtype), slope, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("config", kernels._CONFIGS)
def test_every_config(config, slope, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "_config", lambda *shape: kernels._CONFIGS[config])
    _check(kernels.relu2_mlp, *_inputs((1000, 520, 1544), torch.bfloat16), slope, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("slope", SLOPES)
def test_weights_in_float32(slope):
    """As under autocast: cast for the matrix products, with float32 gradients."""
    tensors, upstream = _inputs((1000, 256, 768), torch.bfloat16, torch.float32)
    found = _run(kernels.relu2_mlp, tensors, upstream, slope)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert not torch.equal(found[2], found[2].bfloat16().float())
    _check(kernels.relu2_mlp, tensors, upstream, slope, 1e-5)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n, d, h = 2**31 // 8192 + 130, 64, 8192
    x, w_up, w_down = (torch.randn(size, device="cuda", dtype=torch.bfloat16) / 8 for size in ((n, d), (h, d), (d, h)))
    leaves = [leaf.requires_grad_() for leaf in (x, w_up, w_down)]
    upstream = torch.randn_like(x)
    out = kernels.relu2_mlp(*leaves, 0.5)
    dx = torch.autograd.grad(out, leaves, upstream)[0]
    tail = x[-100:].detach().requires_grad_()
    expected = reference.relu2_mlp(tail, w_up, w_down, 0.5)
    assert_close(out[-100:], expected, 1e-2)
    assert_close(dx[-100:], torch.autograd.grad(expected, tail, upstream[-100:])[0], 1e-2)
