"""diff_mla and cmd_mla against their definitions, written out with whole score matrices."""

import math

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.rope import apply_rope
from fusedlm.ops.attention.op import PACKED
from fusedlm.ops.attention.sdpa import flash_packed
from fusedlm.ops.common import Implementation
from fusedlm.testing import assert_close, part_model, randomise_

DIFF = "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 16, rope_dim: 6}"
CMD = "{type: cmd_mla, n_heads: 4, kv_rank: 12, q_rank: 16, rope_dim: 6, noise_dim: 10}"
N = 19


def _mixer(case, layer=1):
    return randomise_(part_model(case)).double().blocks[layer].mixer


def _context(mixer):
    context = Context(torch.arange(N)[None])
    context.add_rope(mixer.rope_specs(), torch.float64)
    return context


def _weights(q_BTHD, k_BTHD, scale):
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTHD) * scale
    return scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf).softmax(-1)


def _heads(mixer, x, n_streams, noise_dim=0):
    """Queries and keys of each stream with their rotary parts, values (B, T, H, ...), latent, noise query and key."""
    q_latent, latent, k_rope = mixer.down(x).split([16, 12, 6], dim=-1)
    width = n_streams * 8 + 6
    q, q_noise = mixer.q_up(mixer.q_norm(q_latent)).split([4 * width, noise_dim], dim=-1)
    q = q.unflatten(-1, (4, width))
    latent = mixer.kv_norm(latent)
    k, v, k_noise = mixer.kv_up(latent).split([4 * n_streams * 8, 4 * 8, noise_dim], dim=-1)
    k, v = k.unflatten(-1, (4, -1)), v.unflatten(-1, (4, -1))
    table = _context(mixer).rope[mixer.rope]
    q_rope, k_rope = apply_rope(q[..., -6:], table), apply_rope(k_rope[:, :, None], table).expand(-1, -1, 4, -1)
    q = [torch.cat([q[..., 8 * s : 8 * s + 8], q_rope], dim=-1) for s in range(n_streams)]
    k = [torch.cat([k[..., 8 * s : 8 * s + 8], k_rope], dim=-1) for s in range(n_streams)]
    return q, k, v, q_noise, k_noise


def _finish(mixer, heads, start):
    norm = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6) * mixer.gamma
    return mixer.out((norm * (1 - start)).flatten(-2))


def _diff_by_definition(mixer, x):
    (q1, q2), (k1, k2), v, _, _ = _heads(mixer, x, 2)
    (a, b), (c, d) = mixer.weight.q, mixer.weight.k
    lam = torch.exp(a @ c) - torch.exp(b @ d) + mixer.weight.start
    scale = (8 + 6) ** -0.5
    weights = _weights(q1, k1, scale) - lam * _weights(q2, k2, scale)
    return _finish(mixer, torch.einsum("bhts,bshe->bthe", weights, v), mixer.weight.start)


def _cmd_by_definition(mixer, x):
    """The noise head repeated for every signal head and applied to its values."""
    (q,), (k,), v, q_noise, k_noise = _heads(mixer, x, 1, noise_dim=10)
    noise = _weights(q_noise[:, :, None], k_noise[:, :, None], 10**-0.5).expand(-1, 4, -1, -1)
    lam = torch.exp((mixer.lambda_q * mixer.lambda_k).sum(-1)) - 1 + mixer.lambda_init
    weights = _weights(q, k, (8 + 6) ** -0.5) - lam[:, None, None] * noise
    return _finish(mixer, torch.einsum("bhts,bshe->bthe", weights, v), mixer.lambda_init)


def _forward_and_gradients(mixer, run, x, g):
    mixer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * g).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in mixer.named_parameters()}


@pytest.mark.parametrize("case, definition", [(DIFF, _diff_by_definition), (CMD, _cmd_by_definition)])
def test_equals_the_definition(case, definition):
    mixer = _mixer(case)
    x, g = torch.randn(2, 2, N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = _forward_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g)
    for name, expected in _forward_and_gradients(mixer, lambda x: definition(mixer, x), x, g).items():
        assert expected.norm() > 0, name
        assert_close(actual[name], expected, 1e-10, name)


