"""A console of rich that cannot end the work whose progress it shows."""

import contextlib

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from fusedlm.terminal.text import printable


def plain(text: str) -> Text:
    """One line for rich, shown as it is: no markup, no emoji codes, and control characters escaped."""
    return Text(printable(text).replace("\n", r"\x0a"))


class Screen:
    """Prints lines, tables and bars. When the console can no longer be written, nothing more is shown.

    Args:
        console: None: nothing is shown.
    """

    def __init__(self, console: Console | None):
        self.console = console if console is not None else Console(quiet=True, force_terminal=False)
        self._lost = False
        self.console.on_broken_pipe = self._end

    def _end(self) -> None:
        """Called by rich at a closed pipe, also in the thread that draws bars, where SystemExit shows nothing. Its own
        method would redirect the standard output of the process, whatever file the console writes to."""
        self.console.quiet = True
        raise SystemExit(1)

    @property
    def has_bars(self) -> bool:
        """Whether progress is shown as bars: on a terminal."""
        return self.console.is_terminal and not self.console.quiet and not self._lost

    def note(self, text: str) -> None:
        """Print one line of text, above the bars if there are any."""
        self.print(plain(text), soft_wrap=True)

    def print(self, renderable: RenderableType, **options) -> None:
        self._try(self.console.print, renderable, **options)

    def start(self, progress: Progress) -> None:
        """Show bars that were made for this console."""
        self._try(progress.start)
        if self._lost:
            self.stop(progress)

    def stop(self, progress: Progress) -> None:
        with contextlib.suppress(OSError, ValueError, SystemExit):
            progress.stop()

    def _try(self, action, *arguments, **options) -> None:
        if self._lost:
            return
        try:
            action(*arguments, **options)
        except (OSError, ValueError, SystemExit):  # a closed file is a ValueError; rich exits at a closed pipe
            self._lost = True
