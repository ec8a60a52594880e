"""What benchmarks/run.py measures: one module an op."""

from benchmarks.cases import differential_combine, softcap_cross_entropy
from benchmarks.harness import Op

OPS: dict[str, Op] = {op.name: op for op in (softcap_cross_entropy.OP, differential_combine.OP)}
