"""The token embedding."""

import torch

from fusedlm.nn.ids import check_ids
from fusedlm.nn.module import Module, Normal, Role


class Embedding(Module, torch.nn.Embedding):
    """tokens -> rows of a table that starts as N(0, std^2).

    Args:
        n_rows: rows of the table; those from vocab_size on are padding and belong to no token.
    """

    def __init__(self, vocab_size: int, n_rows: int, dim: int, std: float):
        torch.nn.Module.__init__(self)
        self.vocab_size = vocab_size
        self.num_embeddings, self.embedding_dim = n_rows, dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.add_parameter("weight", (n_rows, dim), Role("embedding", fan_in=dim, fan_out=n_rows), Normal(std))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) int64 -> (..., dim).

        Raises:
            ValueError: on the CPU, an id is not in [0, vocab_size).
        """
        check_ids("tokens", tokens, self.vocab_size)
        return super().forward(tokens)
