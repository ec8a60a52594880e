"""Integer codes of a weight matrix with a scale per row or per group of a row."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fusedlm.ops.quantized.integer import integer_values


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix as signed integers times scales, symmetric around zero.

    codes: (N, K) int8, from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
    scales: (N, G) float16, bfloat16 or float32; group g of a row holds columns g * group to (g + 1) * group - 1.
    bits: 2 to 8.
    group: columns that share a scale; None: the full row, G = 1.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int | None = None

    def values(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """codes times scales, (N, K), multiplied in float32 and rounded once."""
        return integer_values(self.codes, self.scales, self.group).to(dtype)


def stored_matrices(record: Mapping, tensors: Mapping[str, torch.Tensor]) -> dict[str, IntegerMatrix]:
    """The integer matrices of a run by the names of their parameters.

    Args:
        record: the content of its quantization.json.
        tensors: of its model.safetensors.
    """
    return {
        name: IntegerMatrix(tensors[f"{name}.codes"], tensors[f"{name}.scales"], kept["bits"], kept["group"])
        for name, kept in record.get("matrices", {}).items()
    }
