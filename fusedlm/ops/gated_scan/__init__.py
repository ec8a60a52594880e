"""A leaky running mean per channel, its gate known beforehand: a parallel scan."""
