"""Sequence mixers by name. All are built from keyword arguments, their own and those that every mixer takes (dim,
norm_eps, layer: index of the layer from 0, value_sources: see ValueResidual), and share one protocol:

`forward(x_BTD, context, state=None) -> y_BTD`. With a state from `init_state(batch_size, max_tokens)` the tokens are
appended to those seen before, any number at a time, and the state is updated in place. A state is one part or a list of
parts, each with `tensors()`, `mark()` and `rollback(kept)` (nn/cache.py, nn/recurrent_state.py).

`state_bytes(n_tokens, dtype)` is what the state of one sequence holds, `flops(n_tokens)` the matrix-multiply FLOPs of a
forward pass over one sequence by the mixer's definition, `saved_elements()` the elements per token that training saves
for backward beside inputs and outputs of the projections, an estimate for fused kernels, `rope_specs()` the rotary
tables that it reads from the context, `ops(device)` the ops that it runs, and `fuses_norm(x_BTD)` whether x may be a
PendingNorm.
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
