"""One decoder whose blocks come from the recipe, and the account of what it costs."""

from fusedlm.model.decoder import Decoder, State, build_model

__all__ = ["Decoder", "State", "build_model"]
