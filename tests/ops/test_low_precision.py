"""8-bit products: the emulation against float64 and an independent rounding, the kernels against the emulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusedlm.ops import LowPrecision, isolate_outliers, low_precision_linear, low_precision_weight, quantize_mx
from fusedlm.ops.low_precision import reference
from fusedlm.ops.low_precision.formats import GRIDS, Cast, padded
from fusedlm.ops.low_precision.linear import linear
from fusedlm.testing import assert_close, error_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("output", "x", "weight")
PRECISIONS = [
    LowPrecision(),
    LowPrecision(gradients="e5m2"),
    LowPrecision(scales="tensor"),
    LowPrecision(scales="tensor", gradients="e5m2"),
    LowPrecision("int8"),
    LowPrecision("int8", "tensor"),
    LowPrecision("mxfp8"),
    LowPrecision("mxfp8", gradients="e5m2"),
]
EMULATED = [precision for precision in PRECISIONS if precision.format != "mxfp8"]


def _id(precision):
    return f"{precision.format}-{precision.scales}-{precision.gradients}"


def _inputs(n=150, k=128, m=96, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(size, generator=g) for size in ((n, k), (m, k), (n, m)))
    dy *= torch.randn(n, 1, generator=g).exp()  # tokens differ in what they teach
    return x.to(DEVICE, dtype), (w / math.sqrt(k)).to(DEVICE), (1e-4 * dy).to(DEVICE, dtype)


def _run(function, x, weight, dy, **options):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _products(x, weight, dy):
    x, weight, dy = x.double(), weight.double(), dy.double()
    return [x @ weight.t(), dy @ weight, dy.t() @ x]


def _rounded(x, grid, dim):
    """x (float64) to the nearest values of a grid, scaled by the largest magnitude along dim or of all (None), by a
    search in the table of all values."""
    amax = x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().max()
    scale = (amax.float() / GRIDS[grid].largest).double()
    codes = torch.arange(256, dtype=torch.uint8, device=x.device)
    values = codes.view(GRIDS[grid].dtype).double()
    values = values[values.isfinite() & (values.abs() <= GRIDS[grid].largest)].unique()
    middles, x = (values[1:] + values[:-1]) / 2, (x.float() * (1 / scale.float())).double().contiguous()
    at = torch.bucketize(x, middles)
    is_tie = x == middles[at.clamp(max=len(middles) - 1)]
    at += is_tie & ((at - len(values) // 2) % 2 != 0)  # from zero on, every other value is even
    return values[at] * scale


def _mx_rounded(x, kind):
    """x in blocks of 32 along its last dimension."""
    tensor = quantize_mx(x.float().contiguous(), f"mxfp8_{kind}", backend="reference")
    scales = torch.exp2(tensor.scales.double() - 127)[..., None]
    values = tensor.codes.view(GRIDS[kind].dtype).double().unflatten(-1, (-1, 32)) * scales
    return values.flatten(-2)[:, : x.shape[1]]


def _operands(precision, x, weight, dy):
    """Of each product (a, a rounded, b, b rounded), float64, where it is a b^T."""
    x, weight, dy = x.double(), weight.double(), dy.double()
    element = "int8" if precision.format == "int8" else "e4m3"
    gradient = "int8" if precision.format == "int8" else precision.gradients
    if precision.format == "mxfp8":
        pairs = [(x, weight), (dy, weight.t()), (dy.t(), x.t())]
        kinds = [(element, element), (gradient, element), (gradient, element)]
        return [
            (a, _mx_rounded(a, kind_a), b, _mx_rounded(b, kind_b))
            for (a, b), (kind_a, kind_b) in zip(pairs, kinds, strict=True)
        ]
    if precision.scales == "tensor":
        xq, wq, dyq = (_rounded(a, g, None) for a, g in ((x, element), (weight, element), (dy, gradient)))
        return [(x, xq, weight, wq), (dy, dyq, weight.t(), wq.t()), (dy.t(), dyq.t(), x.t(), xq.t())]
    xq = _rounded(x, element, 1)
    scales = (x.abs().amax(1, keepdim=True).float() / GRIDS[element].largest).double()
    folded = dy * scales
    foldedq = _rounded(folded, gradient, 0 if element == "int8" else None)
    return [
        (x, xq, weight, _rounded(weight, element, 1)),
        (dy, _rounded(dy, gradient, 1), weight.t(), _rounded(weight, element, 0).t()),
        (folded.t(), foldedq.t(), (x / scales).t(), (xq / scales).t()),
    ]


@pytest.mark.parametrize("precision", PRECISIONS, ids=_id)
def test_products_are_those_of_rounded_operands(precision):
    """All three, and so values on the grid, which a search in the table of the format's values finds. Their noise is
    that of both operands: no product is more exact."""
    inputs = _inputs(300, 256, 192)
    found = _run(low_precision_linear, *inputs, precision=precision, backend="reference")
    operands = _operands(precision, *inputs)
    for name, a, e, (p, pq, q, qq) in zip(NAMES, found, _products(*inputs), operands, strict=True):
        assert_close(a, pq @ qq.t(), 1e-5, name)
        noise = math.hypot(error_ratio(pq, p), error_ratio(qq, q))
        assert 0.8 * noise < error_ratio(a, e) < 1.2 * noise, (name, error_ratio(a, e), noise)
        assert noise > 0.004, name


@pytest.mark.parametrize(("precision", "least"), [(LowPrecision(), 28.0), (LowPrecision("int8"), 38.0)], ids=str)
def test_signal_to_quantisation_noise(precision, least):
    """Of normal values, whose operands have 31.5 and 41.2 dB (docs/quantization.md)."""
    x, weight, dy = _inputs(1000, 1024, 256)
    found = low_precision_linear(x, weight, precision, backend="reference")
    sqnr = -20 * math.log10(error_ratio(found, x.double() @ weight.double().t()))
    assert least < sqnr < least + 2


def _producer_options(producer, k=128):
    gain = torch.linspace(0.5, 2, k, device=DEVICE)
    return {
        "none": {},
        "norm": {"gain_K": gain, "eps": 1e-5},
        "swiglu": {"activation": "swiglu"},
        "relu2": {"activation": "relu2", "slope": 0.5},
    }[producer]


def _unfused(x, options):
    wide = x.double()
    if "gain_K" in options:
        return F.rms_norm(wide, x.shape[-1:], options["gain_K"].double(), options["eps"])
    if options.get("activation") == "swiglu":
        gate, up = wide.chunk(2, -1)
        return F.silu(gate) * up
    return F.leaky_relu(wide, 0.5).square() if options else wide


@pytest.mark.parametrize("producer", ["norm", "swiglu", "relu2"])
@pytest.mark.parametrize("precision", [LowPrecision(), LowPrecision("int8", "tensor"), LowPrecision("mxfp8")], ids=_id)
def test_gradients_through_what_is_cast(producer, precision):
    """Those of the separate steps, with the gradient of the product that the layer itself gives."""
    _, weight, dy = _inputs(40)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 256 if producer == "swiglu" else 128, generator=g).to(DEVICE)
    options = _producer_options(producer)
    leaves = [x.requires_grad_(), *(o.requires_grad_() for o in options.values() if isinstance(o, torch.Tensor))]
    y = low_precision_linear(x, weight, precision, backend="reference", **options)
    found = torch.autograd.grad(y, leaves, dy)
    value = _unfused(x, options)
    inner = value.detach().float().requires_grad_()
    y_unfused = low_precision_linear(inner, weight, precision, backend="reference")
    assert_close(y, y_unfused, 2e-3)  # some elements are rounded to the neighbouring value
    (d_value,) = torch.autograd.grad(y_unfused, inner, dy)
    for a, e in zip(found, torch.autograd.grad(value, leaves, d_value.double()), strict=True):
        assert_close(a, e, 1e-5)


def test_rows_do_not_depend_on_each_other_by_row():
    x, weight, _ = _inputs()
    alone = low_precision_linear(x[3:4], weight, backend="reference")
    x[5] = 1e30
    assert torch.allclose(low_precision_linear(x, weight, backend="reference")[3:4], alone, rtol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS, ids=_id)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1e9, 1e18])
def test_any_magnitude(precision, scale):
    x, weight, dy = _inputs(33)
    found = _run(low_precision_linear, x * scale, weight, dy, precision=precision, backend="reference")
    for name, a, e in zip(NAMES, found, _products(x * scale, weight, dy), strict=True):
        if scale or name == "x":
            assert_close(a, e, 0.09, name)
        else:
            assert not a.any(), name


@pytest.mark.parametrize("precision", PRECISIONS, ids=_id)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_propagates(precision, bad):
    x, weight, dy = _inputs(33)
    x[2, 7] = bad
    y, _, dw = _run(low_precision_linear, x, weight, dy, precision=precision, backend="reference")
    assert y[2].isnan().all() and dw[:, 7].isnan().all()
    if precision.by_row:
        assert not y[3:].isnan().any()
    x, weight, dy = _inputs(33)
    dy[4, 3] = bad
    y, dx, dw = _run(low_precision_linear, x, weight, dy, precision=precision, backend="reference")
    assert not y.isnan().any() and dx[4].isnan().all() and dw[3].isnan().all()
    weight[1, 1] = bad
    assert low_precision_linear(x, weight, precision, backend="reference")[:, 1].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS, ids=_id)
def test_no_tokens(precision):
    x, weight, _ = _inputs()
    found = _run(low_precision_linear, x[:0], weight, x.new_zeros(0, 96), precision=precision, backend="reference")
    assert [tuple(a.shape) for a in found] == [(0, 96), (0, 128), (96, 128)] and not found[2].any()


def test_what_is_saved_for_backward():
    """One byte per element of the input and of the weight, not the input."""
    x, weight, _ = _inputs(32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_precision_linear(x.requires_grad_(), weight.requires_grad_(), backend="reference")
    assert sum(t.nbytes for t in saved) == 128 * 32 + 128 * 96 + 4 * (1 + 32 + 0 + 128)


def test_codes_of_the_weight_are_used():
    x, weight, _ = _inputs()
    codes = low_precision_weight(2 * weight, backend="reference")
    doubled = low_precision_linear(x, 2 * weight, backend="reference")
    assert torch.equal(low_precision_linear(x, weight, codes=codes, backend="reference"), doubled)
    again = low_precision_weight(weight, out=codes, backend="reference")
    assert again is codes
    assert torch.equal(2 * low_precision_linear(x, weight, codes=codes, backend="reference"), doubled)


@pytest.mark.parametrize("precision", [LowPrecision(), LowPrecision("int8", "tensor"), LowPrecision("mxfp8")], ids=_id)
def test_full_graph(precision):
    x, weight, dy = _inputs(20, 32, 48)
    codes = low_precision_weight(weight, precision, backend="reference")

    def function(x, weight, gain):
        return low_precision_linear(2 * x, weight, precision, codes=codes, gain_K=gain, backend="reference")

    gain = torch.rand(32, device=DEVICE)
    plain, compiled = (
        _run(lambda x, w, f=f: f(x, w, gain), x, weight, dy)
        for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_operators_pass_opcheck():
    x, weight, dy = _inputs(20, 32, 48)
    codes = low_precision_weight(weight, backend="reference")
    gain = torch.rand(32, device=DEVICE).requires_grad_()
    arguments = x.requires_grad_(), gain, weight.requires_grad_(), None, *codes, "norm", 1e-6, "fp8", "row", "e5m2"
    torch.library.opcheck(torch.ops.fusedlm.low_precision_linear.default, (*arguments, "reference"))
    codes = low_precision_weight(weight, LowPrecision("mxfp8"))
    torch.library.opcheck(torch.ops.fusedlm.low_precision_linear_mx.default, (x, weight, *codes, "e4m3"))


def test_bad_input():
    x, weight, _ = _inputs()
    with pytest.raises(ValueError, match=r"^format='fp4' must be one of fp8, int8, mxfp8"):
        LowPrecision("fp4")
    with pytest.raises(ValueError, match=r"^gradients='e5m2': the gradients of int8"):
        LowPrecision("int8", gradients="e5m2")
    with pytest.raises(ValueError, match=r"x \(150, 128\) and weight \(96, 64\) must be"):
        low_precision_linear(x, weight[:, :64])
    with pytest.raises(ValueError, match=r"activation='gelu' must be one of"):
        low_precision_linear(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"gain \(7,\) must be \(128,\)"):
        low_precision_linear(x, weight, gain_K=torch.ones(7, device=DEVICE))
    with pytest.raises(ValueError, match=r"must be a matrix of floats"):
        low_precision_weight(weight[0])
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run: needs"):
        low_precision_linear(x.float(), weight, backend="triton")


# Outliers


def _with_outliers(n=64, k=128, columns=(3, 77, 100), scale=40.0):
    x, weight, dy = _inputs(n, k)
    x[:, list(columns)] *= scale
    return x, weight, dy


def test_outliers_leave_the_8_bit_product():
    x, weight, dy = _with_outliers()
    main, y, found, taken = isolate_outliers(x, weight, 20.0)
    assert (int(found), int(taken)) == (3, 3)
    columns = [3, 77, 100]
    assert not main[:, columns].any() and torch.equal(main != 0, (x != 0) & (main != 0))
    assert_close(y, x[:, columns] @ weight[:, columns].t(), 1e-6)
    exact = _products(x, weight, dy)

    def isolated(x, weight):
        main, y, *_ = isolate_outliers(x, weight, 20.0)
        return y + low_precision_linear(main, weight, LowPrecision("int8"), backend="reference")

    found = _run(isolated, x, weight, dy)
    plain = _run(low_precision_linear, x, weight, dy, precision=LowPrecision("int8"), backend="reference")
    assert error_ratio(found[0], exact[0]) < error_ratio(plain[0], exact[0]) / 2
    # Both gradients of these columns are those of the narrow product.
    assert_close(found[2][:, columns], exact[2][:, columns], 1e-6)
    assert_close(found[1][:, columns], exact[1][:, columns], 1e-6)


def test_no_outliers_is_the_8_bit_product_alone():
    x, weight, dy = _inputs()
    main, y, found, taken = isolate_outliers(x, weight, 50.0)
    assert torch.equal(main, x) and not y.any() and (int(found), int(taken)) == (0, 0)


def test_outliers_beyond_the_capacity_stay():
    x, weight, _ = _with_outliers()
    x[:, 77] *= 10
    main, y, found, taken = isolate_outliers(x, weight, 20.0, capacity=1)
    assert (int(found), int(taken)) == (3, 1)
    assert not main[:, 77].any() and torch.equal(main[:, 3], x[:, 3])
    assert_close(y, x[:, 77:78] @ weight[:, 77:78].t(), 1e-6)


def test_outliers_of_equal_columns_and_of_nan():
    x, weight, _ = _inputs()
    x[:, :100] = 0.0  # most columns are the same
    assert int(isolate_outliers(x, weight, 20.0)[2]) == 0
    x[0, 0] = float("nan")
    main, y, *_ = isolate_outliers(x, weight, 20.0)
    assert main[0, 0].isnan() and not y.isnan().any()


# Kernels


def _kernels():
    return pytest.importorskip("fusedlm.ops.low_precision.triton")


def _assert_same(found: Cast, expected: Cast):
    for name, a, e in zip(Cast._fields, found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, name
        same = (a == e) | (a.isnan() & e.isnan()) if a.is_floating_point() else a == e
        assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} differ"


def _matrix(n, k, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + k)
    x = torch.randn(n, k, generator=g) * torch.randn(n, 1, generator=g).exp()
    x[n // 2] = 0.0
    if n > 4:
        x[1, k // 2], x[2], x[3, k // 2] = float("nan"), 1e-40, float("inf")
    return x.to(DEVICE, dtype)


SHAPES = [(150, 272), (37, 48), (5, 7), (1, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_casts_have_the_same_bits(shape, grid, poisoned):
    kernels, x = _kernels(), _matrix(*shape)
    amax = reference.row_amax(x)
    for by_row in (True, False):
        expected = reference.cast(x, None, "none", 0.0, amax, grid, by_row)[0]
        assert expected.codes_t.shape == (shape[1], padded(shape[0]))
        for given in (amax, None):
            _assert_same(kernels.cast(x, None, "none", 0.0, given, grid, by_row)[0], expected)
        _assert_same(kernels.cast_weight(x, grid, by_row), reference.cast_weight(x, grid, by_row))
    x = torch.cat([x, x], 1)[:, : shape[1]]  # rows that are not contiguous
    fold = torch.rand(shape[0], device=DEVICE)
    largest = (amax * fold).amax(0, keepdim=True)
    for amax_t in (largest, torch.rand(shape[1], device=DEVICE)):
        arguments = x, amax, fold, amax_t, grid
        _assert_same(kernels.cast_gradient(*arguments), reference.cast_gradient(*arguments))


@pytest.mark.parametrize("producer", ["norm", "swiglu", "relu2"])
@pytest.mark.parametrize("by_row", [True, False])
def test_casts_of_what_a_kernel_computes(producer, by_row, poisoned):
    kernels, x = _kernels(), _matrix(37, 96)
    gain = torch.linspace(0.5, 2, 96, device=DEVICE)
    for grid in GRIDS.values():
        arguments = x, gain if producer == "norm" else None, producer, 0.5 if producer == "relu2" else 1e-6, None
        found, inverse_rms = kernels.cast(*arguments, grid, by_row)
        expected, expected_rms = reference.cast(*arguments, grid, by_row)
        finite = expected.scales.isfinite()
        assert torch.equal(found.scales.isfinite(), finite)
        torch.testing.assert_close(found.scales[finite], expected.scales[finite], rtol=2e-6, atol=0)
        if not finite.all() and not by_row:
            continue
        rows = finite if by_row else slice(None)
        values = [reference.decode(c.codes[rows], grid) for c in (found, expected)]
        assert (values[0] != values[1]).float().mean() < 0.01  # on the border between two values
        assert_close(*values, 2e-2)
        transposed = torch.zeros_like(found.codes_t)
        transposed[:, : len(x)] = found.codes.t()
        assert torch.equal(found.codes_t, transposed)
        if inverse_rms is not None:
            torch.testing.assert_close(inverse_rms, expected_rms, equal_nan=True)


@pytest.mark.parametrize("precision", EMULATED, ids=_id)
@pytest.mark.parametrize("producer", ["none", "norm", "swiglu", "relu2"])
def test_kernels_and_products_of_torch(precision, producer, poisoned):
    """All of the layer as a GPU runs it: torch's 8-bit products run on a CPU too."""
    _kernels()
    _, weight, dy = _inputs(37)
    x = torch.randn(37, 256 if producer == "swiglu" else 128, generator=torch.Generator().manual_seed(2))
    x, dy = x.to(DEVICE, torch.bfloat16), dy.to(torch.bfloat16)
    gain = torch.linspace(0.5, 2, 128, device=DEVICE) if producer == "norm" else None
    codes = low_precision_weight(weight, precision, backend="reference")

    def function(x, weight, backend):
        return linear(x, gain, weight, codes, precision, producer, 0.5 if producer == "relu2" else 1e-6, backend)

    found, expected = (_run(function, x, weight, dy, backend=backend) for backend in ("triton", "reference"))
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert_close(a, e, 5e-3, name)  # outputs are rounded to bfloat16


