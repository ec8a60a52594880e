"""Hashed bigram embedding."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.embedding import Embedding
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Constant, Module, Role
from fusedlm.nn.previous import PreviousToken, previous

STD, SCALE = 0.02, 0.05  # of the table's rows, and of what is added to the token embedding
_OF_TOKEN, _OF_PREVIOUS = 36313, 27191


class BigramHash(Module):
    """scale * W e[h(t, t_-1)], h(t, t_-1) = (36313 t xor 27191 t_-1) mod (rows - 1); the first token of a document has
    the last row. W starts at zero; scale is learnt."""

    def __init__(self, *, rows: int, dim: int, out_dim: int):
        """dim: of a row. out_dim: of the output."""
        super().__init__()
        self.rows = rows
        self.table = Embedding(rows, rows, dim, STD)
        self.project = Linear(dim, out_dim, zero=True)
        self.add_parameter("scale", (1,), Role("gate"), Constant(SCALE))

    def forward(self, tokens_BT: torch.Tensor, context: Context, state: PreviousToken | None = None) -> torch.Tensor:
        """(B, T) int64 -> (B, T, out_dim)."""
        return self.scale * self.project(self.table(self.index(tokens_BT, context, state)))

    def index(self, tokens_BT: torch.Tensor, context: Context, state: PreviousToken | None) -> torch.Tensor:
        """(B, T) int64 rows of the table."""
        before_BT = previous(tokens_BT, context, state)
        hashed_BT = (_OF_TOKEN * tokens_BT ^ _OF_PREVIOUS * before_BT) % (self.rows - 1)
        return torch.where(context.positions_BT == 0, self.rows - 1, hashed_BT)

    def init_state(self) -> PreviousToken:
        """Of tokens."""
        return PreviousToken()

    def state_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        return torch.int64.itemsize if n_tokens else 0

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens)
