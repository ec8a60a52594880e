"""Short causal depthwise convolution, as linear-time mixers put before their recurrence."""

import torch

from fusedlm.nn.context import Context


class ShortConv(torch.nn.Module):
    """y_t = sum_j w_j * x_{t-j}, j < size, per channel; taps never reach into an earlier document."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        self.weight = torch.nn.Parameter(torch.empty(size, channels).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, x_BTC: torch.Tensor, context: Context, tail: torch.Tensor | None = None):
        """y (B, T, C) and the new tail; tail is the (B, size - 1, C) inputs before x (None: zeros)."""
        batch, n_tokens, channels = x_BTC.shape
        if tail is None:
            tail = x_BTC.new_zeros(batch, self.size - 1, channels)
        inputs = torch.cat([tail, x_BTC], dim=1)
        weight = self.weight.to(x_BTC.dtype)
        y = x_BTC * weight[0]
        for back in range(1, self.size):
            tap = inputs[:, self.size - 1 - back : self.size - 1 - back + n_tokens] * weight[back]
            if context.packed:
                tap = tap * (context.positions_BT >= back)[..., None]
            y = y + tap
        return y, inputs[:, n_tokens:].clone()

    def state_bytes(self, dtype: torch.dtype) -> int:
        return (self.size - 1) * self.weight.shape[1] * dtype.itemsize
