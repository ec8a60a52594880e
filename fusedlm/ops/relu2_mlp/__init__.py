"""Squared leaky ReLU feed-forward, its activation in the epilogues of its products."""
