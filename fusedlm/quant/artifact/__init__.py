"""The packed artifact: a language model in one file, as small as its codes allow, and read without executing it."""
