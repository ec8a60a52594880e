import pytest
import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context
from fusedlm.testing import assert_close, part_model, randomise_

CASES = [
    "{type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 4}",
    "{type: mamba2, n_heads: 4, head_dim: 6, state_dim: 10, n_groups: 2, conv_size: 2}",
    "{type: mamba2, n_heads: 3, head_dim: 8, state_dim: 5, n_groups: 3, conv_size: 1}",
]


def _mixer(case):
    return randomise_(part_model(case)).double().blocks[0].mixer


def _by_the_formulas(mixer, x_TD):
    """Token by token and head by head, the convolution as a sum over taps."""
    n_heads, width, size = mixer.n_heads, mixer.head_dim, mixer.state_dim
    inner, keys = n_heads * width, mixer.n_groups * size
    w_z, w_mixed, w_dt = mixer.project.weight.split([inner, inner + 2 * keys, n_heads])
    before = [w_mixed @ x for x in x_TD]
    state = torch.zeros(n_heads, size, width, dtype=x_TD.dtype)
    outputs = []
    for t, x in enumerate(x_TD):
        taps = [tap * before[t - j] for j, tap in enumerate(mixer.conv.weight) if t >= j]
        values, b, c = F.silu(sum(taps)).split([inner, keys, keys])
        dt = F.softplus(w_dt @ x + mixer.dt_bias)
        y = []
        for head in range(n_heads):
            group = head // (n_heads // mixer.n_groups)
            value = values.unflatten(0, (n_heads, width))[head]
            key, query = (z.unflatten(0, (mixer.n_groups, size))[group] for z in (b, c))
            decay = torch.exp(-dt[head] * mixer.log_rate[head].exp())
            state[head] = decay * state[head] + dt[head] * torch.outer(key, value)
            y.append(state[head].T @ query + mixer.skip[head] * value)
        gated = torch.cat(y) * F.silu(w_z @ x)
        groups = gated.unflatten(0, (mixer.n_groups, -1))
        normed = groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + 1e-6)
        outputs.append(mixer.out.weight @ (normed.flatten() * mixer.norm.weight))
    return torch.stack(outputs)


@pytest.mark.parametrize("case", CASES)
def test_is_what_the_formulas_say(case):
    mixer = _mixer(case)
    x = torch.randn(1, 19, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_close(mixer(x, Context(torch.arange(19)[None]))[0], _by_the_formulas(mixer, x[0]), 1e-10)


def test_widths():
    """The inner width is twice the model's unless head_dim says otherwise; B and C are one set a group."""
    mixer = part_model("{type: mamba2, n_heads: 4, state_dim: 8, n_groups: 2}").blocks[0].mixer
    assert mixer.head_dim == 16
    assert mixer.project.weight.shape == (2 * 64 + 2 * 2 * 8 + 4, 32)


def test_starts_with_the_published_range_of_half_lives():
    torch.manual_seed(0)
    mixer = part_model("{type: mamba2, n_heads: 64, head_dim: 2}").blocks[0].mixer
    rate, dt = mixer.log_rate.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 3 and 14 < rate.max() <= 16
    assert 1e-3 * 0.999 < dt.min() < 2e-3 and 5e-2 < dt.max() < 0.1 * 1.001


def test_bfloat16_autocast_keeps_the_state_in_float32():
    model = randomise_(part_model(CASES[0]), scale=0.05)
    tokens = torch.randint(0, 61, (2, 200))
    with torch.no_grad():
        expected = model(tokens).logits
        with torch.autocast("cpu", torch.bfloat16):
            state = model.init_state(2)
            rounded = model(tokens, state=state).logits
    assert {layer.memory.dtype for layer in state.layers} == {torch.float32}
    assert_close(rounded, expected, 3e-2)
