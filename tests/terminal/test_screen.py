"""A screen shows what its console can take, and never fails."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from fusedlm.terminal.screen import Screen


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("file", [Full(), closed()], ids=["full", "closed"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_that_cannot_be_written_is_given_up(file, terminal: bool):
    screen = Screen(Console(file=file, force_terminal=terminal, width=40))
    assert screen.has_bars is terminal
    progress = Progress(console=screen.console, auto_refresh=False)
    progress.add_task("a", total=1)
    screen.start(progress)
    screen.note("a")
    screen.stop(progress)
    assert not screen.has_bars


def test_a_note_is_one_line_as_it_is():
    file = io.StringIO()
    screen = Screen(Console(file=file, width=20))
    screen.note("a [bold]  long\nline\x1b[2J of :smile: more than 20 characters")
    assert file.getvalue() == r"a [bold]  long\x0aline\x1b[2J of :smile: more than 20 characters" + "\n"
