"""Averages of the weights, kept in float32 beside them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fusedlm.config.train import TrainConfig
from fusedlm.distributed import forget_gathered, local, shard_like
from fusedlm.optim.schedule import is_decayed_below


class WeightAverage:
    """float32 averages of the parameters of a model, a tied one once, sharded as these are. They begin as the weights.

    updates: weights averaged so far.
    """

    def __init__(self, model: nn.Module):
        self.updates = 0
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def move(self, fraction: float) -> None:
        """a ← a + fraction (w − a). Does not wait for the device."""
        weights = [local(parameter.detach()).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_([local(average) for average in self._averages.values()], weights, fraction)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the model has the averages as weights. Its own weights are restored bit for bit."""
        own = [local(parameter.detach()).clone() for parameter in self._parameters.values()]
        try:
            self._write([local(average) for average in self._averages.values()])
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            local(parameter.detach()).copy_(value)
        forget_gathered(self._model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name (the live tensors, not copies). Save `updates` too."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor], updates: int) -> None:
        """Restore saved averages, full tensors, and their number of updates.

        Raises:
            ValueError: names or shapes do not match this model.
        """
        if tensors.keys() != self._averages.keys():
            name = sorted(tensors.keys() ^ self._averages.keys())[0]
            raise ValueError(f"averaged weights: tensor {name!r} is in only one of the checkpoint and the model")
        for name, average in self._averages.items():
            saved = tensors[name]
            if saved.shape != average.shape:
                raise ValueError(
                    f"averaged weights: tensor {name!r} has shape {tuple(saved.shape)}, "
                    f"in the model {tuple(average.shape)}"
                )
            local(average).copy_(local(shard_like(saved, average)))
        self.updates = updates


class ExponentialMovingAverage(WeightAverage):
    """a ← d·a + (1−d)·w after each optimizer step.

    The decay of update t (from 1) is d = min(decay, (1+t)/(10+t)), so that the random initial weights fade from the
    average early.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay}: must be greater than 0 and less than 1")
        super().__init__(model)
        self.decay = decay

    def update(self) -> None:
        """Update the averages with the current weights. Does not wait for the device."""
        self.updates += 1
        self.move(1 - min(self.decay, (1 + self.updates) / (10 + self.updates)))


class StochasticWeightAverage(WeightAverage):
    """The mean of the weights at regular steps (arXiv 1803.05407), where the learning rate is low."""

    def update(self) -> None:
        """Add the current weights to the mean. Does not wait for the device."""
        self.updates += 1
        self.move(1 / self.updates)

    def reset(self) -> None:
        """Begin anew with the next update."""
        self.updates = 0


class Averages:
    """The averages that a recipe keeps, updated after each optimizer step.

    ema: of every step; None: not kept. swa: of every `train.swa.every`-th step at which the schedule, after its
    warm-up, is below `train.swa.below`; a step that is not empties it, so that weights from before the decay, such as
    of a run that was extended, are never in it.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self._config = config
        self.ema = None if config.ema is None else ExponentialMovingAverage(model, config.ema)
        self.swa = None if config.swa is None else StochasticWeightAverage(model)

    def update(self, step: int) -> None:
        """After the weights changed in a step, counted from 0."""
        if self.ema is not None:
            self.ema.update()
        if self.swa is None:
            return
        swa, steps = self._config.swa, self._config.steps
        if not is_decayed_below(self._config.schedule, step, steps, swa.below):
            self.swa.reset()
        elif (step + 1) % swa.every == 0:
            self.swa.update()

    def updates(self) -> tuple[int, int]:
        """Of `ema` and `swa`; 0 for one that is not kept."""
        return tuple(0 if average is None else average.updates for average in (self.ema, self.swa))

    def kept(self) -> dict[str, WeightAverage]:
        """By the name of `--weights`, those that have averaged something."""
        named = {"ema": self.ema, "swa": self.swa}
        return {name: average for name, average in named.items() if average is not None and average.updates}
