"""The three products with MXFP8 operands, emulated: values are rounded to blocks of 32 along the dimension that is
summed over (OCP Microscaling Formats v1.0), and multiplied in the dtype of x, which represents each of them exactly."""

import torch

from fusedlm.ops.low_precision.formats import Cast, LowPrecision
from fusedlm.ops.mx.formats import BLOCK, FORMATS, MXTensor
from fusedlm.ops.mx.op import dequantize_mx, quantize_mx


def _format(gradients: str | None = None) -> str:
    return f"mxfp8_{gradients or 'e4m3'}"


def _values(codes, scales, width: int, format: str, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_mx(MXTensor(codes, scales, (len(codes), width), FORMATS[format]), dtype)


def _rounded(x: torch.Tensor, format: str, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous rows (R, C) as they are in blocks along C."""
    return dequantize_mx(quantize_mx(x, format), dtype)


def cast_weight(weight: torch.Tensor, out: Cast | None = None) -> Cast:
    """Codes and scales of the rows and, for the gradient of the input, of the columns of a weight (M, K).

    out: what is overwritten, and returned.
    """
    rows, columns = (quantize_mx(w.contiguous(), _format()) for w in (weight, weight.t()))
    cast = Cast(rows.codes, rows.scales, columns.codes, columns.scales)
    if out is None:
        return cast
    for old, new in zip(out, cast, strict=True):
        old.copy_(new)
    return out


@torch.library.custom_op("fusedlm::low_precision_linear_mx", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, w_codes: torch.Tensor, w_scales: torch.Tensor, wt_codes: torch.Tensor,
    wt_scales: torch.Tensor, gradients: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, and the columns of x in MXFP8, which are saved for backward."""
    columns = quantize_mx(x.t().contiguous(), _format())
    w = _values(w_codes, w_scales, x.shape[1], _format(), x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _rounded(x.contiguous(), _format(), x.dtype) @ w.t(), columns.codes, columns.scales


@_forward.register_fake
def _(x, weight, w_codes, w_scales, wt_codes, wt_scales, gradients):
    (n, n_in), n_out = x.shape, weight.shape[0]
    n_blocks = (n + BLOCK - 1) // BLOCK
    codes = x.new_empty(n_in, n_blocks * BLOCK, dtype=torch.uint8)
    return x.new_empty(n, n_out), codes, x.new_empty(n_in, n_blocks, dtype=torch.uint8)


@torch.library.custom_op("fusedlm::low_precision_linear_mx_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, xt_codes: torch.Tensor, xt_scales: torch.Tensor, wt_codes: torch.Tensor, wt_scales: torch.Tensor,
    dtype: torch.dtype, gradients: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dy = dy.contiguous()
    format = _format(gradients)
    w = _values(wt_codes, wt_scales, dy.shape[1], _format(), dy.dtype)
    x = _values(xt_codes, xt_scales, dy.shape[0], _format(), dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        dx = _rounded(dy, format, dy.dtype) @ w.t()
        return dx, (_rounded(dy.t().contiguous(), format, dy.dtype) @ x.t()).to(dtype)


@_backward.register_fake
def _(dy, xt_codes, xt_scales, wt_codes, wt_scales, dtype, gradients):
    n_in = wt_codes.shape[0]
    return dy.new_empty(dy.shape[0], n_in), dy.new_empty(dy.shape[1], n_in, dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, weight, _, _, wt_codes, wt_scales, ctx.gradients = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:], wt_codes, wt_scales)


def _gradients(ctx, dy, *_):
    dx, dw = _backward(dy, *ctx.saved_tensors, ctx.weight_dtype, ctx.gradients)
    return dx, dw, *[None] * 5


_forward.register_autograd(_gradients, setup_context=_setup_context)


def linear(x, weight, codes: Cast, precision: LowPrecision) -> torch.Tensor:
    """Output (..., M) of x (..., K) and a weight (M, K) with its codes."""
    y = _forward(x.reshape(-1, x.shape[-1]), weight, *codes, precision.gradients)[0]
    return y.view(*x.shape[:-1], weight.shape[0])
