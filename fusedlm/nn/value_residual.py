"""Value residual (arXiv 2410.17897): later layers mix the first layer's values into their own."""

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.nn.context import Context

GATE = -1.5  # start of the gate before its sigmoid: 0.18 of the first layer's values


class ValueResidual(torch.nn.Module):
    """v <- (1 - g) v + g first, g = sigmoid of a learnt scalar; `first` is v in the first layer that has the option on
    with a mixer of the same type and values of the same width, and that layer itself passes its own through."""

    def __init__(self, model: ModelConfig, layer: int, width: int, width_of):
        """width_of(mixer config) -> width of the values that a layer with that config would publish."""
        super().__init__()
        mixers = [model.blocks[name].mixer for name in model.layer_blocks()]
        own = mixers[layer]
        self.key = (own.type, width)
        same = [
            index
            for index, mixer in enumerate(mixers)
            if mixer.type == own.type and mixer.value_residual and width_of(mixer) == width
        ]
        self.gate = torch.nn.Parameter(torch.tensor(GATE)) if layer != same[0] else None

    def forward(self, v: torch.Tensor, context: Context) -> torch.Tensor:
        if self.gate is None:
            context.first_values[self.key] = v
            return v
        first = context.first_values[self.key]
        return torch.lerp(v, first, self.gate.sigmoid().to(v.dtype))
