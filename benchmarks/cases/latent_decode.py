"""A decoding step against the latent state at the widths of kepler-wiki, for mla, diff_mla and cmd_mla; and what the
expanded keys and values of as many heads would take."""

import itertools

import torch
import torch.nn.functional as F

from benchmarks.cases.peers import available
from benchmarks.harness import Op, Problem
from fusedlm.ops.latent import reference, sdpa, triton

RANK, ROPE, HEAD = 512, 64, 64
MLA, DIFF_MLA, CMD_MLA = (16, 16), (32, 16), (17, 16)  # heads, and those that are signal
SAMPLED = 2  # rows of the batch that are compared


def problems(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Problem]:
    heads, signal, batch, n_keys = shape

    def draw(*size):
        return torch.randn(size, device=device, dtype=dtype)

    q, state = 1.5 * draw(batch, 1, heads, RANK + ROPE), draw(batch, n_keys, RANK + ROPE)
    weight = torch.rand(signal, device=device) if signal < heads else None
    scale = 0.35 * (HEAD + ROPE) ** -0.5  # scores of about unit variance

    def call(function):
        return lambda q, state: function(q, state, RANK, scale, None, None, None, None, None, signal, weight)

    eager = call(reference.latent_decode)
    problem = {
        "op": "latent_decode",
        "shape": f"{heads} heads, {signal} of signal, {batch} × {n_keys}",
        "dtype": dtype,
        "leaves": [q, state],
        "upstream": None,
        "contenders": available(
            eager=eager,
            torch_compile=torch.compile(eager),
            SDPA_on_latents=call(sdpa.latent_decode),
            fusedlm=call(triton.latent_decode),
        ),  # fmt: skip
        "exact": lambda: [eager(q[:SAMPLED].double(), state[:SAMPLED].double())],
        "sample": lambda found: [found[0][:SAMPLED]],
        "n_bytes": state.nbytes + q.nbytes + q.nbytes * signal * RANK // (heads * (RANK + ROPE)),
        "copies": 1 + 150 * 2**20 // state.nbytes,  # three times the cache of an H100
    }
    if heads == signal:
        problem["part"] = ("SDPA, expanded", _expanded(batch, heads, n_keys, problem["copies"], draw))
    return [Problem(**problem)]


def _expanded(batch: int, heads: int, n_keys: int, copies: int, draw):
    """The same step on cached keys and values of every head; each call takes the next of so many copies."""
    q = draw(batch, 1, heads, HEAD + ROPE).transpose(1, 2)
    sizes = [(batch, n_keys, heads, width) for width in (HEAD + ROPE, HEAD)]
    caches = itertools.cycle([[draw(*size).transpose(1, 2) for size in sizes] for _ in range(copies)])

    def step(*_):
        return F.scaled_dot_product_attention(q, *next(caches))

    return step


OP = Op(
    "latent_decode",
    shapes=[
        *((*kind, 64, n_keys) for n_keys in (4096, 32768) for kind in (MLA, DIFF_MLA, CMD_MLA)),
        *((*MLA, batch, n_keys) for batch, n_keys in ((1, 2048), (1, 32768), (1, 131072), (32, 32768))),
    ],
    quick_shapes=[(2, 2, 3, 40), (4, 2, 2, 40), (3, 2, 2, 40)],
    problems=problems,
)
