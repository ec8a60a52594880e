"""Progress in bytes, reported about once a megabyte."""

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]

_REPORT_BYTES = 1 << 20


class Meter:
    """Counts the bytes of one stage.

    Args:
        report: called as report(stage, bytes done, bytes in all or None).
        total: None where it is not known beforehand.
    """

    def __init__(self, report: Progress, stage: str, total: int | None):
        self.done = self._reported = 0
        self._report, self._stage, self._total = report, stage, total

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.done - self._reported >= _REPORT_BYTES:
            self._reported = self.done
            self._report(self._stage, self.done, self._total)

    def finish(self) -> None:
        """Report the end: what was done is all."""
        self._report(self._stage, self.done, self.done)


def silent(stage: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""
