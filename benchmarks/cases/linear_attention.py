"""Linear attention with a scalar decay: heads of 64 and 128 columns at four lengths, and the sizes of mamba2 in
kepler-wiki, whose heads share one set of keys and queries."""

import torch

from benchmarks.cases.peers import available, peer
from benchmarks.harness import Op, Problem
from fusedlm.ops.linear_attention import reference, triton

# Operands of the products are rounded to bfloat16, which eager PyTorch does not: it computes in float32.
MIN_BOUND = 8e-3
CHECKED_HEADS = 2  # of the first sequence: float64 takes much memory
LONGEST_COMPILED = 4096  # tokens; the loop over chunks is unrolled, which takes minutes above it


def problems(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    batch, tokens, groups, heads, key, value = shape

    def draw(*size):
        return torch.randn(size, device=device).to(dtype)

    q, k, v = draw(batch, tokens, groups, key), draw(batch, tokens, groups, key), draw(batch, tokens, heads, value)
    q *= key**-0.5
    # Half-lives from about ten to a thousand tokens.
    log_decay = -0.07 * torch.rand(batch, tokens, heads, device=device) * 10 ** (-2 * torch.rand(heads, device=device))
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay)]
    upstream = draw(batch, tokens, heads, value)

    def eager(q, k, v, log_decay):
        return reference.decayed_linear_attention(q, k, v, log_decay, None, None, 64)[0]

    def fused(q, k, v, log_decay):
        return triton.decayed_linear_attention(q, k, v, log_decay, None, None)[0]

    def simple_gla(fla):
        def run(q, k, v, log_decay):  # it has a key head for each value head
            q, k = (x.repeat_interleave(heads // groups, 2) for x in (q, k))
            return fla.chunk_simple_gla(q, k, v, log_decay, scale=1.0)[0]

        return run

    # Keys that many heads share get the gradients of all of them.
    checked = heads if groups == 1 else CHECKED_HEADS

    def sample(found):
        return [x[:1, :, :checked] for x in found]

    def exact():
        wide = [x.detach()[:1, :, :checked].double().requires_grad_() for x in leaves]
        out = eager(*wide)
        (d_out,) = sample([upstream])
        return [out.detach(), *torch.autograd.grad(out, wide, d_out.double())]

    states = batch * -(-tokens // 64) * heads * key * value * dtype.itemsize
    inputs = sum(x.nbytes for x in leaves)
    products = 2 * batch * tokens * heads * (64 * (key + value) + 2 * key * value)
    common = {
        "op": "decayed_linear_attention",
        "shape": " × ".join(map(str, shape)),
        "dtype": dtype,
        "leaves": leaves,
        "contenders": available(
            eager=eager,
            torch_compile=torch.compile(eager) if tokens <= LONGEST_COMPILED else None,
            flash_linear_attention=peer("fla.ops.simple_gla", simple_gla),
            fusedlm=fused,
        ),
        "sample": sample,
        "min_bound": MIN_BOUND if dtype != torch.float32 else 1e-5,
        "copies": 1 + 150 * 2**20 // inputs,  # three times the cache of an H100
    }
    return [
        Problem(upstream=None, exact=lambda: exact()[:1], n_bytes=inputs + v.nbytes, n_flops=products, **common),
        Problem(
            upstream=upstream,
            exact=exact,
            n_bytes=3 * inputs + 2 * v.nbytes + 2 * states,
            n_flops=3 * products,
            **common,
        ),
    ]


OP = Op(
    "decayed_linear_attention",
    shapes=[
        (32, 2048, 16, 16, 64, 64),
        (16, 4096, 16, 16, 64, 64),
        (4, 16384, 16, 16, 64, 64),
        (1, 65536, 16, 16, 64, 64),
        (32, 2048, 16, 16, 128, 128),
        (32, 2048, 1, 16, 64, 128),
    ],
    quick_shapes=[(1, 70, 1, 2, 8, 12)],
    problems=problems,
)
