import pytest
import torch

from fusedlm.ops import cached_attention, causal_attention, packed_attention
from fusedlm.ops.attention import reference
from fusedlm.ops.attention.op import CAUSAL, PACKED
from fusedlm.ops.common import Setting
from fusedlm.testing import assert_close

CPU = Setting(torch.device("cpu"), torch.float64)


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
        else:  # where every token sees one key, scores do not matter; a kernel may leave the rounding of a difference
            assert a.norm() < 1e-13 * weight.norm(), f"gradient of {name}"


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 2, 29])
def test_causal(groups, n):
    function = CAUSAL.choose("sdpa", CPU, head_dim=6, value_dim=10).function
    _compare(
        lambda q, k, v: causal_attention(q, k, v, scale=0.4, implementation=function),
        lambda q, k, v: reference.causal(q, k, v, 0.4),
        _qkv(n=n, groups=groups),
    )


@pytest.mark.parametrize("window", [None, 1, 3, 8, 14, 28, 29, 100])
@pytest.mark.parametrize("lengths", [[29], [3, 1, 20, 5]])
def test_packed(window, lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    positions = torch.cat([positions, torch.arange(29)[None]])
    function = PACKED.choose("sdpa", CPU, head_dim=6, value_dim=10).function
    _compare(
        lambda q, k, v: packed_attention(
            q, k, v, scale=0.4, positions_BT=positions, window=window, implementation=function
        ),
        lambda q, k, v: reference.packed(q, k, v, 0.4, positions, window),
        _qkv(),
    )


def test_packed_sees_its_document_only():
    """Against each document alone."""
    q, k, v = _qkv(batch=1)
    positions = torch.cat([torch.arange(11), torch.arange(18)])[None]
    out = packed_attention(q, k, v, scale=0.4, positions_BT=positions)
    for a, b in ((0, 11), (11, 29)):
        assert_close(out[:, a:b], causal_attention(q[:, a:b], k[:, a:b], v[:, a:b], scale=0.4), 1e-12)


@pytest.mark.parametrize("n_new", [1, 5, 29])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cached(n_new, groups):
    q, k, v = _qkv(groups=groups)
    whole = reference.causal(q, k, v, 0.4)
    reach = None if n_new == 1 else torch.arange(29 - n_new, 29)[None]
    out = cached_attention(q[:, -n_new:], k, v, scale=0.4, reach_BT=reach)
    assert_close(out, whole[:, -n_new:], 1e-12)


def test_reference_gradcheck():
    qkv = _qkv(batch=1, n=4, heads=2, groups=1, key=2, value=3)
    positions = torch.tensor([[0, 1, 0, 1]])
    assert torch.autograd.gradcheck(lambda *x: reference.packed(*x, 0.5, positions, 2), qkv)


def test_choices_name_their_reasons():
    reasons = CAUSAL.reasons(CPU, head_dim=64, value_dim=64)
    assert "CUDA" in reasons["cudnn"] and "CUDA" in reasons["flash"] and reasons["sdpa"] is None
    assert CAUSAL.choose("auto", CPU, head_dim=64, value_dim=64).name == "sdpa"
    with pytest.raises(ValueError, match="'cudnn' cannot run: needs a CUDA device, not cpu"):
        CAUSAL.choose("cudnn", CPU, head_dim=64, value_dim=64)
    with pytest.raises(ValueError, match="unknown implementation 'fastest'"):
        CAUSAL.choose("fastest", CPU, head_dim=64, value_dim=64)


def test_the_chosen_implementation_is_the_one_that_runs():
    called = []

    def spy(*args):
        called.append(args)
        return reference.causal(*args)

    q, k, v = _qkv()
    causal_attention(q, k, v, scale=1.0, implementation=spy)
    assert len(called) == 1
