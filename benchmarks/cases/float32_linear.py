"""Scores of a router in float32: at the widths of fusion-1b, and of layers of 64 and 128 experts."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops import float32_linear
from fusedlm.ops.float32 import reference


def problems(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: tokens, inputs, outputs."""
    n_tokens, width, n_outputs = shape
    x = torch.randn(n_tokens, width, device=device).to(dtype).requires_grad_()
    weight = (width**-0.5 * torch.randn(n_outputs, width, device=device)).requires_grad_()
    upstream = torch.randn(n_tokens, n_outputs, device=device)

    def exact(with_gradients: bool):
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
        out = leaves[0] @ leaves[1].t()
        return [out.detach(), *(torch.autograd.grad(out, leaves, upstream.double()) if with_gradients else ())]

    common = {
        "op": "float32_linear",
        "shape": f"{n_tokens} × {width} × {n_outputs}",
        "dtype": dtype,
        "leaves": [x, weight],
        "contenders": available(
            eager=reference.float32_linear,
            torch_compile=torch.compile(reference.float32_linear, dynamic=False),
            fusedlm=torch.compile(float32_linear, dynamic=False),
        ),
        "sample": lambda found: found,
    }
    # The gradients read x once more and write its own.
    forward = x.nbytes + weight.nbytes + upstream.nbytes
    backward = 2 * x.nbytes + 2 * weight.nbytes + upstream.nbytes
    return [
        Problem(upstream=None, exact=lambda: exact(False), n_bytes=forward, **common),
        Problem(upstream=upstream, exact=lambda: exact(True), n_bytes=forward + backward, **common),
    ]


OP = Op(
    "float32_linear",
    shapes=[(65536, 1024, 32), (16384, 2048, 64), (16384, 2048, 128)],
    quick_shapes=[(70, 24, 5)],
    problems=problems,
)
