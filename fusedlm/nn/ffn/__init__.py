"""Feed-forwards by name: `forward(x_BTD) -> y_BTD`, `flops(n_tokens)`."""

from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.ffn.swiglu import SwiGLU

FFNS = {"swiglu": SwiGLU, "relu2": ReLU2}

__all__ = ["FFNS"]
