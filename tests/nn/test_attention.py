"""Softmax attention against its definition, written out query by query."""

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mixers import softmax
from fusedlm.testing import assert_close, part_model, randomise_
from tests.nn.gradients import output_and_gradients

CASES = [
    "{type: attention, n_heads: 4}",
    "{type: attention, n_heads: 4, n_kv_heads: 2, head_dim: 10, rope_dim: 4, rope_base: 500.0}",
    "{type: attention, n_heads: 2, rope_dim: 0, qk_norm: false}",
    "{type: attention, n_heads: 4, n_kv_heads: 1, window: 5}",
    "{type: attention, n_heads: 4, n_kv_heads: 2, output_gate: true}",
    "{type: attention, n_heads: 2, qk_gain: none}",
]
N = 17


def _mixer(case):
    return randomise_(part_model(case)).double().blocks[0].mixer


def _context(mixer):
    context = Context(torch.arange(N)[None])
    context.add_rope(mixer.rope_specs(), torch.float64)
    return context


def _rotated(x_THD, rope_dim, base):
    """Pairs (i, i + R/2) of the first R dimensions, as complex numbers, times exp(i t base^(-2 i / R))."""
    if not rope_dim:
        return x_THD
    real, imaginary = x_THD[..., : rope_dim // 2], x_THD[..., rope_dim // 2 : rope_dim]
    frequencies = base ** (-2 * torch.arange(rope_dim // 2, dtype=torch.float64) / rope_dim)
    angle = torch.arange(N, dtype=torch.float64)[:, None, None] * frequencies
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x_THD[..., rope_dim:]], dim=-1)


def _by_definition(mixer, x_TD, n_heads, n_kv_heads, width, rope_dim, base, qk_norm, window):
    widths = [n_heads * width, n_kv_heads * width, n_kv_heads * width]
    q, k, v, gate = (x_TD @ mixer.qkv.weight.T).tensor_split(torch.tensor(widths).cumsum(0), dim=-1)
    q, k, v = (x.unflatten(-1, (-1, width)) for x in (q, k, v))
    if qk_norm:
        q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q = q if mixer.q_gain is None else q * mixer.q_gain[:, None]
    q, k = (_rotated(x, rope_dim, base) for x in (q, k))
    rows = []
    for t in range(N):
        first = 0 if window is None else max(0, t - window + 1)
        heads = []
        for head in range(n_heads):
            group = head // (n_heads // n_kv_heads)
            scores = k[first : t + 1, group] @ q[t, head] / width**0.5
            heads.append(scores.softmax(0) @ v[first : t + 1, group])
        y = torch.cat(heads)
        rows.append((y / (1 + torch.exp(-gate[t])) if len(gate[t]) else y) @ mixer.out.weight.T)
    return torch.stack(rows)


SIZES = [  # n_heads, n_kv_heads, head_dim, rope_dim, rope_base, qk_norm, window
    (4, 4, 8, 8, 10_000.0, True, None),
    (4, 2, 10, 4, 500.0, True, None),
    (2, 2, 16, 0, 10_000.0, False, None),
    (4, 1, 8, 8, 10_000.0, True, 5),
    (4, 2, 8, 8, 10_000.0, True, None),
    (2, 2, 16, 16, 10_000.0, True, None),
]


@pytest.mark.parametrize("case, sizes", list(zip(CASES, SIZES, strict=True)))
def test_equals_the_definition(case, sizes):
    mixer = _mixer(case)
    x, upstream = torch.randn(2, 1, N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = output_and_gradients(mixer, lambda x: _by_definition(mixer, x[0], *sizes)[None], x, upstream)
    actual = output_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, upstream)
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert_close(actual[name], value, 1e-10, name)


def test_normalised_queries_start_with_a_gain_of_one_and_a_half():
    mixer = part_model(CASES[0]).blocks[0].mixer
    assert mixer.q_gain.tolist() == [1.5] * 4


@pytest.mark.parametrize("case", [CASES[0], "{type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}"])
def test_prompts_are_attended_as_sequences_of_varying_lengths(case, monkeypatch):
    """Those that fill a state; sequences of training and evaluation have one length."""
    model, calls = part_model(case).eval(), []
    attend = softmax.causal_attention
    monkeypatch.setattr(softmax, "causal_attention", lambda *a, **k: calls.append(k["varying"]) or attend(*a, **k))
    tokens = torch.arange(9)[None]
    model(tokens)
    assert set(calls) == {False}
    calls.clear()
    model(tokens, state=model.init_state(1))
    assert set(calls) == {True}
