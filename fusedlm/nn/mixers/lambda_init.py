"""Initial weight of the noise in differential mixers."""

import math


def initial_lambda(configured: float | None, layer: int) -> float:
    """The recipe's value, or with None that of the layer, counted from 0: 0.2 in the first, approaching 0.8 in deep
    ones (arXiv 2410.05258, section 2.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer) if configured is None else configured
