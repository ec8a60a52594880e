"""Short training of a model on synthetic batches."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from fusedlm.config.train import CosineConfig, OptimizerConfig
from fusedlm.data import Batch
from fusedlm.data.meter import ReportProgress, silent
from fusedlm.model import Decoder
from fusedlm.model.precision import autocast
from fusedlm.nn.quantized import quantized_weights
from fusedlm.optim import build_optimizer, schedule_scale
from fusedlm.train.step import train_step

NOT_SCORED = -100
BATCH_TOKENS = {"cuda": 2**17, "cpu": 2**13}  # per batch of scored sequences, by type of device
_MAX_BAD_STEPS = 8
_SCHEDULE = CosineConfig(warmup=0.1, final=0.05)


def fit(
    model: Decoder,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    optimizer: OptimizerConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress = silent,
    stage: str = "training",
) -> list[float]:
    """Train a model in place: warm-up over a tenth of the steps, then cosine decay; gradients clipped to norm 1.

    Args:
        model: on `device`; left in eval mode.
        batches: tokens and targets (B, T) int64; targets -100 are not scored.

    Returns:
        The loss of each step, nats per scored target.

    Raises:
        ValueError: the model has quantised weights, or loss or gradient was not finite in eight consecutive steps.
    """
    if quantized_weights(model):
        raise ValueError("the model has quantised weights, which are not trained; probe the run that they are from")
    torch_optimizer = build_optimizer(model, optimizer, device, dtype)
    losses, bad = [], 0
    model.train()
    try:
        for step in range(steps):
            result = train_step(
                model,
                torch_optimizer,
                _batch(*next(batches), device),
                lr_scale=schedule_scale(_SCHEDULE, step, steps),
                micro_batch_size=2**31,
                grad_clip=1.0,
                autocast=partial(autocast, device, dtype),
            )
            bad = bad + 1 if result.skipped else 0
            if bad == _MAX_BAD_STEPS:
                raise ValueError(
                    f"loss or gradient was not finite in {bad} consecutive steps up to {step + 1}; "
                    f"lower the learning rate {next(iter(optimizer.rates().values())):g}"
                )
            losses.append(result.loss)
            progress(stage, step + 1, steps)
    finally:
        model.eval()
    return losses


def _batch(tokens: np.ndarray, targets: np.ndarray, device: torch.device) -> Batch:
    return Batch(
        tokens=torch.from_numpy(tokens).to(device),
        targets=torch.from_numpy(targets).to(device),
        documents=None,
        n_valid=int((targets != NOT_SCORED).sum()),
        next_sample=0,
    )
