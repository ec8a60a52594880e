"""Public functions of the MX formats."""

import torch

from fusedlm.ops.common import Backend, Op, needs_triton, resolve
from fusedlm.ops.mx import reference
from fusedlm.ops.mx.formats import BLOCK, FORMATS, MXTensor

SCALINGS = ("floor", "rceil")
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def _quantize(x, format, scaling):
    codes, scales = reference.quantize(x, FORMATS[format], scaling)
    return MXTensor(codes, scales, tuple(x.shape), FORMATS[format])


def _dequantize(codes, scales, width, format, dtype):
    return reference.dequantize(codes, scales, width, FORMATS[format], dtype)


QUANTIZE = Op(
    "quantize_mx",
    [Backend("triton", "fusedlm.ops.mx.triton:quantize", needs_triton), Backend("reference", _quantize, fused=False)],
)
DEQUANTIZE = Op(
    "dequantize_mx",
    [
        Backend("triton", "fusedlm.ops.mx.triton:dequantize", needs_triton),
        Backend("reference", _dequantize, fused=False),
    ],
)


def quantize_mx(x: torch.Tensor, format: str, scaling: str = "floor", *, backend: str = "auto") -> MXTensor:
    """Convert to an MX format (OCP Microscaling Formats v1.0, section 6.3): blocks of 32 elements along the last
    dimension share a power of two, and elements are rounded to nearest even and clamped to the largest one.

    Args:
        x: (..., K) float32, bfloat16 or float16, at least one dimension. A block with NaN or infinity becomes NaN as a
            whole: scale 255 and codes 0.
        format: mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3, mxfp8_e5m2 or mxint8.
        scaling: "floor": the largest power of two in the block's largest magnitude, over that of the element type, as
            in the standard; the largest elements may be clamped. "rceil": the smallest power of two by which none is.
        backend: auto, triton or reference; the same bits.

    Raises:
        ValueError: format or scaling is unknown, x has no dimension or another dtype, or the backend cannot run here.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} must be one of {', '.join(SCALINGS)}")
    if x.dtype not in _INPUTS or not x.ndim:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be (..., K) in float32, bfloat16 or float16")
    return resolve("quantize_mx", backend, x)(x, format, scaling)


def dequantize_mx(tensor: MXTensor, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> torch.Tensor:
    """The values of an MX tensor: exact in float64 and float32, and rounded once to other dtypes. 2^128, to which rceil
    rounds the largest numbers of float32 up, is infinite there (the standard leaves such values open).

    Args:
        dtype: float32, bfloat16 or float16, and by the reference float64.
        backend: auto, triton or reference; the same bits.

    Raises:
        ValueError: codes and scales do not have the shapes of the format, or the backend cannot run here.
    """
    format, width = tensor.format, tensor.shape[-1]
    n_blocks = -(-width // BLOCK)
    wanted = (*tensor.shape[:-1], format.n_bytes(n_blocks)), (*tensor.shape[:-1], n_blocks)
    found = tuple(tensor.codes.shape), tuple(tensor.scales.shape)
    if found != wanted:
        raise ValueError(f"codes {found[0]} and scales {found[1]} of {format.name} must be {wanted[0]} and {wanted[1]}")
    run = resolve("dequantize_mx", backend, tensor.codes, dtype=dtype)
    return run(tensor.codes, tensor.scales, width, format.name, dtype)
