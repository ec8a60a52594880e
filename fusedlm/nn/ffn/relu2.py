"""Squared leaky ReLU feed-forward (arXiv 2109.08668)."""

import torch
import torch.nn.functional as F

from fusedlm.config.ffn import ReLU2Config
from fusedlm.config.model import ModelConfig
from fusedlm.nn.linear import Linear, product_dtype
from fusedlm.ops.common import Setting
from fusedlm.ops.relu2_mlp.op import RELU2_MLP, relu2_mlp


class ReLU2(torch.nn.Module):
    """down(leaky_relu(up(x), slope)^2)."""

    def __init__(self, config: ReLU2Config, model: ModelConfig, setting: Setting):
        super().__init__()
        self.slope = config.slope
        hidden = config.hidden or 4 * model.dim
        self.up = Linear(model.dim, hidden)
        self.down = Linear(hidden, model.dim, zero=True)
        self.whole = RELU2_MLP.choose(model.impl.relu2_mlp, setting, dim=model.dim, hidden=hidden)
        self.choices = [self.whole]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.whole.name == "reference":
            u = self.up(x_BTD)
            u = F.leaky_relu(u, self.slope) if self.slope else F.relu(u)
            return self.down(u.square())
        x_ND = x_BTD.to(product_dtype(x_BTD)).flatten(0, -2)
        weights = self.up.weight, self.down.weight
        return relu2_mlp(x_ND, *weights, slope=self.slope, implementation=self.whole.function).view_as(x_BTD)

    def flops(self, n_tokens: int) -> int:
        return self.up.flops(n_tokens) + self.down.flops(n_tokens)
