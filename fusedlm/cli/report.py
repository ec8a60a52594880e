"""fusedlm report: an HTML page about a run."""

from fusedlm.cli.common import RunArgument


def report(run: RunArgument) -> None:
    """Write RUN/report.html, a self-contained page, and its plots as PNG files; print the path."""
    from fusedlm.report import write_report

    print(write_report(run))
