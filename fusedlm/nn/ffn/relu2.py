"""Squared leaky ReLU feed-forward (arXiv 2109.08668)."""

import torch
import torch.nn.functional as F

from fusedlm.config.ffn import ReLU2Config
from fusedlm.config.model import ModelConfig
from fusedlm.nn.linear import Linear


class ReLU2(torch.nn.Module):
    """down(leaky_relu(up(x), slope)^2)."""

    def __init__(self, config: ReLU2Config, model: ModelConfig):
        super().__init__()
        self.slope = config.slope
        hidden = config.hidden or 4 * model.dim
        self.up = Linear(model.dim, hidden)
        self.down = Linear(hidden, model.dim, zero=True)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        u = self.up(x_BTD)
        u = F.leaky_relu(u, self.slope) if self.slope else F.relu(u)
        return self.down(u.square())

    def flops(self, n_tokens: int) -> int:
        return self.up.flops(n_tokens) + self.down.flops(n_tokens)
