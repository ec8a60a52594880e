"""Orthogonalisation with Polar Express, of stacks of the hidden matrices of small models and of one large matrix."""

import torch

from benchmarks.harness import Op, Problem
from fusedlm.ops.polar import reference, triton
from fusedlm.ops.polar.schemes import SCHEMES, product_flops, segments

SCHEME = "polar_express"


def problems(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: matrices, rows, columns."""
    n_matrices, *sides = shape
    x = torch.randn(shape, device=device).to(dtype)

    def eager(x):
        return reference.orthogonalize(x, SCHEME, dtype)

    def exact():
        return [torch.stack([reference.orthogonalize(one.double(), SCHEME, torch.float64) for one in x])]

    n_steps, small, large = len(SCHEMES[SCHEME].coefficients), min(sides), max(sides)
    flops = product_flops(n_steps, small, large, segments(n_steps, small, large), symmetric=True)
    return [
        Problem(
            op="orthogonalize",
            shape=" × ".join(map(str, shape)),
            dtype=dtype,
            leaves=[x],
            upstream=None,
            contenders={
                "eager": eager,
                "torch_compile": torch.compile(eager),
                "fusedlm": lambda x: triton.orthogonalize(x, SCHEME, dtype),
            },
            exact=exact,
            sample=lambda found: found,
            n_bytes=2 * x.nbytes,
            n_flops=n_matrices * flops,
            copies=1 + 150 * 2**20 // x.nbytes,  # three times the cache of an H100
        )
    ]


OP = Op(
    "orthogonalize",
    shapes=[(12, 1024, 1024), (12, 768, 3072), (1, 4096, 4096)],
    quick_shapes=[(2, 20, 40)],
    problems=problems,
)
