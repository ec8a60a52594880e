"""RMSNorm and rotary embedding of heads in Triton: one kernel, for decoding and prefill."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.rotary import reference

_TILE = 1024  # elements of a program


@triton.jit
def rotate_kernel(
    x, cos, sin, gain, out, n_tokens, n_gained, eps, x_b, x_t, x_h, table_b, table_t,
    N_HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): some heads of token i, (batch, token) in order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    b, t = token // n_tokens, token % n_tokens
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (h < N_HEADS)[:, None] & (d < WIDTH)[None, :]
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    at = x + b * x_b + t * x_t + h[:, None] * x_h
    y = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    angle = b * table_b + t * table_t + tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=d < 2 * HALF, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    rotated = y * c[None, :] + other * tl.where(d < HALF, -s, s)[None, :]
    if NORM:
        rotated /= tl.sqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    if GAIN:
        rotated *= tl.load(gain + h, mask=h < n_gained, other=1.0).to(tl.float32)[:, None]
    place = (token * N_HEADS + h[:, None]) * WIDTH + d[None, :]
    tl.store(out + place, rotated.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("fusedlm::rmsnorm_rope", mutates_args=())
def _rmsnorm_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float | None, gain: torch.Tensor | None
) -> torch.Tensor:
    batch, n_tokens, n_heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, cos, sin = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.expand(cos.shape).contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    block = max(16, triton.next_power_of_2(width))
    heads = max(1, min(_TILE // block, triton.next_power_of_2(n_heads)))
    # Unused arguments are pointers too.
    rotate_kernel[(batch * n_tokens, triton.cdiv(n_heads, heads))](
        x, cos, sin, x if gain is None else gain.contiguous(), out, n_tokens, 0 if gain is None else len(gain),
        0.0 if eps is None else eps, *x.stride()[:3], cos.stride(0) * (len(cos) > 1), cos.stride(1),
        N_HEADS=n_heads, WIDTH=width, HALF=cos.shape[-1], NORM=eps is not None, GAIN=gain is not None,
        HEADS=heads, BLOCK=block, num_warps=4, **pdl_options(x.device),
    )  # fmt: skip
    return out


@_rmsnorm_rope.register_fake
def _(x, cos, sin, eps, gain):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rmsnorm_rope(x, cos, sin, eps, gain) -> torch.Tensor:
    differentiable = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, cos, sin, gain))
    run = reference.rmsnorm_rope if differentiable else _rmsnorm_rope
    return run(x, cos, sin, eps, gain)
