"""Soft-capped cross entropy for three vocabularies."""

import torch

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.cross_entropy import reference, triton

CAP = 15.0
SAMPLED = 64  # first and last rows that are compared


def _liger(module):
    def run(logits, targets):
        # It overwrites the logits with the gradient. They are needed again, so a copy is part of its time.
        losses = module.LigerCrossEntropyFunction.apply(
            logits.clone(), targets, None, -100, 0.0, 0.0, "mean", CAP, False
        )
        return losses[0] if isinstance(losses, tuple) else losses

    return run


def problems(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    rows, width = shape
    logits = (4 * torch.randn(rows, width, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(width, (rows,), device=device)

    def by_row(z, t):
        return reference.softcap_cross_entropy(z, t, CAP, width)

    def mean(z, t):
        return reference.softcap_cross_entropy(z, t, CAP, width, reduction="mean")

    def fused_by_row(z, t):
        return triton.softcap_cross_entropy(z, t, CAP, width)

    def fused_mean(z, t):
        return triton.softcap_cross_entropy(z, t, CAP, width, reduction="mean")

    def ends(x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == 0 else torch.cat([x[:SAMPLED], x[-SAMPLED:]])

    def exact_by_row():
        return [by_row(ends(logits.detach()).double(), ends(targets))]

    def exact_mean():
        """The mean, and the gradient of the first and last rows."""
        total = sum(
            by_row(z.double(), t).sum() for z, t in zip(logits.detach().split(256), targets.split(256), strict=True)
        )
        z = ends(logits.detach()).double().requires_grad_()
        return [total / rows, torch.autograd.grad(by_row(z, ends(targets)).sum() / rows, z)[0]]

    common = {
        "op": "softcap_cross_entropy",
        "shape": f"{rows} × {width}",
        "dtype": dtype,
        "leaves": [logits, targets],
        "sample": lambda found: [ends(x) for x in found],
        "copies": min(8, max(1, 2**30 // logits.nbytes)),  # for small vocabularies: the launch of the graph takes 10 us
    }
    return [
        Problem(
            upstream=None,
            exact=exact_by_row,
            n_bytes=logits.nbytes,
            contenders=available(eager=by_row, torch_compile=torch.compile(by_row), fusedlm=fused_by_row),
            **common,
        ),
        Problem(
            upstream=torch.ones((), device=device),
            exact=exact_mean,
            n_bytes=2 * logits.nbytes,  # read once, and the gradient written
            contenders=available(
                eager=mean,
                torch_compile=torch.compile(mean),
                Liger=peer("liger_kernel.ops.cross_entropy", _liger, waits_for_device=True),
                fusedlm=fused_mean,
            ),
            **common,
        ),
    ]


OP = Op(
    "softcap_cross_entropy",
    shapes=[(65536, 1024), (16384, 50304), (8192, 152064)],
    quick_shapes=[(5, 300)],
    problems=problems,
)
