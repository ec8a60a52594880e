"""Models of a run in the formats of other programs, and back."""

from fusedlm.export.from_hf import import_run, load_folder
from fusedlm.export.to_hf import export_run

__all__ = ["export_run", "import_run", "load_folder"]
