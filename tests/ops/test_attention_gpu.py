"""The GPU backends of softmax attention against the float64 reference, forward and every gradient."""

import pytest
import torch

from fusedlm.ops import causal_attention, explain, packed_attention
from fusedlm.ops.attention import reference
from fusedlm.ops.attention.sdpa import varlen_boundaries
from fusedlm.testing import assert_close, error_ratio

pytestmark = pytest.mark.gpu

SHAPES = [  # batch, tokens, heads, key/value heads, head_dim, value_dim
    (2, 256, 4, 4, 64, 64),
    (1, 511, 6, 2, 128, 128),
    (3, 77, 4, 4, 96, 64),
    (1, 1, 2, 1, 64, 64),
]


def _qkv(shape):
    batch, n, heads, groups, key, value = shape
    g = torch.Generator().manual_seed(0)
    sizes = [(batch, n, heads, key), (batch, n, groups, key), (batch, n, groups, value)]
    return [torch.randn(*size, generator=g).cuda().bfloat16().requires_grad_() for size in sizes]


def _run(function, qkv):
    out = function(*qkv)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), qkv)]


def _check(function, expected_function, qkv):
    """Within twice the error of the reference in the same precision."""
    actual = _run(function, qkv)
    same_precision = _run(expected_function, qkv)
    exact = _run(expected_function, [x.detach().double().requires_grad_() for x in qkv])
    for name, a, s, e in zip(("output", "q", "k", "v"), actual, same_precision, exact, strict=True):
        assert_close(a, e, max(2 * error_ratio(s, e), 1e-3), name)


@pytest.mark.parametrize(("backend", "varying"), [("cudnn", False), ("cudnn", True), ("flash", False), ("sdpa", False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal(backend, varying, shape):
    qkv, scale = _qkv(shape), shape[4] ** -0.5
    found = explain(causal_attention, qkv[0].device, torch.bfloat16, head_dim=shape[4], value_dim=shape[5])
    if backend in found.unsupported:
        with pytest.raises(ValueError, match="cannot run"):
            causal_attention(*qkv, scale=scale, backend=backend)
        return
    _check(
        lambda q, k, v: causal_attention(q, k, v, scale=scale, varying=varying, backend=backend),
        lambda q, k, v: reference.causal(q, k, v, scale),
        qkv,
    )


@pytest.mark.parametrize("backend", ["flash", "sdpa"])
@pytest.mark.parametrize("window", [None, 2, 33, 1000])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_packed(backend, window, given, shape):
    """With boundaries that are given, as in a model, and computed from the positions."""
    batch, n, scale = shape[0], shape[1], shape[4] ** -0.5
    g = torch.Generator().manual_seed(2)
    starts = (torch.rand(batch, n, generator=g) < 0.05).index_fill(1, torch.tensor([0]), True)
    index = torch.arange(n).expand(batch, -1)
    positions = (index - torch.where(starts, index, -1).cummax(1).values).cuda()
    options = {"positions_BT": positions, "window": window}
    if given:
        options["boundaries"] = varlen_boundaries(positions)
    _check(
        lambda q, k, v: packed_attention(q, k, v, scale=scale, backend=backend, **options),
        lambda q, k, v: reference.packed(q, k, v, scale, positions, window),
        _qkv(shape),
    )


def test_auto_is_the_fastest():
    def selected(function, *call, **options):
        return explain(function, "cuda", *call, head_dim=128, value_dim=128, **options).backend

    fastest = "cudnn" if torch.cuda.get_device_capability() >= (9, 0) else "flash"
    assert selected(causal_attention) == fastest
    assert selected(packed_attention) == "flash"
    assert selected(causal_attention, torch.float32) == "sdpa"
    assert selected(causal_attention, deterministic=True) == "flash"
