"""Softmax attention: causal, packed (documents and windows), and against a cache of earlier tokens."""
