"""The chunked backend against the reference in float64: sum, losses and every gradient."""

import pytest
import torch

from fusedlm.ops import linear_softcap_cross_entropy
from fusedlm.ops.linear_cross_entropy import reference
from fusedlm.testing import RecordedOperators, assert_close, error_ratio

chunked = pytest.importorskip("fusedlm.ops.linear_cross_entropy.chunked")
chunk_rows = chunked.chunk_rows
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("sum", "losses", "x", "weight")
SHAPES = [
    (7, 13, 13, 5),
    (40, 70, 64, 16),
    (1, 2, 2, 1),
    (33, 1030, 1001, 24),
]  # tokens, rows of the weight, classes, D


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda n_tokens, n_classes, itemsize, held=0: min(16, max(1, n_tokens)))


def _inputs(n, width, classes, dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(n * width)
    x = torch.randn(n, dim, generator=g).to(DEVICE, dtype)
    weight = (4 * torch.randn(width, dim, generator=g) / dim**0.5).to(DEVICE)
    targets = torch.randint(0, classes, (n,), generator=g)
    if n > 2:
        targets[1] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets.to(DEVICE), torch.rand(n, generator=g).to(DEVICE)


def _run(function, x, weight, targets, token_weights, *rest, dtype=None, factor=3.0):
    x, weight = (leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in (x, weight))
    total, losses = function(x, weight, targets, token_weights, *rest)
    return [total.detach(), losses, *torch.autograd.grad(factor * total, (x, weight))]


def _check(inputs, *rest, floor):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = _run(chunked.linear_softcap_cross_entropy, *inputs, *rest)
    same = _run(reference.linear_softcap_cross_entropy, *inputs, *rest)
    exact = _run(reference.linear_softcap_cross_entropy, *inputs, *rest, dtype=torch.float64)
    for name, a, s, e in zip(NAMES, found, same, exact, strict=True):
        assert a.dtype == s.dtype and not (name == "losses" and a.requires_grad)
        assert_close(a, e, max(4 * error_ratio(s, e), floor), name)


@pytest.mark.parametrize("cap, z_loss", [(None, 0.0), (15.0, 0.0), (15.0, 1e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_equal_all_tokens_at_once(shape, cap, z_loss):
    _check(_inputs(*shape), cap, shape[2], z_loss, floor=2e-6)


@pytest.mark.parametrize(
    "n_tokens, n_classes, rows",
    [
        (16384, 50304, 2816),
        (8192, 152064, 1024),
        (65536, 1024, 65536),
        (100, 2**28, 100),
        (300, 2**28, 256),
        (1, 10, 1),
        (0, 10, 1),
    ],
)
def test_size_of_a_chunk(n_tokens, n_classes, rows):
    """At most 298 MiB unless 256 rows take more, and chunks of about equal size."""
    assert chunk_rows(n_tokens, n_classes, 2) == rows


def test_other_temporaries_make_a_chunk_smaller():
    assert chunk_rows(16384, 50304, 2, held=98 * 2**20) == 2048
    assert chunk_rows(16384, 50304, 2, held=196 * 2**20) == 2816, "they exceed half of the limit"


def test_large_temporaries_make_a_chunk_larger():
    assert chunk_rows(8192, 152064, 2, held=594 * 2**20) == 1024
    assert chunk_rows(8192, 152064, 2, held=1188 * 2**20) == 2048


def test_forward_only():
    x, weight, targets, token_weights = _inputs(*SHAPES[1])
    expected = reference.linear_softcap_cross_entropy(x, weight, targets, token_weights, 15.0, 64, 0.0)
    with torch.no_grad():
        found = chunked.linear_softcap_cross_entropy(x, weight, targets, token_weights, 15.0, 64, 0.0)
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, 1e-6)


def test_backward_allocates_no_zeros():
    """As autograd does for the gradients of further outputs, unless told otherwise."""
    x, weight, targets, token_weights = _inputs(*SHAPES[1])
    total, _ = chunked.linear_softcap_cross_entropy(x, weight, targets, token_weights, 15.0, 64, 0.0)
    with RecordedOperators() as ran:
        torch.autograd.grad(total, (x, weight))
    assert ran.names and not any("zeros" in name for name in ran.names)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16])
def test_token_weights_may_have_any_dtype(dtype):
    x, weight, targets, _ = _inputs(*SHAPES[1])
    token_weights = (torch.arange(len(x), device=DEVICE) % 3).to(dtype)
    found = _run(chunked.linear_softcap_cross_entropy, x, weight, targets, token_weights, 15.0, 64, 0.0)
    same = _run(chunked.linear_softcap_cross_entropy, x, weight, targets, token_weights.float(), 15.0, 64, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_gradients_can_be_used_once():
    x, weight, targets, token_weights = _inputs(*SHAPES[1])
    total, _ = chunked.linear_softcap_cross_entropy(x, weight, targets, token_weights, 15.0, 64, 0.0)
    torch.autograd.grad(total, (x, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        torch.autograd.grad(total, (x, weight))


def test_no_tokens():
    x, weight, targets, token_weights = _inputs(0, 9, 9, 4)
    total, losses, dx, dw = _run(chunked.linear_softcap_cross_entropy, x, weight, targets, token_weights, None, 9, 0.0)
    assert total == 0 and losses.shape == (0,) and dx.shape == (0, 4) and not dw.any()


def test_all_logits_are_never_allocated(monkeypatch):
    """The largest tensor as wide as the vocabulary is a chunk's."""
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **rest: sizes.append(size) or empty(*size, **rest))
    x, weight, targets, token_weights = _inputs(*SHAPES[3])
    _run(chunked.linear_softcap_cross_entropy, x, weight, targets, token_weights, None, 1001, 0.0)
    assert (16, 1030) in sizes and all(size[:1] != (33,) or 1030 not in size for size in sizes)


def test_mean_of_a_tied_embedding():
    """As in a model: one weight for all tokens, and the same matrix as embedding and head."""
    embedding = torch.randn(50, 8, device=DEVICE, dtype=torch.float64).requires_grad_()
    tokens, targets = torch.arange(20, device=DEVICE), torch.arange(20, device=DEVICE).roll(-1)
    total, _ = linear_softcap_cross_entropy(
        embedding[tokens], embedding, targets, torch.tensor(1 / 20, device=DEVICE), cap=15.0
    )
    expected = torch.nn.functional.cross_entropy(15 * torch.tanh(embedding[tokens] @ embedding.t() / 15), targets)
    gradients = [torch.autograd.grad(loss, embedding)[0] for loss in (total, expected)]
    assert_close(total, expected, 1e-7)
    assert_close(*gradients, 1e-7)


def test_operators_pass_opcheck():
    x, weight, targets, token_weights = _inputs(*SHAPES[0])
    arguments = (x.detach(), weight.detach(), targets, token_weights, [15.0], 13, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.linear_softcap_cross_entropy.default, arguments)
    rest = (x.detach(), weight.detach(), targets, [15.0], 13, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.linear_softcap_cross_entropy_losses.default, rest)


def test_full_graph():
    inputs = _inputs(*SHAPES[1])

    def function(x, *rest):
        return chunked.linear_softcap_cross_entropy(2 * x, *rest, 15.0, 64, 0.0)

    plain = _run(function, *inputs)
    compiled = _run(torch.compile(function, fullgraph=True, backend="aot_eager"), *inputs)
    for a, b in zip(compiled, plain, strict=True):
        assert_close(a, b, 1e-7)


def test_bad_input():
    x, weight, targets, token_weights = _inputs(*SHAPES[0])
    with pytest.raises(ValueError, match=r"x \(7, 5\), weight \(13, 4\)"):
        linear_softcap_cross_entropy(x, weight[:, :4], targets)
    with pytest.raises(ValueError, match=r"targets \(6,\)"):
        linear_softcap_cross_entropy(x, weight, targets[:6])
    with pytest.raises(ValueError, match=r"token_weights \(3,\) must be \(\) or \(7,\)"):
        linear_softcap_cross_entropy(x, weight, targets, token_weights[:3])
    with pytest.raises(ValueError, match="detach them"):
        linear_softcap_cross_entropy(x, weight, targets, token_weights.requires_grad_())


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 50304, 50257, 64)])
def test_chunks_in_bfloat16(shape, cap, weight_dtype):
    x, weight, *rest = _inputs(*shape, torch.bfloat16)
    _check((x, weight.detach().to(weight_dtype), *rest), cap, shape[2], 0.0, floor=1e-5)
