"""Attention to cached keys: torch's and the kernels' against the reference, that against the full pass."""

import pytest
import torch

from fusedlm.ops import cached_attention
from fusedlm.ops.attention import reference as full
from fusedlm.ops.attention import sdpa
from fusedlm.ops.cached import reference
from fusedlm.ops.common.split_keys import Config
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.cached.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.4
TILE = {"stages": 2, "warps": 4, "per_processor": 1}
TMA, POINTERS = Config(16, tma=True, **TILE), Config(16, tma=False, **TILE)
LENGTHS = [0, 1, 16, 17, 40]  # of the rows of a batch, the new tokens included


def _qkv(batch=3, n_new=1, heads=4, groups=2, n_keys=40, key=8, value=24, lengths=None, dtype=torch.float32, fill=None):
    """q, k, v, scale, starts; `fill` beyond each length."""
    g = torch.Generator().manual_seed(0)
    sizes = [(batch, n_new, heads, key), (batch, n_keys, groups, key), (batch, n_keys, groups, value)]
    q, k, v = (torch.randn(*size, generator=g).to(DEVICE, dtype) for size in sizes)
    starts = None
    if lengths is not None:
        starts = torch.tensor(lengths, device=DEVICE) - n_new
        for b, length in enumerate(lengths):
            k[b, length:] = v[b, length:] = float("nan") if fill is None else fill
    return q, k, v, starts


def _check(q, k, v, visible=None, starts=None, config=TMA, programs=2):
    """Within four times the error of the reference in the same precision, or within the floor."""
    found = kernels.run(q, k, v, SCALE, visible, starts, config=config, programs=programs)
    exact = reference.cached_attention(q.double(), k.double(), v.double(), SCALE, visible, starts)
    same = reference.cached_attention(q, k, v, SCALE, visible, starts)
    assert found.dtype == q.dtype
    assert_close(found, exact, max(4 * error_ratio(same, exact), 1e-6))
    return found


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n_new", [1, 5, 29])
def test_equals_the_full_pass(n_new, groups, backend):
    q, k, v, _ = _qkv(n_new=29, n_keys=29, groups=groups, dtype=torch.float64)
    out = cached_attention(q[:, -n_new:], k, v, scale=SCALE, backend=backend)
    assert_close(out, full.causal(q, k, v, SCALE)[:, -n_new:], 1e-12)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_rows_may_start_at_different_tokens(backend, given):
    """Row 0 has 20 cached tokens, row 1 has 7; the keys after each row's new tokens are not seen."""
    q, k, v, _ = _qkv(batch=2, n_new=29, n_keys=29, dtype=torch.float64)
    starts, n_new = torch.tensor([20, 7], device=DEVICE), 4
    new = torch.stack([q[row, start : start + n_new] for row, start in enumerate(starts.tolist())])
    visible = starts[:, None] + torch.arange(n_new, device=DEVICE) if given else None
    out = cached_attention(new, k, v, scale=SCALE, visible_before_BT=visible, starts_B=starts, backend=backend)
    expected = full.causal(q, k, v, SCALE)
    for row, start in enumerate(starts.tolist()):
        assert_close(out[row], expected[row, start : start + n_new], 1e-12)


@pytest.mark.parametrize("programs", [0, 1, 2, 7])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("n_new, groups", [(1, 1), (1, 4), (3, 2), (8, 2), (35, 2)])
def test_kernel(n_new, groups, config, programs, poisoned):
    q, k, v, _ = _qkv(n_new=n_new, groups=groups)
    _check(q, k, v, config=config, programs=programs)


@pytest.mark.parametrize("programs", [0, 1, 5, 23])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("n_new", [1, 4])
def test_rows_of_different_lengths(n_new, config, programs, poisoned):
    """Shorter ones than the new tokens too: queries without keys give zeros. NaN beyond each length."""
    q, k, v, starts = _qkv(batch=5, n_new=n_new, lengths=LENGTHS)
    found = _check(q, k, v, starts=starts, config=config, programs=programs)
    assert not found[0].any() and not found[1, : n_new - 1].any() and found[1, n_new - 1].all()


@pytest.mark.parametrize("programs", [0, 4])
@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("lengths", [None, [40, 3, 30]])
def test_windows_and_documents(lengths, config, programs, poisoned):
    q, k, v, starts = _qkv(n_new=3, lengths=lengths)
    window = torch.tensor([[20, 0, 1]] if lengths is None else [[37, 0, 1], [0, 1, 2], [3, 4, 5]], device=DEVICE)
    _check(q, k, v, window, starts, config, programs)


@pytest.mark.parametrize("programs", [0, 5])
@pytest.mark.parametrize("heads, groups, key, value", [(1, 1, 1, 1), (17, 1, 20, 6), (40, 2, 16, 16), (6, 3, 33, 40)])
def test_heads_and_widths(heads, groups, key, value, programs, monkeypatch, poisoned):
    """17 and 20 queries of 3 tokens are several tiles of 16."""
    monkeypatch.setattr(kernels, "_ACCUMULATOR", {2: 256, 4: 256})
    sizes = {"heads": heads, "groups": groups, "key": key, "value": value}
    q, k, v, starts = _qkv(batch=2, n_new=3, n_keys=24, lengths=[24, 2], **sizes)
    for config in (TMA, POINTERS):
        _check(q, k, v, starts=starts, config=config, programs=programs)


def test_a_cache_with_room_and_heads_before_tokens():
    q, k, v, starts = _qkv(n_new=2, lengths=[40, 2, 21])
    room = torch.full((3, 90, 2, 32), float("nan"), device=DEVICE)
    room[:, :40, :, :8], room[:, :40, :, 8:] = k, v
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for config in (TMA, POINTERS):
        _check(q, room[:, :40, :, :8], room[:, :40, :, 8:], starts=starts, config=config)
        _check(*heads_first, starts=starts, config=config)


