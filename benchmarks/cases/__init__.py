"""The ops that benchmarks/run.py measures, one module each."""

from benchmarks.cases import (
    differential_combine,
    differential_linear,
    exclude_own_value,
    float32_linear,
    gated_delta_rule,
    gated_rmsnorm,
    gated_scan,
    latent_decode,
    linear_attention,
    linear_softcap_cross_entropy,
    mix_inputs,
    moe_layer,
    orthogonalize,
    quantized_linear,
    relu2_mlp,
    rmsnorm_linear,
    routed_experts,
    short_conv,
    softcap_cross_entropy,
    swiglu_mlp,
)
from benchmarks.harness import Op

_MODULES = (
    softcap_cross_entropy,
    linear_softcap_cross_entropy,
    orthogonalize,
    relu2_mlp,
    swiglu_mlp,
    routed_experts,
    moe_layer,
    float32_linear,
    rmsnorm_linear,
    differential_combine,
    gated_delta_rule,
    short_conv,
    gated_rmsnorm,
    mix_inputs,
    exclude_own_value,
    latent_decode,
    linear_attention,
    differential_linear,
    gated_scan,
    quantized_linear,
)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
