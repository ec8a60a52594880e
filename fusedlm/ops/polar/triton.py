"""Orthogonalisation on tensor cores: products of which half is computed, and polynomials in their epilogues.

Every product but the last of a segment (`schemes.segments`) is symmetric: X X^T, and polynomials of one Gram matrix,
which commute. The kernel computes the tiles on and below the diagonal and stores each twice, the second time
transposed; its epilogue adds the lower terms of the polynomial. Products with X itself are torch.bmm's.

Gram matrices and their polynomials are float16: their entries are at most of order 10, and its rounding is eight times
finer than that of bfloat16, whose small negative eigenvalues would grow. Gram matrices are stored times GRAM_SCALE, so
that few entries are below the smallest normal number. X is in the dtype that the caller chose.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.common.tiles import split_tile
from fusedlm.ops.polar.reference import row_scale, start_scale
from fusedlm.ops.polar.schemes import scheme_of, segments

ALIGNMENT = 128  # sizes are padded with zeros to multiples of it, which changes no product
GRAM_SCALE = 1024.0  # a power of 4, so that its root is exact
_KEYS = (
    "BLOCK_M", "BLOCK_N", "BLOCK_K", "SUBTILES", "FLATTEN", "num_warps", "num_stages", "programs_per_sm", "rate"
)  # fmt: skip
# rate: of arithmetic in waves of tiles, relative to the other's. On an H100 that of "small" was 0.69 to 0.89 of that of
# "large" at six shapes, the median 0.78, with which each of the six gets the tile that was faster there:
# (64, 1280, 1280), (16, 1280, 5120) and (12, 1024, 1024) large; (12, 768, 3072), (12, 768, 768), (1, 4096, 4096) small.
# Four stages of "large", 256 x 128 tiles, and 128 elements of K at a time in "small" exceed its shared memory.
_CONFIGS = {
    name: dict(zip(_KEYS, values, strict=True))
    for name, values in {
        "large": (128, 256, 64, 2, True, 8, 3, 1, 1.0),
        "small": (128, 128, 64, 2, True, 8, 4, 1, 0.78),
    }.items()
}
_INTERPRETED = dict(zip(_KEYS, (128, 128, 64, 2, False, 4, 1, 1, 1.0), strict=True))


@triton.jit
def _position(index, tiles_per_matrix, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Matrix, row and column of a tile, and whether it is in a square block on the diagonal. The lower triangle is
    numbered row by row in square blocks of the longer side of a tile."""
    SIDE: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    DOWN: tl.constexpr = SIDE // BLOCK_M
    ACROSS: tl.constexpr = SIDE // BLOCK_N
    inside = index % tiles_per_matrix
    block, tile = inside // (DOWN * ACROSS), inside % (DOWN * ACROSS)
    i = ((tl.sqrt(8.0 * block.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > block).to(tl.int32)  # where the root was rounded up
    i += ((i + 1) * (i + 2) // 2 <= block).to(tl.int32)
    j = block - i * (i + 1) // 2
    row, column = i * SIDE + tile % DOWN * BLOCK_M, j * SIDE + tile // DOWN * BLOCK_N
    return index // tiles_per_matrix, row, column, i == j


@triton.jit(do_not_specialize=["n_matrices", "tiles_per_matrix"])
def _symmetric_kernel(
    x, y, addend, out, mirrored, scale, alpha, beta, diagonal, n_matrices, tiles_per_matrix, M, K,
    TRANSPOSED: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_SCALE: tl.constexpr, SQUARED_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = scale (alpha x y^T + beta addend + diagonal I), symmetric, of each matrix.

    x, y are (n_matrices M, K), or if transposed (n_matrices K, M); addend and out (n_matrices M, M), all contiguous and
    through descriptors of tiles, of which `mirrored` has the transposed tile of out; scale (n_matrices,) float32.
    """
    WIDTH: tl.constexpr = BLOCK_N // SUBTILES
    n_tiles = n_matrices * tiles_per_matrix
    epilogue_tile = tl.program_id(0) - tl.num_programs(0)
    for index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=FLATTEN):
        b, row, column, _ = _position(index, tiles_per_matrix, BLOCK_M, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(K // BLOCK_K):
            if TRANSPOSED:
                x_tile = x.load([b * K + k * BLOCK_K, row]).T
                y_tile = y.load([b * K + k * BLOCK_K, column])
            else:
                x_tile = x.load([b * M + row, k * BLOCK_K])
                y_tile = y.load([b * M + column, k * BLOCK_K]).T
            product = tl.dot(x_tile, y_tile, product, input_precision="ieee")
        # The tile's position is computed a second time: carried across the inner loop it would make the epilogue depend
        # on the loads of the next tile.
        epilogue_tile += tl.num_programs(0)
        b, row, column, on_diagonal = _position(epilogue_tile, tiles_per_matrix, BLOCK_M, BLOCK_N)
        # Blocks on the diagonal are computed in full. Their mirrored tiles are stored out of bounds, where TMA drops
        # them, which costs less than a branch.
        mirrored_row = tl.where(on_diagonal, n_matrices * M, b * M + column)
        factor = 1.0
        if HAS_SCALE:
            factor = tl.load(scale + b)
            if SQUARED_SCALE:
                factor = factor * factor
        subtiles = split_tile(product, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            left = column + i * WIDTH
            tile = subtiles[i] * alpha
            if HAS_ADDEND:
                tile += beta * addend.load([b * M + row, left]).to(tl.float32)
                same = (row + tl.arange(0, BLOCK_M))[:, None] == (left + tl.arange(0, WIDTH))[None, :]
                tile += tl.where(same, diagonal, 0.0)
            if HAS_SCALE:
                tile *= factor
            tile = tile.to(out.dtype)
            out.store([b * M + row, left], tile)
            mirrored.store([mirrored_row + i * WIDTH, row], tile.T)


def _config(n_matrices: int, M: int, device: torch.device) -> dict:
    """The tile that takes the least time: waves of tiles, times the arithmetic of a tile, over its rate."""
    if device.type != "cuda":
        return _INTERPRETED
    n_sms = n_multiprocessors(device)

    def cost(config: dict) -> float:
        waves = -(-n_matrices * _tiles_per_matrix(M, config) // (n_sms * config["programs_per_sm"]))
        return waves * config["programs_per_sm"] * config["BLOCK_M"] * config["BLOCK_N"] / config["rate"]

    return min((config for config in _CONFIGS.values() if M % _side(config) == 0), key=cost)


def _side(config: dict) -> int:
    return max(config["BLOCK_M"], config["BLOCK_N"])


def _tiles_per_matrix(M: int, config: dict) -> int:
    side = _side(config)
    blocks = M // side
    return blocks * (blocks + 1) // 2 * (side // config["BLOCK_M"]) * (side // config["BLOCK_N"])


def symmetric_product(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    dtype: torch.dtype,
    transposed: bool = False,
    alpha: float = 1.0,
    addend: torch.Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    scale: torch.Tensor | None = None,
    squared_scale: bool = False,
    config: dict | None = None,
) -> torch.Tensor:
    """scale (alpha x y^T + beta addend + diagonal I) of each matrix, which must be symmetric: the upper triangle is a
    copy of the lower one.

    Args:
        x, y: (B, M, K) of one dtype, or if transposed (B, K, M); contiguous, M and K multiples of ALIGNMENT.
        dtype: of the result (B, M, M).
        addend: (B, M, M); None: neither it nor the diagonal is added.
        scale: (B,) float32; None: 1. squared_scale: its square is meant.
        config: None: as measured.
    """
    B, M, K = (x.shape[0], x.shape[2], x.shape[1]) if transposed else x.shape
    config = dict(config or _config(B, M, x.device))
    tiles_per_matrix = _tiles_per_matrix(M, config)
    config.pop("rate")
    n_programs = min(B * tiles_per_matrix, n_multiprocessors(x.device) * config.pop("programs_per_sm"))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    width = block_n // config["SUBTILES"]
    out = torch.empty(B, M, M, dtype=dtype, device=x.device)
    x_tile, y_tile = (
        ([block_k, block_m], [block_k, block_n]) if transposed else ([block_m, block_k], [block_n, block_k])
    )
    _symmetric_kernel[(n_programs,)](
        _descriptor(x, x_tile), _descriptor(y, y_tile),
        None if addend is None else _descriptor(addend, [block_m, width]),
        _descriptor(out, [block_m, width]), _descriptor(out, [width, block_m]), scale,
        float(alpha), float(beta), float(diagonal), B, tiles_per_matrix, M, K,
        TRANSPOSED=transposed, HAS_ADDEND=addend is not None, HAS_SCALE=scale is not None,
        SQUARED_SCALE=squared_scale, **config,
    )  # fmt: skip
    return out


def _descriptor(stack: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    rows, columns = stack.shape[0] * stack.shape[1], stack.shape[2]
    return TensorDescriptor(stack, [rows, columns], [columns, 1], tile)


def iterate(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    scheme: str,
    *,
    transposed: bool,
    parts: tuple[int, ...] | None = None,
    gram_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The steps of a scheme on scale X.

    Args:
        x: (B, M, N), contiguous, M and N multiples of ALIGNMENT.
        scale: (B,) float32, after which the Frobenius norm is at most 1; None: it is already. bfloat16 x is then
            multiplied by it in the first product; float16 could overflow there.
        transposed: whether the columns are the shorter side, as before padding; where they are equal it is False.
        parts: as `segments` gives them; None: by the shape.
        gram_dtype: None: float16 for 16-bit x, else that of x.

    Returns:
        (B, M, N), the dtype of x.
    """
    settings = scheme_of(scheme)
    steps = list(settings.coefficients)
    n_rows, n_columns = x.shape[:0:-1] if transposed else x.shape[1:]
    narrow = gram_dtype or (torch.float16 if x.dtype.itemsize == 2 else x.dtype)
    preconditioned = settings.preconditioned
    for length in parts or segments(len(steps), n_rows, n_columns):
        gram = symmetric_product(
            x, x, dtype=narrow, transposed=transposed, alpha=GRAM_SCALE, scale=scale, squared_scale=True
        )
        row_factor = None
        if preconditioned:
            row_factor = row_scale(gram) * GRAM_SCALE**0.5
            _scale_both_sides(gram, row_factor)
            if scale is not None:
                row_factor = row_factor * scale[:, None]
            scale, preconditioned = None, False
        total = None
        for left in reversed(range(length)):
            a, b, c = steps.pop(0)
            polynomial = {"alpha": c / GRAM_SCALE**2, "addend": gram, "beta": b / GRAM_SCALE, "diagonal": a}
            last = {"dtype": x.dtype, "scale": scale} if left == 0 else {"dtype": narrow}
            if left == 0 and total is None:
                total = symmetric_product(gram, gram, **polynomial, **last)
                break
            factor = symmetric_product(gram, gram, **polynomial, dtype=narrow)
            total = factor if total is None else symmetric_product(total, factor, **last)
            if left:
                gram = symmetric_product(symmetric_product(factor, gram, dtype=narrow), factor, dtype=narrow)
        if row_factor is not None:  # of X; columns of the smaller matrix that it is multiplied by are cheaper
            total.mul_(row_factor[:, None, :])
        x = torch.bmm(x, total.mT) if transposed else torch.bmm(total, x)
        scale = None
    return x


@triton.jit
def _scale_both_sides_kernel(gram, factor, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """gram_ij <- factor_i gram_ij factor_j, rounded once; gram (B, M, M) contiguous, factor (B, M) float32."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    elements = gram + b * M * M + rows[:, None] * M + columns[None, :]
    both = tl.load(factor + b * M + rows)[:, None] * tl.load(factor + b * M + columns)[None, :]
    tl.store(elements, (tl.load(elements).to(tl.float32) * both).to(gram.dtype.element_ty))


def _scale_both_sides(gram: torch.Tensor, factor: torch.Tensor) -> None:
    B, M, _ = gram.shape
    block_m, block_n = min(32, ALIGNMENT), ALIGNMENT
    _scale_both_sides_kernel[(M // block_n, M // block_m, B)](gram, factor, M, block_m, block_n)


def padded(size: int) -> int:
    """The multiple of ALIGNMENT that a size is padded to."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@torch.library.custom_op("fusedlm::orthogonalize", mutates_args=())
def _orthogonalize(x: torch.Tensor, scheme: str, dtype: torch.dtype) -> torch.Tensor:
    *_, n_rows, n_columns = x.shape
    stack = x.reshape(-1, n_rows, n_columns)
    if not stack.numel():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float32)
    scale = start_scale(norm, scheme_of(scheme))
    shape = len(stack), padded(n_rows), padded(n_columns)
    if dtype == torch.float16 or dtype != x.dtype or shape != stack.shape:
        start = torch.zeros if shape != stack.shape else torch.empty
        normalised = start(shape, dtype=dtype, device=x.device)
        torch.mul(stack, scale[:, None, None], out=normalised[:, :n_rows, :n_columns])
        stack, scale = normalised, None
    with torch.autocast(x.device.type, enabled=False):
        found = iterate(stack.contiguous(), scale, scheme, transposed=n_rows > n_columns)
    if found.shape == (len(found), n_rows, n_columns) and found.dtype == x.dtype:
        return found.view(x.shape)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out.view(len(stack), n_rows, n_columns).copy_(found[:, :n_rows, :n_columns])
    return out


@_orthogonalize.register_fake
def _(x, scheme, dtype):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def orthogonalize(x: torch.Tensor, scheme: str, dtype: torch.dtype) -> torch.Tensor:
    return _orthogonalize(x, scheme, dtype)
