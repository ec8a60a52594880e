"""The input of a block, mixed from the residual stream, the first block's input and a skip, and its RMSNorm."""
