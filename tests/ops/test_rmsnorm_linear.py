"""The reference against the formula, both forms and the kernels for few tokens against the reference in float64."""

import pytest
import torch

from fusedlm.config.model import ImplConfig
from fusedlm.model.precision import autocast
from fusedlm.ops import OPS, rmsnorm_linear
from fusedlm.ops.common import Setting
from fusedlm.ops.rmsnorm_linear import reference
from fusedlm.testing import assert_close, error_ratio, part_model, randomise_

kernels = pytest.importorskip("fusedlm.ops.rmsnorm_linear.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NAMES = ("output", "x", "gamma", "weight")
# The large one takes more shared memory in float32 than a GPU has.
TILINGS_IN_FLOAT32 = ["float32"] if DEVICE == "cuda" else ["float32", "large"]
FORMS = [kernels.packed_rmsnorm_linear, kernels.rmsnorm_linear]

# Tokens, width in, width out. The first are any; the second have rows of a multiple of 16 bytes in every dtype.
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
    """Within four times what the reference in the same precision is wrong by, which by luck may be little. One or two
    numbers are measured by the size of what they are a sum of, which may cancel."""
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
    y = rmsnorm_linear(x, gamma, weight, eps=EPS)
    z = x[4] / (x[4].square().mean() + EPS).sqrt() * gamma
    assert_close(y[4], weight @ z, 1e-6)
    assert torch.equal(rmsnorm_linear(x.view(5, 1, 8), gamma, weight, eps=EPS), y.view(5, 1, 3))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 4), (1, 4, 2)])
def test_gradients_of_the_reference(shape):
    leaves = [x.double().requires_grad_() for x in _inputs(*shape)[0]]
    assert torch.autograd.gradcheck(lambda *x: reference.rmsnorm_linear(*x, EPS), leaves)


def test_the_reference_rounds_once():
    """The gain may be finer than x, and is not rounded before it is used; what is projected has the dtype of x."""
    x, gamma, weight = (t.cpu() for t in _inputs(6, 16, 4, torch.bfloat16, torch.float32)[0])
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * gamma
    assert torch.equal(reference.rmsnorm_linear(x, gamma, weight, EPS), wide.bfloat16() @ weight.bfloat16().t())


@pytest.mark.parametrize("weights, share", [(torch.bfloat16, 1.03), (torch.float32, 0.75)])
def test_rounding_the_weight_with_its_gain_is_no_worse(weights, share):
    """In place of rounding the normalised x; of weights in float32 it is the only rounding, where there were two."""
    x, gamma, weight = (t.cpu() for t in _inputs(64, 512, 256, torch.bfloat16, weights)[0])
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    exact = inverse * x.double() * gamma.double() @ weight.double().t()
    normed = (inverse * x.double() * gamma.double()).bfloat16()
    usual = normed.double() @ weight.bfloat16().double().t()
    folded = inverse * (x.double() @ (gamma.double() * weight.double()).bfloat16().double().t())
    assert error_ratio(folded, exact) <= share * error_ratio(usual, exact)


@pytest.mark.parametrize("shape", [*ODD, *ALIGNED], ids=str)
def test_packed(shape):
    _check(kernels.packed_rmsnorm_linear, *_inputs(*shape), 2e-6)


@pytest.mark.parametrize("n", [1, 5, 35])
def test_without_eps(n):
    """Tokens that the last tile has no row for have no length to divide by."""
    tensors, upstream = _inputs(n, 50, 7)
    found = _run(kernels.packed_rmsnorm_linear, tensors, upstream, eps=0.0)
    exact = _run(reference.rmsnorm_linear, tensors, upstream, torch.float64, eps=0.0)
    for name, a, e in zip(NAMES, found, exact, strict=True):
        assert_close(a, e, 2e-6, name)


@pytest.mark.parametrize("shape", ALIGNED, ids=str)
@pytest.mark.parametrize("tiling", TILINGS_IN_FLOAT32)
def test_scaled_product(shape, tiling, monkeypatch):
    monkeypatch.setitem(kernels._CONFIGS, "float32", kernels._CONFIGS[tiling])
    _check(kernels.rmsnorm_linear, *_inputs(*shape), 2e-6)


@pytest.mark.parametrize("n", range(1, 34))
def test_every_number_of_few_tokens(n):
    _check(kernels.rmsnorm_linear, *_inputs(n, 72, 40), 2e-6)


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("widths", [(300, 37), (7, 3), (129, 65)], ids=str)
def test_few_tokens_wider_than_a_tile(n, widths, monkeypatch):
    monkeypatch.setattr(kernels, "_ONE_TILE", 256)
    monkeypatch.setattr(kernels, "_ONE_WIDTH", 64)
    config = {"BLOCK_E": 16, "BLOCK_D": 32, "STAGES": 2, "num_warps": 4}
    monkeypatch.setattr(kernels, "_FEW_ROWS_FLOAT32", config)
    _check(kernels.rmsnorm_linear, *_inputs(n, *widths), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 16, 0), (40, 16, 0), (0, 1, 1)], ids=str)
