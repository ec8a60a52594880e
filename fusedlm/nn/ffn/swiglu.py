"""SwiGLU feed-forward (arXiv 2002.05202)."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear, casts_input, ends_token, fuses_norm, mlp
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.pending import SwiGLUActivation


class SwiGLU(Module):
    """down(silu(gate(x)) * up(x)); gate and up are one packed projection. hidden: None: 8/3 of dim, rounded up to a
    multiple of 64."""

    branch_end = "down"

    def __init__(self, *, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or default_hidden(dim)
        self.gate_up = Linear(dim, 2 * hidden, splits={"gate": hidden, "up": hidden})
        self.down = Linear(hidden, dim, zero=True)
        self.activation = SwiGLUActivation()

    def forward(self, x_BTD: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return mlp(x_BTD, self.gate_up, self.down, self.activation)

    def fuses_norm(self, x_BTD: torch.Tensor) -> bool:
        """For one token, where `down` ends the branch, and for a layer that casts the norm to few bits."""
        return casts_input(self.gate_up) or (ends_token(self.down, x_BTD) and fuses_norm(self.gate_up, x_BTD))

    def flops(self, n_tokens: int) -> int:
        return self.gate_up.flops(n_tokens) + self.down.flops(n_tokens)

    def ops(self, device: torch.device) -> list[OpUse]:
        return [OpUse("swiglu_mlp", "swiglu_mlp", {})]


def default_hidden(dim: int) -> int:
    """8/3 of dim, rounded up to a multiple of 64."""
    return -(-8 * dim // (3 * 64)) * 64
