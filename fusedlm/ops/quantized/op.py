"""Public functions of weights in few bits."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.quantized import reference
from fusedlm.ops.quantized.reference import QuantizedWeight


def needs_bfloat16(call: Call, **sizes: int) -> str | None:
    """`supports` of kernels that decode weights in registers."""
    if reason := needs_triton(call):
        return reason
    if call.dtype == torch.float16:
        return "needs bfloat16 or float32, for the range of the scales"
    return None


QUANTIZED_LINEAR = Op(
    "quantized_linear",
    [
        Backend("triton", "fusedlm.ops.quantized.triton:quantized_linear", needs_bfloat16),
        Backend("reference", reference.quantized_linear, fused=False),
    ],
)


def quantize_weight(weight_NK: torch.Tensor, format: str, group: int | None = None) -> QuantizedWeight:
    """Round a weight to few bits, each element to nearest even by itself.

    Args:
        weight_NK: (N, K) of any float dtype, finite.
        format: mxfp4: E2M1 with a power of two per 32 elements (`quantize_mx`, scaling floor); int4: -7 to 7 with a
            bfloat16 scale per group; fp8: E4M3, and int8: -127 to 127, with a float32 scale per row.
        group: 32, 64 or 128 elements, of int4; None: 64.

    Raises:
        ValueError: format or group is unknown, or the weight is not a finite matrix.
    """
    group = reference.group_of(format, group)
    if weight_NK.ndim != 2 or not weight_NK.is_floating_point():
        raise ValueError(f"weight {tuple(weight_NK.shape)} {weight_NK.dtype} must be a matrix of floats")
    if not weight_NK.isfinite().all():
        raise ValueError("weight has NaN or infinity, which has no scale; quantise weights that are finite")
    return reference.quantize(weight_NK, format, group)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of a weight, (N, K) in dtype."""
    return reference.dequantize(weight, dtype)


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, *, backend: str = "auto") -> torch.Tensor:
    """x W^T, where W stays in few bits in memory.

    Args:
        x: (..., K) of any float dtype.
        weight: of N rows and K columns.
        backend: auto, triton or reference. The kernels of triton take up to 32 tokens in bfloat16 or float32, decode
            the weight in registers and have no backward pass; for more tokens and with gradients it runs the
            reference, which decodes the weight to memory in the dtype of x first.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: x does not have K columns, or the backend cannot run this call.
    """
    if not x.ndim or x.shape[-1] != weight.width:
        raise ValueError(f"x {tuple(x.shape)} must be (..., {weight.width})")
    run = resolve("quantized_linear", backend, x)
    return run(x, weight.codes, weight.scales, weight.width, weight.format, weight.group)
