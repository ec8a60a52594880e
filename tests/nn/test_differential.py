"""diff_mla and cmd_mla against their definitions, written out with full score matrices."""

import math

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.rope import apply_rope
from fusedlm.testing import assert_close, part_model, randomise_
from tests.nn.gradients import output_and_gradients

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
    (a, b), (c, d) = mixer.noise_weight.q, mixer.noise_weight.k
    lam = torch.exp(a @ c) - torch.exp(b @ d) + mixer.noise_weight.start
    scale = (8 + 6) ** -0.5
    weights = _weights(q1, k1, scale) - lam * _weights(q2, k2, scale)
    return _finish(mixer, torch.einsum("bhts,bshe->bthe", weights, v), mixer.noise_weight.start)


def _cmd_by_definition(mixer, x):
    """The noise head repeated for every signal head and applied to its values."""
    (q,), (k,), v, q_noise, k_noise = _heads(mixer, x, 1, noise_dim=10)
    noise = _weights(q_noise[:, :, None], k_noise[:, :, None], 10**-0.5).expand(-1, 4, -1, -1)
    lam = torch.exp((mixer.lambda_q * mixer.lambda_k).sum(-1)) - 1 + mixer.lambda_init
    weights = _weights(q, k, (8 + 6) ** -0.5) - lam[:, None, None] * noise
    return _finish(mixer, torch.einsum("bhts,bshe->bthe", weights, v), mixer.lambda_init)


@pytest.mark.parametrize("case, definition", [(DIFF, _diff_by_definition), (CMD, _cmd_by_definition)])
def test_equals_the_definition(case, definition):
    mixer = _mixer(case)
    x, g = torch.randn(2, 2, N, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = output_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g)
    for name, expected in output_and_gradients(mixer, lambda x: definition(mixer, x), x, g).items():
        assert expected.norm() > 0, name
        assert_close(actual[name], expected, 1e-10, name)


def test_slices_of_the_latent_add_nothing():
    mixer = _mixer(CMD)
    x, g = torch.randn(2, 2, N, 32, dtype=torch.float64)
    expected = output_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g)
    mixer.n_slices = lambda device: 3
    for name, value in output_and_gradients(mixer, lambda x: mixer(x, _context(mixer)), x, g).items():
        assert_close(value, expected[name], 1e-12, name)


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
        weight, scale = diff.noise_weight(x)
        assert weight.item() == pytest.approx(expected) and scale.item() == pytest.approx(1 - expected)
        cmd = part_model(CMD[:-1] + extra + "}").blocks[layer].mixer
        assert cmd.noise_weights().tolist() == pytest.approx([expected] * 4)
    diff.noise_weight(x)[0].backward()
    assert diff.noise_weight.k.grad.norm() > 0
    cmd.noise_weights().sum().backward()
    assert cmd.lambda_k.grad.norm() > 0


def test_lambda_per_token_and_head():
    mixer = part_model("{type: diff_mla, n_heads: 4, kv_rank: 12, rope_dim: 4, lambda_form: token}").blocks[0].mixer
    x = torch.randn(2, 5, 32)
    weights, scale = mixer.noise_weight(x)
    assert torch.equal(weights, torch.full((2, 5, 4), 0.5)) and scale is None and mixer.gamma is None
    torch.nn.init.normal_(mixer.noise_weight.project.weight)
    torch.nn.init.normal_(mixer.out.weight)
    weights, _ = mixer.noise_weight(x)
    assert weights.std(dim=1).min() > 0 and weights.std(dim=2).min() > 0
    context = Context(torch.arange(5)[None])
    context.add_rope(mixer.rope_specs(), torch.float32)
    y = mixer(x, context)
    torch.nn.init.normal_(mixer.noise_weight.project.weight)
    assert not torch.allclose(mixer(x, context), y)


def test_both_streams_decode_from_one_latent_cache():
    model = part_model(DIFF)
    state = model.init_state(1)
    model(torch.arange(10)[None], state=state)
    assert state.layers[0].rows.shape == (1, 10, 12 + 6)
    assert state.nbytes() == 2 * 10 * (12 + 6) * 4


def test_the_noise_has_an_attention_of_its_own():
    """Its widths can take it to another backend than the signal's."""
    uses = {use.name: use.sizes for use in part_model(CMD).blocks[0].ops(torch.device("cpu"))}
    assert uses["attention"] == {"head_dim": 8 + 6, "value_dim": 8}
    assert uses["noise_attention"] == uses["noise_packed_attention"] == {"head_dim": 10, "value_dim": 12}
