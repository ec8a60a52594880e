"""RMSNorm fused with the packed projection that follows it."""
