"""Small experiments on what a model can recall and how far its context reaches."""

from fusedlm.probes.extend import extend
from fusedlm.probes.mqar import Recall, mqar
from fusedlm.probes.needle import needle, teach

__all__ = ["Recall", "extend", "mqar", "needle", "teach"]
