"""RMSNorm and rotary embedding of heads."""
