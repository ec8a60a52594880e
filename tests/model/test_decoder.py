import math

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.ops.common.dispatch import recorded
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, every_mixer_config, part_model, randomise_

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
        assert model(TOKENS).logits.dtype == torch.float32
    assert _stream(model).dtype == torch.float32


def test_padding_rows_are_never_predicted():
    model = randomise_(part_model(ATTENTION, vocab_size=61, extra="vocab_multiple: 64"))
    assert model.embedding.weight.shape[0] == 64
    logits = model(TOKENS).logits
    assert logits.shape == (2, 12, 61)
    expected = -logits.log_softmax(-1).gather(-1, TOKENS[..., None])[..., 0]
    assert_close(model(TOKENS, targets=TOKENS).nll, expected, 1e-6)


def test_targets_of_minus_100_count_nothing():
    model = randomise_(part_model(ATTENTION))
    targets = TOKENS.clone()
    targets[0, 3:] = -100
    nll = model(TOKENS, targets=targets).nll
    assert (nll[0, 3:] == 0).all() and torch.equal(nll[1], model(TOKENS, targets=TOKENS).nll[1])


def test_an_untied_head_has_its_own_weight_and_starts_uniform():
    model = part_model(ATTENTION, extra="tie_embeddings: false")
    assert model.head.weight is not model.embedding.weight
    assert_close(model(TOKENS, targets=TOKENS).nll, torch.full((2, 12), math.log(61)), 1e-6)
    tied = part_model(ATTENTION)
    assert tied.head.weight is tied.embedding.weight


def test_the_softcap_bounds_logits():
    model = randomise_(part_model(ATTENTION, extra="logit_softcap: 2.0"), scale=3.0)
    uncapped = randomise_(part_model(ATTENTION), scale=3.0)
    uncapped.load_state_dict(model.state_dict())
    logits, free = model(TOKENS).logits, uncapped(TOKENS).logits
    assert free.abs().max() > 2 >= logits.abs().max()
    assert_close(logits, 2 * torch.tanh(free / 2), 1e-5)


def test_the_pattern_is_tiled():
    config = every_mixer_config().model_copy(update={"n_layers": 6})
    model = build_model(config, vocab_size=61, device="meta")
    assert model.layer_names == ["a", "g", "w", "m", "a", "g"]
    assert [type(block.mixer).__name__ for block in model.blocks] == [
        "Attention",
        "GatedDeltaNet",
        "Attention",
        "LatentAttention",
        "Attention",
        "GatedDeltaNet",
    ]


def test_dropout_is_for_training():
    model = randomise_(part_model(ATTENTION, extra="dropout: 0.5"))
    assert not torch.equal(model.train()(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(model.eval()(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("part", ["embedding", "mixer", "ffn"])
def test_each_place_of_dropout_drops_its_own(part):
    """With dropout in one place alone, a fraction p of what is added there is zero, the rest is over 1 - p."""
    model = randomise_(part_model(ATTENTION, extra="dropout: 0.25")).train()
    for block in model.blocks:
        block.dropout.p = 0.0
    if part == "embedding":
        seen = _stream(model)
        clean = model.embedding(TOKENS) * model.embedding_scale
    else:
        model.dropout.p = 0.0
        block = model.blocks[0]
        block.dropout.p = 0.25
        calls = []
        block.dropout.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
        model(TOKENS)
        assert len(calls) == 2
        clean, seen = calls[{"mixer": 0, "ffn": 1}[part]]
    dropped = seen == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert_close(seen[~dropped], clean[~dropped] / 0.75, 1e-6)


def test_backends_are_named_after_the_model_was_made():
    model = randomise_(part_model(ATTENTION))
    cpu = torch.device("cpu")
    expected = model(TOKENS).logits
    assert model.explain(cpu, torch.float32)["a.attention"].backend == "sdpa"
    model.use_backends({"attention": "reference"})
    assert model.explain(cpu, torch.float32)["a.attention"].backend == "reference"
    with recorded() as found:
        assert_close(model(TOKENS).logits, expected, 1e-5)
    assert ("attention", "reference") in {(op, backend) for op, backend, _ in found}
    model.use_backends({"attention": "cudnn"})
    for call in (lambda: model.explain(cpu, torch.float32), lambda: model(TOKENS)):
        with pytest.raises(ValueError, match="op attention: backend 'cudnn' cannot run: needs a CUDA device, not cpu"):
            call()
    model.use_backends({})
    assert torch.equal(model(TOKENS).logits, expected)


def test_ops_left_to_separate_layers_say_so():
    """`rmsnorm_linear` and `swiglu_mlp` are fused only where they are named."""
    model, cpu = part_model(ATTENTION), torch.device("cpu")
    found = model.explain(cpu, torch.float32)
    assert {name for name, chosen in found.items() if "separate layers" in chosen.reason} == {
        "a.rmsnorm_linear",
        "a.swiglu_mlp",
    }
    model.use_backends({"swiglu_mlp": "reference"})
    assert model.explain(cpu, torch.float32)["a.swiglu_mlp"].reason == "requested"


def test_a_selection_is_what_the_head_computes():
    model = randomise_(part_model(ATTENTION))
    logits, targets = model(TOKENS).logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten()
    select = torch.tensor([3, 11, 12, 23])
    assert_close(model(TOKENS, select=select).logits, logits[select], 1e-6)
    nll = model(TOKENS, targets=targets.view_as(TOKENS)).nll.flatten()
    output = model(TOKENS, select=select, targets=targets[select])
    assert_close(output.nll, nll[select], 1e-6)
    assert_close(output.losses["nll"], nll[select].mean(), 1e-6)


def test_losses_of_layers_have_weights_of_their_own():
    """`nll` and losses per token by loss_weight, means over sequences by batch_weight."""
    model = randomise_(part_model(ATTENTION, FFN_CASES["routed"][0])).train()
    plain = model(TOKENS, targets=TOKENS)
    assert set(plain.losses) == {"nll", "routed_budget"}
    weights = {"loss_weight": torch.tensor(2.0), "batch_weight": 0.5}
    weighted = model(TOKENS, targets=TOKENS, **weights)
    assert_close(weighted.losses["nll"], 2 * plain.nll.sum(), 1e-6)
    assert_close(weighted.losses["routed_budget"], 0.5 * plain.losses["routed_budget"], 1e-6)
    assert_close(weighted.total(), sum(weighted.losses.values()), 1e-6)
    assert plain.metrics["routed"].shape == (2, 5)
    assert set(model.eval()(TOKENS, targets=TOKENS).losses) == {"nll"}
    model.train()
    by_layer = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda *call: by_layer.append(call[2][1].losses["routed_budget"].value))
    model(TOKENS, targets=TOKENS)
    assert_close(plain.losses["routed_budget"], torch.stack(by_layer).mean(), 1e-6)


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
        (lambda m: m(TOKENS, documents=TOKENS[:1]), r"documents \(1, 12\) must have the shape of tokens \(2, 12\)"),
        (lambda m: m(TOKENS, state=m.init_state(3)), "the state is for 3 sequences, tokens has 2"),
        (lambda m: m(TOKENS, targets=TOKENS[:, 1:]), r"targets \(2, 11\) must have the shape \(2, 12\)"),
        (lambda m: m(TOKENS, lengths=[3, 4]), "lengths are for a state"),
        (lambda m: m(TOKENS, state=m.init_state(2), lengths=[3, 13]), r"lengths=\[3, 13\] .* from 0 to 12"),
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
        again = model(torch.zeros(2, 1, dtype=torch.int64), state=extended).logits
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
