"""Text from a model: decoding with its state, sampling, streaming as valid UTF-8."""

from fusedlm.generation.acceptance import Speculation
from fusedlm.generation.prompts import generate
from fusedlm.generation.sampling import next_token_probabilities, sample

__all__ = ["Speculation", "generate", "next_token_probabilities", "sample"]
