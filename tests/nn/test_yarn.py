import math

import pytest
import torch

from fusedlm.nn.context import Context
from fusedlm.nn.rope import YaRN, inverse_frequencies, rope_table, yarn_frequencies, yarn_score_gain
from fusedlm.testing import MIXER_CASES, assert_close, part_model, randomise_

DIM, BASE = 64, 10_000.0
YARN = YaRN(factor=4, trained_length=2048)


def test_frequencies_by_parts():
    """Kept up to the pair that turns 32 times, divided from the one that turns once on, linear in the index between."""
    plain = inverse_frequencies(DIM, BASE)
    stretched = yarn_frequencies(DIM, BASE, YARN)
    turns = 2048 * plain / (2 * math.pi)
    first, last = int((turns >= 32).sum()) - 1, int((turns > 1).sum())  # the nearest pairs outside of the bounds
    assert 0 < first < last < DIM // 2
    for i, (before, after) in enumerate(zip(plain.tolist(), stretched.tolist(), strict=True)):
        kept = min(max(1 - (i - first) / (last - first), 0), 1)
        assert after == pytest.approx(kept * before + (1 - kept) * before / 4, rel=1e-12)
    assert (stretched == plain).any() and (stretched == plain / 4).any() and (stretched.diff() < 0).all()


def test_a_table_turns_by_the_stretched_frequencies():
    positions = torch.arange(50)[None]
    angle = positions[..., None] * yarn_frequencies(DIM, BASE, YARN)
    cos, sin = rope_table(positions, DIM, BASE, torch.float64, YARN)
    assert_close(cos[:, :, 0], angle.cos(), 1e-15)
    assert_close(sin[:, :, 0], angle.sin(), 1e-15)


def test_factor_one_is_plain_rope():
    positions = torch.arange(50)[None]
    plain = rope_table(positions, DIM, BASE, torch.float64)
    one = rope_table(positions, DIM, BASE, torch.float64, YaRN(factor=1, trained_length=16))
    for a, b in zip(plain, one, strict=True):
        assert_close(a, b, 1e-15)
    assert yarn_score_gain(YaRN(factor=1, trained_length=16)) == 1 == yarn_score_gain(None)


def test_temperature():
    assert yarn_score_gain(YARN) == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize("case", [cases[0] for cases in MIXER_CASES.values()])
def test_every_mixer_with_rope_is_stretched(case):
    model = randomise_(part_model(case)).double()
    tokens = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(0))
    plain = model(tokens).logits
    yarn = YaRN(factor=4, trained_length=10)
    if not any(dim for dim, _ in model.rope_specs):
        with pytest.raises(ValueError, match="no mixer of this model has any"):
            model.set_yarn(yarn)
        return
    model.set_yarn(yarn)
    stretched = model(tokens).logits
    assert not torch.allclose(stretched, plain)
    state = model.init_state(1)
    pieces = [model(tokens[:, a:b], state=state).logits for a, b in ((0, 7), (7, 8), (8, 40))]
    assert_close(torch.cat(pieces, dim=1), stretched, 1e-10)
    model.set_yarn(None)
    assert torch.equal(model(tokens).logits, plain)


def test_recipe_option_is_the_override():
    extra = "yarn: {factor: 4, trained_length: 10}"
    case = MIXER_CASES["mla"][0]
    torch.manual_seed(0)
    by_recipe = randomise_(part_model(case, extra=extra))
    torch.manual_seed(0)
    by_call = randomise_(part_model(case))
    tokens = torch.arange(30)[None]
    assert not torch.equal(by_recipe(tokens).logits, by_call(tokens).logits)
    by_call.set_yarn(YaRN(factor=4.0, trained_length=10))
    assert torch.equal(by_recipe(tokens).logits, by_call(tokens).logits)


@pytest.mark.parametrize("case", ["{type: attention, n_heads: 4, rope_dim: 4}", "{type: mla, n_heads: 4, kv_rank: 12}"])
def test_the_temperature_is_on_the_scores(case):
    """Without the stretched frequencies: positions all zero, where rotary embedding does nothing."""
    mixer = randomise_(part_model(case)).double().blocks[0].mixer

    def run(yarn, scale):
        context = Context(torch.zeros(1, 9, dtype=torch.int64))
        context.add_rope(mixer.rope_specs(), torch.float64, yarn)
        before, mixer.scale = mixer.scale, scale
        y = mixer(x, context)
        mixer.scale = before
        return y

    x = torch.randn(1, 9, 32, dtype=torch.float64)
    assert_close(run(YARN, mixer.scale), run(None, mixer.scale * yarn_score_gain(YARN)), 1e-12)
    assert not torch.allclose(run(YARN, mixer.scale), run(None, mixer.scale))
