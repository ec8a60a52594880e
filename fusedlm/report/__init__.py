"""The report of a run: one self-contained HTML page with plots."""

from fusedlm.report.write import write_report

__all__ = ["write_report"]
