"""Projection and soft-capped cross entropy a chunk of tokens at a time.

A chunk's logits live in one buffer that becomes their gradient in place; from it come the chunk's gradient of the input
and its part of the weight's, before the next chunk overwrites it. The weight's gradient is added up in float32 whatever
the dtype of the weight: parts rounded one by one would be worse than the whole rounded once.
"""

import torch

from fusedlm.ops.softcap_cross_entropy.triton import loss_and_gradient_, loss_only, scale_, weighted_sum

# Of logits and what else is held: each chunk more reads and writes the weight's gradient once more.
_BYTES = 298 * 2**20
_ROWS = 256  # a chunk is a multiple of these, for the tiles of the products


def chunk_rows(n_tokens: int, n_classes: int, itemsize: int, held: int = 0) -> int:
    """Tokens whose logits are held at a time: as few chunks as the bytes allow, of about one size.

    held: bytes of other tensors. They count towards the allowance unless they take more than half of it; a chunk may be
    half as large as they are, since what is held is gone through once a chunk.
    """
    allowed = _BYTES - held if 2 * held < _BYTES else max(_BYTES, held // 2)
    most = max(1, allowed // (n_classes * itemsize * _ROWS)) * _ROWS
    n_chunks = -(-n_tokens // most)
    return -(-n_tokens // (n_chunks * _ROWS)) * _ROWS if n_chunks > 1 else max(1, n_tokens)


def _chunks(x: torch.Tensor, weight: torch.Tensor, held: int):
    """Slices of the tokens and, for each, its logits in the buffer that all share."""
    rows = chunk_rows(len(x), len(weight), x.element_size(), held)
    buffer = torch.empty(rows, len(weight), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, torch.mm(x[part], weight.t(), out=buffer[: part.stop - start])


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out (float32) = a b, plus what it is already unless first."""
    beta = 0.0 if first else 1.0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


@torch.library.custom_op("fusedlm::linear_softcap_cross_entropy", mutates_args=())
def _forward_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    cap: float | None,
    n_classes: int,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum (), losses (N,), and the sum's gradients of x and weight."""
    x, rounded, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    dw = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    if not len(x):
        dw.zero_()
    held = 0 if rounded is weight else rounded.nbytes
    held += 0 if weight.dtype == dw.dtype else dw.nbytes
    for part, logits in _chunks(x, rounded, held):
        loss_and_gradient_(logits, targets[part], token_weights[part], cap, n_classes, z_loss, out=losses[part])
        torch.mm(logits, rounded, out=dx[part])
        _add_product(dw, logits.t(), x[part], first=part.start == 0)
    return weighted_sum(losses, token_weights), losses, dx, dw.to(weight.dtype)


@_forward_backward.register_fake
def _(x, weight, targets, token_weights, cap, n_classes, z_loss):
    losses = x.new_empty(x.shape[:1], dtype=torch.float32)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return x.new_empty((), dtype=torch.float32), losses, dx, dw


class _WithGradients(torch.autograd.Function):
    """Sum and losses, with gradients that were made with them and can be used once."""

    @staticmethod
    def forward(ctx, x, weight, targets, token_weights, cap, n_classes, z_loss):
        loss, losses, *gradients = _forward_backward(x, weight, targets, token_weights, cap, n_classes, z_loss)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        ctx.used = False
        return loss, losses

    @staticmethod
    def backward(ctx, upstream, _):
        if ctx.used:
            raise RuntimeError("linear_softcap_cross_entropy gives its gradients once; call it again for others")
        ctx.used = True
        gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient.numel():
                scale_(gradient, upstream)
        return *gradients, None, None, None, None, None


@torch.library.custom_op("fusedlm::linear_softcap_cross_entropy_losses", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    x, weight, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for part, logits in _chunks(x, weight, 0):
        loss_only(logits, targets[part], cap, n_classes, z_loss, out=losses[part])
    return losses


@_forward.register_fake
def _(x, weight, targets, cap, n_classes, z_loss):
    return x.new_empty(x.shape[:1], dtype=torch.float32)


def linear_softcap_cross_entropy(x, weight, targets, token_weights, cap, n_classes, z_loss):
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _WithGradients.apply(x, weight, targets, token_weights, cap, n_classes, z_loss)
    losses = _forward(x, weight, targets, cap, n_classes, z_loss)
    return (losses * token_weights).sum(), losses
