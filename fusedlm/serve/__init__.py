"""Serving: an engine with continuous batching and a prefix cache, and the HTTP server before it."""

from fusedlm.serve.engine import Engine, Limits
from fusedlm.serve.requests import Choosing, Group, Piece, QueueFull, Sequence

__all__ = ["Choosing", "Engine", "Group", "Limits", "Piece", "QueueFull", "Sequence"]
