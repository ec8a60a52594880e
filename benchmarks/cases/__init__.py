"""What benchmarks/run.py measures: one module an op."""

from benchmarks.cases import (
    differential_combine,
    linear_softcap_cross_entropy,
    relu2_mlp,
    softcap_cross_entropy,
    swiglu_mlp,
)
from benchmarks.harness import Op

_MODULES = (softcap_cross_entropy, linear_softcap_cross_entropy, differential_combine, relu2_mlp, swiglu_mlp)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
