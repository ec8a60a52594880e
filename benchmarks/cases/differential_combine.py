"""Fused subtract + head RMSNorm at the shapes of kepler-14m, kepler-512 and kepler-wiki."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.differential import reference, triton

EPS = 1e-6


def problems(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    batch, tokens, heads, width = shape

    def draw(*size):
        return torch.randn(size, device=device)

    signal, noise = (draw(*shape).to(dtype).requires_grad_() for _ in range(2))
    weight, gamma = draw(heads).requires_grad_(), (1 + draw(width)).requires_grad_()
    scale = torch.tensor(0.7, device=device)
    upstream = (draw(*shape) + noise.detach()).to(
        dtype
    )  # correlated with the noise, so that the terms of lambda's gradient do not cancel

    def eager(signal, noise, weight, gamma):
        return reference.differential_combine(signal, noise, weight, gamma, scale, EPS)

    def fused(signal, noise, weight, gamma):
        return triton.differential_combine(signal, noise, weight, gamma, scale, EPS)

    def exact():
        leaves = [x.detach().double().requires_grad_() for x in (signal, noise, weight, gamma)]
        out = eager(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.double())]

    common = {
        "op": "differential_combine",
        "shape": " × ".join(map(str, shape)),
        "dtype": dtype,
        "leaves": [signal, noise, weight, gamma],
        "contenders": available(eager=eager, torch_compile=torch.compile(eager), fusedlm=fused),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (3 * signal.nbytes),  # three times the cache of an H100
    }
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=3 * signal.nbytes, **common),
        Problem(upstream=upstream, exact=exact, n_bytes=8 * signal.nbytes, **common),
    ]


OP = Op(
    "differential_combine",
    shapes=[(16, 1024, 6, 64), (16, 1024, 8, 64), (8, 2048, 16, 64), (4, 4096, 16, 128)],
    quick_shapes=[(1, 7, 3, 16)],
    problems=problems,
)
