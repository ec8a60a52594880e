"""Standard output and error that survive a closed pipe, a full disk, a closed descriptor and a narrow encoding."""

import contextlib
import os
import sys
from collections.abc import Iterator

from fusedlm.terminal.text import ENCODE_ERRORS, one_line, printable


class LastingStream:
    """A text stream whose first failed write is recorded, and after which everything is dropped.

    Args:
        lasts: whether that write is dropped too, with a warning. If not, it raises.

    Attributes:
        failure: the error of that write; None: there was none.
    """

    def __init__(self, stream, *, lasts: bool):
        self._stream, self.lasts = stream, lasts
        self.failure: OSError | ValueError | None = None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action, *arguments) -> None:
        if self.failure is not None:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self.failure = error
            self._discard()
            if not self.lasts:
                raise
            # A closed pipe needs no warning: `| head` has seen enough.
            if self is _innermost(sys.stdout) and not isinstance(error, BrokenPipeError):
                reason = getattr(error, "strerror", None) or error
                print(f"warning: nothing more is shown on standard output: {one_line(str(reason))}", file=sys.stderr)

    def _discard(self) -> None:
        """Drop what is buffered: the interpreter would fail on it again at exit."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


class PrintableStream:
    """What print() writes to a stream, made printable. Consoles of rich, whose escapes are their own, pass it by."""

    def __init__(self, stream: LastingStream):
        self.rich_proxied_file = stream  # the name under which rich looks for the stream to write to

    def __getattr__(self, name: str):
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(printable(text))


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr able to take any text, inside the context.

    Characters that the encoding lacks are replaced. A closed stream becomes one that drops everything. On a terminal,
    control characters and bidirectional marks in what is printed are escaped, on standard error always. A failed write
    to standard error is dropped; to standard output it raises, outside of `outlast_output`.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    out, err = LastingStream(_any_text(sys.stdout), lasts=False), LastingStream(_any_text(sys.stderr), lasts=True)
    sys.stdout = PrintableStream(out) if _is_terminal(out) else out
    sys.stderr = PrintableStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def outlast_output() -> Iterator[None]:
    """Context in which work continues when standard output can no longer be written. A warning says so, unless a pipe
    was closed."""
    stream = _innermost(sys.stdout)
    if not isinstance(stream, LastingStream):  # called from a program of its own
        yield
        return
    stream.lasts = True
    try:
        yield
    finally:
        stream.flush()
        stream.lasts = False


def make_console(*, stderr: bool = False):
    """A console of rich on standard output or error. It writes around the escaping of `standard_streams`, also while a
    live display has replaced the stream."""
    from rich.console import Console

    return Console(file=_innermost(sys.stderr if stderr else sys.stdout))


def _innermost(stream):
    while (inner := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = inner
    return stream


def _is_terminal(stream) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _any_text(stream):
    """The stream, with an error handler that replaces what its encoding lacks."""
    if hasattr(stream, "reconfigure") and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
        stream.reconfigure(errors=ENCODE_ERRORS)
    return stream


def _open_closed() -> None:
    """Give closed standard streams the null device. The next file to be opened would else take a free descriptor, and
    receive what other code writes to it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)
