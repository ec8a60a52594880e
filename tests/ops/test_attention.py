import pytest
import torch

from fusedlm.ops import causal_attention, explain, packed_attention
from fusedlm.ops.attention import op, reference, sdpa
from fusedlm.testing import assert_close


def _qkv(batch=2, n=29, heads=4, groups=2, key=6, value=10, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, n, heads, key), (batch, n, groups, key), (batch, n, groups, value)]
    return [torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def _compare(run, expected_run, qkv):
    out, expected = run(*qkv), expected_run(*qkv)
    assert_close(out, expected, 1e-12, "output")
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((y * weight).sum(), qkv) for y in (out, expected)]
    for name, a, b in zip("qkv", *gradients, strict=True):
        if b.any():
            assert_close(a, b, 1e-11, f"gradient of {name}")
        else:  # where every token sees a single key scores do not matter; kernels may leave a rounding error
            assert a.norm() < 1e-13 * weight.norm(), f"gradient of {name}"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 29])
def test_causal(groups, n):
    _compare(
        lambda q, k, v: causal_attention(q, k, v, scale=0.4, backend="sdpa"),
        lambda q, k, v: reference.causal(q, k, v, 0.4),
        _qkv(n=n, groups=groups),
    )


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_graphs_of_any_number_of_heads(groups, packed):
    """Of blocks that FSDP manages the compiler makes such ones."""
    torch._dynamo.reset()
    q, k, v = _qkv(groups=groups)
    positions = torch.arange(29)[None] % 11

    def attend(q, k, v, n_heads, n_groups):
        q, k, v = q.unflatten(-1, (n_heads, -1)), k.unflatten(-1, (n_groups, -1)), v.unflatten(-1, (n_groups, -1))
        if packed:
            return packed_attention(q, k, v, scale=0.4, positions_BT=positions, backend="sdpa")
        return causal_attention(q, k, v, scale=0.4, backend="sdpa")

    flat = [x.flatten(-2) for x in (q, k, v)]
    graph = torch.compile(attend, dynamic=True, fullgraph=True, backend="aot_eager")
    assert_close(graph(*flat, 4, groups), attend(*flat, 4, groups), 1e-12)


def test_calls_of_varying_lengths_need_no_plans_of_cudnn(monkeypatch):
    """flash takes their place, with keys and values of one width."""
    calls = []

    def attend(q, k, v, *, is_causal, scale, **options):
        calls.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        assert is_causal
        return reference.causal(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)

    q, k, v = _qkv()
    expected = reference.causal(q, k, v, 0.4)
    monkeypatch.setattr(op, "resolve", lambda *args, **sizes: sdpa.cudnn_causal)
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", attend)
    assert_close(causal_attention(q, k, v, scale=0.4, varying=True), expected, 1e-12)
    assert calls == [(10, 10, 10)]
    assert_close(causal_attention(q, k, v, scale=0.4), expected, 1e-12)
    assert calls == [(10, 10, 10), (6, 6, 10)]


def test_reference_is_the_definition():
    """softmax(q k^T scale) v over the tokens up to each, query head h with key head h // (H / G)."""
    q, k, v = _qkv(n=7)
    out = causal_attention(q, k, v, scale=0.4, backend="reference")
    for row, t, head in ((0, 0, 0), (0, 6, 1), (1, 3, 2), (1, 6, 3)):
        keys, values = k[row, : t + 1, head // 2], v[row, : t + 1, head // 2]
        weights = (0.4 * keys @ q[row, t, head]).exp()
        assert_close(out[row, t, head], weights @ values / weights.sum(), 1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 14, 28, 29, 100])
@pytest.mark.parametrize("lengths", [[29], [3, 1, 20, 5]])
def test_packed(window, lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    positions = torch.cat([positions, torch.arange(29)[None]])
    options = {"scale": 0.4, "positions_BT": positions, "window": window}
    _compare(
        lambda q, k, v: packed_attention(q, k, v, **options, backend="sdpa"),
        lambda q, k, v: reference.packed(q, k, v, 0.4, positions, window),
        _qkv(),
    )


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_documents_equal_separate_ones(backend):
    q, k, v = _qkv(batch=1)
    positions = torch.cat([torch.arange(11), torch.arange(18)])[None]
    out = packed_attention(q, k, v, scale=0.4, positions_BT=positions, backend=backend)
    for a, b in ((0, 11), (11, 29)):
        alone = causal_attention(q[:, a:b], k[:, a:b], v[:, a:b], scale=0.4, backend="reference")
        assert_close(out[:, a:b], alone, 1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_window_is_so_many_tokens(backend):
    """Each token sees itself and window - 1 earlier ones, as if those were its whole sequence."""
    q, k, v = _qkv(batch=1)
    options = {"scale": 0.4, "positions_BT": torch.arange(29)[None], "window": 5}
    out = packed_attention(q, k, v, **options, backend=backend)
    for t in (0, 3, 4, 5, 28):
        seen = slice(max(0, t - 4), t + 1)
        alone = causal_attention(q[:, seen], k[:, seen], v[:, seen], scale=0.4, backend="reference")
        assert_close(out[:, t], alone[:, -1], 1e-12)


def test_reference_gradcheck():
    qkv = _qkv(batch=1, n=4, heads=2, groups=1, key=2, value=3)
    positions = torch.tensor([[0, 1, 0, 1]])
    assert torch.autograd.gradcheck(lambda *x: reference.packed(*x, 0.5, positions, 2), qkv)


def test_kernels_need_a_cuda_device():
    for function, kernels in ((causal_attention, {"cudnn", "flash"}), (packed_attention, {"flash"})):
        found = explain(function, "cpu", torch.float64, head_dim=64, value_dim=64)
        assert found.backend == "sdpa" and set(found.unsupported) == kernels
        assert all(reason == "needs a CUDA device, not cpu" for reason in found.unsupported.values())
