"""What parts of a model say of a forward pass besides its output: losses of their own, and the levels of routing."""

from dataclasses import dataclass

import torch

from fusedlm.nn.ffn.routed import RoutedFFN


def auxiliary_loss(model: torch.nn.Module) -> torch.Tensor | None:
    """() mean of `auxiliary_loss()` over the modules that have one, of the last forward pass in training mode.

    To be asked for once after each such pass, and added to its loss. None: no module has one.
    """
    losses = [module.auxiliary_loss() for module in model.modules() if hasattr(module, "auxiliary_loss")]
    return torch.stack(losses).mean() if losses else None


@dataclass(frozen=True)
class Routing:
    """What the routed feed-forwards of a model did with the tokens of some forward passes."""

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


class RoutingTally:
    """Counts of levels and rows over forward passes, kept on the device; false when a model has no routed layer."""

    def __init__(self, model: torch.nn.Module):
        self.modules = [module for module in model.modules() if isinstance(module, RoutedFFN)]
        self.n_tokens = 0
        self.counts: torch.Tensor | None = None  # (layers, 4) int64, see RoutedFFN.counts

    def __bool__(self) -> bool:
        return bool(self.modules)

    def add(self, tokens: torch.Tensor | None = None) -> None:
        """Count the last forward pass; levels are those of `tokens` (indices into B * T), None: of all."""
        if not self:
            return
        counts = torch.stack([module.counts(tokens) for module in self.modules])
        self.counts = counts if self.counts is None else self.counts + counts
        self.n_tokens += self.modules[0].difficulty.numel()

    def result(self, counts: list[int]) -> Routing:
        """From `self.counts`, flattened, on the host."""
        rows = [counts[i : i + 4] for i in range(0, len(counts), 4)]
        ran = sum(m.flops_of(self.n_tokens, int(row[3])) for m, row in zip(self.modules, rows, strict=True))
        whole = sum(module.full_flops(self.n_tokens) for module in self.modules)
        layers = [[count / max(sum(row[:3]), 1) for count in row[:3]] for row in rows]
        planned = sum(module.flops(self.n_tokens) for module in self.modules)
        return Routing(layers, ran / whole, planned / whole)
