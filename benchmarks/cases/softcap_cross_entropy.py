"""Soft-capped cross entropy at the sizes of three vocabularies."""

import torch

from benchmarks.cases.peers import peer, present
from benchmarks.harness import Op, Problem
from fusedlm.ops.softcap_cross_entropy import reference, triton

CAP = 15.0
SAMPLED = 64  # rows at either end that are compared


def _liger(module):
    def run(logits, targets):
        # It writes the gradient over the logits, which are needed again: the copy is part of its price.
        losses = module.LigerCrossEntropyFunction.apply(
            logits.clone(), targets, None, -100, 0.0, 0.0, "none", CAP, False
        )
        return losses[0] if isinstance(losses, tuple) else losses

    return run


def problems(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    rows, width = shape
    logits = (4 * torch.randn(rows, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(width, (rows,), device=device)
    upstream = torch.rand(rows, device=device) / rows

    def eager(z, t):
        return reference.softcap_cross_entropy(z, t, CAP, width)

    def fused(z, t):
        return triton.softcap_cross_entropy(z, t, CAP, width)

    def ends(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:SAMPLED], x[-SAMPLED:]])

    def exact():
        z = ends(logits.detach()).double().requires_grad_()
        loss = eager(z, ends(targets))
        return [loss.detach(), torch.autograd.grad((loss * ends(upstream)).sum(), z)[0]]

    contenders = present(
        eager=eager,
        torch_compile=torch.compile(eager),
        Liger=peer("liger_kernel.ops.cross_entropy", _liger),
        fusedlm=fused,
    )
    common = {
        "op": "softcap_cross_entropy",
        "shape": f"{rows} × {width}",
        "dtype": dtype,
        "leaves": [logits, targets],
        "contenders": contenders,
        "sample": lambda found: [ends(x) for x in found],
    }
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=logits.nbytes, **common),
        # The row is read for the loss and again for its gradient, which is written.
        Problem(upstream=upstream, exact=exact, n_bytes=3 * logits.nbytes, **common),
    ]


OP = Op(
    "softcap_cross_entropy",
    shapes=[(65536, 1024), (16384, 50304), (8192, 152064)],
    quick_shapes=[(5, 300)],
    problems=problems,
)
