"""RMSNorm with a SiLU gate after or before it."""
