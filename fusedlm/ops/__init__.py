"""Operations, one folder each: a reference in plain PyTorch, faster implementations, and one entry that chooses."""

from fusedlm.ops.attention.op import cached_attention, causal_attention, packed_attention
from fusedlm.ops.common import OPS
from fusedlm.ops.gated_delta_rule.op import gated_delta_rule
from fusedlm.ops.softcap_cross_entropy.op import softcap_cross_entropy

__all__ = [
    "OPS",
    "cached_attention",
    "causal_attention",
    "gated_delta_rule",
    "packed_attention",
    "softcap_cross_entropy",
]
