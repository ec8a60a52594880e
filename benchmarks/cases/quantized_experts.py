"""Routed experts with weights in few bits for few tokens, beside the same weights in bfloat16: the layers of
fusion-1b."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops import dequantize_weight, quantize_weight
from fusedlm.ops.experts import triton as floats
from fusedlm.ops.quantized.reference import QuantizedWeight
from fusedlm.ops.quantized_moe import reference, triton

FORMATS = ("mxfp4", "int4", "fp8", "int8")
OF_FUSION_1B = (1024, 640, 32, 4)


def problems(shape: tuple[int, int, int, int, int, str], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: tokens, dimensions, hidden elements, experts, experts per token, format. Loads are even."""
    n_tokens, dim, hidden, n_experts, top_k, format = shape

    def stack(rows: int, width: int) -> QuantizedWeight:
        return quantize_weight(width**-0.5 * torch.randn(n_experts * rows, width, device=device), format)

    up, down = stack(2 * hidden, dim), stack(dim, hidden)
    x = torch.randn(n_tokens, dim, device=device).to(dtype)
    indices = torch.rand(n_tokens, n_experts, device=device).topk(top_k).indices
    weights = torch.rand(n_tokens, top_k, device=device).softmax(-1)
    w_up, w_down = (dequantize_weight(w, dtype).view(n_experts, -1, w.width) for w in (up, down))

    def few_bits(function):
        def call(x, w_up, w_down, up_codes, up_scales, down_codes, down_scales, indices, weights):
            stacks = (
                QuantizedWeight(codes, scales, w.width, w.format, w.group)
                for codes, scales, w in ((up_codes, up_scales, up), (down_codes, down_scales, down))
            )
            return function(x, *stacks, indices, weights, "swiglu", 0.0)

        return call

    def in_floats(x, w_up, w_down, up_codes, up_scales, down_codes, down_scales, indices, weights):
        return floats.routed_experts(x, w_up, w_down, indices, weights, "swiglu", 0.0)

    eager = few_bits(reference.quantized_experts)
    eager.waits_for_device = True  # for the sizes of the groups
    contenders = {
        "eager, decoded first": eager,
        f"fusedlm, {str(dtype).removeprefix('torch.')}": in_floats,
        "fusedlm": few_bits(triton.quantized_experts),
    }
    used = len(indices.unique())
    n_bytes = used * (up.nbytes + down.nbytes) // n_experts
    n_bytes += 2 * x.nbytes + indices.nbytes + weights.nbytes
    problem = Problem(
        op="quantized_experts",
        shape=f"{n_tokens} × {dim} × {hidden}, {n_experts} experts, top {top_k}, {format}",
        dtype=dtype,
        leaves=[x, w_up, w_down, up.codes, up.scales, down.codes, down.scales, indices, weights],
        upstream=None,
        contenders=available(**contenders),
        exact=lambda: [eager(x.double(), None, None, up.codes, up.scales, down.codes, down.scales, indices, weights)],
        sample=lambda found: found,
        n_bytes=n_bytes,
        copies=min(64, 1 + 150 * 2**20 // n_bytes),  # three times the cache of an H100
    )
    return [problem]


OP = Op(
    "quantized_experts",
    shapes=[(n_tokens, *OF_FUSION_1B, format) for n_tokens in (1, 16) for format in FORMATS],
    quick_shapes=[(n_tokens, 96, 40, 4, 2, format) for n_tokens in (1, 3) for format in FORMATS],
    problems=problems,
)
