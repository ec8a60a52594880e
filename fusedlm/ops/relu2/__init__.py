"""Squared leaky ReLU feed-forward with its activation in the epilogues of the matrix products."""
