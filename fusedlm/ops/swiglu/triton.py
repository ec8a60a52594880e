"""SwiGLU feed-forward in Triton: one pass over the packed projection forward and one backward, between torch.mm's.

The packed projection is saved for backward. The hidden layer is recomputed, into the memory of its gradient.
"""

import torch
import triton
import triton.language as tl

from fusedlm.ops.common.products import cast_weight, matmul

_BLOCK = 1024  # columns per program


@triton.jit
def _gate_and_up(gate_up, H, BLOCK: tl.constexpr):
    """Gate and up of a block of a row in float32, its offsets in (N, H) and in (N, 2 H), and its mask."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    gate_at = row * 2 * H + column
    gate = tl.load(gate_up + gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + gate_at + H, mask=inside, other=0.0).to(tl.float32)
    return gate, up, row * H + column, gate_at, inside


@triton.jit
def _forward_kernel(gate_up, h, H, BLOCK: tl.constexpr):
    gate, up, h_at, _, inside = _gate_and_up(gate_up, H, BLOCK)
    tl.store(h + h_at, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gate_up, dh, d_gate_up, H, BLOCK: tl.constexpr):
    """Writes the gradient of gate_up, and overwrites dh with h."""
    gate, up, h_at, gate_at, inside = _gate_and_up(gate_up, H, BLOCK)
    upstream = tl.load(dh + h_at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = dh.dtype.element_ty
    tl.store(d_gate_up + gate_at, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up + gate_at + H, (upstream * silu).to(dtype), mask=inside)
    tl.store(dh + h_at, (silu * up).to(dtype), mask=inside)


def _launch(kernel, gate_up: torch.Tensor, *outputs: torch.Tensor) -> None:
    n_rows, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.numel():
        block = min(_BLOCK, triton.next_power_of_2(hidden))
        kernel[(n_rows, triton.cdiv(hidden, block))](gate_up, *outputs, hidden, BLOCK=block, num_warps=4)


def _hidden_and_projection(x: torch.Tensor, w_gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = matmul(x, cast_weight(w_gate_up, x).t(), x.dtype)
    h = torch.empty(len(x), len(w_gate_up) // 2, dtype=x.dtype, device=x.device)
    _launch(_forward_kernel, gate_up, h)
    return h, gate_up


@torch.library.custom_op("fusedlm::swiglu_mlp", mutates_args=())
def _forward(x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the packed projection, which is saved for backward."""
    h, gate_up = _hidden_and_projection(x, w_gate_up)
    return matmul(h, cast_weight(w_down, x).t(), x.dtype), gate_up


@_forward.register_fake
def _(x, w_gate_up, w_down):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[0], w_gate_up.shape[0])


@torch.library.custom_op("fusedlm::swiglu_mlp_inference", mutates_args=())
def _inference(x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
    return matmul(_hidden_and_projection(x, w_gate_up)[0], cast_weight(w_down, x).t(), x.dtype)


@_inference.register_fake
def _(x, w_gate_up, w_down):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fusedlm::swiglu_mlp_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, gate_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and the weights, each in its own dtype."""
    gate_up = gate_up.contiguous()
    d_gate_up = torch.empty_like(gate_up)
    h = matmul(dy, cast_weight(w_down, x), x.dtype)  # dh until the kernel overwrites it
    _launch(_backward_kernel, gate_up, h, d_gate_up)
    dw_down = matmul(dy.t(), h, w_down.dtype)
    del h
    dx = matmul(d_gate_up, cast_weight(w_gate_up, x), x.dtype)
    return dx, matmul(d_gate_up.t(), x, w_gate_up.dtype), dw_down


@_backward.register_fake
def _(dy, x, w_gate_up, w_down, gate_up):
    return tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (x, w_gate_up, w_down))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # which would allocate and fill one of zeros
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, dy, _):
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def swiglu_mlp(x, w_gate_up, w_down) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or w_gate_up.requires_grad or w_down.requires_grad):
        return _forward(x, w_gate_up, w_down)[0]
    return _inference(x, w_gate_up, w_down)
