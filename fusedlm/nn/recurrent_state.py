"""The state of a linear-time mixer, of one size at every length."""

import torch


class RecurrentState:
    """The matrix of each head, (B, H, K, V) float32, and what else is carried from token to token: the last inputs of a
    convolution (B, size - 1, C), or a working memory (B, C). None before the first token."""

    def __init__(self):
        self.memory: torch.Tensor | None = None
        self.carried: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.memory, self.carried) if x is not None]
