"""Exclusive self-attention: the output without its component along the token's own value."""
