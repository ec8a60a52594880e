"""RMSNorm and the packed projection behind it."""
