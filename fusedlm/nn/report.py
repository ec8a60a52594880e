"""Losses and metrics that a layer returns besides its output."""

from typing import NamedTuple

import torch


class Loss(NamedTuple):
    """A loss of its own, its coefficient in the recipe already applied.

    value: () with a graph.
    per: what it is normalised by. "batch": value is a mean over the sequences of this call, weighted by their share of
        the optimizer step. "token": value is a sum over tokens, to be divided by the valid targets of the step.
    """

    value: torch.Tensor
    per: str


class Report(NamedTuple):
    """Losses and metrics of one layer, by name.

    metrics: counts and sums without a graph, on the device, which add up over micro-batches and ranks.
    """

    losses: dict[str, Loss]
    metrics: dict[str, torch.Tensor]


def with_report(output: torch.Tensor | tuple[torch.Tensor, Report]) -> tuple[torch.Tensor, Report]:
    """The output of a part that may report something, and its report."""
    return output if type(output) is tuple else (output, Report({}, {}))
