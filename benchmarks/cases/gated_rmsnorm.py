"""RMSNorm with a SiLU gate: over the heads of gdn in hybrid-350m and at the width of kepler-wiki, and with the skip
over all channels of a mamba2 of that width."""

import torch

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.gated_norm import reference, triton

EPS = 1e-6


def problems(shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: batch, tokens, groups, width, and heads of the skip; with one the gate comes before the norm."""
    *size, n_skips = shape
    gate_first = n_skips > 0

    def draw(*size):
        return torch.randn(size, device=device)

    y, z, x = (draw(*size).to(dtype).requires_grad_() for _ in range(3))
    gamma, skip = (1 + draw(size[3])).requires_grad_(), draw(n_skips).requires_grad_()
    upstream = draw(*size).to(dtype)

    def run_with(function):
        if gate_first:
            return lambda y, z, gamma, x, skip: function(y, z, gamma, x, skip, gate_first, EPS)
        return lambda y, z, gamma: function(y, z, gamma, None, None, gate_first, EPS)

    leaves = [y, z, gamma, x, skip] if gate_first else [y, z, gamma]
    eager = run_with(reference.gated_rmsnorm)

    def exact(with_gradients: bool):
        """Row by row, of which the gradients of gamma and skip are sums; all at once would not fit."""
        outputs, found = [], []
        for b in range(len(y)):
            row = [leaf.detach()[b : b + 1] if leaf.ndim == 4 else leaf.detach() for leaf in leaves]
            row = [leaf.double().requires_grad_() for leaf in row]
            out = eager(*row)
            outputs.append(out.detach())
            if with_gradients:
                found.append(torch.autograd.grad(out, row, upstream[b : b + 1].double()))
        gradients = [torch.cat(rows) if rows[0].ndim == 4 else sum(rows) for rows in zip(*found, strict=True)]
        return [torch.cat(outputs), *gradients]

    n_inputs = 3 if gate_first else 2
    common = {
        "op": "gated_rmsnorm",
        "shape": " × ".join(map(str, size)) + (f", skip of {n_skips} heads, gate first" if gate_first else ""),
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(
            eager=eager,
            torch_compile=torch.compile(eager),
            FLA=peer("fla.modules.norm.fused_norm_gate", _fla) if not gate_first else None,
            fusedlm=run_with(triton.gated_rmsnorm),
        ),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (n_inputs * y.nbytes),  # three times the cache of an H100
    }
    forward, backward = n_inputs + 1, 2 * n_inputs + 1
    return [
        Problem(upstream=None, exact=lambda: exact(False), n_bytes=forward * y.nbytes, **common),
        Problem(upstream=upstream, exact=lambda: exact(True), n_bytes=(forward + backward) * y.nbytes, **common),
    ]


def _fla(module):
    return lambda y, z, gamma: module.rms_norm_gated(y, z, gamma, None, eps=EPS)


OP = Op(
    "gated_rmsnorm",
    shapes=[(16, 2048, 10, 128, 0), (32, 2048, 16, 64, 0), (32, 2048, 1, 2048, 32)],
    quick_shapes=[(2, 3, 2, 8, 0), (2, 3, 1, 16, 4)],
    problems=problems,
)
