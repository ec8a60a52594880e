"""Initial decay of linear-time mixers, that of Mamba 2 (arXiv 2405.21060): rates A in [1, 16] and steps dt in
[0.001, 0.1], so half-lives from 1 to 700 tokens."""

import math
from dataclasses import dataclass

import torch

_RATES = 1.0, 16.0
_STEPS = 0.001, 0.1


@dataclass(frozen=True)
class LogRate:
    """log A, A uniform."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        low, high = _RATES
        return (low + (high - low) * torch.rand(shape, generator=generator, device="cpu")).log()


@dataclass(frozen=True)
class StepBias:
    """The bias whose softplus is dt, log dt uniform."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        low, high = (math.log(step) for step in _STEPS)
        dt = torch.exp(low + (high - low) * torch.rand(shape, generator=generator, device="cpu"))
        return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
