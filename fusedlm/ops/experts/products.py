"""Launches of the grouped products: tiles for a dtype and a size, TMA where it can be used, and torch's product."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
import triton

from fusedlm.ops.common.device import n_multiprocessors
from fusedlm.ops.common.tiles import can_use_tma, descriptor
from fusedlm.ops.experts import kernels
from fusedlm.ops.experts.order_kernels import TileSchedule


@dataclass(frozen=True)
class Tiles:
    """Tiles and launch of one kernel. Where the epilogue has subtiles it takes one at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    SUBTILES: int
    FLATTEN: bool
    num_warps: int
    num_stages: int
    per_processor: int  # programs


_TILES = {
    "up": Tiles(128, 256, 64, 8, 4, True, 8, 4, 1),
    "down": Tiles(128, 256, 64, 8, 4, True, 8, 4, 1),
    "down_backward": Tiles(128, 256, 64, 8, 4, True, 8, 4, 1),
    "up_backward": Tiles(128, 256, 64, 8, 4, True, 8, 4, 1),
    "down_gradient": Tiles(128, 128, 64, 8, 2, False, 4, 3, 2),
    "up_gradient": Tiles(256, 128, 64, 8, 2, False, 8, 3, 1),
}
_POINTERS = Tiles(128, 128, 32, 8, 2, False, 8, 3, 2)  # without TMA or on small multiprocessors
_FEW_ROWS = Tiles(64, 128, 64, 8, 2, False, 4, 3, 2)  # of each expert, on average
_FLOAT32 = Tiles(32, 64, 32, 8, 2, False, 4, 2, 2)
# Products for which F.grouped_mm is used where it can run: those that it is faster for. Their gathered rows are in
# memory until the product is done, and take as much of it as the output of up_backward, which follows.
_LIBRARY = frozenset({"down_gradient", "up_gradient"})


