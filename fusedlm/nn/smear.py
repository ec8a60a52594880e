"""A gate that mixes each embedding with the one before."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.module import Constant, Module, Role
from fusedlm.nn.previous import PreviousToken, previous

GATE = -3.0  # start of the gate before its sigmoid: 0.05 of the previous embedding


class SmearGate(Module):
    """x <- (1 - g) x + g x_-1 per dimension, g = sigmoid of a learnt vector; x_-1 is 0 for the first token of a
    document."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.add_parameter("gate", (dim,), Role("gate"), Constant(GATE))

    def forward(self, x_BTD: torch.Tensor, context: Context, state: PreviousToken | None = None) -> torch.Tensor:
        return torch.lerp(x_BTD, previous(x_BTD, context, state), self.gate.sigmoid().to(x_BTD.dtype))

    def init_state(self) -> PreviousToken:
        """Of embeddings."""
        return PreviousToken()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return self.dim * dtype.itemsize if n_tokens else 0
