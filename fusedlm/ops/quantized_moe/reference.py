"""Routed experts with weights in few bits in plain PyTorch: the weights are decoded first."""

import torch

from fusedlm.ops.experts import reference
from fusedlm.ops.quantized.reference import QuantizedWeight, dequantize


def decoded(weight: QuantizedWeight, n_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of a stack: (E, rows of an expert, width)."""
    return dequantize(weight, dtype).view(n_experts, len(weight.codes) // n_experts, weight.width)


def quantized_experts(x, up: QuantizedWeight, down: QuantizedWeight, indices, weights, activation: str, slope: float):
    n_experts = len(down.codes) // x.shape[1]
    w_up, w_down = (decoded(stack, n_experts, x.dtype) for stack in (up, down))
    return reference.routed_experts(x, w_up, w_down, indices, weights, activation, slope)
