"""YaRN applied to a trained model."""

import math
from dataclasses import replace

from fusedlm.model.decoder import Decoder
from fusedlm.nn.rope import YaRN


def stretch_context(model: Decoder, factor: float, trained_length: int) -> None:
    """Set YaRN (arXiv 2309.00071) by a factor, replacing the model's setting.

    Args:
        trained_length: tokens of a training sequence; a model whose recipe has YaRN keeps the length named there, to
            which its factor refers.

    Raises:
        ValueError: the factor is out of range, or no mixer has rotary embedding.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"YaRN factor {factor:g} must be a finite number of at least 1")
    own = model.recipe_yarn
    if own is None:
        model.set_yarn(YaRN(factor, trained_length))
    else:
        model.set_yarn(replace(own, factor=float(factor)))
