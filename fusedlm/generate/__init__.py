"""Text from a model: decoding with its state, sampling, streaming as valid UTF-8."""

from fusedlm.generate.decode import generate
from fusedlm.generate.sampling import next_token_probabilities, sample

__all__ = ["generate", "next_token_probabilities", "sample"]
