"""RMSNorm and rotary embedding of heads in Triton: one kernel, for decoding and prefill; and one for a token of each
row of a static state, which also writes keys and values into their caches."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.rotary import reference

_TILE = 1024  # elements of a program
_MOST_HEADS = 4  # of a program that appends: with few rows there are few programs


@triton.jit
def _rotated(
    x, x_h, cos, sin, h, n_heads, eps, WIDTH: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Heads h of a token (HEADS, BLOCK), whose table begins at cos and sin, with norm and rotary embedding."""
    d = tl.arange(0, BLOCK)
    inside = (h < n_heads)[:, None] & (d < WIDTH)[None, :]
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    at = x + h[:, None] * x_h
    y = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    angle = tl.where(d < HALF, d, d - HALF)
    c = tl.load(cos + angle, mask=d < 2 * HALF, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    rotated = y * c[None, :] + other * tl.where(d < HALF, -s, s)[None, :]
    if NORM:
        rotated /= tl.sqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    return rotated, inside


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
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    table = b * table_b + t * table_t
    rotated, inside = _rotated(
        x + b * x_b + t * x_t, x_h, cos + table, sin + table, h, N_HEADS, eps, WIDTH, HALF, NORM, BLOCK
    )
    if GAIN:
        rotated *= tl.load(gain + h, mask=h < n_gained, other=1.0).to(tl.float32)[:, None]
    place = (token * N_HEADS + h[:, None]) * WIDTH + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def append_kernel(
    q, k, v, cos, sin, gain, v_gain, starts, out, keys, values, n_places, n_gained, eps, v_eps,
    q_b, q_h, k_b, k_h, v_b, table_b, keys_b, keys_s, keys_h, values_b, values_s,
    N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
    NORM: tl.constexpr, GAIN: tl.constexpr, V_NORM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b, j) has some query heads of row b, some key heads, or columns of its value."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    Q_PARTS: tl.constexpr = (N_HEADS + HEADS - 1) // HEADS
    K_PARTS: tl.constexpr = (N_GROUPS + HEADS - 1) // HEADS
    cos += b * table_b
    sin += b * table_b
    d = tl.arange(0, BLOCK)
    if part < Q_PARTS:
        h = part * HEADS + tl.arange(0, HEADS)
        rotated, inside = _rotated(q + b * q_b, q_h, cos, sin, h, N_HEADS, eps, WIDTH, HALF, NORM, BLOCK)
        if GAIN:
            rotated *= tl.load(gain + h, mask=h < n_gained, other=1.0).to(tl.float32)[:, None]
        place = (b * N_HEADS + h[:, None]) * WIDTH + d[None, :]
        tl.store(out + place, rotated.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(starts + b).to(tl.int64) % n_places
        if part < Q_PARTS + K_PARTS:
            h = (part - Q_PARTS) * HEADS + tl.arange(0, HEADS)
            rotated, inside = _rotated(k + b * k_b, k_h, cos, sin, h, N_GROUPS, eps, WIDTH, HALF, NORM, BLOCK)
            at = keys + b * keys_b + slot * keys_s + h[:, None] * keys_h + d[None, :]
            tl.store(at, rotated.to(keys.dtype.element_ty), mask=inside)
        else:
            e = (part - Q_PARTS - K_PARTS) * COLUMNS + tl.arange(0, COLUMNS)
            y = tl.load(v + b * v_b + e, mask=e < VALUE, other=0.0).to(tl.float32)
            if V_NORM:
                y /= tl.sqrt(tl.sum(y * y, 0) / VALUE + v_eps)
                y *= tl.load(v_gain + e, mask=e < VALUE, other=0.0).to(tl.float32)
            tl.store(values + b * values_b + slot * values_s + e, y.to(values.dtype.element_ty), mask=e < VALUE)


def _table(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With rows in one piece and the same strides."""
    cos, sin = (y if y.stride(-1) == 1 else y.contiguous() for y in (cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.expand(cos.shape).contiguous()
    return cos if sin.stride() == cos.stride() else cos.contiguous(), sin


def _blocks(width: int, n_heads: int) -> tuple[int, int]:
    """Heads and columns of a program."""
    block = max(16, triton.next_power_of_2(width))
    return max(1, min(_TILE // block, triton.next_power_of_2(n_heads))), block


@torch.library.custom_op("fusedlm::rmsnorm_rope", mutates_args=())
def _rmsnorm_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float | None, gain: torch.Tensor | None
) -> torch.Tensor:
    batch, n_tokens, n_heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = _table(cos, sin)
    heads, block = _blocks(width, n_heads)
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


@torch.library.custom_op("fusedlm::rope_append", mutates_args=("keys", "values"))
def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float | None,
    gain: torch.Tensor | None,
    v_gain: torch.Tensor | None,
    v_eps: float,
) -> torch.Tensor:
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError(f"keys and values have strides {keys.stride()} and {values.stride()}; the last must be 1")
    (batch, _, n_heads, width), n_groups, value = q.shape, k.shape[2], v.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = _table(cos, sin)
    heads, block = _blocks(width, min(n_heads, _MOST_HEADS))
    columns = max(16, triton.next_power_of_2(value))
    if v_gain is None:
        columns = min(columns, _TILE)
    n_parts = triton.cdiv(n_heads, heads) + triton.cdiv(n_groups, heads) + triton.cdiv(value, columns)
    # Unused arguments are pointers too.
    append_kernel[(batch, n_parts)](
        q, k, v, cos, sin, q if gain is None else gain.contiguous(), q if v_gain is None else v_gain.contiguous(),
        starts, out, keys, values, keys.shape[1], 0 if gain is None else len(gain), 0.0 if eps is None else eps, v_eps,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), cos.stride(0) * (len(cos) > 1),
        *keys.stride()[:3], *values.stride()[:2],
        N_HEADS=n_heads, N_GROUPS=n_groups, WIDTH=width, HALF=cos.shape[-1], VALUE=value,
        NORM=eps is not None, GAIN=gain is not None, V_NORM=v_gain is not None,
        HEADS=heads, BLOCK=block, COLUMNS=columns, num_warps=4, **pdl_options(q.device),
    )  # fmt: skip
    return out


@rope_append.register_fake
def _(q, k, v, keys, values, starts, cos, sin, eps, gain, v_gain, v_eps):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
