"""Soft-capped cross entropy in Triton: a program computes one row, or several short ones.

The loss reads a row once. The gradient reads it again, from the end backwards: computed by the same program, it finds
the end of the row in the cache, so that a gradient computed with the loss costs about one read and one write. Accesses
that are the last to an element are evicted first, the end of each row last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from fusedlm.ops.common.device import pdl_options, supports_pdl
from fusedlm.ops.cross_entropy import caps, kernels
from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, SigmoidCap

_MAX_BOUNDED_CAP = 40.0  # caps up to this need no row maximum
_FULL_ROW_COLUMNS = 4096  # rows up to this length are held in full
_FULL_ROW_ELEMENTS = 1024  # of the rows that one program computes
_LONG_ROW_BYTES = 131072  # from here on few rows at a time fit into the cache
_N_COUNTS = 64  # programs that count valid targets for a mean
_N_SUMS = 64  # programs that sum losses
_BLOCK = 1024  # rows that each of these loads at a time
_SCALE_BLOCK = 8192
_SCALE_PROGRAMS = 1024
_INVALID_TARGET = -1  # a target whose loss is NaN


def _full_row_tile(width: int) -> dict:
    """Shape and launch of a pair of tiles that holds full rows of this length."""
    block = max(1, triton.next_power_of_2(width) // 2)
    rows = max(1, _FULL_ROW_ELEMENTS // (2 * block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, rows * block // 512)}


def _cap_options(cap: Sequence[float] | None, logits: torch.Tensor) -> dict:
    if cap is None:
        return {"CAP": caps.UNCAPPED.value, "BOUNDED": False}
    modes = [caps.CAPPED, caps.CAPPED_PRECISELY] if len(cap) == 1 else [caps.SHIFTED, caps.SHIFTED_PRECISELY]
    mode = modes[logits.dtype == torch.float32]
    return {"CAP": mode.value, "BOUNDED": _cap_arguments(cap)[0] <= _MAX_BOUNDED_CAP}


def _cap_arguments(cap: Sequence[float] | None) -> tuple[float, float, float]:
    """cap, rate and center, as the kernels take them."""
    if cap is None:
        return 0.0, 0.0, 0.0
    if len(cap) == 1:
        return cap[0], 2 * math.log2(math.e) / cap[0], 0.0
    scale, shift, width = cap
    return scale / 2, math.log2(math.e) / width, shift


def cap_list(cap: float | SigmoidCap | Sequence[float] | None) -> list[float] | None:
    """A cap as the operators take it: [cap] of the tanh, or the three values of a SigmoidCap."""
    if cap is None:
        return None
    return list(cap) if isinstance(cap, Sequence) else [cap]


def _gradient_tile(logits: torch.Tensor, capped: bool) -> dict:
    """Tile and launch of `loss_and_gradient_kernel` and `backward_kernel`.

    Many threads per row, the most for the longest rows: the fewer rows run at a time, the more of each stays in the
    cache. Without a cap there is less arithmetic, and more threads per row pay off for shorter rows too. Registers are
    limited to what that many threads leave; float32 arithmetic needs more of them per element."""
    is_long = logits.shape[1] * logits.element_size() >= _LONG_ROW_BYTES
    if not capped:
        block, num_warps = 4096, 32
    elif logits.dtype == torch.float32:
        block, num_warps = 2048, 32 if is_long else 16
    else:
        block, num_warps = (8192, 32) if is_long else (4096, 16)
    return {"ROWS": 1, "BLOCK": block, "num_warps": num_warps, "maxnreg": 32 if num_warps == 32 else 40}


def _cached_columns(logits: torch.Tensor, tile: dict) -> int:
    """Columns at the end of each row that fit into the L2 cache, with as many rows as run at a time."""
    if logits.device.type != "cuda":
        return 2 * tile["BLOCK"]
    device = torch.cuda.get_device_properties(logits.device)
    n_threads = min(device.max_threads_per_multi_processor, device.regs_per_multiprocessor // tile["maxnreg"])
    n_rows = device.multi_processor_count * (n_threads // (32 * tile["num_warps"]))
    room = device.L2_cache_size // (n_rows * logits.element_size())
    return room // (2 * tile["BLOCK"]) * (2 * tile["BLOCK"])


@dataclass(frozen=True)
class _Weights:
    """Weights of the rows' losses, as the kernels take them."""

    values: torch.Tensor | None
    n_counts: int  # > 0: one over the sum of so many values; 0: a value per row; -1: 1, without values

    @property
    def stride(self) -> int:
        return self.values.stride(0) if self.n_counts == 0 else 0


