"""SwiGLU feed-forward that saves only its packed projection for backward."""
