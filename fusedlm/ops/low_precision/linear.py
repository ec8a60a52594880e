"""The linear layer of three 8-bit products as an operator with its gradient.

With scales by row, x (N, K) has the scales a (N,), which cannot be taken out of the sum over tokens of the gradient of
the weight. They move to the other operand: dW = (a dY)^T X' with the codes X' of the forward pass, transposed. So x is
rounded and read once for both of its products.

Largest magnitudes of x and of the incoming gradient are torch operations outside of the operators: torch.compile then
computes them in the kernel that produces the tensor.
"""

import importlib

import torch

from fusedlm.ops.low_precision import reference
from fusedlm.ops.low_precision.formats import Cast, LowPrecision

# Whether sums stay in the registers of the tensor cores, of fewer bits: where the next layer rounds anyway. Gradients
# are summed in float32, that of the weight over all tokens.
FAST_SUMS = {"output": True, "input": False, "weight": False}


def _engine(backend: str):
    if backend == "reference":
        return reference
    return importlib.import_module("fusedlm.ops.low_precision.triton")


@torch.library.custom_op("fusedlm::low_precision_linear", mutates_args=())
def _forward(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    weight: torch.Tensor,
    amax: torch.Tensor | None,
    w_codes: torch.Tensor,
    w_scales: torch.Tensor,
    wt_codes: torch.Tensor,
    wt_scales: torch.Tensor,
    producer: str,
    parameter: float,
    format: str,
    scales: str,
    gradients: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and what is saved for backward: the transposed codes, their scale, the scales of rows that the gradient takes
    over, and the inverse root mean squares of a norm. The weight itself is not read."""
    precision, engine = LowPrecision(format, scales, gradients), _engine(backend)
    cast, inverse_rms = engine.cast(x, gain, producer, parameter, amax, precision.grid, precision.by_row)
    grid = precision.grid
    fast = FAST_SUMS["output"]
    y = engine.multiply(cast.codes, cast.scales, grid, w_codes, w_scales, grid, x.dtype, fast)
    rows = cast.scales if precision.by_row else cast.scales.new_empty(0)
    scales_t = cast.scales_t.clone() if cast.scales_t is cast.scales else cast.scales_t  # outputs share no memory
    return y, cast.codes_t, scales_t, rows, cast.scales.new_empty(0) if inverse_rms is None else inverse_rms


@_forward.register_fake
def _(x, gain, weight, amax, w_codes, w_scales, wt_codes, wt_scales, producer, parameter, format, scales, *_):
    n_rows, (n_out, n_in) = x.shape[0], weight.shape

    def float32(n):
        return x.new_empty(n, dtype=torch.float32)

    codes_t = x.new_empty(n_in, (n_rows + 15) // 16 * 16, dtype=torch.uint8)
    rows, inverse_rms = n_rows if scales == "row" else 0, n_rows if producer == "norm" else 0
    return x.new_empty(n_rows, n_out), codes_t, float32(1), float32(rows), float32(inverse_rms)


@torch.library.custom_op("fusedlm::low_precision_linear_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    amax: torch.Tensor,
    amax_t: torch.Tensor | None,
    xt_codes: torch.Tensor,
    xt_scale: torch.Tensor,
    fold: torch.Tensor | None,
    wt_codes: torch.Tensor,
    wt_scales: torch.Tensor,
    dtype: torch.dtype,
    format: str,
    gradients: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of what was multiplied, in the dtype of dy, and of the weight, in dtype."""
    precision, engine = LowPrecision(format, gradients=gradients), _engine(backend)
    grid, gradient_grid = precision.grid, precision.gradient_grid
    cast = engine.cast_gradient(dy, amax, fold, amax_t, gradient_grid)
    fast = FAST_SUMS["input"]
    dx = engine.multiply(cast.codes, cast.scales, gradient_grid, wt_codes, wt_scales, grid, dy.dtype, fast)
    fast = FAST_SUMS["weight"]
    dw = engine.multiply(cast.codes_t, cast.scales_t, gradient_grid, xt_codes, xt_scale, grid, dtype, fast)
    return dx, dw


@_backward.register_fake
def _(dy, amax, amax_t, xt_codes, xt_scale, fold, wt_codes, wt_scales, dtype, *_):
    n_in = wt_codes.shape[0]
    return dy.new_empty(dy.shape[0], n_in), dy.new_empty(dy.shape[1], n_in, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, gain, weight, _, _, _, wt_codes, wt_scales, ctx.producer, ctx.parameter, *ctx.precision, ctx.backend = inputs
    _, xt_codes, xt_scale, rows, inverse_rms = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    source = None if ctx.producer == "none" else x
    ctx.save_for_backward(source, gain, xt_codes, xt_scale, rows, inverse_rms, wt_codes, wt_scales)


def _gradients(ctx, dy, *_):
    source, gain, xt_codes, xt_scale, rows, inverse_rms, wt_codes, wt_scales = ctx.saved_tensors
    format, scales, gradients = ctx.precision
    amax, fold, amax_t = reference.row_amax(dy), None, None
    if scales == "row":
        fold = rows
        # Integers have no range to spare for outputs whose gradients are small: one scale for each.
        is_integer = format == "int8"
        amax_t = (dy.abs().float() * fold[:, None]).amax(0) if is_integer else (amax * fold).amax(0, keepdim=True)
    else:
        amax = amax.amax(0, keepdim=True)
    options = ctx.weight_dtype, format, gradients, ctx.backend
    d_value, dw = _backward(dy, amax, amax_t, xt_codes, xt_scale, fold, wt_codes, wt_scales, *options)
    dx, d_gain = _gradient_of_producer(ctx.producer, ctx.parameter, d_value, source, gain, inverse_rms)
    return dx, d_gain, dw, *[None] * 11


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _gradient_of_producer(producer: str, parameter: float, d_value, x, gain, inverse_rms):
    """The gradients of x and the gain, from that of what the producer made of x (`reference.produce`)."""
    if producer == "none":
        return d_value, None
    d, wide = d_value.float(), x.float()
    if producer == "norm":
        z, d_z = wide * inverse_rms[:, None], d * gain.float()
        dx = inverse_rms[:, None] * (d_z - z * (d_z * z).mean(-1, keepdim=True))
        return dx.to(x.dtype), (d * z).sum(0).to(gain.dtype)
    if producer == "swiglu":
        gate, up = wide.chunk(2, -1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        return torch.cat([d * up * (sigmoid + silu * (1 - sigmoid)), d * silu], -1).to(x.dtype), None
    leaky = torch.where(wide < 0, wide * parameter, wide)
    return (2 * d * leaky * torch.where(wide < 0, parameter, 1.0)).to(x.dtype), None


def linear(x, gain, weight, codes: Cast, precision: LowPrecision, producer: str, parameter: float, backend: str):
    """Output (..., M) of x (..., K), or what a producer makes of it, and a weight (M, K) with its codes."""
    rows = x.reshape(-1, x.shape[-1])
    amax = reference.row_amax(rows) if producer == "none" else None
    options = producer, parameter, precision.format, precision.scales, precision.gradients, backend
    return _forward(rows, gain, weight, amax, *codes, *options)[0].view(*x.shape[:-1], weight.shape[0])
