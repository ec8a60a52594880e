import math

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.testing import MIXER_CASES, assert_close, every_mixer_config, part_model, randomise_

ATTENTION = MIXER_CASES["attention"][0]
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def _stream(model, tokens=TOKENS):
    """What enters the first block."""
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(tokens)
    return seen[0]


def _rms(x):
    return x.float().square().mean().sqrt().item()


@pytest.mark.parametrize(
    "extra, rms",
    [("", 1.0), ("embedding_rms: 0.3", 0.3), ("embedding_rms: null, embedding_std: 0.01", 0.01)],
)
def test_the_residual_stream_starts_at_its_size(extra, rms):
    torch.manual_seed(0)
    assert _rms(_stream(part_model(ATTENTION, vocab_size=4000, extra=extra))) == pytest.approx(rms, rel=0.1)


def test_autocast_keeps_the_residual_stream_in_its_dtype():
    model = part_model(ATTENTION)
    with autocast(torch.device("cpu"), torch.bfloat16):
        assert _stream(model).dtype == torch.bfloat16
        assert model(TOKENS).dtype == torch.float32
    assert _stream(model).dtype == torch.float32


def test_padding_rows_are_never_predicted():
    model = randomise_(part_model(ATTENTION, vocab_size=61, extra="vocab_multiple: 64"))
    assert model.embedding.weight.shape[0] == 64
    logits = model(TOKENS)
    assert logits.shape == (2, 12, 61)
    expected = -logits.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]
    assert_close(model.loss(TOKENS, TOKENS), expected, 1e-6)


def test_targets_of_minus_100_count_nothing():
    model = randomise_(part_model(ATTENTION))
    targets = TOKENS.clone()
    targets[0, 3:] = -100
    loss = model.loss(TOKENS, targets)
    assert (loss[0, 3:] == 0).all() and torch.equal(loss[1], model.loss(TOKENS, TOKENS)[1])


def test_an_untied_head_has_its_own_weight_and_starts_uniform():
    model = part_model(ATTENTION, extra="tie_embeddings: false")
    assert model.head.weight is not model.embedding.weight
    assert_close(model.loss(TOKENS, TOKENS), torch.full((2, 12), math.log(61)), 1e-6)
    tied = part_model(ATTENTION)
    assert tied.head.weight is tied.embedding.weight


def test_the_softcap_bounds_logits():
    model = randomise_(part_model(ATTENTION, extra="logit_softcap: 2.0"), scale=3.0)
    uncapped = randomise_(part_model(ATTENTION), scale=3.0)
    uncapped.load_state_dict(model.state_dict())
    assert uncapped(TOKENS).abs().max() > 2 >= model(TOKENS).abs().max()
    assert_close(model(TOKENS), 2 * torch.tanh(uncapped(TOKENS) / 2), 1e-5)


def test_dropout_is_for_training():
    model = randomise_(part_model(ATTENTION, extra="dropout: 0.5"))
    assert not torch.equal(model.train()(TOKENS), model(TOKENS))
    assert torch.equal(model.eval()(TOKENS), model(TOKENS))


def test_the_recipe_chooses_the_implementation():
    model = randomise_(part_model(ATTENTION))
    reference = part_model(ATTENTION, extra="impl: {attention: reference, packed_attention: reference}")
    reference.load_state_dict(model.state_dict())
    assert model.implementations["a.attention"].name == "sdpa"
    assert reference.implementations["a.attention"].name == "reference"
    assert_close(reference(TOKENS), model(TOKENS), 1e-5)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="implementation 'cudnn' cannot run: needs a CUDA device, not cpu"):
            part_model(ATTENTION, extra="impl: {attention: cudnn}")


def test_a_state_that_is_full_says_so():
    model = part_model(ATTENTION)
    state = model.init_state(2, max_tokens=12)
    model(TOKENS, state=state)
    with pytest.raises(ValueError, match="room for max_tokens=12, not 13"):
        model(TOKENS[:, :1], state=state)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(TOKENS[0]), r"tokens must be \(batch, length\)"),
        (lambda m: m(TOKENS[:, :0]), r"not \(2, 0\)"),
        (lambda m: m(TOKENS, TOKENS[:1]), r"documents \(1, 12\) must have the shape of tokens \(2, 12\)"),
        (lambda m: m(TOKENS, state=m.init_state(3)), "the state is for 3 sequences, tokens has 2"),
        (lambda m: m.init_state(0), "batch_size=0"),
        (lambda m: m.init_state(1, max_tokens=0), "max_tokens=0"),
    ],
)
def test_inputs_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(part_model(ATTENTION))


@pytest.mark.parametrize("reserve", [False, True])
def test_a_state_extended_is_as_large_as_one_that_was_fed(reserve):
    model = build_model(every_mixer_config(), vocab_size=61)
    fed, extended = (model.init_state(2, max_tokens=41 if reserve else None) for _ in range(2))
    with torch.no_grad():
        model(torch.zeros(2, 40, dtype=torch.int64), state=fed)
        model(torch.zeros(2, 3, dtype=torch.int64), state=extended)
        extended.extend_to(40)
        assert extended.nbytes() == fed.nbytes() and extended.length == 40
        again = model(torch.zeros(2, 1, dtype=torch.int64), state=extended)
        model(torch.zeros(2, 1, dtype=torch.int64), state=fed)
    assert torch.isfinite(again).all() and extended.nbytes() == fed.nbytes()
    assert extended.next_position_B.tolist() == fed.next_position_B.tolist()


def test_a_state_is_not_shortened_or_made_of_nothing():
    model = build_model(every_mixer_config(), vocab_size=61)
    state = model.init_state(1)
    with pytest.raises(ValueError, match="empty cache"):
        state.extend_to(4)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64), state=state)
    with pytest.raises(ValueError, match="more than 4"):
        state.extend_to(4)
