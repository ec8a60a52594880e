"""Quantisation-aware training of a run: which of its steps, and what is scored beside the weights."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from fusedlm.config.train import TrainConfig
from fusedlm.nn.fake_quantized import FakeQuantization


class QuantizationAware:
    """`train.qat` of a recipe; without it no step is rounded."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig):
        self._start = config.qat_start()
        self._weights = None
        if config.qat is not None:
            self._weights = FakeQuantization(model, **config.qat.model_dump(exclude={"start"}))

    def weights(self, step: int) -> Callable[[], AbstractContextManager]:
        """The context of the passes of a step, counted from 0."""
        return self._weights.applied if self._rounds(step) else contextlib.nullcontext

    def kept(self, steps: int) -> dict[str, FakeQuantization]:
        """After so many steps, the rounded weights by the name of their score, if the last step was rounded."""
        return {"qat": self._weights} if self._rounds(steps - 1) else {}

    def record(self, steps: int) -> dict[str, bool]:
        """Of the last of so many steps, for metrics.jsonl."""
        return dict.fromkeys(self.kept(steps), True)

    def _rounds(self, step: int) -> bool:
        return self._weights is not None and step >= self._start
