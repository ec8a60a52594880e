"""Routed feed-forward: three levels of compute, chosen token by token."""

import math

import torch
import torch.nn.functional as F

from fusedlm.config.ffn import RoutedConfig, SwiGLUConfig
from fusedlm.config.model import ModelConfig
from fusedlm.nn.ffn.swiglu import SwiGLU
from fusedlm.nn.linear import Linear
from fusedlm.ops.common import Setting

# Gathered rows come in multiples of this. Matrix products on the CPU round the rows of an incomplete tile in another
# way, and how many tokens are gathered must not show in the result of any one of them.
_TILE = 16


class RoutedFFN(torch.nn.Module):
    """light(x) + a rest(x), where a = clamp((e - low) / (high - low), 0, 1).

    light and rest are the first and the other hidden units of one SwiGLU, the full one: a = 0 is the light feed-forward
    alone, a = 1 the full one, and between them (1 - a) light + a full. Where a is 0, rest does not run: its tokens are
    gathered. e, the difficulty, is the entropy of a small softmax router as a share of its largest value. The router
    learns through a where that is between 0 and 1, and everywhere through the budget (`auxiliary_loss`).
    """

    def __init__(self, config: RoutedConfig, model: ModelConfig, setting: Setting):
        super().__init__()
        self.low, self.high = config.low, config.high
        self.budget, self.budget_weight = config.budget, config.budget_weight
        hidden = config.hidden or -(-8 * model.dim // (3 * 64)) * 64
        light = min(max(8 * round(config.light * hidden / 8), 8), hidden - 1)
        self.light = SwiGLU(SwiGLUConfig(hidden=light), model, setting)
        self.rest = SwiGLU(SwiGLUConfig(hidden=hidden - light), model, setting)
        self.choices = self.light.choices
        self.router = Linear(model.dim, config.n_classes)
        # Equal logits would have entropy 1 and no gradient. A variance of 2 ln(n_classes) (1 / e - 1) makes the mean
        # difficulty about e: here the middle of the band, from which training can go both ways.
        variance = 2 * math.log(config.n_classes) * (2 / (config.low + config.high) - 1)
        torch.nn.init.normal_(self.router.weight, std=math.sqrt(variance / model.dim))
        self.difficulty: torch.Tensor | None = None  # (N,) of the last forward, with its graph while training

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BTD.flatten(0, 1)
        difficulty_N = self._difficulty(x_ND)
        self.difficulty = difficulty_N if self.training else difficulty_N.detach()
        weight_N = self._weight(difficulty_N)
        rows, sources = _gathered(weight_N > 0)
        rest = self.rest(x_ND.index_select(0, sources))
        rest = rest * weight_N.index_select(0, sources).to(rest.dtype)[:, None]
        y_ND = F.pad(self.light(x_ND), (0, 0, 0, _TILE - 1))  # the rows that fill up a tile are added behind the last
        return y_ND.index_add(0, rows, rest)[: x_ND.shape[0]].view_as(x_BTD)

    def _difficulty(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N,) in [0, 1], float32 or better."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            log_p_NC = F.linear(x_ND.to(wide), self.router.weight.to(wide)).log_softmax(-1)
            return -(log_p_NC.exp() * log_p_NC).sum(-1) / math.log(log_p_NC.shape[-1])

    def _weight(self, difficulty_N: torch.Tensor) -> torch.Tensor:
        """(N,) of the full feed-forward in each token's output; 0: light alone, 1: full."""
        return ((difficulty_N - self.low) / (self.high - self.low)).clamp(0, 1)

    def auxiliary_loss(self) -> torch.Tensor:
        """budget_weight * (mean compute a token - budget)^2 of the last forward in training mode; asked for once.

        Compute is in units of the full feed-forward's FLOPs. Its value is that of the levels taken; its gradient is
        as if compute grew evenly with difficulty, from the light one's at 0 to the full one's at 1, so that every token
        moves, and gently.
        """
        difficulty_N, self.difficulty = self.difficulty, self.difficulty.detach()  # the graph is not kept
        router, light, rest = (part.flops(1) / self.full_flops(1) for part in (self.router, self.light, self.rest))
        share = (self._weight(self.difficulty) > 0).to(difficulty_N.dtype).mean()
        compute = router + light + rest * (share + (difficulty_N - self.difficulty).mean())
        return self.budget_weight * (compute - self.budget).square()

    def counts(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """(4,) int64 of the last forward: tokens on the light level, blended, and full; rows that rest computed, those
        that fill up a tile included. Levels are those of `tokens` (indices into B * T), or of all."""
        weight_N = self._weight(self.difficulty.detach())
        chosen_N = weight_N if tokens is None else weight_N[tokens]
        rows = (weight_N > 0).sum()
        if weight_N.numel() > 1:
            rows = (rows + _TILE - 1) // _TILE * _TILE
        levels = [chosen_N == 0, (chosen_N > 0) & (chosen_N < 1), chosen_N == 1]
        return torch.stack([*(level.sum() for level in levels), rows])

    def flops(self, n_tokens: int) -> int:
        """At the budget. What ran is in `counts`."""
        return round(self.budget * self.full_flops(n_tokens))

    def full_flops(self, n_tokens: int) -> int:
        """Of the full feed-forward on every token, without a router."""
        return self.light.flops(n_tokens) + self.rest.flops(n_tokens)

    def flops_of(self, n_tokens: int, rest_rows: int) -> int:
        """Of forward passes over n_tokens in which rest computed so many rows."""
        return self.router.flops(n_tokens) + self.light.flops(n_tokens) + self.rest.flops(rest_rows)

    def active_parameters(self) -> int:
        """Parameters that a token meets on average, at the budget."""
        full = sum(p.numel() for part in (self.light, self.rest) for p in part.parameters())
        return round(self.budget * full)


def _gathered(taken_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the tokens taken, filled up to whole tiles by indices from N on; and the same with these at N - 1."""
    n = taken_N.shape[0]
    if n > 1:  # a single token is not worth a tile, and has no other one to be independent of
        missing = -taken_N.sum() % _TILE
        filler = torch.arange(_TILE - 1, device=taken_N.device) < missing
        taken_N = torch.cat([taken_N, filler])
    rows = taken_N.nonzero().squeeze(1)
    return rows, rows.clamp(max=n - 1)
