"""The next token, drawn from logits."""
