"""The token embedding."""

import torch

from fusedlm.nn.module import Module, Normal, Role


class Embedding(Module, torch.nn.Embedding):
    """tokens -> rows of a table that starts as N(0, std^2)."""

    def __init__(self, n_rows: int, dim: int, std: float):
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = n_rows, dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.add_parameter("weight", (n_rows, dim), Role("embedding", fan_in=dim, fan_out=n_rows), Normal(std))