def test_empty(form, shape):
    tensors, upstream = _inputs(*shape)
    found = _run(form, tensors, upstream)
    assert [x.shape for x in found] == [x.shape for x in _run(reference.rmsnorm_linear, tensors, upstream)]
    assert all(not x.any() for x in found)


def test_backward_on_more_rows_than_a_program_takes_at_once(monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS_PER_SM", 3)
    monkeypatch.setattr(kernels, "_TILE", 32)
    _check(kernels.packed_rmsnorm_linear, *_inputs(50, 16, 8), 2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 6, 45])
def test_rows_apart_from_each_other(form, n):
    """As a slice of something wider, of which the rest is never read, and as columns."""
    tensors, upstream = _inputs(n, 16, 8)

    def sliced(x, *rest):
        poison = torch.full((n, 3), float("nan"), device=DEVICE)
        return form(torch.cat([poison, x, poison], 1)[:, 3:-3], *rest)

    def transposed(x, gamma, weight, eps):
        return form(x.t().contiguous().t(), gamma, weight.t().contiguous().t(), eps)

    def deeper(x, *rest):
        return form(torch.stack([x, -x])[:, :, None], *rest)[0, :, 0]

    def repeated(x, *rest):
        return form(x[:1].expand(n, -1), *rest)

    for function in (sliced, transposed, deeper):
        _check(function, tensors, upstream, 2e-6)
    one = [tensors[0][:1].expand(n, -1), *tensors[1:]]
    assert_close(repeated(*tensors, EPS), reference.rmsnorm_linear(*one, EPS), 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 24, 9), (9, 24, 8), (45, 24, 8)], ids=str)
def test_all_that_is_allocated_is_written(form, shape, monkeypatch):
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    tensors, upstream = _inputs(*shape)
    monkeypatch.setattr(kernels.torch, "empty", poisoned)
    assert all(torch.isfinite(x).all() for x in _run(form, tensors, upstream))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [4, 48])
def test_what_is_kept_for_the_backward_pass(form, n):
    """x and the weights, nothing more, and for few tokens and many alike."""
    (x, gamma, weight), _ = _inputs(n, 16, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        form(*(t.requires_grad_() for t in (x, gamma, weight)), EPS)
    assert sorted(kept) == sorted(t.data_ptr() for t in (x, gamma, weight))


def test_gradients_have_the_dtypes_of_what_they_belong_to():
    (x, gamma, weight), upstream = _inputs(40, 16, 8, torch.float32, torch.float64)
    found = _run(kernels.packed_rmsnorm_linear, [x, gamma, weight], upstream)
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [3, 40])
def test_the_product_may_have_another_dtype_than_x(form, n):
    """As a residual stream in float32 has under autocast; here in bfloat16, which the interpreter cannot multiply."""
    (x, gamma, weight), upstream = _inputs(n, 16, 8)
    x = x.bfloat16()

    def wide(function):
        return lambda *tensors: function(*tensors, torch.promote_types(tensors[0].dtype, torch.float32))

    found, same = (_run(wide(f), [x, gamma, weight], upstream) for f in (form, reference.rmsnorm_linear))
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for a, e in zip(found, same, strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, 1e-2 if a.dtype == torch.bfloat16 else 1e-6)


def test_autocast_decides_the_dtype_of_the_product():
    model, seen = part_model("{type: attention, n_heads: 4}").to(DEVICE), []
    block = model.blocks[0]

    def function(x, gamma, weight, eps, dtype):
        seen.append(dtype)
        return x.new_zeros(*x.shape[:-1], len(weight), dtype=dtype)

    object.__setattr__(block.normed_input, "function", function)
    for dtype in (torch.bfloat16, torch.float32):
        with autocast(torch.device(DEVICE), dtype):
            model(torch.arange(5, device=DEVICE)[None])
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("form", ["packed", "triton"])
@pytest.mark.parametrize("n", [3, 40])
def test_operators_keep_their_promises(form, n):
    tensors, upstream = _inputs(n, 16, 8)
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear.default, (*leaves, EPS, torch.float32, form))
    wide = torch.cat([tensors[0], tensors[0]], 1).detach().view(1, n, 32)[..., :16]
    arguments = (upstream[None], wide, tensors[1].detach().double(), tensors[2].detach(), EPS)
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear.default, (*arguments[1:], torch.float32, form))
    torch.library.opcheck(torch.ops.fusedlm.rmsnorm_linear_backward.default, arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [3, 40])
def test_full_graph(form, n):
    tensors, upstream = _inputs(n, 16, 8)

    def function(x, *rest):
        return form(2 * x, *rest)

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


