"""Products of few tokens with weights in few bits, beside the product with the same weights in bfloat16: at a wide
feed-forward and at the layers of fusion-1b."""

import torch
import torch.nn.functional as F

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops import dequantize_weight, quantize_weight, token_linear
from fusedlm.ops.quantized import reference, triton

FORMATS = ("mxfp4", "int4", "fp8", "int8")
WIDE = (4096, 14336)
OF_FUSION_1B = ((1024, 1280), (1024, 3072), (1024, 5504), (2752, 1024))


def problems(shape: tuple[int, int, int, str], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: tokens, inputs, outputs, format."""
    n_tokens, width, n_outputs, format = shape
    quantized = quantize_weight(width**-0.5 * torch.randn(n_outputs, width, device=device), format)
    x = torch.randn(n_tokens, width, device=device).to(dtype)
    weight = dequantize_weight(quantized, dtype)

    def few_bits(function):
        how = (quantized.width, quantized.format, quantized.group)
        return lambda x, weight, codes, scales: function(x, codes, scales, *how)

    contenders = {"eager": lambda x, weight, codes, scales: F.linear(x, weight)}
    if n_tokens == 1:
        contenders["fusedlm, bfloat16"] = lambda x, weight, codes, scales: token_linear(x, weight)
    contenders["eager, decoded first"] = few_bits(reference.quantized_linear)
    contenders["fusedlm"] = few_bits(triton.quantized_linear)
    n_bytes = quantized.codes.nbytes + quantized.scales.nbytes + x.nbytes + n_tokens * n_outputs * dtype.itemsize
    problem = Problem(
        op="quantized_linear",
        shape=f"{n_tokens} × {width} → {n_outputs}, {format}",
        dtype=dtype,
        leaves=[x, weight, quantized.codes, quantized.scales],
        upstream=None,
        contenders=available(**contenders),
        exact=lambda: [x.double() @ dequantize_weight(quantized, torch.float64).t()],
        sample=lambda found: found,
        n_bytes=n_bytes,
        copies=1 + 150 * 2**20 // n_bytes,  # three times the cache of an H100
    )
    return [problem]


OP = Op(
    "quantized_linear",
    shapes=[
        *((n_tokens, *WIDE, format) for n_tokens in (1, 2, 16, 32) for format in FORMATS),
        *((n_tokens, *sizes, format) for n_tokens in (1, 16) for sizes in OF_FUSION_1B for format in FORMATS),
    ],
    quick_shapes=[(n_tokens, 96, 40, format) for n_tokens in (1, 3) for format in FORMATS],
    problems=problems,
)
