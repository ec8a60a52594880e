"""Sequence mixers by name. All are built from (config, model config, setting, index of the layer from 0) and share one
protocol:

`forward(x_BTD, context, state=None) -> y_BTD`; with a state from `init_state(batch_size, max_tokens)` the tokens are
appended to those seen before, any number at a time, and the state is updated in place. `state_bytes(n_tokens, dtype)`
is what the state of one sequence holds, `flops(n_tokens)` the matrix-multiply FLOPs of a forward pass over one
sequence, `rope_specs()` the rotary tables that it reads from the context, `choices` the implementation of each op.

A mixer that reads x through one projection alone names it `input_projection`, and goes on from what that gives in
`mix(projected, context, state)`, for `Block` to make the norm and the projection in one op.
"""

from fusedlm.nn.mixers.attention import Attention
from fusedlm.nn.mixers.cmd_mla import CommonModeLatentAttention
from fusedlm.nn.mixers.diff_mla import DifferentialLatentAttention
from fusedlm.nn.mixers.gdn import GatedDeltaNet
from fusedlm.nn.mixers.mamba2 import Mamba2
from fusedlm.nn.mixers.mla import LatentAttention
from fusedlm.nn.mixers.sdla import SelectiveDifferentialLinearAttention

MIXERS = {
    "attention": Attention,
    "mla": LatentAttention,
    "diff_mla": DifferentialLatentAttention,
    "cmd_mla": CommonModeLatentAttention,
    "gdn": GatedDeltaNet,
    "sdla": SelectiveDifferentialLinearAttention,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS"]
