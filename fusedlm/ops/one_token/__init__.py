"""The projection of one token, with what is before and after it."""
