"""Bits per byte of documents under a model, with exact byte accounting and every token scored once."""

from fusedlm.evaluate.score import Score, score_documents, stream_nll
from fusedlm.evaluate.text import text_documents

__all__ = ["Score", "score_documents", "stream_nll", "text_documents"]
