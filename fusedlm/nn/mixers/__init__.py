"""Sequence mixers by name. All are built from (config, model config, setting,
index of the layer from 0) and share one protocol:

`forward(x_BTD, context, state=None) -> y_BTD`; with a state from `init_state(batch_size, max_tokens)` the tokens are
appended to those seen before, any number at a time, and the state is updated in place. `state_bytes(n_tokens, dtype)`
is what the state of one sequence holds, `flops(n_tokens)` the matrix-multiply FLOPs of a forward pass over one
sequence, `rope_specs()` the rotary tables that it reads from the context, `choices` the implementation of each op.
"""

from fusedlm.nn.mixers.attention import Attention
from fusedlm.nn.mixers.gdn import GatedDeltaNet
from fusedlm.nn.mixers.mla import LatentAttention

MIXERS = {"attention": Attention, "mla": LatentAttention, "gdn": GatedDeltaNet}

__all__ = ["MIXERS"]
