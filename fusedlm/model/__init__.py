"""One decoder whose blocks come from the recipe, and the account of what it costs."""

from fusedlm.model.build import build_model
from fusedlm.model.decoder import Decoder
from fusedlm.model.output import Output
from fusedlm.model.state import Mark, State

__all__ = ["Decoder", "Mark", "Output", "State", "build_model"]
