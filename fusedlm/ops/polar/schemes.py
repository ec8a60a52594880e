"""The polynomials that orthogonalise, and what their products cost.

A scheme is a list of (a, b, c), each one step X <- (a I + b A + c A^2) X with A = X X^T, which maps every singular
value s to a s + b s^3 + c s^5 and keeps the singular vectors.
"""

from dataclasses import dataclass

_QUINTIC = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class Scheme:
    """coefficients: (a, b, c) of each step. safety, eps: the start is X / (safety |X|_F + eps). preconditioned: X is
    then divided, row by row, by the root of the sum over the row of |X X^T|, which bounds singular values by 1 and
    undoes any smaller start, so that X with |X|_F <= eps starts as zeros instead."""

    coefficients: tuple[tuple[float, float, float], ...]
    safety: float
    eps: float
    preconditioned: bool = False


SCHEMES = {
    # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.
    "quintic": Scheme((_QUINTIC,) * 5, 1.0, 1e-7),
    # arXiv 2505.16932, with a safety factor of 1.02 in all polynomials but the last.
    "polar_express": Scheme(_POLAR_EXPRESS, 1.02, 1e-6),
    # arXiv 2512.04632: almost orthogonal preconditioning in place of the first step.
    # eps: with far smaller elements, their products are no longer normal float32 numbers.
    "turbo": Scheme(_POLAR_EXPRESS[1:], 1.0, 1e-15, preconditioned=True),
}

# Columns per row from which the Gram form is taken. It needs fewer FLOPs above 1. Measured on an H100 at 4 (12 matrices
# of 768 x 3072: 0.57 ms, plain 0.78) and at 1 (12 of 1024 x 1024: 0.69, plain 0.58), but not between.
_GRAM_ASPECT = 1.25


def scheme_of(name: str) -> Scheme:
    """Raises ValueError for an unknown name."""
    if name not in SCHEMES:
        raise ValueError(f"scheme={name!r}: there is no such scheme; one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def segments(n_steps: int, n_rows: int, n_columns: int) -> tuple[int, ...]:
    """How many steps are taken on the Gram matrix before each product with X (n_rows, n_columns), wide or square.

    (1, 1, ...) is the plain iteration. With longer segments most products are those of (n_rows, n_rows) matrices. The
    Gram matrix is computed from X again after two steps: rounding gives it small negative eigenvalues, which every
    step on it multiplies by up to a^2, so that in 16 bits five steps on one Gram matrix can diverge.
    """
    if n_columns < _GRAM_ASPECT * n_rows or n_steps < 4:
        return (1,) * n_steps
    return (2, n_steps - 2)


def product_flops(n_steps: int, n_rows: int, n_columns: int, parts: tuple[int, ...], *, symmetric: bool) -> int:
    """FLOPs of the products with one matrix, a multiply-add counting two.

    Args:
        parts: as `segments` gives them.
        symmetric: whether of symmetric products only half is computed.
    """
    wide, small = 2 * n_rows**2 * n_columns, 2 * n_rows**3
    n_symmetric_small = n_steps + 3 * sum(length - 1 for length in parts)
    symmetric_flops = len(parts) * wide + n_symmetric_small * small
    return (symmetric_flops // 2 if symmetric else symmetric_flops) + len(parts) * wide
