"""The concrete MX formats of OCP Microscaling Formats v1.0, section 5.2, and the tensor that holds one of them."""

from dataclasses import dataclass

import torch

BLOCK = 32  # elements that share a scale
NAN_SCALE = 255  # of E8M0, which has neither zero nor infinity (section 5.4.1)
SCALE_BIAS = 127


@dataclass(frozen=True)
class MXFormat:
    """An element type; the scale is E8M0 in all of them.

    bits: of an element.
    mantissa: bits of the mantissa; of INT8, those after the binary point.
    emin, emax: exponents of the smallest normal element and of the largest power of two.
    largest: code of the largest finite element.
    is_integer: two's complement instead of sign, exponent and mantissa.
    """

    name: str
    bits: int
    mantissa: int
    emin: int
    emax: int
    largest: int
    is_integer: bool = False

    @property
    def largest_mantissa(self) -> int:
        """The largest element over 2^emax, minus 1, in units of 2^-23: the mantissa field of a float32."""
        return (self.largest & ((1 << self.mantissa) - 1)) << (23 - self.mantissa)

    @property
    def largest_value(self) -> float:
        return (1 + self.largest_mantissa / 2**23) * 2.0**self.emax

    def n_bytes(self, n_blocks: int) -> int:
        """Bytes of the codes of so many blocks."""
        return n_blocks * BLOCK * self.bits // 8


FORMATS = {
    format.name: format
    for format in (
        MXFormat("mxfp4", 4, mantissa=1, emin=0, emax=2, largest=0x7),
        MXFormat("mxfp6_e2m3", 6, mantissa=3, emin=0, emax=2, largest=0x1F),
        MXFormat("mxfp6_e3m2", 6, mantissa=2, emin=-2, emax=4, largest=0x1F),
        MXFormat("mxfp8_e4m3", 8, mantissa=3, emin=-6, emax=8, largest=0x7E),
        MXFormat("mxfp8_e5m2", 8, mantissa=2, emin=-14, emax=15, largest=0x7B),
        MXFormat("mxint8", 8, mantissa=6, emin=0, emax=0, largest=0x7F, is_integer=True),
    )
}


@dataclass(frozen=True)
class MXTensor:
    """A tensor in an MX format, in blocks of 32 along the last dimension; the last block is filled with zeros.

    codes: (..., bytes) uint8, packed: of 4 bits, the even element in the low nibble; of 6 bits, four elements in three
        bytes, little-endian, the first in the lowest bits.
    scales: (..., blocks) uint8, E8M0: 2^(scale - 127), or NaN at 255.
    shape: of the tensor.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    format: MXFormat

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.scales.numel()
