"""Feed-forwards by name, all built from (config, model config, setting): `forward(x_BTD) -> y_BTD`, `flops(n_tokens)`,
`choices`, the implementation of each op; where tokens differ in what they meet, `active_parameters()`; where training
has a loss of their own, `auxiliary_loss()`, of the last training forward."""

from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.ffn.routed import RoutedFFN
from fusedlm.nn.ffn.swiglu import SwiGLU

FFNS = {"swiglu": SwiGLU, "relu2": ReLU2, "routed": RoutedFFN}

__all__ = ["FFNS"]
