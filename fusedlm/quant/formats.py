"""The grids that a matrix is rounded to: integers of 2 to 8 bits, and the formats of `quantize_weight`."""

from dataclasses import dataclass
from typing import Protocol

import torch

from fusedlm.ops import QuantizedWeight, dequantize_weight
from fusedlm.ops.quantized import reference
from fusedlm.ops.quantized.integer import BITS, by_column, integer_scales, largest_code
from fusedlm.quant.integer import IntegerMatrix

RATIOS = tuple(r / 20 for r in range(20, 3, -1))  # of the largest magnitude, for the search of clips
_EXPONENTS = (1.0, 2.0, 0.5)  # of mxfp4, whose scales are powers of two


class Format(Protocol):
    """Levels times the scale of a row or group. `group`: columns that share a scale; None: the row."""

    group: int | None

    def scales(self, weight_NK: torch.Tensor, clip: float | None) -> torch.Tensor:
        """Scales as they are stored, by the largest magnitude, or of integers by clip standard deviations."""

    def candidates(self, weight_NK: torch.Tensor) -> list[torch.Tensor]:
        """Stored scales to choose among, the first of which are those by the largest magnitude."""

    def values_of(self, scales_NG: torch.Tensor) -> torch.Tensor:
        """(N, G) float32 of stored scales."""

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The levels nearest to numbers that were divided by their scale, in their dtype."""

    def build(self, levels_NK: torch.Tensor, scales_NG: torch.Tensor) -> IntegerMatrix | QuantizedWeight:
        """The matrix of levels and stored scales."""

    def n_bytes(self, n_rows: int, width: int) -> int:
        """Bytes of codes and scales."""


@dataclass(frozen=True)
class Integers:
    """Codes from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, with bfloat16 scales: an `IntegerMatrix`."""

    bits: int
    group: int | None = None

    def scales(self, weight_NK: torch.Tensor, clip: float | None) -> torch.Tensor:
        return integer_scales(weight_NK, self.bits, self.group, clip)

    def candidates(self, weight_NK: torch.Tensor) -> list[torch.Tensor]:
        # integer_scales divides the limit: a weight times the ratio has the limit times the ratio.
        return [integer_scales(weight_NK * ratio, self.bits, self.group) for ratio in RATIOS]

    def values_of(self, scales_NG: torch.Tensor) -> torch.Tensor:
        return scales_NG.float()

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        largest = largest_code(self.bits)
        return scaled.round().clamp(-largest, largest)

    def build(self, levels_NK: torch.Tensor, scales_NG: torch.Tensor) -> IntegerMatrix:
        return IntegerMatrix(levels_NK.to(torch.int8), scales_NG, self.bits, self.group)

    def n_bytes(self, n_rows: int, width: int) -> int:
        """Of codes of this width without gaps, and of the scales."""
        groups = 1 if self.group is None else -(-width // self.group)
        return (n_rows * width * self.bits + 7) // 8 + 2 * n_rows * groups

    def __str__(self) -> str:
        return f"int{self.bits}" + (f" in groups of {self.group}" if self.group else "")


@dataclass(frozen=True)
class Packed:
    """A format of `quantize_weight`: a `QuantizedWeight`. size: columns that share a scale; 0: the row."""

    name: str
    size: int

    @property
    def group(self) -> int | None:
        return self.size or None

    def scales(self, weight_NK: torch.Tensor, clip: float | None) -> torch.Tensor:
        if clip is not None:
            raise ValueError(f"clip={clip}: scales of {self.name} are not made of standard deviations; leave it out")
        return reference.scales_of(weight_NK.float(), self.name, self.size)

    def candidates(self, weight_NK: torch.Tensor) -> list[torch.Tensor]:
        ratios = _EXPONENTS if self.name == "mxfp4" else RATIOS
        return [reference.scales_of(weight_NK.float(), self.name, self.size, ratio) for ratio in ratios]

    def values_of(self, scales_NG: torch.Tensor) -> torch.Tensor:
        return reference.scale_values(scales_NG, self.name)

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        return reference.nearest_levels(scaled, self.name)

    def build(self, levels_NK: torch.Tensor, scales_NG: torch.Tensor) -> QuantizedWeight:
        return reference.encode(levels_NK, scales_NG, self.name, self.size)

    def n_bytes(self, n_rows: int, width: int) -> int:
        """Of codes and scales as they are stored."""
        parts = reference.layout(n_rows, width, self.name, self.size)
        return sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in parts)

    def __str__(self) -> str:
        return self.name + (f" in groups of {self.size}" if self.name == "int4" else "")


def packed(name: str, group: int | None = None) -> Packed:
    """A format of `quantize_weight` by its name; raises as `quantize_weight`."""
    return Packed(name, reference.group_of(name, group))


def integers(name: str, group: int | None = None) -> Integers:
    """int2 to int8 by name.

    Raises:
        ValueError: the name is another, or the group is not positive.
    """
    names = [f"int{bits}" for bits in BITS]
    if name not in names:
        raise ValueError(f"format={name!r} must be one of {', '.join(names)}")
    if group is not None and group < 1:
        raise ValueError(f"group={group} must be at least 1")
    return Integers(int(name.removeprefix("int")), group)


def column_scales(format: Format, scales_NG: torch.Tensor, width: int) -> torch.Tensor:
    """(N, width) float64, the scale of each element."""
    return by_column(format.values_of(scales_NG).double(), width, format.group).expand(-1, width)


def decoded(matrix: IntegerMatrix | QuantizedWeight) -> torch.Tensor:
    """The values of a matrix, (N, K) float32."""
    return matrix.values() if isinstance(matrix, IntegerMatrix) else dequantize_weight(matrix)
