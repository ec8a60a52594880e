"""RMSNorm and projection in Triton: one kernel for one token, two for a few tokens, two variants for many.

One token, as in decoding, is bound by reading the weight once: each program reads some rows of it, computes the norm
itself and scales its sums at the end. A few tokens are normalised by a kernel of their own: to do it in every program
would take longer than one more launch.

For many tokens `packed` normalises x in one pass and calls torch for the matrix product. `triton` multiplies x by
gamma * weight and scales the rows of the product by 1 / rms(x): x is read and not written, and gamma * weight is
rounded instead of the normalised x.

x and the weights are saved for backward. One pass turns the gradient of the normalised x into that of x, in place,
recomputes the normalised x for the gradient of the weight, and sums a partial gradient of gamma per program; a second
kernel reduces these in a fixed order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import n_multiprocessors, pdl_options, supports_pdl
from fusedlm.ops.common.products import cast_weight, matmul
from fusedlm.ops.common.sums import column_sums
from fusedlm.ops.common.tiles import tile_at
from fusedlm.ops.norm_linear.op import unaligned

FEW_TOKENS = 32  # up to this many tokens the matrix product is our own kernel
_TILE = 4096  # elements, of full rows
_PROGRAMS_PER_SM = 8  # of the backward pass; few, since each writes a partial gradient of gamma

# One token: elements of the weight that a program loads at a time, and at most so many columns.
_ONE_TOKEN_TILE, _ONE_TOKEN_COLUMNS = 8192, 2048
# A few tokens: rows of the weight per program, and columns per step.
_FEW_TOKENS = {"BLOCK_E": 64, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4}
_FEW_TOKENS_FLOAT32 = {"BLOCK_E": 32, "BLOCK_D": 64, "STAGES": 2, "num_warps": 4}
_PREFETCHED_LINES = tl.constexpr(8)  # cache lines per row of the weight, prefetched while x is being written


def _tiling(rows: int, columns: int, depth: int, subtiles: int, num_warps: int, num_stages: int) -> dict:
    tile = {"BLOCK_N": rows, "BLOCK_E": columns, "BLOCK_D": depth, "SUBTILES": subtiles}
    return tile | {"num_warps": num_warps, "num_stages": num_stages}


# Tiles of the scaled matmul.
_CONFIGS = {
    "large": _tiling(128, 256, 64, 2, num_warps=8, num_stages=4),
    "small": _tiling(128, 128, 64, 1, num_warps=8, num_stages=4),
    "float32": _tiling(64, 64, 32, 1, num_warps=8, num_stages=2),
}
_GROUP = 8  # tile rows in a group, see tile_at


@triton.jit
def _inverse_rms(squares, eps, WIDTH: tl.constexpr):
    return 1.0 / tl.sqrt(squares / WIDTH + eps)


@triton.jit
def _row_tile(tile, n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column indices of a tile of full rows, and its mask."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    return row, column, (row < n_rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _normalise_kernel(
    x, gamma, out, n_rows, x_row, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PDL: the next kernel may start, and waits for this one itself."""
    if PDL:
        gdc_launch_dependents()
    # Backwards, so that the start, where the matmul begins, is still in the cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, column, inside = _row_tile(tile, n_rows, WIDTH, ROWS, BLOCK)
    z = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    z *= _inverse_rms(tl.sum(z * z, 1), eps, WIDTH)[:, None]
    z *= tl.load(gamma + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * WIDTH + column[None, :], z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_rms_kernel(x, out, n_rows, x_row, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = _row_tile(tl.program_id(0), n_rows, WIDTH, ROWS, BLOCK)
    z = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, _inverse_rms(tl.sum(z * z, 1), eps, WIDTH), mask=row < n_rows)


@triton.jit
def _fold_kernel(gamma, weight, out, n_rows, weight_row, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = _row_tile(tl.program_id(0), n_rows, WIDTH, ROWS, BLOCK)
    w = tl.load(weight + row[:, None] * weight_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w *= tl.load(gamma + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * WIDTH + column[None, :], w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x, gamma, gradient, dx, normed, d_gamma, n_rows, n_tiles, x_row, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient: of the normalised x; dx may share its memory."""
    columns = tl.arange(0, BLOCK)
    g = tl.load(gamma + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        # Backwards: the end, which the matmul before has written last, is still in the cache.
        row, column, inside = _row_tile(n_tiles - 1 - tile, n_rows, WIDTH, ROWS, BLOCK)
        at = row[:, None] * WIDTH + column[None, :]
        z = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        # With eps 0 this would be infinite for rows beyond the last, and the sum NaN.
        inverse = tl.where(row < n_rows, _inverse_rms(tl.sum(z * z, 1), eps, WIDTH), 0.0)[:, None]
        z *= inverse
        tl.store(normed + at, (z * g[None, :]).to(normed.dtype.element_ty), mask=inside)
        total += tl.sum(dz * z, 0)
        dz *= g[None, :]
        dz = (dz - z * (tl.sum(dz * z, 1) / WIDTH)[:, None]) * inverse
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=inside)
    tl.store(d_gamma + tl.program_id(0) * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit
def _one_token_kernel(
    x, gamma, weight, out, n_out, weight_row, eps,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_inside = row < n_out
    row_at = row.to(tl.int64) * weight_row
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < WIDTH
        w = tl.load(
            weight + row_at[:, None] + column[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        z = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        squares += z * z
        total += w * (z * g)[None, :]
    y = tl.sum(total, 1) * _inverse_rms(tl.sum(squares, 0), eps, WIDTH)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row_inside)


@triton.jit
def _few_tokens_kernel(
    x, weight, out, n_tokens, n_out, weight_row,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x weight^T for a few contiguous rows x. The weight is the left operand, which tensor cores take 64 rows of.
    PDL: it may start before x is written, and prefetches the start of the weight meanwhile."""
    token = tl.arange(0, BLOCK_N)
    row = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token_inside, row_inside = token < n_tokens, row < n_out
    token_at, row_at = token * WIDTH, row.to(tl.int64) * weight_row
    if PDL:
        # A cache line is 1024 bits.
        line = tl.arange(0, _PREFETCHED_LINES) * (1024 // weight.dtype.element_ty.primitive_bitwidth)
        first = weight + tl.minimum(row, n_out - 1).to(tl.int64)[:, None] * weight_row
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [first + tl.minimum(line, WIDTH - 1)[None, :]],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    y = tl.zeros((BLOCK_E, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_D, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_D)
        column_inside = column < WIDTH
        w = tl.load(
            weight + row_at[:, None] + column[None, :], mask=row_inside[:, None] & column_inside[None, :], other=0.0
        )
        z = tl.load(
            x + token_at[None, :] + column[:, None], mask=token_inside[None, :] & column_inside[:, None], other=0.0
        )
        y = tl.dot(w.to(z.dtype), z, y, input_precision="ieee")
    at = token.to(tl.int64)[None, :] * n_out + row[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=token_inside[None, :] & row_inside[:, None])


@triton.jit
def _scaled_matmul_kernel(
    x, weight, out, inverse_rms, n_rows, n_out,
    WIDTH: tl.constexpr, N_PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """x, weight and out: tensor descriptors, which read zeros and write nothing out of bounds."""
    n_row_tiles, n_column_tiles = tl.cdiv(n_rows, BLOCK_N), tl.cdiv(n_out, BLOCK_E)
    n_tiles = n_row_tiles * n_column_tiles
    # Counted separately from the loop, so that the store of a tile overlaps with the loads of the next.
    epilogue_tile = tl.program_id(0) - N_PROGRAMS
    for tile in tl.range(tl.program_id(0), n_tiles, N_PROGRAMS, flatten=True):
        tile_row, tile_column = tile_at(tile, n_row_tiles, n_column_tiles, GROUP)
        total = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
        for step in range(tl.cdiv(WIDTH, BLOCK_D)):
            a = x.load([tile_row * BLOCK_N, step * BLOCK_D])
            b = weight.load([tile_column * BLOCK_E, step * BLOCK_D])
            total = tl.dot(a, b.T, total, input_precision="ieee")
        epilogue_tile += N_PROGRAMS
        tile_row, tile_column = tile_at(epilogue_tile, n_row_tiles, n_column_tiles, GROUP)
        row = tile_row * BLOCK_N + tl.arange(0, BLOCK_N)
        inverse = tl.load(inverse_rms + row, mask=row < n_rows, other=0.0)
        total *= inverse[:, None]
        if SUBTILES == 2:  # stored in halves, which need half of the shared memory
            halves = tl.permute(tl.reshape(total, (BLOCK_N, 2, BLOCK_E // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([tile_row * BLOCK_N, tile_column * BLOCK_E], left.to(out.dtype))
            out.store([tile_row * BLOCK_N, tile_column * BLOCK_E + BLOCK_E // 2], right.to(out.dtype))
        else:
            out.store([tile_row * BLOCK_N, tile_column * BLOCK_E], total.to(out.dtype))


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """(N, D) with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tma_aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless the tensor memory accelerator can load it: base and row stride are multiples of 16 bytes."""
    step = x.stride(0)
    fits = step >= x.shape[1] and step * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _row_launch(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": min(max(block // 512, 4), 16),
    }


def normalise(x: torch.Tensor, gamma: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x (N, D) normalised, times gamma, in dtype."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch = _row_launch(x.shape[1]) | {"PDL": supports_pdl(x.device)}
    if len(x) <= FEW_TOKENS:  # most multiprocessors would be idle: more programs and threads
        launch |= {"ROWS": 1, "num_warps": max(launch["num_warps"], 8)}
    grid = (triton.cdiv(len(x), launch["ROWS"]),)
    _normalise_kernel[grid](x, gamma.contiguous(), out, len(x), x.stride(0), eps, **launch)
    return out


def one_token(x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm and projection of x (1, D)."""
    width, n_out = x.shape[1], len(weight)
    block = min(max(16, triton.next_power_of_2(width)), _ONE_TOKEN_COLUMNS)
    block_e = min(64, _ONE_TOKEN_TILE // block)
    out, weight = torch.empty(1, n_out, dtype=x.dtype, device=x.device), _as_rows(weight)
    _one_token_kernel[(triton.cdiv(n_out, block_e),)](
        x, gamma.contiguous(), weight, out, n_out, weight.stride(0), eps, WIDTH=width, BLOCK_E=block_e, BLOCK_D=block,
        num_warps=4,
    )  # fmt: skip
    return out


def few_tokens_matmul(x: torch.Tensor, weight: torch.Tensor, config: dict | None = None) -> torch.Tensor:
    """x weight^T for contiguous x (N, D), N at most FEW_TOKENS. config: as _FEW_TOKENS."""
    (n, width), n_out = x.shape, len(weight)
    config = dict(config or (_FEW_TOKENS_FLOAT32 if x.dtype == torch.float32 else _FEW_TOKENS))
    config["BLOCK_D"] = min(config["BLOCK_D"], max(16, triton.next_power_of_2(width)))
    out, weight = torch.empty(n, n_out, dtype=x.dtype, device=x.device), _as_rows(weight)
    _few_tokens_kernel[(triton.cdiv(n_out, config["BLOCK_E"]),)](
        x, weight, out, n, n_out, weight.stride(0), WIDTH=width, BLOCK_N=max(16, triton.next_power_of_2(n)),
        **config, **pdl_options(x.device),
    )  # fmt: skip
    return out


def scaled_matmul(x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float, config=None) -> torch.Tensor:
    """(x (gamma * weight)^T) / rms(x) for x (N, D). config: one of _CONFIGS.

    Raises:
        ValueError: the tensor memory accelerator cannot load rows of this length.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (n, width), n_out = x.shape, len(weight)
    if reason := unaligned(x.dtype, width, n_out):
        raise ValueError(f"op rmsnorm_linear: backend 'triton' cannot run: {reason}; use 'packed'")
    config = dict(config or _CONFIGS[_config_name(x.dtype, n_out)])
    launch, weight = _row_launch(width), _as_rows(weight)
    folded = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(n_out, launch["ROWS"]),)
    _fold_kernel[grid](gamma.contiguous(), weight, folded, n_out, weight.stride(0), **launch)
    inverse_rms = torch.empty(n, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, launch["ROWS"]),)
    _inverse_rms_kernel[grid](x, inverse_rms, n, x.stride(0), eps, **launch)
    out = torch.empty(n, n_out, dtype=x.dtype, device=x.device)
    block_n, block_e, block_d = (config[name] for name in ("BLOCK_N", "BLOCK_E", "BLOCK_D"))
    n_programs = min(triton.cdiv(n, block_n) * triton.cdiv(n_out, block_e), n_multiprocessors(x.device))
    _scaled_matmul_kernel[(n_programs,)](
        TensorDescriptor.from_tensor(_tma_aligned(x), [block_n, block_d]),
        TensorDescriptor.from_tensor(folded, [block_e, block_d]),
        TensorDescriptor.from_tensor(out, [block_n, block_e // config["SUBTILES"]]),
        inverse_rms, n, n_out,
        WIDTH=width, N_PROGRAMS=n_programs, GROUP=_GROUP, **config,
    )  # fmt: skip
    return out


def _config_name(dtype: torch.dtype, n_out: int) -> str:
    """Key of _CONFIGS: large tiles unless they would exceed the columns."""
    if dtype == torch.float32:
        return "float32"
    return "large" if n_out % 256 == 0 or n_out > 2048 else "small"


@torch.library.custom_op("fusedlm::rmsnorm_linear", mutates_args=())
def _forward(
    x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype, variant: str
) -> torch.Tensor:
    rows, shape = _as_rows(x), (*x.shape[:-1], len(weight))
    if not len(rows) or not len(weight):
        return torch.empty(shape, dtype=dtype, device=x.device)
    if len(rows) == 1:
        y = one_token(rows.to(dtype), gamma, weight, eps)
    elif len(rows) <= FEW_TOKENS:
        y = few_tokens_matmul(normalise(rows, gamma, eps, dtype), weight)
    elif variant == "packed":
        normed = normalise(rows, gamma, eps, dtype)
        y = matmul(normed, cast_weight(weight, normed).t(), dtype)
    else:
        y = scaled_matmul(rows.to(dtype), gamma, weight, eps)
    return y.view(shape)


@_forward.register_fake
def _(x, gamma, weight, eps, dtype, variant):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)


@torch.library.custom_op("fusedlm::rmsnorm_linear_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gamma and the weight, each in its own dtype."""
    rows = _as_rows(x)
    n, width = rows.shape
    upstream = upstream.reshape(n, len(weight))
    gradient = matmul(upstream, cast_weight(weight, upstream), upstream.dtype)
    dx = gradient if x.dtype == gradient.dtype else torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(gradient)
    launch = _row_launch(width)
    n_tiles = triton.cdiv(n, launch["ROWS"])
    n_programs = min(n_tiles, _PROGRAMS_PER_SM * n_multiprocessors(x.device))
    d_gamma = torch.empty(n_programs, width, dtype=torch.float32, device=x.device)
    if n:
        _backward_kernel[(n_programs,)](
            rows, gamma.contiguous(), gradient, dx, normed, d_gamma, n, n_tiles, rows.stride(0), eps, **launch
        )
    return dx.view(x.shape), column_sums(d_gamma, gamma.dtype), matmul(upstream.t(), normed, weight.dtype)


@_backward.register_fake
def _(upstream, x, gamma, weight, eps):
    d_gamma = torch.empty(gamma.shape, dtype=gamma.dtype, device=x.device)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), d_gamma, d_weight


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, upstream):
    x, gamma, weight = ctx.saved_tensors
    return *_backward(upstream, x, gamma, weight, ctx.eps), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def packed_rmsnorm_linear(x, gamma, weight, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _forward(x, gamma, weight, eps, dtype or x.dtype, "packed")


def rmsnorm_linear(x, gamma, weight, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _forward(x, gamma, weight, eps, dtype or x.dtype, "triton")
