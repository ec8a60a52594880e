"""Public function of the short causal convolution."""

from collections.abc import Sequence

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.conv import reference

_MAX_SIZE, _MAX_HEAD_DIM = 8, 256  # of the kernels: taps and heads are held in registers


def _needs_kernels(call: Call, *, size: int, head_dim: int) -> str | None:
    if size > _MAX_SIZE:
        return f"needs at most {_MAX_SIZE} taps, not {size}"
    if head_dim > _MAX_HEAD_DIM:
        return f"needs heads of at most {_MAX_HEAD_DIM}, not {head_dim}"
    return needs_triton(call)


SHORT_CONV = Op(
    "short_conv",
    [
        Backend("triton", "fusedlm.ops.conv.triton:short_conv", _needs_kernels),
        Backend("reference", reference.short_conv, fused=False),
    ],
    size=4,
    head_dim=0,
)


def short_conv(
    x_BTC,
    weight_SC,
    tail_BSC=None,
    *,
    positions_BT=None,
    lengths_B=None,
    silu: bool = True,
    widths: Sequence[int] | None = None,
    head_dim: int = 0,
    head_scales: Sequence[float] = (),
    backend: str = "auto",
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """y_t = silu(sum_s weight_s * x_{t-s}), a causal convolution of each channel, in parts; heads of the first parts
    are L2-normalised: scale * y / sqrt(sum(y^2) + 1e-6).

    Args:
        x_BTC: (B, T, C) of any float dtype, perhaps a slice of a packed projection; the arithmetic is float32 or
            better.
        weight_SC: (S, C), the newest input's first.
        tail_BSC: (B, S - 1, C), the inputs before the first token, cast to the dtype of x; None: zeros.
        positions_BT: (B or 1, T) int64, the index of each token in its document, of which no tap reads an earlier one;
            None: no document begins here.
        lengths_B: (B,) int64, how many of the T tokens each row has, the rest being padding: the returned tail ends
            with them; None: all.
        silu: whether the activation is applied.
        widths: channels of the parts, which sum to C; None: one part.
        head_dim: channels of a head that is normalised.
        head_scales: a scale for each of the first parts, which are normalised, and of whole heads.
        backend: auto, triton or reference.

    Returns:
        The parts, each (B, T, width) in the dtype of x, and the tail (B, S - 1, C) for the tokens that follow, in
        memory of its own.

    Raises:
        ValueError: the shapes do not match, or the backend cannot run this call.
    """
    widths = (x_BTC.shape[-1],) if widths is None else tuple(widths)
    _check(x_BTC, weight_SC, tail_BSC, positions_BT, lengths_B, widths, head_dim, head_scales)
    if tail_BSC is not None:
        tail_BSC = tail_BSC.to(x_BTC.dtype)
    run = resolve("short_conv", backend, x_BTC, size=weight_SC.shape[0], head_dim=head_dim)
    return run(x_BTC, weight_SC, tail_BSC, positions_BT, lengths_B, silu, widths, head_dim, tuple(head_scales))


def short_conv_tail(x_BTC, tail_BSC, size: int, lengths_B=None) -> torch.Tensor:
    """The tail that `short_conv` returns.

    Args:
        x_BTC, tail_BSC, lengths_B: as of `short_conv`.
        size: taps.

    Returns:
        (B, size - 1, C) in the dtype of x, in memory of its own.
    """
    if tail_BSC is not None:
        tail_BSC = tail_BSC.to(x_BTC.dtype)
    return reference.next_tail(x_BTC, tail_BSC, size - 1, lengths_B)


def _check(x, weight, tail, positions, lengths, widths, head_dim, head_scales) -> None:
    if x.ndim != 3 or weight.ndim != 2 or not len(weight) or x.shape[2] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, T, C) and (S, C), S >= 1")
    batch, n_tokens, channels = x.shape
    if tail is not None and tail.shape != (batch, len(weight) - 1, channels):
        raise ValueError(f"tail {tuple(tail.shape)} must be {(batch, len(weight) - 1, channels)}, (B, S - 1, C)")
    if positions is not None and positions.shape not in ((batch, n_tokens), (1, n_tokens)):
        raise ValueError(f"positions {tuple(positions.shape)} must be (B or 1, T) of x {tuple(x.shape)}")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths {tuple(lengths.shape)} must be (B,) of x {tuple(x.shape)}")
    if not widths or min(widths) < 1 or sum(widths) != channels:
        raise ValueError(f"widths={list(widths)} must be positive and sum to the {channels} channels of x")
    if len(head_scales) > len(widths):
        raise ValueError(f"head_scales={list(head_scales)}: there are only {len(widths)} parts")
    normed = widths[: len(head_scales)]
    if normed and (head_dim < 1 or any(width % head_dim for width in normed)):
        raise ValueError(f"head_dim={head_dim} must divide the parts that are normalised, widths={list(normed)}")
