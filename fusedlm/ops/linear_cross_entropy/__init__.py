"""Projection to a vocabulary fused with soft-capped cross entropy, without the matrix of all logits."""
