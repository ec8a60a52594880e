"""Short causal depthwise convolution with SiLU and head normalisation."""