class Products:
    """The grouped products of one call.

    Args:
        x: (N, D), whose dtype and device are those of all operands.
        n_slots: N k.
        n_experts: E.
        hidden: H.
    """

    def __init__(self, x: torch.Tensor, n_slots: int, n_experts: int, hidden: int):
        self.n_slots, self.n_experts, self.hidden, self.dim = n_slots, n_experts, hidden, x.shape[1]
        self.few_rows = n_slots <= 64 * n_experts
        self.float32 = x.dtype == torch.float32
        self.block_m = self.tiles("up", False).BLOCK_M

    def tiles(self, which: str, use_tma: bool) -> Tiles:
        """All kernels of a call that share a schedule have the same BLOCK_M."""
        if self.float32:
            return _FLOAT32
        if self.few_rows and not which.endswith("gradient"):
            return _FEW_ROWS
        return _TILES[which] if use_tma else _POINTERS

    def up(self, x, w, schedule: TileSchedule, top_k: int, swiglu: bool, slope: float, save: bool):
        """a (rows, H) and, with save, the pre-activation h."""
        a = _empty(x, self.n_slots, self.hidden)
        h = _empty(x, self.n_slots, w.shape[1]) if save else a
        parts, use_tma = 2 if swiglu else 1, can_use_tma(w)
        tiles = self.tiles("up", use_tma)
        columns = tiles.BLOCK_N // parts
        matrix = w.view(-1, self.hidden, self.dim)
        if use_tma:
            matrix = descriptor(matrix, parts, columns, tiles.BLOCK_K)
        kernels.up_kernel[self._grid(tiles, columns, self.hidden, x.device)](
            x, matrix, schedule.slots, *_tables(schedule), h, a, slope, top_k, self.n_experts, self.hidden,
            self.dim, SWIGLU=swiglu, SAVE=save, TMA=use_tma, MASK_K=self.dim % tiles.BLOCK_K != 0,
            **_options(tiles),
        )  # fmt: skip
        return a, h

    def rows(self, which: str, a, w, schedule: TileSchedule, transposed: bool):
        """a (rows, K) times w (E, K, N) or, transposed, (E, N, K): (rows, N).

        Args:
            which: down or up_backward.
        """
        K, N = w.shape[1:][::-1] if transposed else w.shape[1:]
        if which in _LIBRARY and _runs_library(a, w):
            return F.grouped_mm(a, w.transpose(1, 2) if transposed else w, offs=schedule.starts[1:])
        out = _empty(a, self.n_slots, N)
        use_tma = can_use_tma(a, w)
        tiles = self.tiles(which, use_tma)
        matrix = w.view(-1, w.shape[2])
        if use_tma:
            a = descriptor(a, tiles.BLOCK_M, tiles.BLOCK_K)
            box = (tiles.BLOCK_N, tiles.BLOCK_K) if transposed else (tiles.BLOCK_K, tiles.BLOCK_N)
            matrix = descriptor(matrix, *box)
        kernels.rows_kernel[self._grid(tiles, tiles.BLOCK_N, N, out.device)](
            a, matrix, *_tables(schedule), out, self.n_experts, self.n_slots, N, K,
            TRANSPOSED=transposed, TMA=use_tma, **_options(tiles),
        )  # fmt: skip
        return out

    def down_backward(self, dy, w, schedule: TileSchedule, weights, h, swiglu: bool, slope: float):
        """The gradient of h, a times the weights of its rows, and the gradient of the weights by row, float32."""
        dh, weighted = torch.empty_like(h), _empty(h, self.n_slots, self.hidden)
        matrix, use_tma = w.view(-1, self.hidden), can_use_tma(w, h)
        tiles = self.tiles("down_backward", use_tma)
        n_columns = triton.cdiv(self.hidden, tiles.BLOCK_N)
        scores = torch.empty(n_columns, self.n_slots, dtype=torch.float32, device=dy.device)
        if use_tma:
            matrix = descriptor(matrix, tiles.BLOCK_K, tiles.BLOCK_N)
        kernels.down_backward_kernel[self._grid(tiles, tiles.BLOCK_N, self.hidden, dy.device)](
            dy, matrix, schedule.slots, *_tables(schedule), weights, h, dh, weighted, scores, slope,
            weights.shape[1], self.n_experts, self.n_slots, self.hidden, self.dim,
            SWIGLU=swiglu, TMA=use_tma, MASK_K=self.dim % tiles.BLOCK_K != 0,
            **_options(tiles),
        )  # fmt: skip
        return dh, weighted, scores.sum(0)

    def weight_gradient(self, which: str, left, right, schedule: TileSchedule, top_k: int, dtype: torch.dtype):
        """(E, M, N): left^T right of the rows of each expert.

        Args:
            which: down_gradient: the rows of left are tokens, and those of right sorted rows; up_gradient: the
                reverse.
        """
        M, N = left.shape[1], right.shape[1]
        gather_left = which == "down_gradient"
        if which in _LIBRARY and dtype == left.dtype and _runs_library(left, right):
            left, right = (
                (spread(left, schedule, top_k), right) if gather_left else (left, spread(right, schedule, top_k))
            )
            return F.grouped_mm(left.t(), right, offs=schedule.starts[1:])
        out = torch.empty(self.n_experts, M, N, dtype=dtype, device=left.device)
        use_tma = can_use_tma(right if gather_left else left)
        tiles = self.tiles(which, use_tma)
        n_tiles = self.n_experts * triton.cdiv(M, tiles.BLOCK_M) * triton.cdiv(N, tiles.BLOCK_N)
        if use_tma and gather_left:
            right = descriptor(right, tiles.BLOCK_K, tiles.BLOCK_N)
        elif use_tma:
            left = descriptor(left, tiles.BLOCK_K, tiles.BLOCK_M)
        n_programs = min(n_tiles, tiles.per_processor * n_multiprocessors(out.device))
        kernels.weight_gradient_kernel[(n_programs,)](
            left, right, schedule.slots, schedule.starts, out, top_k, self.n_experts, self.n_slots, M, N,
            GATHER_LEFT=gather_left, TMA=use_tma, **_options(tiles, "FLATTEN"),
        )  # fmt: skip
        return out

    def _grid(self, tiles: Tiles, block_n: int, n_columns: int, device: torch.device) -> tuple[int]:
        """Programs: no more than there can be tiles, whatever the loads."""
        n_row_tiles = self.n_slots // tiles.BLOCK_M + min(self.n_slots, self.n_experts)
        n_tiles = n_row_tiles * triton.cdiv(n_columns, block_n)
        return (min(n_tiles, tiles.per_processor * n_multiprocessors(device)),)


def combine(sorted_rows: torch.Tensor, schedule: TileSchedule, weights: torch.Tensor, weighted: bool) -> torch.Tensor:
    """(N, D): the sum over the k rows of each token, with `weighted` of weight (N, k) * row."""
    n_tokens, top_k = weights.shape
    out = _empty(sorted_rows, n_tokens, sorted_rows.shape[1])
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    kernels.combine_kernel[(n_tokens, triton.cdiv(out.shape[1], block))](
        sorted_rows, schedule.rows, weights, out, out.shape[1], TOP_K=top_k, WEIGHTED=weighted, BLOCK=block, num_warps=4
    )
    return out


def spread(x: torch.Tensor, schedule: TileSchedule, top_k: int) -> torch.Tensor:
    """(N k, D): the rows of x (N, D) of the slots, sorted by expert."""
    out = _empty(x, len(x) * top_k, x.shape[1])
    block = min(1024, triton.next_power_of_2(out.shape[1]))
    kernels.spread_kernel[(len(x), triton.cdiv(out.shape[1], block))](
        x, schedule.rows, out, out.shape[1], TOP_K=top_k, BLOCK=block, num_warps=4
    )
    return out


def _empty(like: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device)


def _tables(schedule: TileSchedule) -> tuple[torch.Tensor, ...]:
    return schedule.starts, schedule.tile_starts, schedule.tile_experts


def _options(tiles: Tiles, *unused: str) -> dict:
    return {name: value for name, value in asdict(tiles).items() if name not in (*unused, "per_processor")}


def _runs_library(*operands: torch.Tensor) -> bool:
    """Whether torch has a grouped product for these on this device: bfloat16 on Hopper, rows aligned to 16 bytes."""
    x = operands[0]
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    return can_use_tma(*operands)
