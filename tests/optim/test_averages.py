import pytest
import torch
from torch import nn

from fusedlm.config.train import CosineConfig, LinearConfig, SWAConfig, TrainConfig, WSDConfig
from fusedlm.optim import Averages, ExponentialMovingAverage


def walk(model, ema, steps):
    """Update the averages after each of some random changes of the weights; the weights after each."""
    history = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        history.append(model.weight.detach().clone())
    return history


def test_averages_follow_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    expected = model.weight.detach().double()
    ema = ExponentialMovingAverage(model, decay=0.5)
    for t, weight in enumerate(walk(model, ema, 20), start=1):
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, rtol=0, atol=1e-6)


def test_averages_of_bfloat16_weights_are_float32():
    model = nn.Linear(3, 2).bfloat16()
    ema = ExponentialMovingAverage(model, decay=0.9)
    walk(model, ema, 2)
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {torch.float32}


def test_applied_swaps_the_weights_and_restores_them_also_after_an_error():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(model, decay=0.9)
    own = walk(model, ema, 5)[-1]
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.weight, ema.state_dict()["weight"])
        assert not torch.equal(model.weight, own)
        raise KeyError
    assert torch.equal(model.weight, own)


def test_loaded_averages_continue_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(model, decay=0.9)
    walk(model, ema, 4)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    other = ExponentialMovingAverage(model, decay=0.9)
    other.load_state_dict(saved, updates=4)
    ema.update()
    other.update()
    assert torch.equal(ema.state_dict()["weight"], other.state_dict()["weight"])


def test_tied_weights_are_averaged_once():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    ema = ExponentialMovingAverage(nn.Sequential(embedding, head), decay=0.9)
    assert list(ema.state_dict()) == ["0.weight"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "'bias' is in only one"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, r"'weight' has shape \(2, 2\), in the model \(2, 3\)"),
    ],
)
def test_averages_of_another_model_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        ExponentialMovingAverage(nn.Linear(3, 2), decay=0.9).load_state_dict(tensors, updates=1)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}: must be greater than 0 and less than 1"):
        ExponentialMovingAverage(nn.Linear(3, 2), decay=decay)


def averaged(config, steps, skip=()):
    """The averages after walking through all steps, and the weights after each."""
    model = nn.Linear(3, 2, bias=False)
    averages, weights = Averages(model, config), []
    for step in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        weights.append(model.weight.detach().double().clone())
        if step not in skip:
            averages.update(step)
    return averages, weights


def settings(**changes):
    schedule = WSDConfig(warmup=0.2, decay=0.5, final=0.0)
    return TrainConfig(steps=40, seq_len=4, batch_size=1, schedule=schedule, **changes)


def test_swa_is_the_mean_of_every_nth_step_below_the_threshold():
    """The last 20 of 40 steps decay from 1 to 0: below 0.4 are those from 33 on, counted from 1, the last at 0."""
    averages, weights = averaged(settings(swa=SWAConfig(every=3, below=0.4)), 40, skip=(35,))
    chosen = [weights[step - 1] for step in (33, 39)]
    assert averages.updates() == (0, 2)
    mean = averages.swa.state_dict()["weight"]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), sum(chosen) / 2, rtol=0, atol=1e-6)
    assert set(averages.kept()) == {"swa"}


def test_warm_up_is_not_averaged_and_a_step_above_the_threshold_empties_the_mean():
    config = settings(swa=SWAConfig(every=1, below=0.4), ema=0.9)
    averages, _ = averaged(config, 3)
    assert set(averages.kept()) == {"ema"}
    averages, _ = averaged(config, 40)
    assert averages.updates() == (40, 8)
    averages.update(20)  # of a run that was extended
    assert averages.updates() == (41, 0)


def test_a_threshold_that_the_schedule_never_passes_is_refused():
    for schedule in (WSDConfig(final=0.2), WSDConfig(decay=0), CosineConfig(final=0.3), LinearConfig(final=0.2)):
        with pytest.raises(ValueError, match="swa.below=0.2: the schedule ends at"):
            TrainConfig(steps=40, seq_len=4, batch_size=1, schedule=schedule, swa=SWAConfig())
