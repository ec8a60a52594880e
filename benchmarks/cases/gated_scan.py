"""The working memory of sdla: 64 channels at two lengths."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.scan import reference, triton


def problems(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    gate = torch.rand(shape, device=device).to(dtype).requires_grad_()
    new = torch.randn(shape, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(shape, device=device)

    def eager(gate, new):
        return reference.gated_scan(gate, new, None, None)[0]

    def fused(gate, new):
        return triton.gated_scan(gate, new, None, None)[0]

    def exact():
        doubles = [x.detach().double().requires_grad_() for x in (gate, new)]
        out = eager(*doubles)
        return [out.detach(), *torch.autograd.grad(out, doubles, upstream.double())]

    common = {
        "op": "gated_scan",
        "shape": " × ".join(map(str, shape)),
        "dtype": dtype,
        "leaves": [gate, new],
        "contenders": available(eager=eager, torch_compile=torch.compile(eager), fusedlm=fused),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (3 * upstream.nbytes),  # three times the cache of an H100
    }
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=2 * gate.nbytes + upstream.nbytes, **common),
        Problem(upstream=upstream, exact=exact, n_bytes=5 * gate.nbytes + 3 * upstream.nbytes, **common),
    ]


OP = Op(
    "gated_scan",
    shapes=[(32, 2048, 64), (1, 65536, 64)],
    quick_shapes=[(2, 70, 6)],
    problems=problems,
)
