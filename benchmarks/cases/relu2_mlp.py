"""Squared leaky ReLU feed-forward at two widths, with and without a slope."""

from functools import partial

from benchmarks.cases import feed_forward
from benchmarks.harness import Op
from fusedlm.ops.relu2 import reference, triton


def problems(shape: tuple, device, dtype):
    *size, slope = shape
    eager, fused = (partial(function.relu2_mlp, slope=slope) for function in (reference, triton))
    return feed_forward.problems("relu2_mlp", eager, fused, 1, size, device, dtype, f", slope {slope}")


OP = Op(
    "relu2_mlp",
    shapes=[(65536, 512, 1536, 0.5), (16384, 2048, 6144, 0.5), (65536, 512, 1536, 0.0), (16384, 2048, 6144, 0.0)],
    quick_shapes=[(9, 16, 24, 0.5)],
    problems=problems,
)
