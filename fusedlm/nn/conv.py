"""The short causal depthwise convolution in front of linear-time recurrences."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.module import Module, Role, Uniform


class ShortConv(Module):
    """y_t = sum_j w_j * x_{t-j}, j < size, per channel; taps never read an earlier document. There is no bias:
    published Mamba 2 models have one, the gated delta net of Qwen3-Next has none."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        bound = size**-0.5
        self.add_parameter("weight", (size, channels), Role("convolution"), Uniform(-bound, bound))

    def forward(
        self, x_BTC: torch.Tensor, context: Context, tail: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y (B, T, C) and the inputs (B, size - 1 + T, C), tail first, from which `tail_of` takes the next
        tail. tail: the (B, size - 1, C) inputs before x; None: zeros."""
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
        return y, inputs

    def extend(self, tail: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs that `forward` returned, their tail replaced by another one (None: zeros)."""
        new = inputs[:, self.size - 1 :]
        if tail is None:
            tail = new.new_zeros(new.shape[0], self.size - 1, new.shape[2])
        return torch.cat([tail, new], dim=1)

    def tail_of(self, inputs: torch.Tensor, n_new_B: torch.Tensor | None = None) -> torch.Tensor:
        """The last size - 1 inputs, (B, size - 1, C), if row b has only n_new_B[b] of the new ones (None: all)."""
        size = self.size - 1
        if n_new_B is None:
            return inputs[:, inputs.shape[1] - size :].clone()
        index = n_new_B[:, None] + torch.arange(size, device=inputs.device)
        return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[2]))

    def state_bytes(self, dtype: torch.dtype) -> int:
        return (self.size - 1) * self.weight.shape[1] * dtype.itemsize
