"""Standard streams that are closed, full, narrow or watched by a terminal."""

import errno
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from fusedlm.terminal import make_console, outlast_output, standard_streams


class Fails(io.StringIO):
    """Takes `good` writes, then fails."""

    def __init__(self, error: Exception, good: int = 0):
        super().__init__()
        self.error, self.good = error, good

    def write(self, text: str) -> int:
        if self.good == 0:
            raise self.error
        self.good -= 1
        return super().write(text)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch):
    """Set sys.stdout, and get sys.stderr as a StringIO."""

    def use(out) -> io.StringIO:
        err = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return err

    return use


FULL, CLOSED = OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("error", "warning"),
    [
        (FULL, "warning: nothing more is shown on standard output: No space left on device\n"),
        (ValueError("closed file"), "warning: nothing more is shown on standard output: closed file\n"),
        (CLOSED, ""),
    ],
)
def test_work_outlasts_its_output(streams, error, warning):
    out = Fails(error, good=2)
    err = streams(out)
    with standard_streams(), outlast_output():
        for text in "abc":
            print(text)
        Console().print("d")
        sys.stdout.flush()
    assert out.getvalue() == "a\n"
    assert err.getvalue().startswith(warning) and err.getvalue().count("\n") == bool(warning)


@pytest.mark.parametrize("error", [FULL, CLOSED])
def test_elsewhere_a_failed_write_raises_once(streams, error):
    streams(Fails(error))
    with standard_streams():
        with pytest.raises(OSError, match=error.strerror):
            print("a")
        assert sys.stdout.failure is error
        print("b", flush=True)


def test_a_failed_write_to_standard_error_is_dropped(streams, monkeypatch):
    streams(io.StringIO())
    monkeypatch.setattr(sys, "stderr", Fails(FULL))
    with standard_streams():
        print("error", file=sys.stderr)


def test_what_an_encoding_lacks_is_replaced(streams):
    raw = io.BytesIO()
    streams(io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    with standard_streams():
        print("é ─ … 5 × 4 \udcff 😀", flush=True)
    assert raw.getvalue() == rb"\xe9 - ... 5 x 4 \xff \U0001f600" + b"\n"


@pytest.mark.parametrize(("out", "shown"), [(Terminal(), r"\x1b[2J" + "\n"), (io.StringIO(), "\x1b[2J\n")])
def test_what_is_printed_cannot_drive_a_terminal(streams, out, shown):
    err = streams(out)
    with standard_streams():
        print("\x1b[2J")
        print("\x1b[2J", file=sys.stderr)
    assert (out.getvalue(), err.getvalue()) == (shown, r"\x1b[2J" + "\n")
    assert sys.stdout is out


def test_consoles_keep_their_own_escapes(streams, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    streams(out)
    with standard_streams():
        make_console().print("[red]a[/red]")
        Console().print("[red]b[/red]")
    assert out.getvalue().count("\x1b[31m") == 2


CODE = """
import os, sys
from fusedlm.terminal import standard_streams
with standard_streams():
    print("out"); print("err", file=sys.stderr)
    opened = os.open(os.devnull, os.O_RDONLY)
    sys.exit(0 if opened > 2 else 9)
"""


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_descriptors_are_not_given_to_files(closed):
    def close():
        for descriptor in closed:
            os.close(descriptor)

    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, preexec_fn=close)
    assert done.returncode == 0
    assert done.stdout == ("" if 1 in closed else "out\n")
    assert done.stderr == ("" if 2 in closed else "err\n")
