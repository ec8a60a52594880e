"""Approximate polar factors of stacks of matrices, as Muon computes them."""
