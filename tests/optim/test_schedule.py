import math

import pytest

from fusedlm.config.train import CosineConfig, LinearConfig, WSDConfig
from fusedlm.optim import schedule_scale


def scales(config, steps):
    return [schedule_scale(config, step, steps) for step in range(steps)]


def test_wsd_at_its_corners():
    values = scales(WSDConfig(warmup=0.1, decay=0.2, final=0.1), 100)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == values[79] == 1.0
    assert values[80] == pytest.approx(1 - 0.9 / 20)
    assert values[99] == pytest.approx(0.1)
    assert all(b < a for a, b in zip(values[79:], values[80:], strict=False))


def test_cosine_at_its_corners():
    values = scales(CosineConfig(warmup=0.1, final=0.2), 100)
    assert values[4] == pytest.approx(0.5)
    assert values[9] == 1.0
    assert values[54] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert values[99] == pytest.approx(0.2)


def test_linear_at_its_corners():
    values = scales(LinearConfig(warmup=0.1, final=0.2), 100)
    assert values[4] == pytest.approx(0.5)
    assert values[9] == 1.0
    assert values[54] == pytest.approx(1 - 0.8 * 45 / 90)
    assert values[99] == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "config",
    [
        WSDConfig(),
        WSDConfig(warmup=0, decay=0),
        WSDConfig(warmup=0, decay=1, final=0),
        WSDConfig(warmup=1, decay=0),
        WSDConfig(warmup=0.5, decay=0.5),
        CosineConfig(),
        CosineConfig(warmup=0, final=0),
        CosineConfig(warmup=1),
        LinearConfig(),
        LinearConfig(warmup=1),
    ],
)
def test_multipliers_are_between_zero_and_one_at_every_length(config, steps):
    assert all(0 <= value <= 1 for value in scales(config, steps))


def test_without_warmup_or_decay_the_rate_is_constant():
    assert set(scales(WSDConfig(warmup=0, decay=0), 50)) == {1.0}


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_schedule_is_refused(step):
    with pytest.raises(ValueError, match=f"step={step}: must be from 0 to 9"):
        schedule_scale(WSDConfig(), step, 10)
