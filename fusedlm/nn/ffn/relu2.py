"""Squared leaky ReLU feed-forward (arXiv 2109.08668)."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear, casts_input, ends_token, fuses_norm, mlp
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.pending import SquaredReLU


class ReLU2(Module):
    """down(leaky_relu(up(x), slope)^2); hidden: None: 4 * dim."""

    branch_end = "down"

    def __init__(self, *, dim: int, hidden: int | None = None, slope: float = 0.0):
        super().__init__()
        hidden = hidden or 4 * dim
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim, zero=True)
        self.activation = SquaredReLU(slope)

    def forward(self, x_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return mlp(x_BTD, self.up, self.down, self.activation)

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        """For one token, where `down` ends the branch, and for a layer that casts the norm to few bits."""
        return casts_input(self.up) or (ends_token(self.down, x_BTD) and fuses_norm(self.up, x_BTD))

    def flops(self, n_tokens: int) -> int:
        return self.up.flops(n_tokens) + self.down.flops(n_tokens)

    def ops(self, device: torch.device) -> list[OpUse]:
        sizes = self.activation.sizes(self.up.in_features, self.up.out_features)
        return [OpUse("relu2_mlp", "relu2_mlp", sizes)]
