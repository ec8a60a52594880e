"""fusedlm report: one page about a run."""

from fusedlm.cli.common import RunArgument


def report(run: RunArgument) -> None:
    """Write RUN/report.html, one self-contained page, and its plots as PNG files; print where it is."""
    from fusedlm.report import write_report

    print(write_report(run))
