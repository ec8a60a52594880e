"""Problems of feed-forward networks."""

from collections.abc import Callable

import torch

from benchmarks.cases.peers import available
from benchmarks.harness import Problem

SAMPLED = 256  # tokens, and rows of the gradients of the weights, that are compared
_CHUNK = 4096  # tokens computed in float64 at a time


def problems(
    op: str, eager: Callable, fused: Callable, n_up: int, shape: tuple[int, int, int], device, dtype, label: str = ""
) -> list[Problem]:
    """Forward, and forward + backward, of x (N, D), weights (n_up H, D) and (D, H), in one dtype."""
    n, dim, hidden = shape

    def draw(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(rows, columns, device=device)).to(dtype)

    x, w_up, w_down = leaves = [
        leaf.requires_grad_()
        for leaf in (draw(n, dim), draw(n_up * hidden, dim, dim**-0.5), draw(dim, hidden, hidden**-0.5))
    ]
    upstream = draw(n, dim)

    def exact():
        """Output and gradients, a chunk of tokens at a time; the gradients of the weights are sums over all of them."""
        weights = [w.detach().double().requires_grad_() for w in (w_up, w_down)]
        first, totals = [], [0.0, 0.0]
        for start in range(0, n, _CHUNK):
            chunk = x[start : start + _CHUNK].detach().double().requires_grad_()
            out = eager(chunk, *weights)
            dx, *dw = torch.autograd.grad(out, [chunk, *weights], upstream[start : start + _CHUNK].double())
            first = first or [out.detach(), dx]
            totals = [total + gradient for total, gradient in zip(totals, dw, strict=True)]
        return sample([*first, *totals])

    def sample(found):
        return [tensor[:SAMPLED] for tensor in found]

    common = {
        "op": op,
        "shape": " × ".join(map(str, shape)) + label,
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(eager=eager, torch_compile=torch.compile(eager), fusedlm=fused),
        "sample": sample,
    }
    n_bytes = 2 * x.nbytes + w_up.nbytes + w_down.nbytes
    n_flops = 2 * n * (n_up + 1) * hidden * dim
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=n_bytes, n_flops=n_flops, **common),
        Problem(upstream=upstream, exact=exact, n_bytes=2 * n_bytes, n_flops=3 * n_flops, **common),
    ]
