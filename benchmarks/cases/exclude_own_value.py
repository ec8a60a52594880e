"""Exclusive self-attention at the shape of golf-27m, and with heads of 128 in groups of 4."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.xsa import reference, triton


def problems(shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: batch, tokens, heads, values, width."""
    batch, tokens, heads, n_values, width = shape

    def draw(n_heads):
        return torch.randn(batch, tokens, n_heads, width, device=device).to(dtype)

    y, v = draw(heads).requires_grad_(), draw(n_values).requires_grad_()
    upstream = draw(heads)

    def exact(with_gradients: bool):
        """Row by row: all at once would not fit."""
        rows = []
        for tensors in zip(y.detach().split(1), v.detach().split(1), upstream.split(1), strict=True):
            *leaves, up = (x.double() for x in tensors)
            leaves = [x.requires_grad_() for x in leaves]
            out = reference.exclude_own_value(*leaves)
            rows.append([out.detach(), *(torch.autograd.grad(out, leaves, up) if with_gradients else ())])
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]

    common = {
        "op": "exclude_own_value",
        "shape": f"{batch} × {tokens} × {heads} × {width}, {n_values} values",
        "dtype": dtype,
        "leaves": [y, v],
        "contenders": available(
            eager=reference.exclude_own_value,
            torch_compile=torch.compile(reference.exclude_own_value),
            fusedlm=triton.exclude_own_value,
        ),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (y.nbytes + v.nbytes),  # three times the cache of an H100
    }
    forward, backward = 2 * y.nbytes + v.nbytes, 3 * y.nbytes + 2 * v.nbytes
    return [
        Problem(upstream=None, exact=lambda: exact(False), n_bytes=forward, **common),
        Problem(upstream=upstream, exact=lambda: exact(True), n_bytes=forward + backward, **common),
    ]


OP = Op(
    "exclude_own_value",
    shapes=[(64, 2048, 8, 4, 64), (16, 2048, 16, 4, 128)],
    quick_shapes=[(2, 3, 4, 2, 8)],
    problems=problems,
)
