"""SwiGLU feed-forward that keeps only its packed projection for the backward pass."""
