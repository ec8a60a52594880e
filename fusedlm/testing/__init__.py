"""Helpers for tests: error ratios, random weights, small models of every part, recorded operators."""

from fusedlm.testing.backends import backend_of
from fusedlm.testing.compare import assert_close, error_ratio
from fusedlm.testing.models import (
    FFN_CASES,
    MIXER_CASES,
    NO_FFN,
    every_mixer_config,
    part_config,
    part_model,
    randomise_,
    wired_config,
)
from fusedlm.testing.operators import RecordedOperators

__all__ = [
    "FFN_CASES",
    "MIXER_CASES",
    "NO_FFN",
    "RecordedOperators",
    "assert_close",
    "backend_of",
    "error_ratio",
    "every_mixer_config",
    "part_config",
    "part_model",
    "randomise_",
    "wired_config",
]
