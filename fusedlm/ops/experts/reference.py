"""Feed-forward of routed experts in plain PyTorch: a loop over the experts."""

import torch
import torch.nn.functional as F

from fusedlm.ops.experts.order import sort_by_expert


def routed_experts(x, w_up, w_down, indices, weights, activation: str, slope: float) -> torch.Tensor:
    order = sort_by_expert(indices, len(w_up))
    h = grouped_linear(x[order.slots.long() // indices.shape[1]], w_up.to(x.dtype), order.ends)
    out = grouped_linear(activate(h, activation, slope), w_down.to(x.dtype), order.ends)
    out = out[order.rows.long()].view(*indices.shape, x.shape[1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    return (out.to(dtype) * weights.to(dtype)[:, :, None]).sum(1).to(x.dtype)


def activate(h: torch.Tensor, activation: str, slope: float) -> torch.Tensor:
    """swiglu: silu(gate) * up of rows [gate, up]; relu2: leaky_relu(h, slope)^2. In float32 or better."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if activation == "swiglu":
        gate, up = wide.chunk(2, dim=-1)
        return (F.silu(gate) * up).to(h.dtype)
    return F.leaky_relu(wide, slope).square().to(h.dtype)


def grouped_linear(x_RI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Rows from ends[e - 1] up to ends[e] times weight[e]^T: (R, O)."""
    if torch.compiler.is_compiling():
        return _grouped_linear(x_RI, weight_EOI, ends_E)
    return _loop(x_RI, weight_EOI, ends_E)


def _loop(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    groups = zip(x.tensor_split(ends[:-1].long().cpu()), weight.unbind(), strict=True)
    return torch.cat([F.linear(rows, w) for rows, w in groups])


# The sizes of the groups depend on data, which a compiled graph cannot hold: there the loop is one operator.
@torch.library.custom_op("fusedlm::experts_grouped_linear", mutates_args=())
def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _loop(x, weight, ends)


@_grouped_linear.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("fusedlm::experts_grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    at = ends[:-1].long().cpu()
    groups = zip(dy.tensor_split(at), x.tensor_split(at), strict=True)
    return _loop(dy, weight.transpose(1, 2), ends), torch.stack([d.t() @ rows for d, rows in groups])


@_grouped_linear_backward.register_fake
def _(dy, x, weight, ends):
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return *_grouped_linear_backward(dy, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_gradients, setup_context=_setup_context)
