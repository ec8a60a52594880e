"""Progress in bytes, reported about once per megabyte."""

from collections.abc import Callable

ReportProgress = Callable[[str, int, int | None], None]  # (stage, done, total or None)

_REPORT_BYTES = 1 << 20


class Meter:
    """Counts the bytes of one stage.

    Args:
        report: called as report(stage, bytes done, total or None).
        total: bytes of the stage; None: unknown.
    """

    def __init__(self, report: ReportProgress, stage: str, total: int | None):
        self.done = self._reported = 0
        self._report, self._stage, self._total = report, stage, total

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.done - self._reported >= _REPORT_BYTES:
            self._reported = self.done
            self._report(self._stage, self.done, self._total)

    def finish(self) -> None:
        """Report the stage as complete."""
        self._report(self._stage, self.done, self.done)


def silent(stage: str, done: int, total: int | None) -> None:
    """ReportProgress that shows nothing."""
