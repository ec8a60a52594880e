"""Squared leaky ReLU feed-forward in Triton: the two matrix products whose output is the hidden layer.

With z = x w_up^T and a = leaky_relu(z) the first kernel computes h = a^2 from the float32 accumulator and, in training
with a slope, one bit per element: whether z is negative. h and the bits are all that is saved for backward of the
hidden layer, and enough: 2 a leaky_relu'(z) is 2 sqrt(h), times -|slope| where z is negative, with half the relative
rounding error of h. The second kernel, of the backward pass, multiplies dh = dy w_down by it in the accumulator. The
other products have nothing to fuse and are torch.mm's.

Tiles are loaded and stored by the tensor memory accelerator (TMA), or through pointers where rows or bases are not
aligned to 16 bytes or the device has no TMA.
"""

import torch
import triton
import triton.language as tl

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.common.products import cast_weight, matmul
from fusedlm.ops.common.tiles import can_use_tma, descriptor, load_tile, split_tile, tile_at, tile_offsets

_KEYS = (
    "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "SUBTILES", "FLATTEN", "num_warps", "num_stages", "programs_per_sm"
)  # fmt: skip
_CONFIGS = {  # BLOCK_N / SUBTILES is a multiple of 64, since the signs of 64 columns are packed together
    name: dict(zip(_KEYS, values, strict=True))
    for name, values in {
        "up": (128, 256, 64, 8, 4, True, 8, 4, 1),
        "down_backward": (128, 256, 64, 8, 4, True, 8, 3, 1),
        "down_backward_shallow": (128, 128, 32, 8, 2, True, 4, 4, 2),
        "few_rows": (64, 64, 128, 8, 1, True, 4, 4, 1),
        "pointers": (64, 128, 32, 8, 2, False, 4, 3, 2),
        "float32": (32, 64, 32, 8, 1, False, 4, 2, 2),
    }.items()
}


def _config(M: int, N: int, K: int, which: str) -> dict:
    """Tiles and launch of the 16-bit product (M, K) × (K, N) in the kernel `up` or `down_backward`."""
    if M <= 64:
        return _CONFIGS["few_rows"]
    # With little arithmetic per byte two programs per multiprocessor hide each other's epilogues, which saves more than
    # the larger tile.
    return _CONFIGS["down_backward_shallow" if which == "down_backward" and K <= 1024 else which]


