"""Feed-forwards by name, all built from keyword arguments, their own and `dim`. They share one protocol:

`forward(x_BTD, context) -> y_BTD`, or `(y_BTD, Report)` with losses and metrics of their own; `flops(n_tokens)`;
`ops(device)`, the ops that they run; `active_parameters()`, where tokens differ in the parameters they use;
`saved_elements()`, elements per token that they save for backward beside their linear layers;
`waits_for_device(device, dtype)`, whether a pass needs numbers on the host.

Losses appear in metrics.jsonl as `loss_NAME`. A class that reports a metric names it in `metric`, and its
`summarise(layers, sums)` gives the figures of summed metrics, which training, validation and `fusedlm eval` then hold.
`end_step(layers, sums, taken)` is called after each optimizer step with the sums of that step on the device.
"""

from fusedlm.nn.ffn.moe import MoE
from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.ffn.routed import RoutedFFN
from fusedlm.nn.ffn.swiglu import SwiGLU

FFNS = {"swiglu": SwiGLU, "relu2": ReLU2, "routed": RoutedFFN, "moe": MoE}

__all__ = ["FFNS"]
