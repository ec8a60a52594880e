"""Stop at a step boundary on SIGINT or SIGTERM."""

import signal
import threading


class StopSignal:
    """Context in which the first SIGINT or SIGTERM sets `received`, and a second one has its usual effect.

    The previous handlers are restored at the first signal and at the end of the context. Outside the main thread, where
    Python allows no handlers, nothing is changed.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in self._NUMBERS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _handle(self, number, frame) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be restored from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