def test_the_latent_in_slices_is_the_latent_whole():
    mixer = _mixer(CMD)
    x, g = torch.randn(2, 2, N, 32, dtype=torch.float64)
    whole = _forward_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g)
    mixer.n_slices = 3
    for name, value in _forward_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g).items():
        assert_close(value, whole[name], 1e-12, name)


@pytest.mark.parametrize("rank, expected", [(64, 1), (128, 1), (129, 3), (192, 2), (512, 4), (131, 131)])
def test_slices(rank, expected):
    from fusedlm.nn.mixers.cmd_mla import _slices

    assert _slices(rank) == expected


@pytest.mark.parametrize(
    "configured, layer, expected", [(None, 0, 0.2), (None, 5, 0.8 - 0.6 * math.exp(-1.5)), (0.3, 5, 0.3)]
)
def test_lambda_init(configured, layer, expected):
    assert initial_lambda(configured, layer) == pytest.approx(expected)


@pytest.mark.parametrize("extra", ["", ", lambda_init: 0.35"])
def test_lambda_starts_at_lambda_init_and_is_learnt(extra):
    x = torch.randn(1, 3, 32)
    for layer in (0, 1):
        expected = 0.35 if extra else initial_lambda(None, layer)
        diff = part_model(DIFF[:-1] + extra + "}").blocks[layer].mixer
        assert diff.weight(x).item() == pytest.approx(expected)
        assert diff.weight.scale().item() == pytest.approx(1 - expected)
        cmd = part_model(CMD[:-1] + extra + "}").blocks[layer].mixer
        assert cmd.weights().tolist() == pytest.approx([expected] * 4)
    diff.weight(x).backward()
    assert diff.weight.k.grad.norm() > 0
    cmd.weights().sum().backward()
    assert cmd.lambda_k.grad.norm() > 0


def test_lambda_per_token_and_head():
    mixer = part_model("{type: diff_mla, n_heads: 4, kv_rank: 12, rope_dim: 4, lambda_form: token}").blocks[0].mixer
    x = torch.randn(2, 5, 32)
    assert torch.equal(mixer.weight(x), torch.full((2, 5, 4), 0.5)) and mixer.gamma is None
    torch.nn.init.normal_(mixer.weight.project.weight)
    torch.nn.init.normal_(mixer.out.weight)
    weights = mixer.weight(x)
    assert weights.std(dim=1).min() > 0 and weights.std(dim=2).min() > 0
    context = Context(torch.arange(5)[None])
    context.add_rope(mixer.rope_specs(), torch.float32)
    y = mixer(x, context)
    torch.nn.init.normal_(mixer.weight.project.weight)
    assert not torch.allclose(mixer(x, context), y)


def test_both_streams_decode_from_one_latent_cache():
    model = part_model(DIFF)
    state = model.init_state(1)
    model(torch.arange(10)[None], state=state)
    assert state.layers[0].rows.shape == (1, 10, 12 + 6)
    assert state.nbytes() == 2 * 10 * (12 + 6) * 4


def test_the_noise_has_an_attention_of_its_own_and_says_so():
    """Its widths can take it to another implementation than the signal's."""
    named = part_model(CMD).implementations
    assert {"a.attention", "a.packed_attention", "a.noise_attention", "a.noise_packed_attention"} <= set(named)


def test_boundaries_are_made_when_the_noise_alone_needs_them(monkeypatch):
    model = part_model(CMD)
    assert not model.needs_boundaries
    flash = Implementation("flash", flash_packed, lambda setting, **shape: None if shape["head_dim"] == 10 else "no")
    monkeypatch.setitem(PACKED.implementations, "flash", flash)
    assert part_model(CMD).needs_boundaries
