"""Multi-head latent attention against its definition, and what decoding keeps."""

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.testing import assert_close, part_model, randomise_
from tests.nn.gradients import output_and_gradients

N = 17
CASES = [  # and n_heads, groups, head_dim, rank, q_rank, rope_dim
    ("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 4}", (4, 4, 8, 12, 0, 4)),
    (
        "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6, n_kv_groups: 2, head_dim: 10}",
        (4, 2, 10, 12, 20, 6),
    ),
    ("{type: mla, n_heads: 2, kv_rank: 8, rope_dim: 0}", (2, 2, 16, 8, 0, 0)),
]


def _norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def _rotate(x, t, base=10_000.0):
    """Pairs (i, i + R/2) by t base^(-2 i / R)."""
    half = x.shape[-1] // 2
    angle = t * base ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _by_definition(mixer, x_TD, n_heads, groups, width, rank, q_rank, rope):
    """Keys and values of every group from the latent; one rotary key for all; scale 1 / sqrt(width + rope)."""
    w_q_down, w_kv, w_rope = mixer.down.weight.split([q_rank, rank, rope])
    w_k, w_v = (w.unflatten(0, (groups, width)) for w in mixer.kv_up.weight.split([groups * width, groups * width]))
    w_q = mixer.q_up.weight.unflatten(0, (n_heads, width + rope))
    keys, rotary, values, rows = [], [], [], []
    for t, x in enumerate(x_TD):
        latent = _norm(w_kv @ x, mixer.kv_norm.weight)
        keys.append(w_k @ latent)
        values.append(w_v @ latent)
        rotary.append(_rotate(w_rope @ x, t))
        source = _norm(w_q_down @ x, mixer.q_norm.weight) if q_rank else x
        heads = []
        for h in range(n_heads):
            group = h // (n_heads // groups)
            q = w_q[h] @ source
            content = torch.stack([k[group] for k in keys]) @ q[:width]
            position = torch.stack(rotary) @ _rotate(q[width:], t)
            weights = ((content + position) / (width + rope) ** 0.5).softmax(0)
            heads.append(weights @ torch.stack([v[group] for v in values]))
        rows.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("case, sizes", CASES)
def test_equals_the_definition(case, sizes):
    mixer = randomise_(part_model(case)).double().blocks[0].mixer
    context = Context(torch.arange(N)[None])
    context.add_rope(mixer.rope_specs(), torch.float64)
    x, upstream = torch.randn(2, N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = output_and_gradients(mixer, lambda x: _by_definition(mixer, x, *sizes), x, upstream)
    actual = output_and_gradients(mixer, lambda x: mixer(x[None], context)[0], x, upstream)
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert_close(actual[name], value, 1e-10, name)


def test_absorbed_decoding_equals_expanded():
    """Every token decoded alone against the latents, compared with the expanded heads over the full sequence."""
    case = "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 16, rope_dim: 6, n_kv_groups: 2}"
    mixer = randomise_(part_model(case)).double().blocks[0].mixer
    x = torch.randn(2, 19, 32, dtype=torch.float64)

    def context(first, last, n_past):
        made = Context(torch.arange(first, last)[None], past=n_past)
        made.add_rope(mixer.rope_specs(), torch.float64)
        return made

    expanded = mixer(x, context(0, 19, 0))
    state = mixer.init_state(2)
    decoded = [mixer(x[:, t : t + 1], context(t, t + 1, t), state) for t in range(19)]
    assert_close(torch.cat(decoded, dim=1), expanded, 1e-12)


def test_the_state_is_the_latent_and_one_rotated_key():
    model = part_model("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}")
    state = model.init_state(1)
    model(torch.arange(10)[None], state=state)
    rows = state.layers[0].rows
    assert rows.shape == (1, 10, 12 + 6)
    again = model.init_state(1)
    model(torch.tensor([[0]]), state=again)
    assert torch.allclose(again.layers[0].rows[:, 0], rows[:, 0], atol=1e-6)
    shifted = part_model("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}")
    shifted.load_state_dict(model.state_dict())
    other = shifted.init_state(1)
    shifted(torch.zeros(1, 10, dtype=torch.int64), state=other)
    same_token = other.layers[0].rows[0]
    assert torch.allclose(same_token[0, :12], same_token[9, :12], atol=1e-6), "the latent has no position"
    assert not torch.allclose(same_token[0, 12:], same_token[9, 12:]), "the key is stored rotated"
