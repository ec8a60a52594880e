import math

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.nn.mixers.lambda_init import initial_lambda
from fusedlm.nn.rope import YaRN
from fusedlm.testing import assert_close, part_model, randomise_

CASES = [
    "{type: sdla, n_heads: 4, rope_dim: 4, chunk_size: 4}",
    "{type: sdla, n_heads: 2, head_dim: 6, rank: 10, rope_dim: 2, lambda_init: 0.5}",
    "{type: sdla, n_heads: 2, rope_dim: 0, memory: false}",
]
YARN = YaRN(factor=4, trained_length=8, beta_fast=2.0, beta_slow=0.5)


def _mixer(case, layer=1):
    return randomise_(part_model(case)).double().blocks[layer].mixer


def _context(mixer, n, yarn=None):
    context = Context(torch.arange(n)[None])
    context.add_rope(mixer.rope_specs(), torch.float64, yarn)
    return context


def _norm(x, weight=1.0):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _rotate(x, angle):
    """Pairs (i, i + R/2) of x by the angles of one position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _by_the_formulas(mixer, x_TD, context):
    """Token by token, head by head, stream by stream, with the sums in plain matrices."""
    n_heads, width, rope = mixer.n_heads, mixer.head_dim, mixer.rope[0]
    rank = mixer.c_norm.weight.shape[0]
    w_down, w_krope, w_decay, w_gamma_x = mixer.down.weight.split([rank, 2 * rope, n_heads, mixer.down_widths[3]])
    w_q, w_k = mixer.qk_up.weight.split(mixer.qk_widths)
    w_q, w_k = w_q.unflatten(0, (2, n_heads, rope + width)), w_k.unflatten(0, (2, n_heads, width))
    w_v, w_krope = mixer.v_up.weight.unflatten(0, (n_heads, width)), w_krope.unflatten(0, (2, rope))
    scale = (width + rope) ** -0.25
    gain = math.sqrt(context.score_gain)
    cos, sin = context.rope[mixer.rope]
    sums = torch.zeros(2, n_heads, width + rope, width, dtype=x_TD.dtype)
    normaliser = torch.zeros(2, n_heads, width + rope, dtype=x_TD.dtype)
    h = torch.zeros(mixer.memory_dim, dtype=x_TD.dtype)
    outputs = []
    for t, x in enumerate(x_TD):
        c = _norm(w_down @ x, mixer.c_norm.weight)
        angle = torch.atan2(sin[0, t, 0], cos[0, t, 0])
        decay = torch.sigmoid(w_decay @ x + mixer.decay_bias) ** (1 / 16)
        heads = []
        for head in range(n_heads):
            streams = []
            for i in range(2):
                q, k = w_q[i, head] @ c, torch.cat([w_krope[i] @ x, w_k[i, head] @ c])
                q, k = (torch.cat([_rotate(y[:rope], angle) * gain, y[rope:]]) * scale for y in (q, k))
                q, k = 1 + q + q**2 / 2, 1 + k + k**2 / 2
                sums[i, head] = decay[head] * sums[i, head] + torch.outer(k, w_v[head] @ c)
                normaliser[i, head] = decay[head] * normaliser[i, head] + k
                streams.append(sums[i, head].T @ q / (normaliser[i, head] @ q))
            o = streams[0] - mixer.lambda_head[head] * mixer.lambda_layer * streams[1]
            heads.append(_norm(o, mixer.head_norm) * mixer.kept)
        o = torch.cat(heads)
        if mixer.write is not None:
            w_h, w_g = mixer.write.weight.chunk(2)
            w_m, w_gamma_h = mixer.read.weight.chunk(2)
            g = torch.sigmoid(w_g @ o)
            h = (1 - g) * h + g * torch.tanh(w_h @ o)
            gamma = torch.sigmoid(w_gamma_x @ x + w_gamma_h @ h)
            o = gamma * o + (1 - gamma) * (w_m @ h)
        outputs.append(mixer.out.weight @ o)
    return torch.stack(outputs)


@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("case", CASES)
def test_is_what_the_formulas_say(case, yarn):
    mixer = _mixer(case)
    context = _context(mixer, 19, yarn)
    x = torch.randn(1, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_close(mixer(x, context)[0], _by_the_formulas(mixer, x[0], context), 1e-10)


@pytest.mark.parametrize("layer", [0, 1])
def test_lambda_starts_at_its_initial_value(layer):
    mixer = part_model("{type: sdla, n_heads: 4}").blocks[layer].mixer
    share = mixer.lambda_head * mixer.lambda_layer
    assert torch.allclose(share, torch.full((4,), initial_lambda(None, layer)))
    assert torch.allclose(mixer.kept, 1 - share[0])
    chosen = part_model("{type: sdla, n_heads: 4, lambda_init: 0.3}").blocks[layer].mixer
    assert torch.allclose(chosen.lambda_head * chosen.lambda_layer, torch.full((4,), 0.3))


def test_the_second_stream_is_subtracted():
    """With lambda 0 it has no effect; with equal streams and lambda 1 nothing is left."""
    mixer = _mixer("{type: sdla, n_heads: 2, rope_dim: 4, memory: false}")
    x, context = torch.randn(1, 9, 32, dtype=torch.float64), _context(mixer, 9)
    with torch.no_grad():
        mixer.lambda_head.zero_()
        before = mixer(x, context)
        second = mixer.qk_up.weight[: mixer.qk_widths[0]].chunk(2)[1]
        second.mul_(2)
        assert torch.equal(mixer(x, context), before)
        mixer.lambda_head.fill_(0.5)
        assert not torch.allclose(mixer(x, context), before)
        mixer.lambda_head.fill_(1 / mixer.lambda_layer.item())
        for weight in (*mixer.qk_up.weight.split(mixer.qk_widths), mixer.down.weight.split(mixer.down_widths)[1]):
            first, second = weight.chunk(2)
            second.copy_(first)
        assert mixer(x, context).abs().max() < 1e-8


def test_heads_start_with_half_lives_from_tens_to_a_thousand_tokens():
    mixer = part_model("{type: sdla, n_heads: 4}").blocks[0].mixer
    decay = mixer.decay_bias.double().sigmoid() ** (1 / 16)
    half_lives = math.log(0.5) / decay.log()
    assert torch.allclose(half_lives, torch.tensor([16.0, 64.0, 256.0, 1024.0], dtype=torch.float64), rtol=1e-4)


def test_the_working_memory_remembers_what_the_sums_forgot():
    """With a decay that forgets at once, an early token still reaches later outputs through the working memory only."""
    for memory, reaches in ((True, True), (False, False)):
        mixer = _mixer(f"{{type: sdla, n_heads: 2, rope_dim: 4, memory: {str(memory).lower()}}}")
        x = torch.randn(1, 9, 32, dtype=torch.float64)
        changed = x.clone()
        changed[:, 0] += 1
        with torch.no_grad():
            mixer.decay_bias.fill_(-1e5)
            before, after = (mixer(y, _context(mixer, 9)) for y in (x, changed))
        assert torch.allclose(before[:, 1:], after[:, 1:], rtol=0, atol=1e-9) != reaches


def test_bfloat16_autocast_keeps_sums_in_float32():
    model = randomise_(part_model(CASES[0]), scale=0.05)
    tokens = torch.randint(0, 61, (2, 200))
    with torch.no_grad():
        expected = model(tokens).logits
        with torch.autocast("cpu", torch.bfloat16):
            state = model.init_state(2)
            rounded = model(tokens, state=state).logits
    assert {x.dtype for layer in state.layers for x in layer.tensors()} == {torch.float32}
    assert_close(rounded, expected, 3e-2)
