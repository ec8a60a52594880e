"""Operations as plain functions. Each op is one folder: a reference in plain PyTorch, faster backends, and `op.py`, the
public function, which selects the backend that runs."""

from fusedlm.ops.attention.op import causal_attention, packed_attention
from fusedlm.ops.cached.op import cached_attention
from fusedlm.ops.common import OPS, explain
from fusedlm.ops.conv.op import short_conv, short_conv_tail
from fusedlm.ops.cross_entropy.op import softcap_cross_entropy
from fusedlm.ops.cross_entropy.reference import SigmoidCap
from fusedlm.ops.delta_rule.op import gated_delta_rule
from fusedlm.ops.differential.op import differential_combine
from fusedlm.ops.differential_linear.op import differential_linear_attention
from fusedlm.ops.distillation.op import linear_distillation
from fusedlm.ops.draw.op import draw_token
from fusedlm.ops.experts.op import routed_experts
from fusedlm.ops.experts.order import count_tokens
from fusedlm.ops.float32.op import float32_linear
from fusedlm.ops.gated_norm.op import gated_rmsnorm
from fusedlm.ops.latent.op import latent_decode
from fusedlm.ops.latent.reference import quantise_latent
from fusedlm.ops.linear_attention.op import decayed_linear_attention
from fusedlm.ops.linear_cross_entropy.op import linear_softcap_cross_entropy
from fusedlm.ops.low_precision.formats import LowPrecision
from fusedlm.ops.low_precision.op import isolate_outliers, low_precision_linear, low_precision_weight
from fusedlm.ops.mixing.op import mix_inputs
from fusedlm.ops.mx.formats import MXTensor
from fusedlm.ops.mx.op import dequantize_mx, quantize_mx
from fusedlm.ops.norm_linear.op import rmsnorm_linear
from fusedlm.ops.one_token.op import token_linear
from fusedlm.ops.polar.op import orthogonalize
from fusedlm.ops.quantized.op import dequantize_weight, quantize_weight, quantized_linear
from fusedlm.ops.quantized.reference import QuantizedWeight
from fusedlm.ops.quantized_moe.op import quantized_experts
from fusedlm.ops.relu2.op import relu2_mlp
from fusedlm.ops.rotary.op import rmsnorm_rope, rope_append
from fusedlm.ops.scan.op import gated_scan
from fusedlm.ops.swiglu.op import swiglu_mlp
from fusedlm.ops.xsa.op import exclude_own_value

__all__ = [
    "OPS",
    "LowPrecision",
    "MXTensor",
    "QuantizedWeight",
    "SigmoidCap",
    "cached_attention",
    "causal_attention",
    "count_tokens",
    "decayed_linear_attention",
    "dequantize_mx",
    "dequantize_weight",
    "differential_combine",
    "differential_linear_attention",
    "draw_token",
    "exclude_own_value",
    "explain",
    "float32_linear",
    "gated_delta_rule",
    "gated_rmsnorm",
    "gated_scan",
    "isolate_outliers",
    "latent_decode",
    "linear_distillation",
    "linear_softcap_cross_entropy",
    "low_precision_linear",
    "low_precision_weight",
    "mix_inputs",
    "orthogonalize",
    "packed_attention",
    "quantise_latent",
    "relu2_mlp",
    "quantize_mx",
    "quantize_weight",
    "quantized_experts",
    "quantized_linear",
    "rmsnorm_linear",
    "rmsnorm_rope",
    "rope_append",
    "routed_experts",
    "short_conv",
    "short_conv_tail",
    "softcap_cross_entropy",
    "swiglu_mlp",
    "token_linear",
]
