"""Exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class ExponentialMovingAverage:
    """float32 averages of the parameters of a model, a tied one once: a ← d·a + (1−d)·w after each optimizer step.

    The decay of update t (from 1) is d = min(decay, (1+t)/(10+t)), so that the random initial weights fade from the
    average early.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay}: must be greater than 0 and less than 1")
        self.decay = decay
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights. Does not wait for the device."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the model has the averages as weights. Its own weights are restored bit for bit."""
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        try:
            self._write(list(self._averages.values()))
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name (the live tensors, not copies). Save `updates` too."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor], updates: int) -> None:
        """Restore saved averages and their number of updates.

        Raises:
            ValueError: names or shapes do not match this model.
        """
        if tensors.keys() != self._averages.keys():
            name = sorted(tensors.keys() ^ self._averages.keys())[0]
            raise ValueError(f"moving average: tensor {name!r} is in only one of the checkpoint and the model")
        for name, average in self._averages.items():
            if tensors[name].shape != average.shape:
                raise ValueError(
                    f"moving average: tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                    f"in the model {tuple(average.shape)}"
                )
            average.copy_(tensors[name])
        self.updates = updates
