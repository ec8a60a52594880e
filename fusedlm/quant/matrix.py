"""Quantise one weight of a model by a method, with what calibration knows of its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fusedlm.ops import QuantizedWeight
from fusedlm.quant.formats import Format, Integers, Packed, column_scales, decoded
from fusedlm.quant.gptq import (
    BLOCK,
    DAMPING,
    inverse_factor,
    output_error,
    round_compensated,
    round_plain,
    search_scales,
)
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.low_rank import LowRank, correction

Calibrate = Literal["plain", "gptq-lite", "gptq"]


@dataclass(frozen=True)
class Method:
    """How scales are chosen and elements are rounded.

    calibrate: plain: each element by itself, nothing is known of the inputs; gptq-lite: the same with searched scales;
        gptq: with compensation.
    clip: of scales: max: the largest magnitude; search: `search_scales`; a number: so many standard deviations.
    ordered: gptq rounds columns by descending diagonal of H.
    damping: fraction of the mean of H's diagonal that gptq adds to it.
    block: columns per block of gptq.
    """

    calibrate: Calibrate = "plain"
    clip: Literal["max", "search"] | float = "max"
    ordered: bool = True
    damping: float = DAMPING
    block: int = BLOCK

    def __post_init__(self):
        if self.calibrate not in ("plain", "gptq-lite", "gptq"):
            raise ValueError(f"calibrate={self.calibrate!r} must be one of plain, gptq-lite, gptq")
        if self.calibrate == "plain" and self.clip == "search":
            raise ValueError(
                "clip='search' needs the inputs of layers, which calibrate='plain' does not read; use gptq-lite"
            )
        if self.calibrate == "gptq-lite" and self.clip != "search":
            raise ValueError(
                f"clip={self.clip!r}: gptq-lite is the search of clips; use calibrate='plain' for this one"
            )
        if isinstance(self.clip, str) and self.clip not in ("max", "search"):
            raise ValueError(f"clip={self.clip!r} must be max, search or a number of standard deviations")
        if not isinstance(self.clip, str) and not 0 < self.clip <= 1e4:
            raise ValueError(f"clip={self.clip} must be greater than 0 and at most 10000 standard deviations")
        if not 0 <= self.damping <= 1e4:
            raise ValueError(f"damping={self.damping} must be from 0 to 10000")


@dataclass(frozen=True)
class Inputs:
    """What calibration text sends into a matrix (N, K).

    hessian_KK: E[x x^T]; None: every column counts the same (rows of an embedding, or nothing is known).
    tokens: so many x.
    row_weight_N: fraction of tokens that use each row, of embeddings, or (1,) the rows of an expert; None: all.
    note: what is special, for people.
    """

    hessian_KK: torch.Tensor | None = None
    tokens: int = 0
    row_weight_N: torch.Tensor | None = None
    note: str | None = None

    def hessian(self, width: int, device: torch.device) -> torch.Tensor:
        """(K, K) float64."""
        if self.hessian_KK is None:
            return torch.eye(width, dtype=torch.float64, device=device)
        return self.hessian_KK

    def error(self, error_NK: torch.Tensor) -> float:
        """tr(E H E^T): mean squared change of the outputs, summed over outputs."""
        by_row_N = output_error(error_NK, self.hessian(error_NK.shape[1], error_NK.device))
        if self.row_weight_N is not None:
            by_row_N = by_row_N * self.row_weight_N
        return float(by_row_N.sum())


@dataclass(frozen=True)
class Outcome:
    """One matrix in few bits.

    error: tr(E H E^T), its rounding error at the outputs. power: tr(W H W^T), of the same units.
    weight_error: |E| / |W|. damping: the highest that gptq used; None: it did not run. dead: columns without input.
    tokens: of the calibration, that reached the matrix. notes: for people.
    """

    matrix: IntegerMatrix | QuantizedWeight
    low_rank: LowRank | None
    error: float
    power: float
    weight_error: float
    damping: float | None = None
    dead: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        matrix = self.matrix
        width = matrix.codes.shape[1] if isinstance(matrix, IntegerMatrix) else matrix.width
        return len(matrix.codes), width

    @property
    def output_error(self) -> float:
        """The root of error / power: how far outputs are off, as a fraction of their size."""
        return (max(self.error, 0.0) / self.power) ** 0.5 if self.power > 0 else 0.0

    def values(self) -> torch.Tensor:
        """(N, K) float32, with the low-rank term."""
        values = decoded(self.matrix)
        return values if self.low_rank is None else values + self.low_rank.values()


def quantize_matrix(
    weight_NK: torch.Tensor, parts: Sequence[Inputs], format: Format, method: Method, rank: int = 0
) -> Outcome:
    """Quantise a weight (N, K).

    Args:
        parts: inputs of equally many rows each: one, or those of each expert of a stack.
        rank: of a low-rank correction; 0: none. A stack of experts has none.

    Raises:
        ValueError: the weight is not finite, the Hessian cannot be used, or the rank is out of range.
    """
    if not weight_NK.isfinite().all():
        raise ValueError("weight has NaN or infinity, which has no scale; quantise weights that are finite")
    weight_NK, width = weight_NK.detach().float(), weight_NK.shape[1]
    weights = weight_NK.chunk(len(parts))
    scales, inverses, damping, dead, notes = [], [], None, 0, []
    for rows_NK, inputs in zip(weights, parts, strict=True):
        hessian_KK = inputs.hessian(width, rows_NK.device)
        if method.clip == "search":
            scales_NG = search_scales(rows_NK, format, hessian_KK)
        else:
            scales_NG = format.scales(rows_NK, None if method.clip == "max" else method.clip)
        scales.append(scales_NG)
        if method.calibrate == "gptq" and inputs.hessian_KK is not None:
            inverses.append(inverse_factor(hessian_KK, ordered=method.ordered, damping=method.damping))
            damping, dead = max(damping or 0.0, inverses[-1].damping), dead + inverses[-1].dead
        if inputs.note is not None and inputs.note not in notes:
            notes.append(inputs.note)
    if inverses:  # of all parts, or of none
        levels = round_compensated(weights, scales, format, inverses, block=method.block)
    else:
        levels = [round_plain(rows_NK, own_NG, format) for rows_NK, own_NG in zip(weights, scales, strict=True)]
    if damping is not None and damping > method.damping:
        notes.append(f"damping raised to {damping:g}")
    if dead:
        notes.append(f"{dead} columns without input")
    levels_NK, scales_NG = torch.cat(levels), torch.cat(scales)
    rounded_NK = levels_NK * column_scales(format, scales_NG, width)
    low_rank = None
    if rank and len(parts) == 1:
        low_rank = correction(rounded_NK - weight_NK, parts[0].hessian(width, weight_NK.device), rank)
        rounded_NK = rounded_NK + low_rank.values()
    error_NK = rounded_NK - weight_NK
    pairs = list(zip(error_NK.chunk(len(parts)), weight_NK.chunk(len(parts)), parts, strict=True))
    norm = float(weight_NK.double().norm())
    return Outcome(
        matrix=format.build(levels_NK, scales_NG),
        low_rank=low_rank,
        error=sum(inputs.error(error) for error, _, inputs in pairs),
        power=sum(inputs.error(rows) for _, rows, inputs in pairs),
        weight_error=float(error_NK.norm()) / norm if norm else 0.0,
        damping=damping,
        dead=dead,
        tokens=sum(inputs.tokens for inputs in parts),
        notes=tuple(notes),
    )


def format_of(matrix: IntegerMatrix | QuantizedWeight) -> Format:
    """The format that a matrix was built by."""
    if isinstance(matrix, IntegerMatrix):
        return Integers(matrix.bits, matrix.group)
    return Packed(matrix.format, matrix.group)


def outcome_bytes(outcome: Outcome) -> int:
    """Bytes of codes without gaps, scales and correction; of a packed format, as they are stored."""
    low_rank = 0 if outcome.low_rank is None else outcome.low_rank.nbytes
    return format_of(outcome.matrix).n_bytes(*outcome.shape) + low_rank
