"""Weights in few bits by rounding each element by itself. Other methods give the same mapping to `replace_layers`."""

import torch

from fusedlm.nn.quantized import hidden_weights, quantized_weights
from fusedlm.ops import QuantizedWeight, quantize_weight


@torch.no_grad()
def round_weights(model: torch.nn.Module, format: str, group: int | None = None) -> dict[str, QuantizedWeight]:
    """Every hidden matrix and stack of experts of a model, rounded, by the names of `hidden_weights`; the model is not
    changed.

    Args:
        format, group: as `quantize_weight` takes them.

    Raises:
        ValueError: as `quantize_weight`, with the name of the weight; or the model is quantised already.
    """
    if quantized_weights(model):
        raise ValueError("the model is quantised already; quantise the run that it is from")
    weights = {}
    for name, weight in hidden_weights(model).items():
        try:
            weights[name] = quantize_weight(weight.flatten(0, -2), format, group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return weights
