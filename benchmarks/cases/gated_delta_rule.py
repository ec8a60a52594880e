"""The gated delta rule on 65,536 tokens and 16 heads, in sequences of 2,048 to 65,536 tokens."""

import torch
import torch.nn.functional as F

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.attention import sdpa
from fusedlm.ops.delta_rule import reference, triton

# Operands of products are bfloat16, where the reference computes in float32: up to 2^-9 for each of them.
BOUND = 8e-3
CHECKED_HEADS = 2  # of the first sequence: float64 takes much memory
LONGEST_COMPILED = 4096  # tokens; the loop over chunks is unrolled, which takes minutes above it


def _peer(module):
    def run(q, k, v, log_decay, beta):
        return module.chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=1.0)[0]

    return run


def problems(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    total, tokens, heads, width = shape

    def draw(*size):
        return torch.randn(total // tokens, tokens, heads, *size, device=device)

    q, k = F.normalize(draw(width), dim=-1) * width**-0.5, F.normalize(draw(width), dim=-1)
    leaves = [x.to(dtype) for x in (q, k, draw(width))] + [-F.softplus(draw() - 1), draw().sigmoid()]
    leaves = [x.requires_grad_() for x in leaves]
    upstream = draw(width).to(dtype)

    def eager(*leaves):
        return reference.gated_delta_rule(*leaves, None, None, 64)[0]

    def fused(*leaves):
        return triton.gated_delta_rule(*leaves, None, None, 64)[0]

    def sample(found):
        return [x[:1, :, :CHECKED_HEADS] for x in found]

    def exact():
        wide = [x.detach()[:1, :, :CHECKED_HEADS].double().requires_grad_() for x in leaves]
        out = eager(*wide)
        (d_out,) = sample([upstream])
        return [out.detach(), *torch.autograd.grad(out, wide, d_out.double())]

    contenders = available(
        eager=eager,
        torch_compile=torch.compile(eager) if tokens <= LONGEST_COMPILED else None,
        flash_linear_attention=peer("fla.ops.gated_delta_rule", _peer),
        fusedlm=fused,
    )
    common = {
        "op": "gated_delta_rule",
        "shape": f"{total // tokens} × {tokens} × {heads} × {width}",
        "dtype": dtype,
        "leaves": leaves,
        "contenders": contenders,
        "sample": sample,
        "min_bound": BOUND,
    }
    part = None
    if device.type == "cuda":

        def attention(q, k, v, log_decay, beta):
            return sdpa.cudnn_causal(q, k, v, 1.0)

        part = "cuDNN attention", attention
    flops = 3 * 2 * total * heads * width**2
    gates = sum(x.nbytes for x in leaves[3:])
    return [
        Problem(
            upstream=None, exact=lambda: exact()[:1], n_bytes=4 * q.numel() * dtype.itemsize + gates, n_flops=flops,
            part=part, **common,
        ),
        Problem(
            upstream=upstream, exact=exact, n_bytes=11 * q.numel() * dtype.itemsize + 3 * gates, n_flops=3 * flops,
            part=part, **common,
        ),
    ]  # fmt: skip


OP = Op(
    "gated_delta_rule",
    shapes=[(65536, tokens, 16, width) for width in (64, 128) for tokens in (2048, 4096, 16384, 65536)],
    quick_shapes=[(130, 65, 2, 16)],
    problems=problems,
)
