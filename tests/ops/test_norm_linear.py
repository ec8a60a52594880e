"""The reference against the formula, both backends (for one, a few and many tokens) against the float64 reference."""

import pytest
import torch

from fusedlm.model.precision import autocast
from fusedlm.ops import OPS, rmsnorm_linear
from fusedlm.ops.common import Call
from fusedlm.ops.norm_linear import reference
from fusedlm.testing import assert_close, backend_of, error_ratio, part_model, randomise_

kernels = pytest.importorskip("fusedlm.ops.norm_linear.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("output", "x", "gamma", "weight")
# In float32 the large one needs more shared memory than a GPU has.
FLOAT32_CONFIGS = ["float32"] if DEVICE == "cuda" else ["float32", "large"]
BACKENDS = [kernels.packed_rmsnorm_linear, kernels.rmsnorm_linear]

# N, D, E. The second have rows of a multiple of 16 bytes in every dtype.
ODD = [(1, 1, 1), (1, 40, 33), (3, 17, 5), (16, 300, 20), (33, 1, 3), (35, 50, 7), (70, 130, 31)]
ALIGNED = [(33, 8, 8), (40, 48, 520), (150, 72, 136), (64, 64, 64), (257, 264, 40)]


def _inputs(n, width, n_out, dtype=torch.float32, weights=None):
    g = torch.Generator().manual_seed(n + width + n_out)

    def draw(*size):
        return torch.randn(size, generator=g).to(DEVICE)

    x, gamma, weight = draw(n, width), 1 + 0.3 * draw(width), draw(n_out, width) / width**0.5
    return [x.to(dtype), gamma.to(weights or dtype), weight.to(weights or dtype)], draw(n, n_out).to(dtype)


def _run(function, tensors, upstream, dtype=None, eps=EPS):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves, eps)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _check(function, tensors, upstream, floor):
    """Within four times the error of the reference in the same precision, or within the floor. One or two elements are
    compared with the terms that they are a sum of, which may cancel."""
    found = _run(function, tensors, upstream)
    same = _run(reference.rmsnorm_linear, tensors, upstream)
    exact = _run(reference.rmsnorm_linear, tensors, upstream, torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype and a.shape == s.shape, name
        if e.numel() <= 2 or a.shape[-1] == 1:
            unit = torch.finfo(a.dtype).eps
            assert torch.allclose(a.double(), e, rtol=16 * unit, atol=64 * unit * len(upstream) ** 0.5), name
        else:
            assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


def test_is_the_formula():
    (x, gamma, weight), _ = _inputs(5, 8, 3)
    y = rmsnorm_linear(x, gamma, weight, eps=EPS, backend="reference")
    z = x[4] / (x[4].square().mean() + EPS).sqrt() * gamma
    assert_close(y[4], weight @ z, 1e-6)
    deeper = rmsnorm_linear(x.view(5, 1, 8), gamma, weight, eps=EPS, backend="reference")
    assert torch.equal(deeper, y.view(5, 1, 3))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (1, 4, 2)])
def test_gradients_of_the_reference(shape):
    leaves = [x.double().requires_grad_() for x in _inputs(*shape)[0]]
    assert torch.autograd.gradcheck(lambda *x: reference.rmsnorm_linear(*x, EPS), leaves)


def test_the_reference_rounds_once():
    """The gain may have more digits than x and is not rounded; the normalised x is, to the dtype of x."""
    x, gamma, weight = (t.cpu() for t in _inputs(6, 16, 4, torch.bfloat16, torch.float32)[0])
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * gamma
    assert torch.equal(reference.rmsnorm_linear(x, gamma, weight, EPS), normed.bfloat16() @ weight.bfloat16().t())


@pytest.mark.parametrize("weights, ratio", [(torch.bfloat16, 1.03), (torch.float32, 0.75)])
def test_rounding_the_weight_with_its_gain_is_no_worse(weights, ratio):
    """Than rounding the normalised x. With float32 weights it is the only rounding, in place of two."""
    x, gamma, weight = (t.cpu() for t in _inputs(64, 512, 256, torch.bfloat16, weights)[0])
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    exact = inverse * x.double() * gamma.double() @ weight.double().t()
    normed = (inverse * x.double() * gamma.double()).bfloat16()
    usual = normed.double() @ weight.bfloat16().double().t()
    folded = inverse * (x.double() @ (gamma.double() * weight.double()).bfloat16().double().t())
    assert error_ratio(folded, exact) <= ratio * error_ratio(usual, exact)


