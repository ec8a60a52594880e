"""Projection and soft-capped cross entropy, one chunk of tokens at a time.

The chunks share one buffer for their logits, which are overwritten with their gradient; from it the chunk's gradients
of the input and of the weight are computed before the next chunk. The weight's gradient is accumulated in float32
whatever the dtype of the weight, and rounded once.
"""

from collections.abc import Sequence

import torch

from fusedlm.ops.cross_entropy.triton import cap_list, loss_and_gradient_, loss_only, scale_, weighted_sum

# Of the logits and other temporaries. Fewer chunks are faster: each reads and writes the weight's gradient once.
_MAX_BYTES = 298 * 2**20
_ROW_MULTIPLE = 256  # chunks are multiples of this, for the tiles of the matrix products


def chunk_rows(n_tokens: int, n_classes: int, itemsize: int, held: int = 0) -> int:
    """Tokens per chunk: as few chunks as the memory limit allows, of about equal size.

    held: bytes of other temporaries. They count towards the limit unless they exceed half of it. Above that a chunk may
    be half as large as they are, since each chunk reads and writes them.
    """
    allowed = _MAX_BYTES - held if 2 * held < _MAX_BYTES else max(_MAX_BYTES, held // 2)
    max_rows = max(1, allowed // (n_classes * itemsize * _ROW_MULTIPLE)) * _ROW_MULTIPLE
    n_chunks = -(-n_tokens // max_rows)
    return -(-n_tokens // (n_chunks * _ROW_MULTIPLE)) * _ROW_MULTIPLE if n_chunks > 1 else max(1, n_tokens)


def _chunks(x: torch.Tensor, weight: torch.Tensor, held: int):
    """Yields slices of the tokens with their logits, in a buffer that all chunks share."""
    rows = chunk_rows(len(x), len(weight), x.element_size(), held)
    buffer = torch.empty(rows, len(weight), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        yield part, torch.mm(x[part], weight.t(), out=buffer[: part.stop - start])


def _accumulate_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out (float32) += a b; with `first` out = a b."""
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
    cap: Sequence[float] | None,
    n_classes: int,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum (), losses (N,), and the gradients of the sum with respect to x and weight."""
    x, w, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    dw = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    if not len(x):
        dw.zero_()
    held = 0 if w is weight else w.nbytes
    held += 0 if weight.dtype == dw.dtype else dw.nbytes
    for part, logits in _chunks(x, w, held):
        loss_and_gradient_(logits, targets[part], token_weights[part], cap, n_classes, z_loss, out=losses[part])
        torch.mm(logits, w, out=dx[part])
        _accumulate_product(dw, logits.t(), x[part], first=part.start == 0)
    return weighted_sum(losses, token_weights), losses, dx, dw.to(weight.dtype)


@_forward_backward.register_fake
def _(x, weight, targets, token_weights, cap, n_classes, z_loss):
    losses = x.new_empty(x.shape[:1], dtype=torch.float32)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return x.new_empty((), dtype=torch.float32), losses, dx, dw


class _WithGradients(torch.autograd.Function):
    """Sum and losses. The gradients are computed with them and can be used once."""

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
            raise RuntimeError("linear_softcap_cross_entropy gives its gradients once; call it again")
        ctx.used = True
        gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient.numel():
                scale_(gradient, upstream)
        return *gradients, None, None, None, None, None


@torch.library.custom_op("fusedlm::linear_softcap_cross_entropy_losses", mutates_args=())
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cap: Sequence[float] | None,
    n_classes: int,
    z_loss: float,
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
    token_weights, cap = token_weights.expand(len(x)), cap_list(cap)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _WithGradients.apply(x, weight, targets, token_weights, cap, n_classes, z_loss)
    losses = _forward(x, weight, targets, cap, n_classes, z_loss)
    return (losses * token_weights).sum(), losses
