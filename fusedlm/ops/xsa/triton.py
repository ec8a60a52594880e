"""Exclusive self-attention in Triton: one pass forward, one backward.

A row is one value of one token, with the group of heads that share it; a tile is a few rows. Heads are computed one
after the other, so that the value and the sum of its gradient over the group stay in registers. y and v are saved for
backward, which recomputes the component along the value.
"""

import torch
import triton
import triton.language as tl

from fusedlm.ops.xsa.reference import EPS

_TILE = 1024  # elements
_PER_WARP = 256  # elements
_EPS = tl.constexpr(EPS)


@triton.jit
def _rows(n_rows, n_tokens, N_VALUES: tl.constexpr, ROWS: tl.constexpr):
    """Row indices of this program's tile with their batch, token and value, and a mask of the rows that exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // N_VALUES
    b, t, g = (token // n_tokens).to(tl.int64), (token % n_tokens).to(tl.int64), (row % N_VALUES).to(tl.int64)
    return row.to(tl.int64), b, t, g, row < n_rows


@triton.jit
def _load(tensor, at, column, inside):
    return tl.load(tensor + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normalised(own):
    """Rows of length 1, one over what they were divided by, and their former length."""
    length = tl.sqrt(tl.sum(own * own, 1))
    inverse = 1.0 / tl.maximum(length, _EPS)
    return own * inverse[:, None], inverse, length


@triton.jit
def _forward_kernel(
    y, v, out, n_rows, n_tokens, y_b, y_t, y_h, v_b, v_t, v_g,
    N_VALUES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, b, t, g, row_inside = _rows(n_rows, n_tokens, N_VALUES, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row_inside[:, None] & (column < WIDTH)[None, :]
    own, _, _ = _normalised(_load(v, b * v_b + t * v_t + g * v_g, column, inside))
    y_at, out_at = b * y_b + t * y_t + g * GROUP * y_h, row * (GROUP * WIDTH)
    for _ in range(GROUP):
        value = _load(y, y_at, column, inside)
        value -= tl.sum(value * own, 1)[:, None] * own
        tl.store(out + out_at[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=inside)
        y_at += y_h
        out_at += WIDTH


@triton.jit
def _backward_kernel(
    upstream, y, v, dy, dv, n_rows, n_tokens,
    up_b, up_t, up_h, y_b, y_t, y_h, v_b, v_t, v_g, dy_b, dy_t, dy_h, dv_b, dv_t, dv_g,
    N_VALUES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, b, t, g, row_inside = _rows(n_rows, n_tokens, N_VALUES, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row_inside[:, None] & (column < WIDTH)[None, :]
    own, inverse, length = _normalised(_load(v, b * v_b + t * v_t + g * v_g, column, inside))
    up_at = b * up_b + t * up_t + g * GROUP * up_h
    y_at = b * y_b + t * y_t + g * GROUP * y_h
    dy_at = b * dy_b + t * dy_t + g * GROUP * dy_h
    d_own = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    along_own = tl.zeros((ROWS,), dtype=tl.float32)  # component of d_own along the value
    for _ in range(GROUP):
        value = _load(y, y_at, column, inside)
        d_out = _load(upstream, up_at, column, inside)
        along, d_along = tl.sum(value * own, 1), tl.sum(d_out * own, 1)
        d_value = d_out - d_along[:, None] * own
        tl.store(dy + dy_at[:, None] + column[None, :], d_value.to(dy.dtype.element_ty), mask=inside)
        d_own -= d_along[:, None] * value + along[:, None] * d_out
        along_own -= 2.0 * along * d_along
        up_at += up_h
        y_at += y_h
        dy_at += dy_h
    # Of a value below EPS the divisor is constant.
    along_own = tl.where(length >= _EPS, along_own, 0.0)
    d_own = (d_own - along_own[:, None] * own) * inverse[:, None]
    dv_at = b * dv_b + t * dv_t + g * dv_g
    tl.store(dv + dv_at[:, None] + column[None, :], d_own.to(dv.dtype.element_ty), mask=inside)


def _with_contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _launch(y: torch.Tensor, v: torch.Tensor) -> dict:
    block = triton.next_power_of_2(y.shape[3])
    rows = max(1, _TILE // block)
    return {
        "N_VALUES": v.shape[2],
        "GROUP": y.shape[2] // v.shape[2],
        "WIDTH": y.shape[3],
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, rows * block // _PER_WARP),
    }


@torch.library.custom_op("fusedlm::exclude_own_value", mutates_args=())
def _forward(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        y, v = _with_contiguous_heads(y), _with_contiguous_heads(v)
        launch = _launch(y, v)
        n_rows = v.shape[:3].numel()
        _forward_kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
            y, v, out, n_rows, y.shape[1], *y.stride()[:3], *v.stride()[:3], **launch
        )
    return out


@_forward.register_fake
def _(y, v):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@torch.library.custom_op("fusedlm::exclude_own_value_backward", mutates_args=())
def _backward(upstream: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and v, with the order of their dimensions in memory."""
    upstream, y, v = (_with_contiguous_heads(x) for x in (upstream, y, v))
    dy, dv = torch.empty_like(y), torch.empty_like(v)
    if not y.numel():
        return dy, dv.zero_()
    launch = _launch(y, v)
    n_rows = v.shape[:3].numel()
    strides = [stride for x in (upstream, y, v, dy, dv) for stride in x.stride()[:3]]
    _backward_kernel[(triton.cdiv(n_rows, launch["ROWS"]),)](
        upstream, y, v, dy, dv, n_rows, y.shape[1], *strides, **launch
    )
    return dy, dv


@_backward.register_fake
def _(upstream, y, v):
    return tuple(torch.empty_like(_with_contiguous_heads(x)) for x in (y, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, upstream):
    return _backward(upstream, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def exclude_own_value(y, v) -> torch.Tensor:
    return _forward(y, v)
