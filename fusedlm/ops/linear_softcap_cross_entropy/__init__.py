"""Projection to a vocabulary and soft-capped cross entropy, without the matrix of all logits."""
