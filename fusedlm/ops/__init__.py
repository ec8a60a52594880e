"""Operations, one folder each: a reference in plain PyTorch, faster implementations, and one entry that chooses."""

from fusedlm.ops.attention.op import cached_attention, causal_attention, packed_attention
from fusedlm.ops.common import OPS
from fusedlm.ops.decayed_linear_attention.op import decayed_linear_attention
from fusedlm.ops.differential_combine.op import differential_combine
from fusedlm.ops.gated_delta_rule.op import gated_delta_rule
from fusedlm.ops.gated_scan.op import gated_scan
from fusedlm.ops.linear_softcap_cross_entropy.op import linear_softcap_cross_entropy
from fusedlm.ops.relu2_mlp.op import relu2_mlp
from fusedlm.ops.rmsnorm_linear.op import rmsnorm_linear
from fusedlm.ops.softcap_cross_entropy.op import softcap_cross_entropy
from fusedlm.ops.swiglu_mlp.op import swiglu_mlp

__all__ = [
    "OPS",
    "cached_attention",
    "causal_attention",
    "decayed_linear_attention",
    "differential_combine",
    "gated_delta_rule",
    "gated_scan",
    "linear_softcap_cross_entropy",
    "packed_attention",
    "relu2_mlp",
    "rmsnorm_linear",
    "softcap_cross_entropy",
    "swiglu_mlp",
]
