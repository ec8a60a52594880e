"""The GPU implementations of softmax attention against the float64 reference, forward and every gradient."""

import pytest
import torch

from fusedlm.nn.context import varlen_boundaries
from fusedlm.ops.attention import reference
from fusedlm.ops.attention.op import CAUSAL, PACKED
from fusedlm.ops.common import Setting
from fusedlm.testing import assert_close, error_ratio

pytestmark = pytest.mark.gpu

SHAPES = [  # batch, tokens, heads, kv heads, key width, value width
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


@pytest.mark.parametrize("name", ["cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal(name, shape):
    setting = Setting(torch.device("cuda"), torch.bfloat16)
    dims = {"head_dim": shape[4], "value_dim": shape[5]}
    if CAUSAL.reasons(setting, **dims)[name]:
        with pytest.raises(ValueError, match="cannot run"):
            CAUSAL.choose(name, setting, **dims)
        return
    function = CAUSAL.choose(name, setting, **dims).function
    scale = shape[4] ** -0.5
    _check(lambda q, k, v: function(q, k, v, scale), lambda q, k, v: reference.causal(q, k, v, scale), _qkv(shape))


@pytest.mark.parametrize("name", ["flash", "sdpa"])
@pytest.mark.parametrize("window", [None, 2, 33, 1000])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_packed(name, window, shape):
    batch, n, scale = shape[0], shape[1], shape[4] ** -0.5
    g = torch.Generator().manual_seed(2)
    begins = (torch.rand(batch, n, generator=g) < 0.05).index_fill(1, torch.tensor([0]), True)
    index = torch.arange(n).expand(batch, -1)
    positions = (index - torch.where(begins, index, -1).cummax(1).values).cuda()
    boundaries = varlen_boundaries(positions)
    dims = {"head_dim": shape[4], "value_dim": shape[5]}
    function = PACKED.choose(name, Setting(torch.device("cuda"), torch.bfloat16), **dims).function
    _check(
        lambda q, k, v: function(q, k, v, scale, positions, window, boundaries),
        lambda q, k, v: reference.packed(q, k, v, scale, positions, window),
        _qkv(shape),
    )


def test_auto_is_the_fastest():
    setting = Setting(torch.device("cuda"), torch.bfloat16)
    fastest = "cudnn" if setting.capability >= (9, 0) else "flash"
    assert CAUSAL.choose("auto", setting, head_dim=128, value_dim=128).name == fastest
    assert PACKED.choose("auto", setting, head_dim=128, value_dim=128).name == "flash"
    single = Setting(torch.device("cuda"), torch.float32)
    assert CAUSAL.choose("auto", single, head_dim=128, value_dim=128).name == "sdpa"
    strict = Setting(torch.device("cuda"), torch.bfloat16, deterministic=True)
    assert CAUSAL.choose("auto", strict, head_dim=128, value_dim=128).name == "flash"
