"""What an 8-bit product is computed in: the element types, the granularity of scales, the layout of casts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

FORMATS = ("fp8", "int8", "mxfp8")
SCALES = ("row", "tensor")
GRADIENTS = ("e4m3", "e5m2")
ALIGNMENT = 16  # columns of both operands of an 8-bit product must be a multiple of it
TINY = 2.0**-126  # the smallest scale: a normal number of float32, whose inverse is one too


@dataclass(frozen=True)
class Grid:
    """The values that an 8-bit element can have.

    mantissa, emin: explicit bits and exponent of the smallest normal number of a float; of integers 0 and 0.
    """

    name: str
    dtype: torch.dtype
    largest: float
    mantissa: int = 0
    emin: int = 0

    @property
    def is_integer(self) -> bool:
        return self.dtype == torch.int8


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("e4m3", torch.float8_e4m3fn, 448.0, 3, -6),
        Grid("e5m2", torch.float8_e5m2, 57344.0, 2, -14),
        Grid("int8", torch.int8, 127.0),
    )
}


@dataclass(frozen=True)
class LowPrecision:
    """The precision of the three products of a linear layer.

    Attributes:
        format: fp8: E4M3; int8: -127 to 127; mxfp8: E4M3 with a power of two per 32 elements, emulated.
        scales: row: one per row of the operands of the output and of the gradient of the input; tensor: one per
            tensor. Not of mxfp8.
        gradients: e4m3 or e5m2, the element type of the incoming gradient in fp8 and mxfp8.

    Raises:
        ValueError: one of them is unknown, or int8 with gradients in e5m2.
    """

    format: str = "fp8"
    scales: str = "row"
    gradients: str = "e4m3"

    def __post_init__(self):
        for name, known in (("format", FORMATS), ("scales", SCALES), ("gradients", GRADIENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.format == "int8" and self.gradients == "e5m2":
            raise ValueError("gradients='e5m2': the gradients of int8 are int8; leave it out")

    @property
    def by_row(self) -> bool:
        return self.scales == "row"

    @property
    def grid(self) -> Grid:
        """Of inputs and weights."""
        return GRIDS["int8" if self.format == "int8" else "e4m3"]

    @property
    def gradient_grid(self) -> Grid:
        return GRIDS["int8" if self.format == "int8" else self.gradients]


class Cast(NamedTuple):
    """A matrix (N, K) in 8 bits, in the two layouts that products contract over.

    Attributes:
        codes: (N, K) uint8, the bits of the elements.
        scales: (N,) float32, or (1,) for all rows: values are codes times scales.
        codes_t: (K, N up to a multiple of 16) uint8, the transpose, with zeros after the last row.
        scales_t: of the transpose: (K,) float32, or (1,).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    codes_t: torch.Tensor
    scales_t: torch.Tensor


def padded(n: int) -> int:
    """n up to a multiple of ALIGNMENT."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def unaligned(in_features: int, out_features: int) -> str | None:
    """Why a weight of these sizes has no 8-bit products, or None."""
    if in_features % ALIGNMENT or out_features % ALIGNMENT:
        return f"needs widths that are multiples of {ALIGNMENT}, not {in_features} and {out_features}"
    return None