def test_each_matrix_is_cast_by_one_kernel(monkeypatch):
    kernels, launched = _kernels(), []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda x, *rest: launched.append(tuple(x.shape)) or launch(x, *rest))
    x, weight, dy = _inputs(37)
    codes = low_precision_weight(weight, backend="reference")
    _run(lambda x, w: linear(x, None, w, codes, LowPrecision(), "none", 0.0, "triton"), x, weight, dy)
    assert launched == [(37, 128), (37, 96)]


@pytest.mark.parametrize(("precision", "product"), [(LowPrecision(), "_scaled_mm"), (LowPrecision("int8"), "_int_mm")])
def test_products_that_run(precision, product, monkeypatch):
    """Three 8-bit products of torch, and no other."""
    _kernels()
    calls, real = [], getattr(torch, product)
    x, weight, dy = _inputs(37, dtype=torch.bfloat16)
    codes = low_precision_weight(weight, precision, backend="reference")
    for name in ("mm", "matmul"):
        monkeypatch.setattr(torch, name, None)
    monkeypatch.setattr(reference, "multiply", None)
    monkeypatch.setattr(torch, product, lambda a, b, **rest: calls.append((a.dtype, b.dtype)) or real(a, b, **rest))
    _run(lambda x, w: linear(x, None, w, codes, precision, "none", 0.0, "triton"), x, weight, dy)
    assert calls == [(precision.grid.dtype, precision.grid.dtype)] * 3


