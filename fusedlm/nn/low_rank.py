"""A linear layer with a trained low-rank delta (LoRA, Hu et al., arXiv 2106.09685)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusedlm.nn.linear import Linear
from fusedlm.nn.quantized import hidden_matrices


class LowRankLinear(Linear):
    """In place of a `Linear`: the same products with W + up down, W of that layer and without a gradient of its own.

    down (rank, in_features) starts as N(0, 1 / in_features), up (out_features, rank) at zero: the layer starts as it
    was. With several splits the delta is one of all rows.
    """

    def __init__(self, layer: Linear, rank: int, generator: torch.Generator):
        """generator: on the CPU, of `down`."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.splits = layer.in_features, layer.out_features, layer.splits
        self.backends, self.training, self.ends_branch = layer.backends, layer.training, layer.ends_branch
        self.register_buffer("base", layer.weight.detach(), persistent=False)
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        self.down = torch.nn.Parameter(down.to(layer.weight))
        self.up = torch.nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.register_parameter("bias", None)

    @property
    def weight(self) -> torch.Tensor:
        return self.base + (self.up @ self.down).to(self.base.dtype)


@contextmanager
def low_rank_deltas(model: torch.nn.Module, rank: int, seed: int = 0) -> Iterator[list[torch.nn.Parameter]]:
    """Every hidden matrix of a model with a low-rank delta, inside the context; afterwards the model is as it was.

    Yields:
        The parameters of the deltas.

    Raises:
        ValueError: the rank is less than 1, or the model has no hidden matrix of floats.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    layers = hidden_matrices(model)
    if not layers:
        raise ValueError("the model has no hidden matrix in floats (it is quantised); finetune its norms instead")
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: LowRankLinear(layer, rank, generator) for name, layer in layers.items()}
    try:
        for name, delta in deltas.items():
            _replace(model, name, delta)
        yield [parameter for delta in deltas.values() for parameter in (delta.down, delta.up)]
    finally:
        for name, layer in layers.items():
            _replace(model, name, layer)


def _replace(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
