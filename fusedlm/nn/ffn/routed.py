"""Routed feed-forward: three levels of compute, chosen per token."""

import math

import torch
import torch.nn.functional as F

from fusedlm.nn.context import Context
from fusedlm.nn.ffn.swiglu import SwiGLU, default_hidden
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Module, Normal, OpUse
from fusedlm.nn.report import Loss, Report

# Gathered rows are padded to multiples of this. Matrix products on the CPU round rows of an incomplete tile
# differently, and a token's result must not depend on how many others are gathered.
_TILE = 16


class RoutedFFN(Module):
    """light(x) + a rest(x), where a = clamp((e - low) / (high - low), 0, 1).

    light and rest are the first and the other hidden units of one SwiGLU, the full one: a = 0 is the light feed-forward
    alone, a = 1 the full one, and between them (1 - a) light + a full. rest runs on the gathered tokens with a > 0
    only. e, the difficulty, is the entropy of a small softmax router as a fraction of its maximum. The router learns
    through a where that is between 0 and 1, and everywhere through the budget.

    Reports the loss `routed_budget` while training, and the metric `routed`, (5,) int64: tokens on the light level,
    blended, and full, of the context's selection; rows that rest computed, padding of tiles included; tokens.
    """

    metric = "routed"

    def __init__(
        self,
        *,
        dim: int,
        hidden: int | None = None,
        light: float = 0.2,
        low: float = 0.3,
        high: float = 0.7,
        n_classes: int = 8,
        budget: float = 0.6,
        budget_weight: float = 1.0,
    ):
        """The arguments are those of fusedlm.config.ffn.RoutedConfig."""
        super().__init__()
        self.low, self.high = low, high
        self.budget, self.budget_weight = budget, budget_weight
        hidden = hidden or default_hidden(dim)
        n_light = min(max(8 * round(light * hidden / 8), 8), hidden - 1)
        self.light = SwiGLU(dim=dim, hidden=n_light)
        self.rest = SwiGLU(dim=dim, hidden=hidden - n_light)
        # Equal logits would have entropy 1 and no gradient. A variance of 2 ln(n_classes) (1 / e - 1) makes the mean
        # difficulty about e: here the middle of the band, from which training can go both ways.
        variance = 2 * math.log(n_classes) * (2 / (low + high) - 1)
        self.router = Linear(dim, n_classes, kind="router", init=Normal(math.sqrt(variance / dim)))

    def forward(self, x_BTD: torch.Tensor, context: Context | None = None) -> tuple[torch.Tensor, Report]:
        x_ND = x_BTD.flatten(0, -2)
        difficulty_N = self.difficulty(x_ND)
        weight_N = self._weight(difficulty_N)
        rows, sources = _gathered(weight_N > 0)
        rest = self.rest(x_ND.index_select(0, sources))
        rest = rest * weight_N.index_select(0, sources).to(rest.dtype)[:, None]
        y_ND = F.pad(self.light(x_ND), (0, 0, 0, _TILE - 1))  # padding of a tile is added to rows after the last
        y_BTD = y_ND.index_add(0, rows, rest)[: x_ND.shape[0]].view_as(x_BTD)
        losses = {"routed_budget": Loss(self.budget_loss(difficulty_N), "batch")} if self.training else {}
        select = None if context is None else context.select
        return y_BTD, Report(losses, {"routed": self.counts(weight_N.detach(), select)})

    def difficulty(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N,) in [0, 1], float32 or better."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            log_p_NC = self.router(x_ND, dtype=wide).log_softmax(-1)
            return -(log_p_NC.exp() * log_p_NC).sum(-1) / math.log(log_p_NC.shape[-1])

    def _weight(self, difficulty_N: torch.Tensor) -> torch.Tensor:
        """(N,) of the full feed-forward in each token's output; 0: light alone, 1: full."""
        return ((difficulty_N - self.low) / (self.high - self.low)).clamp(0, 1)

    def budget_loss(self, difficulty_N: torch.Tensor) -> torch.Tensor:
        """() budget_weight * (mean compute per token - budget)^2.

        Compute is in units of the full feed-forward's FLOPs. The value is that of the levels taken; the gradient is
        that of compute growing linearly with difficulty, from the light one's at 0 to the full one's at 1, so that
        every token moves, and gently.
        """
        constant_N = difficulty_N.detach()
        router, light, rest = (part.flops(1) / self.full_flops(1) for part in (self.router, self.light, self.rest))
        share = (self._weight(constant_N) > 0).to(difficulty_N.dtype).mean()
        compute = router + light + rest * (share + (difficulty_N - constant_N).mean())
        return self.budget_weight * (compute - self.budget).square()

    @staticmethod
    def counts(weight_N: torch.Tensor, select: torch.Tensor | None = None) -> torch.Tensor:
        """The metric `routed` of weights (N,); levels are those of the tokens selected, None: of all."""
        chosen_N = weight_N if select is None else weight_N[select]
        rows = (weight_N > 0).sum()
        if weight_N.numel() > 1:
            rows = (rows + _TILE - 1) // _TILE * _TILE
        levels = [chosen_N == 0, (chosen_N > 0) & (chosen_N < 1), chosen_N == 1]
        n_tokens = torch.full_like(rows, weight_N.numel())
        return torch.stack([*(level.sum() for level in levels), rows, n_tokens])

    @staticmethod
    def summarise(layers: list["RoutedFFN"], sums: list[list[int]]) -> dict[str, float | list[list[float]]]:
        """Figures of the metric `routed`, summed over forward passes, a row per layer.

        Returns:
            routed_light, routed_blend, routed_full: fractions of tokens on each level, means over the layers.
            routed_flops_share: FLOPs that ran, over those of the full feed-forwards on every token; padding counts in
                both.
            routed_budget: the target of that fraction.
            routed_layers: the three fractions of each layer, first to last.
        """
        ran = sum(layer.flops_of(n, rest_rows) for layer, (*_, rest_rows, n) in zip(layers, sums, strict=True))
        full = sum(layer.full_flops(n) for layer, (*_, n) in zip(layers, sums, strict=True))
        planned = sum(layer.flops(n) for layer, (*_, n) in zip(layers, sums, strict=True))
        fractions = [[count / max(sum(row[:3]), 1) for count in row[:3]] for row in sums]
        light, blend, all_ = (sum(column) / len(layers) for column in zip(*fractions, strict=True))
        return {
            "routed_light": light,
            "routed_blend": blend,
            "routed_full": all_,
            "routed_flops_share": ran / full,
            "routed_budget": planned / full,
            "routed_layers": fractions,
        }

    def flops(self, n_tokens: int) -> int:
        """At the budget. What ran is in the metric `routed`."""
        return round(self.budget * self.full_flops(n_tokens))

    def full_flops(self, n_tokens: int) -> int:
        """Of the full feed-forward on every token, without a router."""
        return self.light.flops(n_tokens) + self.rest.flops(n_tokens)

    def flops_of(self, n_tokens: int, rest_rows: int) -> int:
        """Of forward passes over n_tokens in which rest computed so many rows."""
        return self.router.flops(n_tokens) + self.light.flops(n_tokens) + self.rest.flops(rest_rows)

    def active_parameters(self) -> int:
        """Parameters that a token uses on average, at the budget."""
        full = sum(p.numel() for part in (self.light, self.rest) for p in part.parameters())
        return round(self.budget * full)

    def waits_for_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """For the number of gathered tokens."""
        return True

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse("float32_linear", "float32_linear", {}), *self.light.ops(device)]


def _gathered(taken_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the tokens taken, padded to full tiles with indices from N on; and the same clamped to N - 1."""
    n = taken_N.shape[0]
    if n > 1:  # a single token has no others to be independent of
        missing = -taken_N.sum() % _TILE
        filler = torch.arange(_TILE - 1, device=taken_N.device) < missing
        taken_N = torch.cat([taken_N, filler])
    rows = taken_N.nonzero().squeeze(1)
    return rows, rows.clamp(max=n - 1)