def _rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _losses(
    logits, targets, cap, n_classes, z_loss, loss: torch.Tensor | None = None, after_count: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row (N,), and its normaliser as peak exponent and log2 of the remaining sum (2, N), all float32.
    after_count: the previous kernel counts the valid targets."""
    n_rows = len(logits)
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device) if loss is None else loss
    normalisers = torch.empty(2, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows and logits.shape[1] <= _FULL_ROW_COLUMNS:
        weights = _Weights(None, -1)
        _launch_full_rows(logits, targets, weights, loss, normalisers, None, cap, n_classes, z_loss, after_count)
    elif n_rows:
        kernels.forward_kernel[(n_rows,)](
            logits, targets, loss, *normalisers, n_rows, logits.stride(0), n_classes, *_cap_arguments(cap), z_loss,
            ROWS=1, BLOCK=1024, num_warps=8, **_cap_options(cap, logits), **_pdl_launch(logits, after_count),
        )  # fmt: skip
    return loss, normalisers


def _losses_and_gradients(
    logits, targets, weights: _Weights, gradient, cap, n_classes, z_loss, loss: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of each row (N,) float32. Writes its gradient times weights to gradient (N, V), which may be the logits."""
    n_rows, width = logits.shape
    loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device) if loss is None else loss
    after_count = weights.n_counts > 0
    if n_rows and width <= _FULL_ROW_COLUMNS:
        _launch_full_rows(logits, targets, weights, loss, (None, None), gradient, cap, n_classes, z_loss, after_count)
    elif n_rows:
        tile = _gradient_tile(logits, cap is not None)
        kernels.loss_and_gradient_kernel[(n_rows,)](
            logits, targets, weights.values, loss, gradient, n_rows, logits.stride(0), gradient.stride(0),
            weights.stride, width, n_classes, _cached_columns(logits, tile), *_cap_arguments(cap), z_loss,
            N_COUNTS=weights.n_counts, **_cap_options(cap, logits), **tile, **_pdl_launch(logits, after_count),
        )  # fmt: skip
    return loss


def _launch_full_rows(
    logits, targets, weights: _Weights, loss, normalisers, gradient, cap, n_classes, z_loss, after_count
):
    """Losses of short rows, and their gradient or, without one, their normalisers."""
    (n_rows, width), tile, (peaks, log2_totals) = logits.shape, _full_row_tile(logits.shape[1]), normalisers
    # Without a gradient these programs of one warp are so short that PDL costs more than it saves.
    launch = {"PDL": False} if gradient is None else _pdl_launch(logits, after_count)
    kernels.full_rows_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
        logits, targets, weights.values, loss, peaks, log2_totals, gradient, n_rows, logits.stride(0),
        0 if gradient is None else gradient.stride(0), weights.stride, width, n_classes, *_cap_arguments(cap), z_loss,
        N_COUNTS=weights.n_counts, GRADIENT=gradient is not None,
        UNMASKED=n_classes == width == 2 * tile["BLOCK"] and n_rows % tile["ROWS"] == 0,
        **_cap_options(cap, logits), **tile, **launch,
    )  # fmt: skip


def _pdl_launch(logits: torch.Tensor, after_count: bool) -> dict:
    """PDL only after the count of valid targets: after another kernel the logits may not have been written yet."""
    return pdl_options(logits.device) if after_count else {"PDL": supports_pdl(logits.device)}


def _reduction_weights(targets: torch.Tensor, mean: bool) -> _Weights:
    """The weights of a sum or a mean; for a mean, launches the count of valid targets."""
    if not mean:
        return _Weights(None, -1)
    counts = torch.empty(_N_COUNTS, dtype=torch.int32, device=targets.device)
    kernels.count_kernel[(_N_COUNTS,)](targets, counts, len(targets), BLOCK=_BLOCK, PDL=supports_pdl(targets.device))
    return _Weights(counts, _N_COUNTS)


def _total(losses: torch.Tensor, weights: _Weights) -> torch.Tensor:
    """The sum () float32 of losses (N,) float32 times weights, in a fixed order."""
    sums = torch.empty(_N_SUMS, dtype=torch.float32, device=losses.device)
    out = torch.empty((), dtype=torch.float32, device=losses.device)
    kernels.partial_sums_kernel[(_N_SUMS,)](
        losses, weights.values, sums, len(losses), weights.stride, WEIGHTED=weights.n_counts == 0, BLOCK=_BLOCK,
        **pdl_options(losses.device),
    )  # fmt: skip
    counts = weights.values if weights.n_counts > 0 else None
    kernels.total_kernel[(1,)](
        sums, counts, out, N_SUMS=_N_SUMS, N_COUNTS=weights.n_counts, num_warps=1, **pdl_options(losses.device)
    )
    return out


