"""Small experiments on what a model can recall and how long its context can be."""

from fusedlm.probes.coordinates import probe_coordinates
from fusedlm.probes.extend import probe_extend
from fusedlm.probes.mqar import Recall, probe_mqar
from fusedlm.probes.needle import finetune, probe_needle

__all__ = ["Recall", "finetune", "probe_coordinates", "probe_extend", "probe_mqar", "probe_needle"]
