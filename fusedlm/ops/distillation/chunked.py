"""Soft-target distillation, one chunk of tokens at a time, in PyTorch's own operations.

A chunk's logits of both heads, and what is computed from them, are freed with the chunk; its gradients of the input and
of the weight are computed before the next one. The weight's gradient is accumulated in float32 or better and rounded
once.
"""

from collections.abc import Sequence

import torch

from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, SigmoidCap

_MAX_BYTES = 2**29  # of the temporaries of a chunk: logits of two heads, four tensors of that size in float32
_ROW_MULTIPLE = 256  # for the tiles of the matrix products


def chunk_rows(n_tokens: int, n_classes: int) -> int:
    """Tokens per chunk: as few chunks as the memory allows, of about equal size."""
    most = max(1, _MAX_BYTES // (16 * n_classes * _ROW_MULTIPLE)) * _ROW_MULTIPLE
    n_chunks = -(-n_tokens // most)
    return -(-n_tokens // (n_chunks * _ROW_MULTIPLE)) * _ROW_MULTIPLE if n_chunks > 1 else max(1, n_tokens)


def cap_list(cap: float | SigmoidCap | None) -> list[float]:
    """A cap as an operator takes it: none, one or three numbers."""
    if cap is None:
        return []
    return [float(c) for c in cap] if isinstance(cap, SigmoidCap) else [float(cap)]


def _cap_(logits: torch.Tensor, cap: Sequence[float], slope: bool) -> torch.Tensor | None:
    """Cap logits in place; returns the derivative with `slope`, None without a cap."""
    if not cap:
        return None
    if len(cap) == 1:
        logits.div_(cap[0]).tanh_()
        derivative = (1 - logits * logits) if slope else None
        logits.mul_(cap[0])
        return derivative
    scale, shift, width = cap
    logits.add_(shift).div_(width).sigmoid_()
    derivative = (logits * (1 - logits)).mul_(scale / width) if slope else None
    logits.mul_(scale)
    return derivative


def _log_softmax(x, weight, cap, n_classes, temperature, wide, slope):
    """Of capped logits over the temperature; and the derivative of the cap, or None."""
    logits = torch.mm(x, weight.t())[:, :n_classes].to(wide)
    derivative = _cap_(logits, cap, slope)
    return logits.div_(temperature).log_softmax(-1), derivative


@torch.library.custom_op("fusedlm::linear_distillation", mutates_args=())
def _forward_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    teacher_x: torch.Tensor,
    teacher_weight: torch.Tensor,
    cap: Sequence[float],
    teacher_cap: Sequence[float],
    n_classes: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum (), divergences (N,), and the gradients of the sum with respect to x and weight."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w, teacher_w = weight.to(x.dtype), teacher_weight.to(teacher_x.dtype)
    divergences = torch.zeros(len(x), dtype=wide, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.zeros(weight.shape, dtype=wide, device=x.device)
    rows = chunk_rows(len(x), max(len(weight), len(teacher_weight)))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        log_q, _ = _log_softmax(teacher_x[part], teacher_w, teacher_cap, n_classes, temperature, wide, slope=False)
        log_p, derivative = _log_softmax(x[part], w, cap, n_classes, temperature, wide, slope=True)
        q, valid = log_q.exp(), targets[part] != IGNORE_INDEX
        divergences[part] = log_q.sub_(log_p).mul_(q).sum(-1).masked_fill_(~valid, 0.0)
        factor = (temperature * token_weights[part].to(wide)).masked_fill(~valid, 0.0)
        slope = log_p.exp_().sub_(q).mul_(factor[:, None])
        if derivative is not None:
            slope.mul_(derivative)
        # As wide as the weight: products of a width that is no multiple of 8 are several times slower on GPUs.
        gradient = torch.empty(len(slope), len(w), dtype=x.dtype, device=x.device)
        gradient[:, :n_classes].copy_(slope)
        gradient[:, n_classes:].zero_()
        torch.mm(gradient, w, out=dx[part])
        _add_product_(dw, gradient.t(), x[part])
    total = temperature**2 * (divergences * token_weights).sum()
    return total.to(wide), divergences, dx, dw.to(weight.dtype)


def _add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out (float32 or better) += a b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # the CPU has no products of mixed precision
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


@_forward_backward.register_fake
def _(x, weight, targets, token_weights, teacher_x, teacher_weight, cap, teacher_cap, n_classes, temperature):
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return x.new_empty((), dtype=wide), x.new_empty(x.shape[:1], dtype=wide), dx, dw


class _WithGradients(torch.autograd.Function):
    """Sum and divergences. The gradients are computed with them and can be used once."""

    @staticmethod
    def forward(ctx, x, weight, *rest):
        total, divergences, *gradients = _forward_backward(x, weight, *rest)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(divergences)
        ctx.set_materialize_grads(False)
        ctx.used = False
        return total, divergences

    @staticmethod
    def backward(ctx, upstream, _):
        if ctx.used:
            raise RuntimeError("linear_distillation gives its gradients once; call it again")
        ctx.used = True
        # In place: they are not used again, and that of the weight is as large as it.
        dx, dw = (gradient.mul_(upstream.to(gradient.dtype)) for gradient in ctx.saved_tensors)
        return dx, dw, *[None] * 8


def linear_distillation(
    x, weight, targets, token_weights, teacher_x, teacher_weight, cap, teacher_cap, n_classes, temperature
):
    token_weights = token_weights.expand(len(x))
    teacher = (teacher_x, teacher_weight, cap_list(cap), cap_list(teacher_cap), n_classes, temperature)
    return _WithGradients.apply(x, weight, targets, token_weights, *teacher)
