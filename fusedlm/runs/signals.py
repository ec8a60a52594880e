"""Stop at a step boundary on SIGINT, SIGTERM or SIGHUP."""

import signal
import threading


class StopSignal:
    """Context in which the first SIGINT, SIGTERM or SIGHUP (the terminal was closed) sets `received`.

    A second SIGINT or SIGTERM has its usual effect: their handlers are restored at the first signal, those of all at
    the end of the context. A further SIGHUP is ignored, since a terminal that is closed sends several. A signal that
    was ignored stays ignored: SIGHUP under nohup, SIGINT in the background of a script. Outside the main thread, where
    Python allows no handlers, nothing is changed.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in self._NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        self._restore(self._NUMBERS)

    def _handle(self, number, frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._restore((signal.SIGINT, signal.SIGTERM))

    def _restore(self, numbers) -> None:
        for number in numbers:
            if number in self._previous:
                handler = self._previous.pop(number)
                # None: a handler that was not installed from Python, and cannot be restored from it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