@pytest.mark.parametrize("n_new", [1, 3, 12])
def test_torch_attention(n_new):
    q, k, v, starts = _qkv(n_new=n_new, lengths=[40, n_new, 20], fill=0.0)
    exact = reference.cached_attention(q.double(), k.double(), v.double(), SCALE, None, starts)
    assert_close(sdpa.cached(q, k, v, SCALE, None, starts), exact, 1e-6)


@pytest.mark.parametrize("n_new, requires_grad", [(64, False), (65, False), (1, True)])
def test_more_tokens_and_gradients_run_torch_attention(n_new, requires_grad, monkeypatch):
    q, k, v, _ = _qkv(n_new=n_new, n_keys=70)
    q.requires_grad_(requires_grad)
    monkeypatch.setattr(kernels, "_cached_attention", lambda *given: "operator")
    out = kernels.cached_attention(q, k, v, SCALE, None, None)
    if n_new == 64:
        assert out == "operator"
        return
    assert_close(out, reference.cached_attention(q, k, v, SCALE, None, None), 1e-6)
    if requires_grad:
        out.sum().backward()
        assert q.grad.abs().sum() > 0
        with torch.no_grad():
            assert kernels.cached_attention(q, k, v, SCALE, None, None) == "operator"


@pytest.mark.parametrize(
    "batch, heads, groups, masked, runs_torch",
    [(1, 4, 4, False, True), (1, 4, 4, True, False), (3, 4, 2, False, False), (32, 4, 2, False, True)],
)
def test_torch_runs_where_it_is_faster(batch, heads, groups, masked, runs_torch, monkeypatch):
    q, k, v, starts = _qkv(batch=batch, heads=heads, groups=groups, lengths=[40] * batch if masked else None)
    monkeypatch.setattr(kernels, "_cached_attention", lambda *given: "operator")
    monkeypatch.setattr(kernels.sdpa, "cached", lambda *given: "torch")
    found = kernels.cached_attention(q, k, v, SCALE, None, starts)
    assert found == ("torch" if runs_torch else "operator")


@pytest.mark.parametrize("size", [{"batch": 0}, {"heads": 0, "groups": 1}])
def test_empty(size):
    q, k, v, _ = _qkv(**size)
    assert kernels.run(q, k, v, SCALE, None, None).shape == (*q.shape[:3], v.shape[-1])


def test_operator_passes_opcheck():
    q, k, v, starts = _qkv(batch=2, n_new=2, n_keys=20, lengths=[20, 0])
    visible = torch.tensor([[3, 1]], device=DEVICE)
    torch.library.opcheck(torch.ops.fusedlm.cached_attention.default, (q, k, v, SCALE, visible, starts))


def test_full_graph():
    q, k, v, starts = _qkv(n_new=2, lengths=[40, 2, 0], fill=0.0)

    def function(q, k, v, starts):
        return kernels.cached_attention(2 * q, k, v, SCALE, None, starts)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, starts), function(q, k, v, starts))

    def public(q, k, v, starts):
        return cached_attention(q, k, v, scale=SCALE, starts_B=starts)

    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v, starts)[:2], public(q, k, v, starts)[:2], 1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="stages=1 with TMA; it needs at least 2"):
        Config(64, stages=1, warps=4, per_processor=1)
    q, k, v, _ = _qkv()
    for given in ((q[0], k, v), (q, k[:2], v), (q, k[..., :4], v), (q, k, v[:, :30]), (q[:, :, :3], k, v)):
        with pytest.raises(ValueError, match=r"q \(.*\), k \(.*\) and v \(.*\) must be \(B, T, H, D\)"):
            cached_attention(*given, scale=1.0)
    with pytest.raises(ValueError, match="q is torch.float32, k torch.float16 .* cast them to one dtype"):
        kernels.run(q, k.half(), v, SCALE, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_new, heads, groups", [(1, 16, 16), (1, 16, 4), (8, 16, 1), (3, 12, 4)])
@pytest.mark.parametrize("key, value", [(64, 64), (128, 128), (96, 40)])
def test_kernel_on_the_gpu(key, value, n_new, heads, groups, dtype, poisoned):
    """With the configurations of the product."""
    sizes = {"heads": heads, "groups": groups, "key": key, "value": value}
    q, k, v, starts = _qkv(batch=6, n_new=n_new, n_keys=2049, lengths=[0, 1, 64, 65, 1000, 2049], dtype=dtype, **sizes)
    _check(0.3 * q, k, v, starts=starts, config=None, programs=None)
    _check(0.3 * q, k, v, starts=starts, config=None, programs=0)


@pytest.mark.gpu
def test_a_cuda_graph_serves_other_lengths():
    q, k, v, starts = _qkv(batch=4, n_keys=2048, key=64, value=64, lengths=[1, 100, 1000, 2048], fill=0.0)
    kernels.run(q, k, v, SCALE, None, starts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.run(q, k, v, SCALE, None, starts)
    for lengths in ([2048, 1, 0, 77], [0, 0, 0, 2048], [5, 6, 7, 8]):
        starts.copy_(torch.tensor(lengths) - 1)
        graph.replay()
        assert_close(out, reference.cached_attention(*(x.double() for x in (q, k, v)), SCALE, None, starts), 1e-5)


@pytest.mark.parametrize(("n_keys", "block"), [(10 * 2304, 64), (32768, 64), (32769, 128)])
def test_few_keys_are_read_in_smaller_blocks(n_keys, block):
    """More programs share them."""
    assert kernels.config_of(128, 16, torch.bfloat16, n_keys).block == block
