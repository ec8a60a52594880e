"""Losses and metrics of layers: of one forward pass, and what becomes of the sums of many."""

import torch
import torch.nn.functional as F

from fusedlm.nn.report import Loss, Report


def collect(reports: list[Report]) -> tuple[dict[str, Loss], dict[str, torch.Tensor]]:
    """Each loss as the mean over the layers that have it, and each metric of all layers that have it, stacked in their
    order; shorter ones are filled up with zeros."""
    losses: dict[str, list[Loss]] = {}
    metrics: dict[str, list[torch.Tensor]] = {}
    for report in reports:
        for name, loss in report.losses.items():
            losses.setdefault(name, []).append(loss)
        for name, metric in report.metrics.items():
            metrics.setdefault(name, []).append(metric)
    means = {n: Loss(torch.stack([one.value for one in all_]).mean(), all_[0].per) for n, all_ in losses.items()}
    return means, {name: _stacked(all_) for name, all_ in metrics.items()}


def _stacked(metrics: list[torch.Tensor]) -> torch.Tensor:
    longest = max(len(metric) for metric in metrics)
    return torch.stack([F.pad(metric, (0, longest - len(metric))) for metric in metrics])


def summarise(model: torch.nn.Module, metrics: dict[str, torch.Tensor]) -> dict:
    """As `Decoder.summarise`."""
    figures = {}
    for name, sums in metrics.items():
        layers = _layers(model, name)[: len(sums)]
        figures |= layers[0].summarise(layers, sums.tolist())
    return figures


def end_step(model: torch.nn.Module, metrics: dict[str, torch.Tensor], taken: torch.Tensor) -> None:
    """Let layers use the metrics of an optimizer step, such as for the balance of experts. Once per step, after the
    update; all processes call it with the same sums. Does not wait for the device.

    Args:
        metrics: `Output.metrics`, summed over the micro-batches and processes of the step.
        taken: () bool on the device, whether parameters were updated; if not, layers stay as they are too.
    """
    for name, sums in metrics.items():
        layers = _layers(model, name)[: len(sums)]
        if layers and hasattr(layers[0], "end_step"):
            layers[0].end_step(layers, sums, taken)


def _layers(model: torch.nn.Module, metric: str) -> list[torch.nn.Module]:
    """The layers that report a metric, in the order of its rows. Those of multi-token prediction come last, and report
    in training alone: metrics of evaluation have fewer rows."""
    return [module for module in model.modules() if getattr(module, "metric", None) == metric]