def test_integer_sums_of_many_terms():
    kernels = _kernels()
    a = torch.full((40, 131072 + 64), 127, dtype=torch.int8, device=DEVICE)
    total = kernels._integer_product(a, a[:16])
    assert total.shape == (40, 16) and (total == 127.0**2 * a.shape[1]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS, ids=_id)
@pytest.mark.parametrize("shape", [(4096, 1024, 4096), (1000, 512, 1408), (17, 64, 128), (1, 256, 512)], ids=str)
def test_on_a_gpu(precision, shape):
    x, weight, dy = _inputs(*shape, dtype=torch.bfloat16)
    found, expected = (
        _run(low_precision_linear, x, weight, dy, precision=precision, backend=backend)
        for backend in ("auto", "reference")
    )
    for name, a, e in zip(NAMES, found, expected, strict=True):
        assert_close(a, e, 5e-3, name)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
def test_a_gpu_rounds_as_the_table(grid):
    """Every value of a 16-bit float below and above the grid, its ties among them."""
    kernels = _kernels()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE).to(torch.int16)
    x = bits.view(torch.bfloat16).float()
    x = torch.where(x.isfinite() & (x.abs() <= grid.largest), x, 0.0)[:, None].expand(-1, 16).contiguous()
    amax = torch.full((1,), grid.largest, device=DEVICE)
    _assert_same(
        kernels.cast_gradient(x, amax, None, None, grid), reference.cast_gradient(x, amax, None, None, grid)
    )  # fmt: skip


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    kernels, n, k = _kernels(), 2**31 // 16384 + 130, 16384
    x = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    cast = kernels.cast(x, None, "none", 0.0, None, GRIDS["e4m3"], True)[0]
    expected = reference.cast(x[-100:], None, "none", 0.0, None, GRIDS["e4m3"], True)[0]
    assert torch.equal(cast.codes[-100:], expected.codes)
    assert torch.equal(cast.codes_t[-64:, n - 100 : n], expected.codes[:, -64:].t())


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x, weight, dy = _inputs(256, dtype=torch.bfloat16)
    codes = low_precision_weight(weight)

    def run():
        return _run(low_precision_linear, x, weight, dy, codes=codes)

    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, run(), strict=True):
        assert torch.equal(a, e)
