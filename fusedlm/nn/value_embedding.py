"""Value embeddings: a table of the tokens that layers add to their values."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import Constant, Module, Role

STD, SCALE = 0.01, 0.1  # of the table's rows, and of what is added to the values


class ValueEmbedding(Module):
    """v <- v + scale * W e, e the token's row of a table that all layers with this option share; W and the scale are
    the layer's own."""

    def __init__(self, width: int, value_width: int):
        """width: of a row of the table. value_width: of the values of all heads."""
        super().__init__()
        self.project = Linear(width, value_width)
        self.add_parameter("scale", (1,), Role("gate"), Constant(SCALE))

    def forward(self, v_BTE: torch.Tensor, context: Context) -> torch.Tensor:
        return v_BTE + (self.scale * self.project(context.value_rows_BTW)).to(v_BTE.dtype)

    def flops(self, n_tokens: int) -> int:
        return self.project.flops(n_tokens)
