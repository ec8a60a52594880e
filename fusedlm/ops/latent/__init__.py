"""Attention of new tokens to the latent state of multi-head latent attention, for decoding."""
