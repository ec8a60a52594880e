"""SwiGLU feed-forward at two widths."""

from functools import partial

from benchmarks.cases import feed_forward
from benchmarks.harness import Op
from fusedlm.ops.swiglu import reference, triton

OP = Op(
    "swiglu_mlp",
    shapes=[(65536, 512, 1408), (16384, 2048, 5504)],
    quick_shapes=[(9, 16, 24)],
    problems=partial(feed_forward.problems, "swiglu_mlp", reference.swiglu_mlp, triton.swiglu_mlp, 2),
)
