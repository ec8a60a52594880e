"""The projection of one token in Triton: one kernel, bound by reading the weight once.

Each program reads some rows of the weight, prepares the token itself and adds the residual to its sums. It starts
before the previous kernel has ended (PDL), and loads the first part of its rows meanwhile: these do not depend on it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.one_token import reference

COLUMNS = 2048  # of the weight that a program loads at a time, at most
_ACTIVATIONS = {None: 0, "relu2": 1, "swiglu": 2}


@triton.jit
def _prepare(x, gain, column, inside, slope, WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr):
    """A part of the token, and its squares before the gain."""
    z = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    squares = z * z
    if NORM:
        z *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        z = tl.where(z < 0, z * slope, z)
        z *= z
    if ACTIVATION == 2:
        z *= tl.sigmoid(z) * tl.load(x + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    return z, squares


@triton.jit
def token_kernel(
    x, gain, weight, residual, out, n_out, weight_row, eps, slope,
    WIDTH: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_out
    rows = weight + row.to(tl.int64)[:, None] * weight_row
    column = tl.arange(0, COLUMNS)
    w = tl.load(rows + column[None, :], mask=row_inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    z, squares = _prepare(x, gain, column, column < WIDTH, slope, WIDTH, NORM, ACTIVATION)
    total = w.to(tl.float32) * z[None, :]
    for start in tl.static_range(COLUMNS, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < WIDTH
        w = tl.load(rows + column[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        z, more = _prepare(x, gain, column, inside, slope, WIDTH, NORM, ACTIVATION)
        squares += more
        total += w.to(tl.float32) * z[None, :]
    y = tl.sum(total, 1)
    if NORM:
        y /= tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
    if RESIDUAL:
        y += tl.load(residual + row, mask=row_inside, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row_inside)


def config_of(width: int) -> dict:
    """By the columns of the weight; measured on an H100. Where one block has them all, a program has several rows and
    loads all of them before it waits for the previous kernel."""
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    rows = 4 if width <= columns else 1
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 8 if rows * columns > 4096 else 4}


def run(x, weight, gain, eps, activation, slope, residual, dtype, config: dict | None = None) -> torch.Tensor:
    """Launch the kernel. config: instead of that of `config_of`."""
    n_out, width = weight.shape
    out = torch.empty(*x.shape[:-1], n_out, dtype=dtype, device=x.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = config or config_of(width)
    # Unused arguments are pointers too.
    token_kernel[(triton.cdiv(n_out, config["ROWS"]),)](
        x.contiguous(), x if gain is None else gain.contiguous(), weight,
        x if residual is None else residual.contiguous(), out, n_out, weight.stride(0), eps, slope,
        WIDTH=width, NORM=gain is not None, ACTIVATION=_ACTIVATIONS[activation], RESIDUAL=residual is not None,
        **config, **pdl_options(x.device),
    )  # fmt: skip
    return out


@torch.library.custom_op("fusedlm::token_linear", mutates_args=())
def _token_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return run(x, weight, gain, eps, activation, slope, residual, dtype)


@_token_linear.register_fake
def _(x, weight, gain, eps, activation, slope, residual, dtype):
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype, device=x.device)


def token_linear(x, weight, gain, eps, activation, slope, residual, dtype) -> torch.Tensor:
    tensors = (x, weight, gain, residual)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    is_one = x.numel() == x.shape[-1] and weight.numel() > 0
    run_of = _token_linear if is_one and not differentiable else reference.token_linear
    return run_of(x, weight, gain, eps, activation, slope, residual, dtype)
