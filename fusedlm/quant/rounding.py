"""Weights in few bits by rounding each element by itself. Other methods give the same mapping to `replace_layers`."""

import torch

from fusedlm.nn.quantized import hidden_matrices, quantized_layers
from fusedlm.ops import QuantizedWeight, quantize_weight


@torch.no_grad()
def round_weights(model: torch.nn.Module, format: str, group: int | None = None) -> dict[str, QuantizedWeight]:
    """The rounded weight of every hidden matrix of a model, by the name of its layer; the model is not changed.

    Args:
        format, group: as `quantize_weight` takes them.

    Raises:
        ValueError: as `quantize_weight`, with the name of the layer; or the model is quantised already.
    """
    if quantized_layers(model):
        raise ValueError("the model is quantised already; quantise the run that it is from")
    weights = {}
    for name, layer in hidden_matrices(model).items():
        try:
            weights[name] = quantize_weight(layer.weight_of(), format, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return weights
