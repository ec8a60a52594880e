"""Differential linear attention in plain PyTorch: features, two streams of linear attention, and their difference."""

import torch
import torch.nn.functional as F

from fusedlm.ops.linear_attention import reference as linear_attention


def features(u: torch.Tensor) -> torch.Tensor:
    """1 + u + u^2 / 2, the exponential to second order: at least 1/2."""
    return torch.addcmul(1 + u, u, u, value=0.5)


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Pairs (i, i + R/2) of the leading R dimensions rotated by a table of cosines and sines (..., R/2)."""
    if rope is None:
        return x
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest.to(cos.dtype)], dim=-1)


def differential_linear_attention(
    q, k, k_rope, v, log_decay, weight, gamma, rope, scale, eps, state, reset, written, chunk_size,
    in_place=False, attend=linear_attention.decayed_linear_attention,
):  # fmt: skip
    wide = torch.promote_types(v.dtype, torch.float32)
    heads, width = v.shape[2:]
    q, k, k_rope, values = (x.to(wide) for x in (q, k, k_rope, v))
    k = torch.cat([rotate(k_rope, rope).repeat_interleave(heads, dim=2), k], dim=-1)
    q, k = features(rotate(q, rope) * scale), features(k * scale)
    values = F.pad(values, (0, 1), value=1.0)  # sums of 1 are the normalisers
    if written is not None:
        values = values.masked_fill(~written[..., None, None], 0.0)
    streams = (q, k, values.repeat(1, 1, 2, 1), log_decay.repeat(1, 1, 2))
    sums, after = attend(*streams, state, reset, chunk_size)
    weighted, normaliser = sums.split([width, 1], dim=-1)
    # Before the first token that is written it is 0, and so is the sum.
    signal, noise = (weighted / normaliser.masked_fill(normaliser == 0, 1.0)).chunk(2, dim=2)
    difference = signal - weight.to(wide)[:, None] * noise
    out = F.rms_norm(difference, (width,), gamma.to(wide), eps).to(v.dtype)
    return out, state.copy_(after) if in_place else after
