"""Bits per byte of documents under a model: bytes counted exactly, each token scored once."""

from fusedlm.evaluate.budget import first_tokens
from fusedlm.evaluate.score import NotFinite, Score, default_stride, score_documents, stream_nll
from fusedlm.evaluate.text import text_documents

__all__ = ["NotFinite", "Score", "default_stride", "first_tokens", "score_documents", "stream_nll", "text_documents"]
