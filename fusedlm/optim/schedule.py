"""Learning-rate schedules as pure functions of the step, so that resuming needs no state of theirs."""

import math

from fusedlm.config.train import CosineConfig, ScheduleConfig


def schedule_scale(config: ScheduleConfig, step: int, steps: int) -> float:
    """Multiplier of the peak learning rate.

    Warm-up and decay take their fractions of all steps, rounded to whole steps. The warm-up rises linearly and reaches
    1 on its last step; the decay reaches `final` on the last step of all. WSD: arXiv 2404.06395; cosine: arXiv
    1608.03983 without restarts.

    Args:
        step: the optimizer step about to be taken, counted from 0.
        steps: length of the whole run in optimizer steps.

    Raises:
        ValueError: step is not in [0, steps).
    """
    if not 0 <= step < steps:
        raise ValueError(f"step={step} is outside a schedule of {steps} steps")
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(config, CosineConfig):
        progress = (step + 1 - warmup) / (steps - warmup)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
    decay = min(round(config.decay * steps), steps - warmup)
    into_decay = step + 1 - (steps - decay)
    if into_decay <= 0:
        return 1.0
    return 1 - (1 - config.final) * into_decay / decay
