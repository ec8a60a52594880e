"""Attention of new tokens to cached keys and values, for decoding."""
