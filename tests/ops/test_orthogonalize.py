"""The reference against the singular value decomposition, the kernels against the reference."""

import pytest
import torch

from fusedlm.ops import orthogonalize
from fusedlm.ops.common import Call
from fusedlm.ops.polar import reference
from fusedlm.ops.polar.op import ORTHOGONALIZE
from fusedlm.ops.polar.schemes import SCHEMES, product_flops, segments
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.polar.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
SMALL_TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SUBTILES": 2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and padding of a size for the interpreter, with several tiles per matrix and per program."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "ALIGNMENT", 16)
        monkeypatch.setattr(kernels, "_INTERPRETED", kernels._INTERPRETED | SMALL_TILES)


def spectrum(values: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with these singular values, and its polar factor."""
    generator = torch.Generator().manual_seed(0)
    n = len(values)
    u, v = (torch.linalg.qr(torch.randn(k, n, generator=generator, dtype=torch.float64))[0] for k in (rows, columns))
    return (u * values.double()) @ v.T, u @ v.T


SPECTRA = {
    "flat": torch.ones(32),
    "decaying": torch.logspace(0, -3, 32),
    "rank one": torch.cat([torch.ones(1), torch.zeros(31)]),
}
# ||O - U V^T||_F / ||U V^T||_F over the singular vectors of values above 0, of a 32 x 48 matrix in float64.
ERRORS = {
    ("quintic", "flat"): 0.0187,
    ("quintic", "decaying"): 0.2778,
    ("quintic", "rank one"): 0.3036,
    ("polar_express", "flat"): 0.0681,
    ("polar_express", "decaying"): 0.1328,
    ("polar_express", "rank one"): 0.0963,
    ("turbo", "flat"): 0.1325,
    ("turbo", "decaying"): 0.3904,
    ("turbo", "rank one"): 0.3156,
}


def polar_error(scheme: str, name: str) -> float:
    values = SPECTRA[name]
    x, polar = spectrum(values, 32, 48)
    if name == "rank one":
        polar = x
    return error_ratio(orthogonalize(x, scheme), polar)


@pytest.mark.parametrize(("scheme", "name"), ERRORS)
def test_distance_from_the_polar_factor(scheme, name):
    assert polar_error(scheme, name) == pytest.approx(ERRORS[scheme, name], abs=1e-3)


@EVERY_SCHEME
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 6, 6)])
def test_is_a_polynomial_of_the_singular_values(shape, scheme):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings, found = SCHEMES[scheme], orthogonalize(x, scheme)
    for one, out in zip(x.view(-1, *shape[-2:]), found.view(-1, *shape[-2:]), strict=True):
        if settings.preconditioned:
            one = one.T if one.shape[0] > one.shape[1] else one
            one = one / (one @ one.T).abs().sum(1, keepdim=True).sqrt()
            out = out if out.shape == one.shape else out.T
        else:
            one = one / (settings.safety * one.norm() + settings.eps)
        u, s, v = torch.linalg.svd(one, full_matrices=False)
        for a, b, c in settings.coefficients:
            s = a * s + b * s**3 + c * s**5
        torch.testing.assert_close(out, (u * s) @ v, rtol=0, atol=1e-11)


@EVERY_SCHEME
def test_zero_and_tiny_matrices(scheme, small_tiles):
    """Zeros stay zeros, in a stack; rows of zeros too; the smallest numbers give no NaN, with turbo zeros."""
    x = torch.randn(5, 16, 12, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([0.0, 1e-40, 1e-17, 1e-13, 1.0])[:, None, None]).to(DEVICE)
    x[4, 3] = 0
    for out in (orthogonalize(x, scheme, backend="reference"), kernels.orthogonalize(x, scheme, torch.float32)):
        assert out.isfinite().all() and not out[0].any() and not out[4, 3].any()
        exact = reference.orthogonalize(x.double(), scheme, torch.float64)
        assert out[1].norm() < 1e-30
        if scheme == "turbo":
            assert not out[:3].any()
        for i in (3, 4) if scheme == "turbo" else (2, 3, 4):
            assert_close(out[i].double(), exact[i], 1e-4)


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ((1, 35, 20), "polar_express"),
        ((18, 40), "quintic"),
        ((1, 17, 17), "polar_express"),
        ((10, 20), "turbo"),
        ((1, 16, 10), "turbo"),
    ],
)
def test_kernel(shape, scheme, small_tiles, poisoned):
    """Tall, wide and square; not multiples of the tile; in plain steps and on the Gram matrix, whose condition is that
    of x squared."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = reference.orthogonalize(x.double(), scheme, torch.float64)
    same = error_ratio(reference.orthogonalize(x, scheme, torch.float32), exact)
    out = kernels.orthogonalize(x, scheme, torch.float32)
    assert out.dtype == x.dtype
    assert_close(out, exact, max(8 * same, 1e-5))


@pytest.mark.parametrize(
    ("tile", "size", "transposed"),
    [((32, 16, 1), 64, False), ((16, 32, 2), 64, True), ((16, 32, 4), 64, False), ((16, 16, 1), 48, True)],
)
def test_symmetric_product(tile, size, transposed, poisoned):
    """Every term of the epilogue, several blocks below the diagonal, matrices apart from each other."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, *((16, size) if transposed else (size, 16)), generator=generator).to(DEVICE)
    addend = torch.randn(2, size, size, generator=generator).to(DEVICE)
    addend, scale = addend + addend.mT, torch.tensor([0.5, 3.0], device=DEVICE)
    config = kernels._INTERPRETED | dict(zip(("BLOCK_M", "BLOCK_N", "SUBTILES"), tile, strict=True)) | {"BLOCK_K": 16}
    gram = (x.mT if transposed else x).double()
    gram = gram @ gram.mT
    options = {"dtype": torch.float32, "transposed": transposed, "config": config}
    found = kernels.symmetric_product(x, x, **options)
    assert torch.equal(found, found.mT)
    assert_close(found, gram, 1e-6)
    assert_close(
        kernels.symmetric_product(x, x, scale=scale, squared_scale=True, **options),
        gram * scale.double()[:, None, None] ** 2,
        1e-6,
    )
    found = kernels.symmetric_product(x, x, alpha=0.3, addend=addend, beta=-2.0, diagonal=5.0, scale=scale, **options)
    exact = 0.3 * gram - 2 * addend.double() + 5 * torch.eye(size, dtype=torch.float64, device=DEVICE)
    assert_close(found, scale.double()[:, None, None] * exact, 1e-6)


def test_the_gram_form_is_the_plain_iteration(small_tiles):
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    plain, gram = (
        kernels.iterate(x, 1 / x.norm(dim=(1, 2)), "polar_express", parts=parts, transposed=False)
        for parts in ((1,) * 5, (2, 3))
    )
    assert not torch.equal(plain, gram)
    assert_close(gram, plain, 1e-5)
    assert segments(5, 32, 32) == (1,) * 5 and segments(5, 32, 64) == (2, 3) and segments(4, 32, 64) == (2, 2)


def test_flops_of_products():
    """By hand for matrices (2, 6): 16 per product of two (2, 2), 48 per product with a (2, 6)."""
    assert product_flops(5, 2, 6, (1,) * 5, symmetric=False) == 5 * (48 + 16 + 48)
    assert product_flops(5, 2, 6, (1,) * 5, symmetric=True) == 5 * (24 + 8 + 48)
    # X X^T, 2 polynomials and R and Q after the first; the same with a third polynomial; 2 products with X.
    assert product_flops(5, 2, 6, (2, 3), symmetric=True) == (24 + 8 * 5) + (24 + 8 * 9) + 2 * 48


def test_the_tile_of_fewest_waves(monkeypatch):
    """On an H100, with its 132 multiprocessors."""
    monkeypatch.setattr(kernels, "n_multiprocessors", lambda device: 132)
    cuda = torch.device("cuda")
    large, small = kernels._CONFIGS["large"], kernels._CONFIGS["small"]
    for size in ((64, 1280), (16, 1280), (12, 1024)):
        assert kernels._config(*size, cuda) == large
    for size in ((12, 768), (1, 4096)):
        assert kernels._config(*size, cuda) == small
    assert kernels._config(1000, 128, cuda) == small, "the larger tile does not divide 128"
    assert [kernels._tiles_per_matrix(1280, config) for config in (large, small)] == [30, 55]


def test_operator_passes_opcheck(small_tiles):
    for shape in ((1, 9, 10), (0, 3, 4)):
        torch.library.opcheck(
            torch.ops.fusedlm.orthogonalize.default, (torch.randn(shape, device=DEVICE), "turbo", torch.float32)
        )


def test_full_graph(small_tiles):
    x = torch.randn(1, 9, 10, device=DEVICE)

    def function(x):
        return kernels.orthogonalize(2 * x, "polar_express", torch.float32)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))


def test_dtypes_and_empty_stacks():
    x = torch.randn(2, 5, 7)
    half = orthogonalize(x, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and 1e-4 < error_ratio(half, orthogonalize(x)) < 0.1
    assert orthogonalize(x.bfloat16()).dtype == torch.bfloat16
    assert orthogonalize(torch.ones(0, 3, 4)).shape == (0, 3, 4)
    assert orthogonalize(torch.ones(2, 0, 4)).shape == (2, 0, 4)


def test_bad_input():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="scheme='svd': there is no such scheme; one of quintic, polar_express, turbo"):
        orthogonalize(x, "svd")
    with pytest.raises(ValueError, match=r"x \(4,\) of torch.float32 must be \(..., M, N\)"):
        orthogonalize(x[0])
    with pytest.raises(ValueError, match=r"of torch.int64 must be \(..., M, N\)"):
        orthogonalize(x.long())
    with pytest.raises(ValueError, match="dtype=torch.int32: must be a float dtype"):
        orthogonalize(x, dtype=torch.int32)


def test_where_the_kernel_runs(monkeypatch):
    def reason(dtype=torch.bfloat16, capability=(9, 0), rows=768, columns=3072, device="cuda"):
        monkeypatch.setattr(Call, "capability", capability)
        call = Call(torch.device(device), dtype)
        return ORTHOGONALIZE.select("auto", call, rows=rows, columns=columns).unsupported.get("triton")

    assert reason() is None and reason(torch.float16, (10, 0)) is None
    assert "needs bfloat16 or float16" in reason(torch.float32)
    assert "a shorter side of at least 128, not 127" in reason(rows=127) and "not 64" in reason(columns=64)
    assert "this is 8.0" in reason(capability=(8, 0))
    assert "needs a CUDA device" in reason(device="cpu")


@pytest.mark.gpu
@EVERY_SCHEME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 256, 256), (2, 300, 1100), (1300, 400)])
def test_kernel_in_half_precision(shape, dtype, scheme, poisoned):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    exact = reference.orthogonalize(x.double(), scheme, torch.float64)
    same = error_ratio(reference.orthogonalize(x, scheme, dtype), exact)
    out = kernels.orthogonalize(x, scheme, dtype)
    assert_close(out, exact, 4 * same)
    assert torch.equal(kernels.orthogonalize(x, scheme, dtype), out)
