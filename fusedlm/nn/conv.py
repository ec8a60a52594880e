"""The short causal depthwise convolution in front of linear-time recurrences."""

from collections.abc import Sequence

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.module import Module, OpUse, Role, Uniform
from fusedlm.ops import short_conv, short_conv_tail


class ShortConv(Module):
    """y_t = silu(sum_j w_j * x_{t-j}), j < size, per channel, in parts; taps never read an earlier document. Heads of
    the first parts may be L2-normalised. There is no bias: published Mamba 2 models have one, the gated delta net of
    Qwen3-Next has none."""

    def __init__(self, widths: Sequence[int], size: int, *, head_dim: int = 0, head_scales: Sequence[float] = ()):
        """widths: channels of the parts. head_scales: factors of the first parts, whose heads of head_dim are
        normalised."""
        super().__init__()
        self.widths, self.size = tuple(widths), size
        self.head_dim, self.head_scales = head_dim, tuple(head_scales)
        bound = size**-0.5
        self.add_parameter("weight", (size, sum(widths)), Role("convolution"), Uniform(-bound, bound))

    def forward(
        self, x_BTC: torch.Tensor, context: Context, tail: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The parts, each (B, T, width), and the tail after the tokens that the context counts, (B, size - 1, C).
        tail: the (B, size - 1, C) inputs before x; None: zeros."""
        return short_conv(
            x_BTC,
            self.weight,
            tail,
            positions_BT=context.positions_BT if context.packed else None,
            lengths_B=context.lengths_B,
            widths=self.widths,
            head_dim=self.head_dim,
            head_scales=self.head_scales,
            backend=self.backend("short_conv"),
        )

    def tail_after(self, x_BTC: torch.Tensor, tail: torch.Tensor | None, n_tokens_B: torch.Tensor) -> torch.Tensor:
        """The tail that `forward` returns, if row b has only the first n_tokens_B[b] tokens of x."""
        return short_conv_tail(x_BTC, tail, self.size, n_tokens_B)

    def state_bytes(self, dtype: torch.dtype) -> int:
        return (self.size - 1) * self.weight.shape[1] * dtype.itemsize

    def op(self) -> OpUse:
        return OpUse("short_conv", "short_conv", {"size": self.size, "head_dim": self.head_dim})
