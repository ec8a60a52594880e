"""Feed-forward of routed experts in Triton.

Slots are sorted by expert on the device. The rows of x are gathered as the first product loads them, and the activation
is computed in its accumulators; the second product writes one row per slot, in order, and the rows of each token are
then summed with their weights. x, the pre-activation h and the order are saved for backward (arXiv 2512.14080), where
the first product gathers rows of the upstream gradient, recomputes the activation from h, and gives the gradients of h
and of the weights.
"""

import torch

from fusedlm.ops.common.products import cast_weight
from fusedlm.ops.experts.order_kernels import TileSchedule, empty_schedule, schedule_tiles
from fusedlm.ops.experts.products import Products, combine


def _output(x, w_up, w_down, indices, weights, activation: str, slope: float, save: bool):
    """y, h where it is saved, and the schedule."""
    n_experts, _, hidden = w_down.shape
    products = Products(x, indices.numel(), n_experts, hidden)
    schedule = schedule_tiles(indices, n_experts, products.block_m)
    if not x.numel() or not hidden:
        return torch.zeros_like(x), x.new_zeros(indices.numel(), w_up.shape[1]), schedule
    x, weights, swiglu = x.contiguous(), weights.contiguous(), activation == "swiglu"
    a, h = products.up(x, cast_weight(w_up, x), schedule, indices.shape[1], swiglu, slope, save)
    out = products.rows("down", a, cast_weight(w_down, x), schedule, transposed=True)
    del a
    return combine(out, schedule, weights, weighted=True), h, schedule


@torch.library.custom_op("fusedlm::routed_experts", mutates_args=())
def _forward(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and what is saved for backward: h and the schedule."""
    y, h, schedule = _output(x, w_up, w_down, indices, weights, activation, slope, True)
    return y, h, *schedule


@_forward.register_fake
def _(x, w_up, w_down, indices, weights, activation, slope):
    h = x.new_empty(indices.numel(), w_up.shape[1])
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), h, *empty_schedule(x, indices.numel(), w_up.shape[0])


@torch.library.custom_op("fusedlm::routed_experts_inference", mutates_args=())
def _inference(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    slope: float,
) -> torch.Tensor:
    return _output(x, w_up, w_down, indices, weights, activation, slope, False)[0]


@_inference.register_fake
def _(x, w_up, w_down, indices, weights, activation, slope):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fusedlm::routed_experts_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    weights: torch.Tensor,
    h: torch.Tensor,
    schedule: list[torch.Tensor],
    activation: str,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, the matrices and the weights, each in its own dtype."""
    n_experts, _, hidden = w_down.shape
    schedule, top_k = TileSchedule(*schedule), weights.shape[1]
    if not x.numel() or not hidden:
        return tuple(torch.zeros_like(a, memory_format=torch.contiguous_format) for a in (x, w_up, w_down, weights))
    dy, x, h, factors = dy.contiguous(), x.contiguous(), h.contiguous(), weights.contiguous()
    products = Products(x, weights.numel(), n_experts, hidden)
    dh, weighted, scores = products.down_backward(
        dy, cast_weight(w_down, x), schedule, factors, h, activation == "swiglu", slope
    )
    dw_down = products.weight_gradient("down_gradient", dy, weighted, schedule, top_k, w_down.dtype)
    del weighted
    dw_up = products.weight_gradient("up_gradient", dh, x, schedule, top_k, w_up.dtype)
    rows = products.rows("up_backward", dh, cast_weight(w_up, x), schedule, transposed=False)
    del dh
    dx = combine(rows, schedule, factors, weighted=False)
    return dx, dw_up, dw_down, scores[schedule.rows].view(weights.shape).to(weights.dtype)


@_backward.register_fake
def _(dy, x, w_up, w_down, weights, h, schedule, activation, slope):
    return tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (x, w_up, w_down, weights))


def _setup_context(ctx, inputs, output):
    x, w_up, w_down, _, weights, ctx.activation, ctx.slope = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # which would fill tensors of zeros for all of them
    ctx.save_for_backward(x, w_up, w_down, weights, *output[1:])


def _gradients(ctx, dy, *_):
    x, w_up, w_down, weights, h, *schedule = ctx.saved_tensors
    dx, dw_up, dw_down, d_weights = _backward(dy, x, w_up, w_down, weights, h, schedule, ctx.activation, ctx.slope)
    return dx, dw_up, dw_down, None, d_weights, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def routed_experts(x, w_up, w_down, indices, weights, activation: str, slope: float) -> torch.Tensor:
    arguments = (x, w_up, w_down, indices, weights, activation, slope)
    if torch.is_grad_enabled() and any(a.requires_grad for a in (x, w_up, w_down, weights)):
        return _forward(*arguments)[0]
    return _inference(*arguments)
