"""YaRN put on a finished model."""

import math

from fusedlm.config.model import YaRNConfig
from fusedlm.model.decoder import Decoder


def stretch_context(model: Decoder, factor: float, trained_length: int) -> None:
    """Set YaRN (arXiv 2309.00071) by a factor, in place of what the model has.

    Args:
        trained_length: tokens of a training sequence; a model whose recipe has YaRN keeps the length named there, to
            which its factor refers.

    Raises:
        ValueError: the factor is out of range, or no mixer has rotary embedding.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"YaRN factor {factor:g} must be a finite number of at least 1")
    own = model.config.yarn
    if own is None:
        model.set_yarn(YaRNConfig(factor=factor, trained_length=trained_length))
    else:
        model.set_yarn(own.model_copy(update={"factor": float(factor)}))
