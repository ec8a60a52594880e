"""Levels and compute of routed feed-forwards, from the metric `routed` of forward passes."""

from dataclasses import dataclass

import torch

from fusedlm.nn.ffn.routed import RoutedFFN


@dataclass(frozen=True)
class Routing:
    """Levels and compute of some forward passes."""

    layers: list[list[float]]  # of each, first to last: shares of tokens on the light level, blended, full
    flops_share: float  # FLOPs that ran, over those of the full feed-forwards on every token; padding counts in both
    budget: float  # the share that training aims at

    @property
    def shares(self) -> list[float]:
        """Light, blended, full: means over the layers."""
        return [sum(shares) / len(self.layers) for shares in zip(*self.layers, strict=True)]

    def record(self) -> dict:
        """As metrics.jsonl and `fusedlm eval --json` hold it."""
        light, blend, full = self.shares
        return {
            "routed_light": light,
            "routed_blend": blend,
            "routed_full": full,
            "routed_flops_share": self.flops_share,
            "routed_budget": self.budget,
            "routed_layers": self.layers,
        }


def has_routing(model: torch.nn.Module) -> bool:
    """Whether a model has routed feed-forwards."""
    return any(isinstance(module, RoutedFFN) for module in model.modules())


def routing_of(model: torch.nn.Module, metrics: dict[str, torch.Tensor]) -> Routing | None:
    """From summed metrics of a model's forward passes; None where it has no routed feed-forward. Waits for the device
    where the metrics lie on one."""
    if "routed" not in metrics:
        return None
    modules = [module for module in model.modules() if isinstance(module, RoutedFFN)]
    rows = metrics["routed"].tolist()
    ran = sum(m.flops_of(n, rest_rows) for m, (*_, rest_rows, n) in zip(modules, rows, strict=True))
    full = sum(m.full_flops(n) for m, (*_, n) in zip(modules, rows, strict=True))
    planned = sum(m.flops(n) for m, (*_, n) in zip(modules, rows, strict=True))
    layers = [[count / max(sum(row[:3]), 1) for count in row[:3]] for row in rows]
    return Routing(layers, ran / full, planned / full)
