"""Small experiments on what a model can recall and how far its context reaches."""

from fusedlm.probes.extend import probe_extend
from fusedlm.probes.mqar import Recall, probe_mqar
from fusedlm.probes.needle import probe_needle, teach

__all__ = ["Recall", "probe_extend", "probe_mqar", "probe_needle", "teach"]