@pytest.mark.parametrize("shape", [*ODD, *ALIGNED], ids=str)
def test_packed(shape):
    _check(kernels.packed_rmsnorm_linear, *_inputs(*shape), 2e-6)


@pytest.mark.parametrize("n", [1, 5, 35])
def test_without_eps(n):
    """Rows beyond the last, which are zero, are then divided by zero."""
    tensors, upstream = _inputs(n, 50, 7)
    found = _run(kernels.packed_rmsnorm_linear, tensors, upstream, eps=0.0)
    exact = _run(reference.rmsnorm_linear, tensors, upstream, torch.float64, eps=0.0)
    for name, a, e in zip(NAMES, found, exact, strict=True):
        assert_close(a, e, 2e-6, name)


@pytest.mark.parametrize("shape", ALIGNED, ids=str)
@pytest.mark.parametrize("config", FLOAT32_CONFIGS)
def test_triton(shape, config, monkeypatch):
    monkeypatch.setitem(kernels._CONFIGS, "float32", kernels._CONFIGS[config])
    _check(kernels.rmsnorm_linear, *_inputs(*shape), 2e-6)


@pytest.mark.parametrize("n", range(1, 34))
def test_every_small_number_of_tokens(n):
    _check(kernels.rmsnorm_linear, *_inputs(n, 72, 40), 2e-6)


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("widths", [(300, 37), (7, 3), (129, 65)], ids=str)
def test_a_few_tokens_wider_than_a_tile(n, widths, monkeypatch):
    monkeypatch.setattr(kernels, "_ONE_TOKEN_TILE", 256)
    monkeypatch.setattr(kernels, "_ONE_TOKEN_COLUMNS", 64)
    config = {"BLOCK_E": 16, "BLOCK_D": 32, "STAGES": 2, "num_warps": 4}
    monkeypatch.setattr(kernels, "_FEW_TOKENS_FLOAT32", config)
    _check(kernels.rmsnorm_linear, *_inputs(n, *widths), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 16, 0), (40, 16, 0), (0, 1, 1)], ids=str)
def test_empty(backend, shape):
    tensors, upstream = _inputs(*shape)
    found = _run(backend, tensors, upstream)
    assert [x.shape for x in found] == [x.shape for x in _run(reference.rmsnorm_linear, tensors, upstream)]
    assert all(not x.any() for x in found)


def test_programs_with_several_tiles_backward(monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS_PER_SM", 3)
    monkeypatch.setattr(kernels, "_TILE", 32)
    _check(kernels.packed_rmsnorm_linear, *_inputs(50, 16, 8), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 6, 45])
def test_rows_with_strides(backend, n):
    """A slice, of which the rest is never read, transposed rows, more dimensions, expanded rows."""
    tensors, upstream = _inputs(n, 16, 8)

    def sliced(x, *rest):
        poison = torch.full((n, 3), float("nan"), device=DEVICE)
        return backend(torch.cat([poison, x, poison], 1)[:, 3:-3], *rest)

    def transposed(x, gamma, weight, eps):
        return backend(x.t().contiguous().t(), gamma, weight.t().contiguous().t(), eps)

    def deeper(x, *rest):
        return backend(torch.stack([x, -x])[:, :, None], *rest)[0, :, 0]

    def repeated(x, *rest):
        return backend(x[:1].expand(n, -1), *rest)

    for function in (sliced, transposed, deeper):
        _check(function, tensors, upstream, 2e-6)
    one = [tensors[0][:1].expand(n, -1), *tensors[1:]]
    assert_close(repeated(*tensors, EPS), reference.rmsnorm_linear(*one, EPS), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 24, 9), (9, 24, 8), (45, 24, 8)], ids=str)
def test_everything_allocated_is_written(backend, shape, monkeypatch):
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    tensors, upstream = _inputs(*shape)
    monkeypatch.setattr(kernels.torch, "empty", poisoned)
    assert all(torch.isfinite(x).all() for x in _run(backend, tensors, upstream))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [4, 48])
def test_only_x_and_the_weights_are_saved_for_backward(backend, n):
    (x, gamma, weight), _ = _inputs(n, 16, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        backend(*(t.requires_grad_() for t in (x, gamma, weight)), EPS)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, gamma, weight))


def test_gradients_have_the_dtypes_of_their_tensors():
    (x, gamma, weight), upstream = _inputs(40, 16, 8, torch.float32, torch.float64)
    found = _run(kernels.packed_rmsnorm_linear, [x, gamma, weight], upstream)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [3, 40])
