"""Value residual (arXiv 2410.17897): later layers mix the first layer's values into their own."""

import torch

from fusedlm.nn.context import Context
from fusedlm.nn.module import Constant, Module, Role

GATE = -1.5  # start of the gate before its sigmoid: 0.18 of the first layer's values


class ValueResidual(Module):
    """v <- (1 - g) v + g first, g = sigmoid of a learnt scalar; `first` is v in the first layer that has the option on
    with a mixer of the same type and values of the same width. That layer keeps its own values."""

    def __init__(self, mixer: str, width: int, sources: set[tuple[str, int]] | None = None):
        """
        Args:
            mixer: type of the mixer.
            width: of its values.
            sources: (type, width) of the earlier layers that provide their values; shared by all layers of a model. The
                first layer of its kind adds itself and has no gate. None: there are no earlier layers.
        """
        super().__init__()
        self.key = (mixer, width)
        sources = set() if sources is None else sources
        if self.key in sources:
            self.add_parameter("gate", (1,), Role("gate"), Constant(GATE))
        else:
            sources.add(self.key)
            self.gate = None

    def forward(self, v: torch.Tensor, context: Context) -> torch.Tensor:
        if self.gate is None:
            context.first_values[self.key] = v
            return v
        first = context.first_values[self.key]
        return torch.lerp(v, first, self.gate.sigmoid().to(v.dtype))
