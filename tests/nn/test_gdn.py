"""Gated delta net against its definition, token by token and head by head."""

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.testing import assert_close, part_model, randomise_
from tests.nn.gradients import output_and_gradients

CASES = [  # and heads, width of keys, of values, taps
    ("{type: gdn, n_heads: 2, chunk_size: 8}", (2, 16, 16, 4)),
    ("{type: gdn, n_heads: 4, head_dim: 6, value_head_dim: 10, conv_size: 2, chunk_size: 16}", (4, 6, 10, 2)),
    ("{type: gdn, n_heads: 1, conv_size: 1}", (1, 32, 32, 1)),
]
N = 19


def _silu(x):
    return x / (1 + torch.exp(-x))


def _by_definition(mixer, x_TD, n_heads, key_dim, value_dim, taps):
    """S <- alpha S (I - beta k k^T) + beta v k^T, y = S q / sqrt(key_dim)."""
    projected = x_TD @ mixer.qkv.weight.T
    state = torch.zeros(n_heads, value_dim, key_dim, dtype=x_TD.dtype)
    rows = []
    for t, x in enumerate(x_TD):
        mixed = _silu(sum(mixer.conv.weight[j] * projected[t - j] for j in range(taps) if j <= t))
        q, k, v = mixed.split([n_heads * key_dim, n_heads * key_dim, n_heads * value_dim])
        a, b = (mixer.gates.weight @ x).chunk(2)
        alpha = torch.exp(-mixer.log_rate.exp() * torch.log1p(torch.exp(a + mixer.dt_bias)))
        beta = 1 / (1 + torch.exp(-b))
        z = (mixer.z.weight @ x).unflatten(0, (n_heads, value_dim))
        heads, states = [], []
        for h in range(n_heads):
            q_h, k_h = (y.unflatten(0, (n_heads, key_dim))[h] for y in (q, k))
            q_h, k_h = (y / (y.square().sum() + 1e-6).sqrt() for y in (q_h, k_h))
            v_h = v.unflatten(0, (n_heads, value_dim))[h]
            erased = torch.eye(key_dim, dtype=x.dtype) - beta[h] * torch.outer(k_h, k_h)
            states.append(alpha[h] * state[h] @ erased + beta[h] * torch.outer(v_h, k_h))
            y = states[h] @ q_h / key_dim**0.5
            y = y / (y.square().mean() + 1e-6).sqrt() * mixer.norm.weight
            heads.append(y * _silu(z[h]))
        state = torch.stack(states)
        rows.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("case, sizes", CASES)
def test_equals_the_definition(case, sizes):
    mixer = randomise_(part_model(case)).double().blocks[0].mixer
    x, upstream = torch.randn(2, 1, N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = output_and_gradients(mixer, lambda x: _by_definition(mixer, x[0], *sizes)[None], x, upstream)
    actual = output_and_gradients(mixer, lambda x: mixer(x, Context(torch.arange(N)[None])), x, upstream)
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert_close(actual[name], value, 1e-9, name)


def test_starts_with_the_published_range_of_half_lives():
    mixer = part_model("{type: gdn, n_heads: 64, head_dim: 2}").blocks[0].mixer
    rate, dt = mixer.log_rate.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 3 and 14 < rate.max() <= 16
    assert 1e-3 * 0.999 < dt.min() < 3e-3 and 4e-2 < dt.max() < 0.1 * 1.001


def test_the_convolution_has_no_bias():
    """Neither has that of Qwen3-Next; mamba2 here has none where the published one has."""
    for mixer in ("gdn", "mamba2"):
        convolution = part_model(f"{{type: {mixer}, n_heads: 2}}").blocks[0].mixer.conv
        assert [name for name, _ in convolution.named_parameters()] == ["weight"]
        zero, context = torch.zeros(1, 5, convolution.weight.shape[1]), Context(torch.arange(5)[None])
        assert not any(part.any() for part in convolution(zero, context)[0])
