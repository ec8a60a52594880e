"""Soft-capped cross entropy in Triton: a program takes a row, or several narrow ones.

The loss reads a row once. Its gradient reads it again, from the end backwards: made by the same program right after, it
finds in the cache what was read last, and a gradient that is made with the loss costs one read and one write. What is
read or written for the last time is the first to leave the cache; the end of each row is the last.
"""

import math
from dataclasses import dataclass

import torch
import triton

from fusedlm.ops.common.device import launched_early, overlaps
from fusedlm.ops.softcap_cross_entropy import kernels

_WIDEST_BOUND = 40.0  # caps up to here need no maximum
_WHOLE = 4096  # classes up to which a program holds whole rows
_NARROW_TILE = 1024  # elements of the rows that a program takes together
_WIDE = 131072  # bytes of a row from which few at a time fit into the cache
_N_COUNTS = 64  # programs that count the rows of a mean
_N_SUMS = 64  # programs that sum up losses
_SHARE = 1024  # rows of each at a time
_SCALE_BLOCK = 8192
_SCALE_PROGRAMS = 1024


def _narrow(width: int) -> dict:
    """Rows and columns of each tile of a pair that holds rows of this width whole."""
    block = max(1, triton.next_power_of_2(width) // 2)
    rows = max(1, _NARROW_TILE // (2 * block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, rows * block // 512)}


def _capping(cap: float | None, logits: torch.Tensor) -> dict:
    mode = kernels.UNCAPPED
    if cap is not None:
        mode = kernels.CAPPED_PRECISELY if logits.dtype == torch.float32 else kernels.CAPPED
    return {"CAP": mode.value, "BOUNDED": cap is not None and cap <= _WIDEST_BOUND}


def _scales(cap: float | None) -> tuple[float, float]:
    """What the kernels take of the cap: itself, and what a logit is multiplied by in the exponent of its tanh."""
    return (0.0, 0.0) if cap is None else (cap, 2 * math.log2(math.e) / cap)


def _gradient_tile(logits: torch.Tensor, capped: bool) -> dict:
    """Many threads to a row, and for the widest rows all that a program can have: of fewer rows at a time more is left
    in the cache. Without a cap there is less to compute, and the memory wants more of fewer rows sooner. Registers are
    as many as the threads leave; the arithmetic for float32 needs more of them for each number."""
    wide = logits.shape[1] * logits.element_size() >= _WIDE
    if not capped:
        block, num_warps = 4096, 32
    elif logits.dtype == torch.float32:
        block, num_warps = 2048, 32 if wide else 16
    else:
        block, num_warps = (8192, 32) if wide else (4096, 16)
    return {"ROWS": 1, "BLOCK": block, "num_warps": num_warps, "maxnreg": 32 if num_warps == 32 else 40}


def _kept(logits: torch.Tensor, tile: dict) -> int:
    """Elements at the end of each row that the cache has room for while as many rows are read as run at a time."""
    if logits.device.type != "cuda":
        return 2 * tile["BLOCK"]
    device = torch.cuda.get_device_properties(logits.device)
    n_threads = min(device.max_threads_per_multi_processor, device.regs_per_multiprocessor // tile["maxnreg"])
    n_rows = device.multi_processor_count * (n_threads // (32 * tile["num_warps"]))
    room = device.L2_cache_size // (n_rows * logits.element_size())
    return room // (2 * tile["BLOCK"]) * (2 * tile["BLOCK"])


@dataclass(frozen=True)
class _Weights:
    """What rows' losses are multiplied by, as the kernels take it."""

    numbers: torch.Tensor | None
    n_counts: int  # of numbers over the sum of which it is one; 0: one number a row; -1: none, it is 1

    @property
    def stride(self) -> int:
        return self.numbers.stride(0) if self.n_counts == 0 else 0


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _losses(
    logits, targets, cap, n_classes, z_loss, loss: torch.Tensor | None = None, counted: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row (N,) and of its normaliser the highest exponent and log2 of the rest (2, N), both float32.
    counted: the last kernel that was launched counts the rows."""
    n_rows = len(logits)
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device) if loss is None else loss
    normalisers = torch.empty(2, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows and logits.shape[1] <= _WHOLE:
        weights = _Weights(None, -1)
        _whole_rows(logits, targets, weights, loss, normalisers, None, cap, n_classes, z_loss, counted)
    elif n_rows:
        kernels.forward_kernel[(n_rows,)](
            logits, targets, loss, *normalisers, n_rows, logits.stride(0), n_classes, *_scales(cap), z_loss,
            ROWS=1, BLOCK=1024, num_warps=8, **_capping(cap, logits), **_launch(logits, counted),
        )  # fmt: skip
    return loss, normalisers


def _losses_and_gradients(
    logits, targets, weights: _Weights, gradient, cap, n_classes, z_loss, loss: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of each row (N,) float32; gradient (N, V), which may be the logits, becomes weights times its own."""
    n_rows, width = logits.shape
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device) if loss is None else loss
    counted = weights.n_counts > 0
    if n_rows and width <= _WHOLE:
        _whole_rows(logits, targets, weights, loss, (None, None), gradient, cap, n_classes, z_loss, counted)
    elif n_rows:
        tile = _gradient_tile(logits, cap is not None)
        kernels.both_kernel[(n_rows,)](
            logits, targets, weights.numbers, loss, gradient, n_rows, logits.stride(0), gradient.stride(0),
            weights.stride, width, n_classes, _kept(logits, tile), *_scales(cap), z_loss,
            N_COUNTS=weights.n_counts, **_capping(cap, logits), **tile, **_launch(logits, counted),
        )  # fmt: skip
    return loss


def _whole_rows(logits, targets, weights: _Weights, loss, normalisers, gradient, cap, n_classes, z_loss, counted):
    """Of narrow rows the losses, and the gradient or, without one, the normalisers."""
    (n_rows, width), tile, (peaks, log2_totals) = logits.shape, _narrow(logits.shape[1]), normalisers
    # Without a gradient a program of one warp is so short that to ask whether it must wait takes longer than to wait.
    launch = {"OVERLAPPED": False} if gradient is None else _launch(logits, counted)
    kernels.whole_rows_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
        logits, targets, weights.numbers, loss, peaks, log2_totals, gradient, n_rows, logits.stride(0),
        0 if gradient is None else gradient.stride(0), weights.stride, width, n_classes, *_scales(cap), z_loss,
        N_COUNTS=weights.n_counts, GRADIENT=gradient is not None,
        FULL=n_classes == width == 2 * tile["BLOCK"] and n_rows % tile["ROWS"] == 0, **_capping(cap, logits), **tile,
        **launch,
    )  # fmt: skip


def _launch(logits: torch.Tensor, counted: bool) -> dict:
    """Early behind the count of rows alone: behind another kernel the logits need not be there."""
    return launched_early(logits.device) if counted else {"OVERLAPPED": overlaps(logits.device)}


def _of_reduction(targets: torch.Tensor, mean: bool) -> _Weights:
    """For a mean this launches the count of rows."""
    if not mean:
        return _Weights(None, -1)
    counts = torch.empty(_N_COUNTS, dtype=torch.int32, device=targets.device)
    kernels.count_kernel[(_N_COUNTS,)](targets, counts, len(targets), BLOCK=_SHARE, OVERLAPPED=overlaps(targets.device))
    return _Weights(counts, _N_COUNTS)


def _total(losses: torch.Tensor, weights: _Weights) -> torch.Tensor:
    """The sum () float32 of losses (N,) float32 times weights, always in the same order."""
    sums = torch.empty(_N_SUMS, dtype=torch.float32, device=losses.device)
    out = torch.empty((), dtype=torch.float32, device=losses.device)
    kernels.sums_kernel[(_N_SUMS,)](
        losses, weights.numbers, sums, len(losses), weights.stride, WEIGHTED=weights.n_counts == 0, BLOCK=_SHARE,
        **launched_early(losses.device),
    )  # fmt: skip
    counts = weights.numbers if weights.n_counts > 0 else None
    kernels.total_kernel[(1,)](
        sums, counts, out, N_SUMS=_N_SUMS, N_COUNTS=weights.n_counts, num_warps=1, **launched_early(losses.device)
    )
    return out


@torch.library.custom_op("fusedlm::softcap_cross_entropy", mutates_args=())
def _forward(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, n_classes: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _losses(_rows(logits), targets.contiguous(), cap, n_classes, z_loss)


@_forward.register_fake
def _(logits, targets, cap, n_classes, z_loss):
    loss = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return loss, loss.new_empty(2, logits.shape[0])


@torch.library.custom_op("fusedlm::softcap_cross_entropy_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    normalisers: torch.Tensor,
    cap: float | None,
    n_classes: int,
    z_loss: float,
) -> torch.Tensor:
    """Gradient of the logits (N, V), contiguous."""
    logits = _rows(logits)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    n_rows, width = logits.shape
    if n_rows:
        tile = _narrow(width) if width <= _WHOLE else _gradient_tile(logits, cap is not None)
        kernels.backward_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
            logits, targets.contiguous(), *normalisers, upstream, gradient, n_rows, logits.stride(0),
            upstream.stride(0), width, n_classes, *_scales(cap), z_loss, **_capping(cap, logits),
            **tile,
        )  # fmt: skip
    return gradient


@_backward.register_fake
def _(upstream, logits, targets, normalisers, cap, n_classes, z_loss):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, output[1])


def _gradients(ctx, upstream, _):
    logits, targets, normalisers = ctx.saved_tensors
    return _backward(upstream, logits, targets, normalisers, *ctx.rest), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


@torch.library.custom_op("fusedlm::reduced_softcap_cross_entropy", mutates_args=())
def _reduced(
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: float | None, n_classes: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum or mean () of the losses, and its gradient (N, V)."""
    logits, targets = _rows(logits), targets.contiguous()
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    weights = _of_reduction(targets, mean)
    return _total(_losses_and_gradients(logits, targets, weights, gradient, cap, n_classes, z_loss), weights), gradient


@_reduced.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return logits.new_empty((), dtype=torch.float32), gradient


@torch.library.custom_op("fusedlm::reduced_softcap_cross_entropy_", mutates_args=("logits",))
def _reduced_(
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: float | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    """Sum or mean () of the losses; the logits, whose rows must be contiguous, become its gradient."""
    targets = targets.contiguous()
    weights = _of_reduction(targets, mean)
    return _total(_losses_and_gradients(logits, targets, weights, logits, cap, n_classes, z_loss), weights)


@_reduced_.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fusedlm::reduced_softcap_cross_entropy_loss", mutates_args=())
def _reduced_loss(
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: float | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    """Sum or mean () of the losses alone."""
    logits, targets = _rows(logits), targets.contiguous()
    weights = _of_reduction(targets, mean)
    return _total(_losses(logits, targets, cap, n_classes, z_loss, counted=mean)[0], weights)


@_reduced_loss.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fusedlm::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor (); next to free when that is 1, as it is where the loss is what is differentiated."""
    kernels.scale_kernel[(min(triton.cdiv(x.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS),)](
        x, factor, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8, **launched_early(x.device)
    )


class _Reduced(torch.autograd.Function):
    """The sum or mean, whose gradient was made with it and can be used once."""

    @staticmethod
    def forward(ctx, logits, targets, mean, cap, n_classes, z_loss, in_place):
        if in_place and logits.stride(-1) == 1:
            gradient = logits.detach()
            loss = _reduced_(gradient, targets, mean, cap, n_classes, z_loss)
        else:
            loss, gradient = _reduced(logits, targets, mean, cap, n_classes, z_loss)
        ctx.save_for_backward(gradient)
        ctx.used = False
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if ctx.used:
            raise RuntimeError("a reduced softcap_cross_entropy gives its gradient once; take reduction='none'")
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        if gradient.numel():
            scale_(gradient, upstream)
        return gradient, None, None, None, None, None, None


def softcap_cross_entropy(
    logits, targets, cap, n_classes, z_loss=0.0, reduction="none", in_place=False
) -> torch.Tensor:
    if reduction != "none" and torch.is_grad_enabled() and logits.requires_grad:
        return _Reduced.apply(logits, targets, reduction == "mean", cap, n_classes, z_loss, in_place)
    if reduction != "none":
        return _reduced_loss(logits, targets, reduction == "mean", cap, n_classes, z_loss)
    return _forward(logits, targets, cap, n_classes, z_loss)[0]


def loss_and_gradient_(logits, targets, weights, cap, n_classes, z_loss=0.0, out=None) -> torch.Tensor:
    """Loss of each row (N,) float32, in out if given; the logits (N, V) become weights (N,) times its gradient."""
    return _losses_and_gradients(logits, targets, _Weights(weights, 0), logits, cap, n_classes, z_loss, out)


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum () float32 of losses (N,) float32 times weights (N,)."""
    return _total(losses, _Weights(weights, 0))


def loss_only(logits, targets, cap, n_classes, z_loss=0.0, out=None) -> torch.Tensor:
    """Loss of each row (N,) float32, in out if given, of logits (N, V) whose rows are contiguous; no gradient."""
    return _losses(logits, targets, cap, n_classes, z_loss, out)[0]
