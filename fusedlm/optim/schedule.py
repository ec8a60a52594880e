"""Learning-rate schedules as pure functions of the step: they have no state to save."""

import math

from fusedlm.config.train import CosineConfig, LinearConfig, ScheduleConfig


def schedule_scale(config: ScheduleConfig, step: int, steps: int) -> float:
    """Multiplier of the peak learning rate.

    Warm-up and decay last their fractions of all steps, rounded to integers. The warm-up is linear and reaches 1 on its
    last step; the decay reaches `final` on the last step of the run. WSD: arXiv 2404.06395; cosine: arXiv 1608.03983
    without restarts; linear: arXiv 2310.07831.

    Args:
        step: the optimizer step about to be taken, from 0.
        steps: optimizer steps of the run.

    Raises:
        ValueError: step is not in [0, steps).
    """
    if not 0 <= step < steps:
        raise ValueError(f"step={step}: must be from 0 to {steps - 1}")
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(config, LinearConfig):
        return 1 - (1 - config.final) * (step + 1 - warmup) / (steps - warmup)
    if isinstance(config, CosineConfig):
        progress = (step + 1 - warmup) / (steps - warmup)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
    decay = min(round(config.decay * steps), steps - warmup)
    into_decay = step + 1 - (steps - decay)
    if into_decay <= 0:
        return 1.0
    return 1 - (1 - config.final) * into_decay / decay


def is_decayed_below(config: ScheduleConfig, step: int, steps: int, scale: float) -> bool:
    """Whether the multiplier of a step is below `scale`, and not because of the warm-up."""
    return step >= round(config.warmup * steps) and schedule_scale(config, step, steps) < scale