@torch.library.custom_op("fusedlm::softcap_cross_entropy", mutates_args=())
def _forward(
    logits: torch.Tensor, targets: torch.Tensor, cap: Sequence[float] | None, n_classes: int, z_loss: float
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
    cap: Sequence[float] | None,
    n_classes: int,
    z_loss: float,
) -> torch.Tensor:
    """Gradient of the logits (N, V), contiguous."""
    logits = _rows(logits)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    n_rows, width = logits.shape
    if n_rows:
        tile = _full_row_tile(width) if width <= _FULL_ROW_COLUMNS else _gradient_tile(logits, cap is not None)
        kernels.backward_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
            logits, targets.contiguous(), *normalisers, upstream, gradient, n_rows, logits.stride(0),
            upstream.stride(0), width, n_classes, *_cap_arguments(cap), z_loss, **_cap_options(cap, logits),
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
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: Sequence[float] | None, n_classes: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum or mean () of the losses, and its gradient (N, V)."""
    logits, targets = _rows(logits), targets.contiguous()
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    weights = _reduction_weights(targets, mean)
    return _total(_losses_and_gradients(logits, targets, weights, gradient, cap, n_classes, z_loss), weights), gradient


@_reduced.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return logits.new_empty((), dtype=torch.float32), gradient


@torch.library.custom_op("fusedlm::reduced_softcap_cross_entropy_", mutates_args=("logits",))
def _reduced_(
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: Sequence[float] | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    """Sum or mean () of the losses. Overwrites the logits, whose rows must be contiguous, with its gradient."""
    targets = targets.contiguous()
    weights = _reduction_weights(targets, mean)
    return _total(_losses_and_gradients(logits, targets, weights, logits, cap, n_classes, z_loss), weights)


@_reduced_.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fusedlm::reduced_softcap_cross_entropy_loss", mutates_args=())
def _reduced_loss(
    logits: torch.Tensor, targets: torch.Tensor, mean: bool, cap: Sequence[float] | None, n_classes: int, z_loss: float
) -> torch.Tensor:
    """Sum or mean () of the losses, without a gradient."""
    logits, targets = _rows(logits), targets.contiguous()
    weights = _reduction_weights(targets, mean)
    return _total(_losses(logits, targets, cap, n_classes, z_loss, after_count=mean)[0], weights)


@_reduced_loss.register_fake
def _(logits, targets, mean, cap, n_classes, z_loss):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.custom_op("fusedlm::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x *= factor (); almost free where it is 1, as where the loss itself is differentiated."""
    kernels.scale_kernel[(min(triton.cdiv(x.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS),)](
        x, factor, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8, **pdl_options(x.device)
    )


class _Reduced(torch.autograd.Function):
    """The sum or mean. Its gradient is computed with it and can be used once."""

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
            raise RuntimeError("a reduced softcap_cross_entropy gives its gradient once; use reduction='none'")
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        if gradient.numel():
            scale_(gradient, upstream)
        return gradient, None, None, None, None, None, None


def softcap_cross_entropy(
    logits, targets, cap, n_classes, z_loss=0.0, reduction="none", in_place=False, ignore_index=IGNORE_INDEX
) -> torch.Tensor:
    if ignore_index != IGNORE_INDEX:
        # The kernels ignore IGNORE_INDEX only. With another index IGNORE_INDEX is an invalid target.
        ignored = targets == ignore_index
        targets = targets.masked_fill(targets == IGNORE_INDEX, _INVALID_TARGET).masked_fill(ignored, IGNORE_INDEX)
    cap = cap_list(cap)
    if reduction != "none" and torch.is_grad_enabled() and logits.requires_grad:
        return _Reduced.apply(logits, targets, reduction == "mean", cap, n_classes, z_loss, in_place)
    if reduction != "none":
        return _reduced_loss(logits, targets, reduction == "mean", cap, n_classes, z_loss)
    return _forward(logits, targets, cap, n_classes, z_loss)[0]


def loss_and_gradient_(logits, targets, weights, cap, n_classes, z_loss=0.0, out=None) -> torch.Tensor:
    """Loss of each row (N,) float32, in out if given. The logits (N, V) become its gradient times weights (N,)."""
    return _losses_and_gradients(logits, targets, _Weights(weights, 0), logits, cap_list(cap), n_classes, z_loss, out)


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum () float32 of losses (N,) float32 times weights (N,)."""
    return _total(losses, _Weights(weights, 0))


def loss_only(logits, targets, cap, n_classes, z_loss=0.0, out=None) -> torch.Tensor:
    """Loss of each row (N,) float32, in out if given, without a gradient. Rows of the logits (N, V) are contiguous."""
    return _losses(logits, targets, cap_list(cap), n_classes, z_loss, out)[0]