@triton.jit
def _store(target, tile, row, column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        target.store([row, column], tile.to(target.dtype))
    else:
        offsets, inside = tile_offsets(row, column, n_rows, n_columns, ROWS, COLUMNS)
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _pack(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS // 8) bytes: bit b of byte 8 i + j is that of column 64 i + 8 b + j. In the layout of an
    accumulator one thread has all columns of a byte."""
    bits = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 64, 8, 8))
    return tl.reshape(tl.sum(bits << tl.arange(0, 8)[None, None, :, None], 2), (ROWS, COLUMNS // 8)).to(tl.uint8)


@triton.jit
def _unpack(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    packed = tl.reshape(packed.to(tl.int32), (ROWS, COLUMNS // 64, 1, 8))
    return tl.reshape((packed >> tl.arange(0, 8)[None, None, :, None]) & 1, (ROWS, COLUMNS)) != 0


@triton.jit
def _activate(
    z, h, signs, slope, row, column, M, N,
    LEAKY: tl.constexpr, SAVE_SIGNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    a = tl.where(z < 0, z * slope if LEAKY else 0.0, z)
    _store(h, a * a, row, column, M, N, ROWS, COLUMNS, TMA)
    if SAVE_SIGNS:
        offsets, inside = tile_offsets(row, column // 8, M, tl.cdiv(N, 64) * 8, ROWS, COLUMNS // 8)
        tl.store(signs + offsets, _pack(z < 0, ROWS, COLUMNS), mask=inside)


@triton.jit
def _up_kernel(
    x, w, h, signs, slope, M, N, K,
    LEAKY: tl.constexpr, SAVE_SIGNS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """h (M, N) and signs (M, N up to a multiple of 64 / 8) of z = x w^T, x (M, K), w (N, K)."""
    n_tiles_m, n_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    epilogue_tile = tl.program_id(0) - tl.num_programs(0)
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    for index in tl.range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_at(index, n_tiles_m, n_tiles_n, GROUP_M)
        z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            x_tile = load_tile(x, m * BLOCK_M, k * BLOCK_K, M, K, BLOCK_M, BLOCK_K, TMA)
            w_tile = load_tile(w, n * BLOCK_N, k * BLOCK_K, N, K, BLOCK_N, BLOCK_K, TMA)
            z = tl.dot(x_tile, w_tile.T, z, input_precision="ieee")
        # The tile's position is computed a second time: carried across the inner loop it would make the epilogue depend
        # on the loads of the next tile.
        epilogue_tile += tl.num_programs(0)
        m, n = tile_at(epilogue_tile, n_tiles_m, n_tiles_n, GROUP_M)
        subtiles = split_tile(z, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            column = n * BLOCK_N + i * WIDTH
            _activate(subtiles[i], h, signs, slope, m * BLOCK_M, column, M, N, LEAKY, SAVE_SIGNS, BLOCK_M, WIDTH, TMA)


@triton.jit
def _scale_negative(dh, signs, negative_factor, row, column, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dh, times negative_factor where z was negative. Of the full accumulator, not its subtiles: the packed signs are
    then converted to its layout, and not the accumulator to theirs."""
    offsets, inside = tile_offsets(row, column // 8, M, tl.cdiv(N, 64) * 8, ROWS, COLUMNS // 8)
    is_negative = _unpack(tl.load(signs + offsets, mask=inside, other=0), ROWS, COLUMNS)
    return tl.where(is_negative, dh * negative_factor, dh)


@triton.jit
def _down_backward_kernel(
    dy, w, h, dz, signs, negative_factor, M, N, K,
    LEAKY: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """dz (M, N) from dh = dy w, dy (M, K), w (K, N), and what was saved: h (M, N) and, with a slope, the signs."""
    n_tiles_m, n_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    epilogue_tile = tl.program_id(0) - tl.num_programs(0)
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    for index in tl.range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_at(index, n_tiles_m, n_tiles_n, GROUP_M)
        dh = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            dy_tile = load_tile(dy, m * BLOCK_M, k * BLOCK_K, M, K, BLOCK_M, BLOCK_K, TMA)
            w_tile = load_tile(w, k * BLOCK_K, n * BLOCK_N, K, N, BLOCK_K, BLOCK_N, TMA)
            dh = tl.dot(dy_tile, w_tile, dh, input_precision="ieee")
        epilogue_tile += tl.num_programs(0)
        m, n = tile_at(epilogue_tile, n_tiles_m, n_tiles_n, GROUP_M)
        row = m * BLOCK_M
        if LEAKY:
            dh = _scale_negative(dh, signs, negative_factor, row, n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
        subtiles = split_tile(dh, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            column = n * BLOCK_N + i * WIDTH
            root = tl.sqrt(load_tile(h, row, column, M, N, BLOCK_M, WIDTH, TMA).to(tl.float32))
            _store(dz, subtiles[i] * (2.0 * root), row, column, M, N, BLOCK_M, WIDTH, TMA)


def _launch(
    which: str, first, second, hidden: list, signs, factor: float, config: dict | None = None, **constants
) -> None:
    """Launch a kernel on contiguous matrices, none of them empty.

    Args:
        which: `up` or `down_backward`.
        first, second: (M, K), and (N, K) for `up` or (K, N) for `down_backward`.
        hidden: the kernel's (M, N) matrices: h, and for `down_backward` dz.
        signs: as `_empty_signs` allocates them.
        factor: the slope for `up`; for `down_backward` the factor of the gradient where z is negative.
        config: instead of that of `_config`.
    """
    (M, K), N = first.shape, hidden[0].shape[1]
    use_tma = can_use_tma(first, second, *hidden)
    if config is None:
        if first.dtype == torch.float32:
            config = _CONFIGS["float32"]
        else:
            config = _config(M, N, K, which) if use_tma else _CONFIGS["pointers"]
    config = dict(config)
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    n_tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    n_programs = min(n_tiles, config.pop("programs_per_sm") * n_multiprocessors(first.device))
    if use_tma:
        first = descriptor(first, block_m, block_k)
        second = descriptor(second, *((block_n, block_k) if which == "up" else (block_k, block_n)))
        hidden = [descriptor(matrix, block_m, block_n // config["SUBTILES"]) for matrix in hidden]
    kernel = _up_kernel if which == "up" else _down_backward_kernel
    kernel[(n_programs,)](first, second, *hidden, signs, factor, M, N, K, TMA=use_tma, **constants, **config)


def _empty_signs(like: torch.Tensor, n_rows: int, n_columns: int, slope: float) -> torch.Tensor:
    """Memory for one bit per element; without a slope for none."""
    return like.new_empty(n_rows if slope else 0, (n_columns + 63) // 64 * 8, dtype=torch.uint8)


def _hidden_layer(x: torch.Tensor, w_up: torch.Tensor, slope: float, signs: torch.Tensor | None) -> torch.Tensor:
    h = torch.empty(len(x), len(w_up), dtype=x.dtype, device=x.device)
    if not x.numel() or not h.numel():
        if signs is not None:
            signs.zero_()
        return h.zero_()
    save_signs = signs is not None and slope != 0
    _launch("up", x, w_up, [h], signs if save_signs else h, slope, LEAKY=slope != 0, SAVE_SIGNS=save_signs)
    return h


@torch.library.custom_op("fusedlm::relu2_mlp", mutates_args=())
def _forward(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and what is saved for backward: h and, with a slope, the signs of z."""
    signs = _empty_signs(x, len(x), len(w_up), slope)
    h = _hidden_layer(x.contiguous(), cast_weight(w_up, x), slope, signs)
    return matmul(h, cast_weight(w_down, x).t(), x.dtype), h, signs


@_forward.register_fake
def _(x, w_up, w_down, slope):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, x.new_empty(x.shape[0], w_up.shape[0]), _empty_signs(x, x.shape[0], w_up.shape[0], slope)


@torch.library.custom_op("fusedlm::relu2_mlp_inference", mutates_args=())
def _inference(x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, slope: float) -> torch.Tensor:
    h = _hidden_layer(x.contiguous(), cast_weight(w_up, x), slope, None)
    return matmul(h, cast_weight(w_down, x).t(), x.dtype)


@_inference.register_fake
def _(x, w_up, w_down, slope):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fusedlm::relu2_mlp_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    h: torch.Tensor,
    signs: torch.Tensor,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and the weights, each in its own dtype."""
    dy, x, h, signs = dy.contiguous(), x.contiguous(), h.contiguous(), signs.contiguous()
    dz = torch.empty_like(h)
    if dy.numel() and h.numel():
        leaky = slope != 0
        _launch(
            "down_backward", dy, cast_weight(w_down, x), [h, dz], signs if leaky else h, -abs(slope), LEAKY=leaky
        )  # fmt: skip
    dw_down = matmul(dy.t(), h, w_down.dtype)
    return matmul(dz, cast_weight(w_up, x), x.dtype), matmul(dz.t(), x, w_up.dtype), dw_down


@_backward.register_fake
def _(dy, x, w_up, w_down, h, signs, slope):
    return tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (x, w_up, w_down))


def _setup_context(ctx, inputs, output):
    x, w_up, w_down, ctx.slope = inputs
    _, h, signs = output
    ctx.mark_non_differentiable(h, signs)
    ctx.set_materialize_grads(False)  # which would fill a matrix of zeros for each
    ctx.save_for_backward(x, w_up, w_down, h, signs)


def _gradients(ctx, dy, *_):
    return *_backward(dy, *ctx.saved_tensors, ctx.slope), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def relu2_mlp(x, w_up, w_down, slope: float) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or w_up.requires_grad or w_down.requires_grad):
        return _forward(x, w_up, w_down, slope)[0]
    return _inference(x, w_up, w_down, slope)