def test_the_product_may_have_another_dtype_than_x(backend, n):
    """As with a float32 residual stream under autocast; here x is bfloat16, which the interpreter cannot multiply."""
    (x, gamma, weight), upstream = _inputs(n, 16, 8)
    x = x.bfloat16()

    def in_float32(function):
        return lambda *tensors: function(*tensors, torch.promote_types(tensors[0].dtype, torch.float32))

    found, same = (_run(in_float32(f), [x, gamma, weight], upstream) for f in (backend, reference.rmsnorm_linear))
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for a, e in zip(found, same, strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, 1e-2 if a.dtype == torch.bfloat16 else 1e-6)


def test_autocast_decides_the_dtype_of_the_product():
    model, seen = part_model("{type: attention, n_heads: 4}").to(DEVICE), []
    model.use_backends({"rmsnorm_linear": "auto"})

    def function(x, gamma, weight, eps, dtype):
        seen.append(dtype)
        return x.new_zeros(*x.shape[:-1], len(weight), dtype=dtype)

    with backend_of("rmsnorm_linear", function):
        for dtype in (torch.bfloat16, torch.float32):
            with autocast(torch.device(DEVICE), dtype):
                model(torch.arange(5, device=DEVICE)[None])
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2, "once per layer"


@pytest.mark.parametrize("backend", ["packed", "triton"])
@pytest.mark.parametrize("n", [3, 40])
def test_operators_pass_opcheck(backend, n):
    tensors, upstream = _inputs(n, 16, 8)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear.default, (*leaves, EPS, torch.float32, backend))
    sliced = torch.cat([tensors[0], tensors[0]], 1).detach().view(1, n, 32)[..., :16]
    arguments = (upstream[None], sliced, tensors[1].detach().double(), tensors[2].detach(), EPS)
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear.default, (*arguments[1:], torch.float32, backend))
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [3, 40])
def test_full_graph(backend, n):
    tensors, upstream = _inputs(n, 16, 8)

    def function(x, *rest):
        return backend(2 * x, *rest)

    plain = _run(function, tensors, upstream)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


def test_bad_input():
    x, gamma, weight = torch.zeros(2, 4), torch.zeros(4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"gamma \(3,\)"):
        rmsnorm_linear(x, torch.zeros(3), weight)
    with pytest.raises(ValueError, match=r"weight \(4, 3\) must be"):
        rmsnorm_linear(x, gamma, weight.t())
    with pytest.raises(ValueError, match=r"x \(4,\)"):
        rmsnorm_linear(x[0], gamma, weight)
    with pytest.raises(ValueError, match="D at least 1"):
        rmsnorm_linear(x[:, :0], gamma[:0], weight[:, :0])


def test_rows_that_tma_cannot_load_are_an_error():
    with pytest.raises(ValueError, match="multiple of 16 bytes, not 6 elements of 4 bytes; use 'packed'"):
        kernels.rmsnorm_linear(*_inputs(40, 6, 8)[0], EPS)


