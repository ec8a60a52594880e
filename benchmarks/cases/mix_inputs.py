"""The input of a block and its RMSNorm at the shape of golf-27m, with x0 alone and with a skip, and with wider rows."""

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.mixing import reference, triton

EPS = 1e-6


def problems(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """shape: batch, tokens, width, and whether there is a skip. The outputs are concatenated in what is compared."""
    *size, has_skip = shape
    width = size[-1]

    def draw(*size):
        return torch.randn(size, device=device)

    def full():
        return draw(*size).to(dtype).requires_grad_()

    leaves = [full(), (1 + draw(width)).requires_grad_(), draw(width).requires_grad_()]
    leaves += [full(), draw(width).requires_grad_()]
    if has_skip:
        leaves += [full(), draw(width).requires_grad_()]
    upstream = draw(*size[:-1], 2 * width).to(dtype)

    def run_with(function):
        def run(x, gain, mix_x, x0, mix_x0, skip=None, skip_weight=None):
            return function(x, gain, mix_x, x0, mix_x0, skip, skip_weight, EPS)

        return run

    eager = run_with(reference.mix_inputs)

    def exact(with_gradients: bool):
        """Row by row, of which the gradients of vectors are sums; all at once would not fit."""
        outputs, found = [], []
        for b in range(size[0]):
            row = [leaf.detach()[b : b + 1] if leaf.ndim == 3 else leaf.detach() for leaf in leaves]
            row = [leaf.double().requires_grad_() for leaf in row]
            out = eager(*row)
            outputs.append([part.detach() for part in out])
            if with_gradients:
                found.append(torch.autograd.grad(out, row, upstream[b : b + 1].double().split(width, dim=-1)))
        gradients = [torch.cat(rows) if rows[0].ndim == 3 else sum(rows) for rows in zip(*found, strict=True)]
        return [*(torch.cat(parts) for parts in zip(*outputs, strict=True)), *gradients]

    n_inputs = 3 if has_skip else 2
    matrix = leaves[0].nbytes
    common = {
        "op": "mix_inputs",
        "shape": " × ".join(map(str, size)) + (", x0 and skip" if has_skip else ", x0"),
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(eager=eager, torch_compile=torch.compile(eager), fusedlm=run_with(triton.mix_inputs)),
        "sample": lambda found: found,
        "copies": 1 + 150 * 2**20 // (n_inputs * matrix),  # three times the cache of an H100
    }
    forward, backward = n_inputs + 2, 2 * n_inputs + 2
    return [
        Problem(upstream=None, exact=lambda: exact(False), n_bytes=forward * matrix, **common),
        Problem(upstream=upstream, exact=lambda: exact(True), n_bytes=(forward + backward) * matrix, **common),
    ]


OP = Op(
    "mix_inputs",
    shapes=[(64, 2048, 512, 0), (64, 2048, 512, 1), (16, 2048, 2048, 1)],
    quick_shapes=[(2, 3, 8, 0), (2, 3, 12, 1)],
    problems=problems,
)
