"""Public functions of linear layers with 8-bit products."""

from functools import partial

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.low_precision import linear, mx, outliers, reference
from fusedlm.ops.low_precision.formats import Cast, LowPrecision, unaligned

ACTIVATIONS = ("relu2", "swiglu")
FP8 = LowPrecision()


def _supports(call: Call, *, in_features: int, out_features: int, is_integer: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if call.dtype != torch.bfloat16:
        return f"needs bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if not is_integer and call.capability < (8, 9):
        return f"fp8 needs compute capability 8.9, this is {'.'.join(map(str, call.capability))}; int8 runs here"
    return unaligned(in_features, out_features)


def _supports_weight(call: Call, *, is_integer: int) -> str | None:
    if not is_integer and call.device.type == "cuda" and call.capability < (8, 9):
        return "fp8 needs compute capability 8.9"
    return needs_triton(call)


LOW_PRECISION_LINEAR = Op(
    "low_precision_linear",
    [
        Backend("triton", "fusedlm.ops.low_precision.triton:linear", _supports),
        Backend("reference", partial(linear.linear, backend="reference"), fused=False),
    ],
    in_features=2048,
    out_features=8192,
    is_integer=0,
)
LOW_PRECISION_WEIGHT = Op(
    "low_precision_weight",
    [
        Backend("triton", "fusedlm.ops.low_precision.triton:cast_weight", _supports_weight),
        Backend("reference", reference.cast_weight, fused=False),
    ],
    is_integer=0,
)


def low_precision_weight(
    weight_MK: torch.Tensor,
    precision: LowPrecision = FP8,
    *,
    out: Cast | None = None,
    backend: str = "auto",
) -> Cast:
    """A weight in 8 bits, in the layouts of the output and of the gradient of the input, for `low_precision_linear`.

    Args:
        weight_MK: (M, K) of any float dtype; read without gradients. Rows with NaN or infinity become NaN.
        out: an earlier result, which is overwritten and returned; None: it is allocated.
        backend: auto, triton or reference; the same bits.

    Raises:
        ValueError: the weight is no matrix, or the backend cannot run here.
    """
    if weight_MK.ndim != 2 or not weight_MK.is_floating_point():
        raise ValueError(f"weight {tuple(weight_MK.shape)} {weight_MK.dtype} must be a matrix of floats")
    weight = weight_MK.detach()
    if precision.format == "mxfp8":
        return mx.cast_weight(weight, out)
    run = resolve("low_precision_weight", backend, weight, is_integer=int(precision.grid.is_integer))
    return run(weight, precision.grid, precision.by_row, out)


def low_precision_linear(
    x,
    weight_MK,
    precision: LowPrecision = FP8,
    *,
    codes: Cast | None = None,
    gain_K=None,
    eps: float = 1e-6,
    activation: str | None = None,
    slope: float = 0.0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """f(x) W^T with all three products, the output and both gradients, in 8 bits; f is RMSNorm (arXiv 1910.07467), an
    activation, or nothing, and its output is cast as it is computed.

    Args:
        x: (..., K) of any float dtype; (..., 2 K), gate first, with swiglu.
        weight_MK: (M, K), whose gradient has its own dtype.
        precision: element types and scales.
        codes: of the weight, from `low_precision_weight` with the same precision; None: computed here.
        gain_K: (K,) gain of the norm; None: no norm.
        eps: of the norm.
        activation: "relu2": leaky_relu(x, slope)^2; "swiglu": silu(gate) * up; None: none.
        slope: of the leaky ReLU below zero.
        dtype: of the output and of the gradients between layers; None: that of x. x is cast to it first.
        backend: auto, triton (a CUDA device, bfloat16, widths that are multiples of 16) or reference, which emulates
            the products in float32 on any device. Not of mxfp8, which is emulated everywhere.

    Returns:
        (..., M). Rows of x with NaN or infinity are NaN, and so is then the gradient of the weight.

    Raises:
        ValueError: the shapes do not match, the activation is unknown or comes with a norm, or the backend cannot run
            this call.
    """
    if activation is not None and (activation not in ACTIVATIONS or gain_K is not None):
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}, and without a gain")
    width = x.shape[-1] // (2 if activation == "swiglu" else 1) if x.ndim else 0
    if weight_MK.ndim != 2 or not width or weight_MK.shape[1] != width or (activation == "swiglu" and x.shape[-1] % 2):
        shapes = f"x {tuple(x.shape)} and weight {tuple(weight_MK.shape)}"
        raise ValueError(f"{shapes} must be (..., K), or (..., 2 K) with swiglu, and (M, K)")
    if gain_K is not None and gain_K.shape != (width,):
        raise ValueError(f"gain {tuple(gain_K.shape)} must be ({width},)")
    x = x.to(dtype or x.dtype)
    producer = "norm" if gain_K is not None else activation or "none"
    parameter = float(eps if producer == "norm" else slope)
    codes = low_precision_weight(weight_MK, precision, backend=backend) if codes is None else codes
    if precision.format == "mxfp8" or not x.numel():
        value = x
        if producer != "none":
            value = reference.produce(x, gain_K, producer, parameter)[0].to(x.dtype)
        if not x.numel():  # there is no largest magnitude of nothing
            return value @ weight_MK.to(x.dtype).t()
        return mx.linear(value, weight_MK, codes, precision)
    sizes = {"in_features": width, "out_features": weight_MK.shape[0], "is_integer": int(precision.grid.is_integer)}
    run = resolve("low_precision_linear", backend, x, **sizes)
    return run(x, gain_K, weight_MK, codes, precision, producer, parameter)


def isolate_outliers(x, weight_MK, threshold: float, capacity: int | None = None):
    """Take the columns of x with outliers out of a product x W^T.

    Args:
        x: (..., K), the input of a linear layer.
        weight_MK: (M, K).
        threshold: of the robust z-score of a column's largest magnitude (`outliers.z_scores`).
        capacity: the most columns that are taken; None: one of 64, at least 16.

    Returns:
        x with zeros in these columns; (..., M), the product of these columns in the dtype of x; and () numbers of the
        columns above the threshold and of those taken.
    """
    rows = x.flatten(0, -2)
    capacity = outliers.default_capacity(x.shape[-1]) if capacity is None else min(capacity, x.shape[-1])
    main, index, narrow, found, taken = outliers.split(rows, threshold, capacity)
    y = outliers.narrow_product(narrow, weight_MK, index)
    return main.view(x.shape), y.view(*x.shape[:-1], weight_MK.shape[0]), found, taken