def test_where_the_backends_run(monkeypatch):
    op, call = OPS["rmsnorm_linear"], Call(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(Call, "capability", (9, 0))
    found = op.select("auto", call, in_features=64, out_features=96)
    assert found.backend == "packed" and found.unsupported == {}
    found = op.select("auto", call, in_features=64, out_features=20)
    assert list(found.unsupported) == ["triton"] and "not 20 elements of 2 bytes" in found.unsupported["triton"]
    monkeypatch.setattr(Call, "capability", (8, 0))
    found = op.select("auto", call)
    assert found.backend == "packed" and found.unsupported == {"triton": "needs compute capability 9.0, this is 8.0"}


MIXERS = [
    "{type: attention, n_heads: 4}",
    "{type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 8}",
    "{type: sdla, n_heads: 4, rope_dim: 4, chunk_size: 8}",
    "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
    "{type: cmd_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
    "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
]
# These read x twice: for queries and latents, or for lambda too.
READ_TWICE = [
    "{type: mla, n_heads: 4, kv_rank: 12}",
    "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 20, lambda_form: token}",
]


def _packed(calls: list):
    """The kernels of the packed backend as a backend of the test's own, which notes the shapes of its weights."""

    def run(x, gamma, weight, eps, dtype):
        calls.append(tuple(weight.shape))
        return kernels.packed_rmsnorm_linear(x, gamma, weight, eps, dtype)

    return backend_of("rmsnorm_linear", run)


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_a_model(mixer):
    """A block fuses its norm with the projection that follows: at every length, and while decoding."""
    model = randomise_(part_model(mixer)).to(DEVICE)
    tokens = torch.arange(40, device=DEVICE)[None] % 61
    calls = []
    with torch.no_grad(), _packed(calls):
        separate = model(tokens).logits
        assert calls == [], "models fuse it only where it is named"
        model.use_backends({"rmsnorm_linear": "auto", "token_linear": "reference"})
        assert_close(model(tokens).logits, separate, 1e-5)
        n_fused = len(calls)
        assert n_fused == 2 * (1 + ("q_rank" in mixer)), "per layer the input, and the queries' latent"
        state = model.init_state(1)
        decoded = [model(tokens[:, t : t + 1], state=state).logits for t in range(6)]
        assert_close(torch.cat(decoded, 1), separate[:, :6], 1e-5)
        assert len(calls) == 7 * n_fused


@pytest.mark.parametrize("mixer", READ_TWICE)
def test_not_where_x_is_read_twice(mixer):
    """Only the norm of the queries' latent, if there is one, is fused."""
    model = randomise_(part_model(mixer)).to(DEVICE)
    tokens = torch.arange(9, device=DEVICE)[None]
    calls = []
    with torch.no_grad(), _packed(calls):
        separate = model(tokens).logits
        model.use_backends({"rmsnorm_linear": "auto"})
        assert_close(model(tokens).logits, separate, 1e-5)
    assert [shape[1] for shape in calls] == ([20, 20] if "q_rank" in mixer else [])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize(
    "shape", [*ALIGNED, (1, 64, 48), (300, 1024, 1280), (2048, 2048, 512), (1000, 96, 2304)], ids=str
)
def test_many_in_half_precision(backend, dtype, weights, shape):
    tensors, upstream = _inputs(*shape, dtype, dtype if weights == "same" else torch.float32)
    _check(backend, tensors, upstream, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 15, 16, 17, 32])
@pytest.mark.parametrize("widths", [(1024, 5120), (2048, 10240), (300, 77), (1000, 1001)], ids=str)
def test_few_in_half_precision(n, dtype, weights, widths):
    tensors, upstream = _inputs(n, *widths, dtype, dtype if weights == "same" else torch.float32)
    _check(kernels.packed_rmsnorm_linear, tensors, upstream, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ["large", "small"])
def test_every_config(dtype, config):
    (x, gamma, weight), _ = _inputs(1111, 520, 776, dtype)
    found = kernels.scaled_matmul(x, gamma, weight, EPS, kernels._CONFIGS[config])
    exact = reference.rmsnorm_linear(x.double(), gamma.double(), weight.double(), EPS)
    assert_close(found, exact, 2 * error_ratio(reference.rmsnorm_linear(x, gamma, weight, EPS), exact))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4, 16, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_activations_in_half_precision(backend, n):
    """x * gamma is too large for float16; the normalised x is not."""
    (x, gamma, weight), _ = _inputs(n, 256, 64, torch.float16, torch.float32)
    x, gamma = x * 10000, gamma.abs() * 20
    exact = reference.rmsnorm_linear(x.double(), gamma.double(), weight.double(), EPS)
    allowed = 4 * error_ratio(reference.rmsnorm_linear(x, gamma, weight, EPS), exact)
    assert_close(backend(x, gamma, weight, EPS), exact, allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16])
def test_in_a_cuda_graph(n):
    (x, gamma, weight), _ = _inputs(n, 512, 1536, torch.bfloat16)
    kernels.packed_rmsnorm_linear(x, gamma, weight, EPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.packed_rmsnorm_linear(x, gamma, weight, EPS)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, kernels.packed_rmsnorm_linear(x, gamma, weight, EPS))


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    x = torch.randn(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    gamma, weight = torch.ones(1024, device="cuda"), torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    last = reference.rmsnorm_linear(x[-2:], gamma, weight, EPS)
    for backend in BACKENDS:
        assert_close(backend(x, gamma, weight, EPS)[-2:], last, 1e-2)
    tokens = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    for few in (tokens[:1], tokens):
        found = kernels.packed_rmsnorm_linear(few, gamma, x, EPS)  # x is the weight here
        assert_close(found[:, -2:], reference.rmsnorm_linear(few, gamma, x[-2:], EPS), 1e-2)