def test_the_product_refuses_rows_that_it_cannot_take(monkeypatch):
    with pytest.raises(ValueError, match="multiple of 16 bytes, not 6 numbers of 4; use packed"):
        kernels.rmsnorm_linear(*_inputs(40, 6, 8)[0], EPS)
    op, setting = OPS["rmsnorm_linear"], Setting(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(Setting, "capability", (9, 0))
    assert op.reasons(setting, in_features=64, out_features=96) == {"packed": None, "triton": None, "reference": None}
    assert "not 20 numbers of 2" in op.reasons(setting, in_features=64, out_features=20)["triton"]
    monkeypatch.setattr(Setting, "capability", (8, 0))
    assert op.reasons(setting)["triton"] == "needs compute capability 9.0, this is 8.0"
    assert op.choose("auto", setting).function is kernels.packed_rmsnorm_linear


def test_recipes_know_every_implementation():
    known = set(ImplConfig.model_fields["rmsnorm_linear"].annotation.__args__)
    assert known == {"auto", *OPS["rmsnorm_linear"].implementations}


MIXERS = [
    "{type: attention, n_heads: 4}",
    "{type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 8}",
    "{type: sdla, n_heads: 4, rope_dim: 4, chunk_size: 8}",
    "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
    "{type: cmd_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
    "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6}",
]
# What reads x twice: queries beside the latents, lambda beside both.
READ_TWICE = [
    "{type: mla, n_heads: 4, kv_rank: 12}",
    "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 20, lambda_form: token}",
]


@pytest.mark.parametrize("mixer", MIXERS)
def test_in_a_model(mixer):
    """A block makes norm and projection in one, equal to what its parts give by themselves."""
    model = randomise_(part_model(mixer)).to(DEVICE)
    assert model.implementations["a.rmsnorm_linear"].name == "reference"
    tokens = torch.arange(40, device=DEVICE)[None] % 61
    plain = model(tokens)
    for part in (part for block in model.blocks for part in (block, block.mixer)):
        for name in ("normed_input", "normed_q"):
            if choice := getattr(part, name, None):
                object.__setattr__(choice, "function", kernels.packed_rmsnorm_linear)
    with torch.no_grad():
        assert_close(model(tokens), plain, 1e-5)
        state = model.init_state(1)
        decoded = [model(tokens[:, t : t + 1], state=state) for t in range(6)]
        assert_close(torch.cat(decoded, 1), plain[:, :6], 1e-5)
    block, normed = model.blocks[0], []
    block.mixer.mix = lambda projected, *_: normed.append(projected) or torch.zeros_like(x)
    x = torch.randn(1, 5, 32, device=DEVICE)
    block._mix(x, None, None)
    assert_close(normed[0], block.mixer.input_projection(block.mixer_norm(x)), 1e-5)


@pytest.mark.parametrize("mixer", READ_TWICE)
def test_not_where_x_is_read_twice(mixer):
    block = part_model(mixer).blocks[0]
    assert block.mixer.input_projection is None and block.normed_input is None


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize(
    "shape", [*ALIGNED, (1, 64, 48), (300, 1024, 1280), (2048, 2048, 512), (1000, 96, 2304)], ids=str
)
def test_many_in_half_precision(form, dtype, weights, shape):
    tensors, upstream = _inputs(*shape, dtype, dtype if weights == "same" else torch.float32)
    _check(form, tensors, upstream, 1e-5)


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
@pytest.mark.parametrize("tiling", ["large", "small"])
def test_every_tiling(dtype, tiling):
    (x, gamma, weight), _ = _inputs(1111, 520, 776, dtype)
    found = kernels.scaled_product(x, gamma, weight, EPS, kernels._CONFIGS[tiling])
    exact = reference.rmsnorm_linear(x.double(), gamma.double(), weight.double(), EPS)
    assert_close(found, exact, 2 * error_ratio(reference.rmsnorm_linear(x, gamma, weight, EPS), exact))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4, 16, 40])
@pytest.mark.parametrize("form", FORMS)
def test_large_activations_in_half_precision(form, n):
    """x * gamma is too large for float16; the normalised x is not."""
    (x, gamma, weight), _ = _inputs(n, 256, 64, torch.float16, torch.float32)
    x, gamma = x * 10000, gamma.abs() * 20
    exact = reference.rmsnorm_linear(x.double(), gamma.double(), weight.double(), EPS)
    allowed = 4 * error_ratio(reference.rmsnorm_linear(x, gamma, weight, EPS), exact)
    assert_close(form(x, gamma, weight, EPS), exact, allowed)


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
    for form in FORMS:
        assert_close(form(x, gamma, weight, EPS)[-2:], last, 1e-2)
    tokens = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    for few in (tokens[:1], tokens):
        found = kernels.packed_rmsnorm_linear(few, gamma, x, EPS)  # of which x is now the weight
        assert_close(found[:, -2:], reference.rmsnorm_linear(few, gamma, x[-2:], EPS), 1e-2)
