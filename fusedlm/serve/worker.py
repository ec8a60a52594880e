"""The thread that steps the engine, and the way to it from an event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from fusedlm.serve.engine import Engine
from fusedlm.serve.requests import Piece, Sequence

T = TypeVar("T")
Sink = Callable[[Sequence, Piece], None]

_log = logging.getLogger("fusedlm.serve")


class Stopped(Exception):
    """The engine's thread has ended, or ends."""


class Worker:
    """Runs an engine in a thread of its own. The thread alone touches it: what others want is a command that runs
    between two steps."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], object], Future] | None] = queue.SimpleQueue()
        # By the number of the sequence: all that somebody waits for.
        self._sinks: dict[int, tuple[Sequence, asyncio.AbstractEventLoop, Sink]] = {}
        self._thread = threading.Thread(target=self._run, name="fusedlm-engine", daemon=True)
        self._stopping, self._lock = False, threading.Lock()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def call(self, command: Callable[[Engine], T]) -> "Future[T]":
        """Run a command between two steps.

        Raises:
            Stopped: the thread has been stopped.
        """
        future: Future = Future()
        with self._lock:  # no command may come after the last one
            if not self.is_alive:
                raise Stopped
            self._commands.put((command, future))
        return future

    async def submit(self, sequences: list[Sequence], sink: Sink) -> None:
        """Queue sequences; sink(sequence, piece) is then called in this event loop, and for the last time with a piece
        that has a finish.

        Raises:
            QueueFull, ValueError: as `Engine.submit`.
            Stopped: the thread has been stopped.
        """
        loop = asyncio.get_running_loop()

        def command(engine: Engine) -> None:
            engine.submit(sequences)
            self._sinks.update({sequence.number: (sequence, loop, sink) for sequence in sequences})

        future = self.call(command)
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.cancel(sequences)
            raise

    def cancel(self, sequences: list[Sequence]) -> None:
        """Forget sequences, soon; those that have ended are left alone."""

        def command(engine: Engine) -> None:
            for sequence in sequences:
                self._sinks.pop(sequence.number, None)
                engine.cancel(sequence)

        with contextlib.suppress(Stopped):
            self.call(command)

    def end_all(self) -> None:
        """End all sequences, with the finish "shutdown"."""
        with contextlib.suppress(Stopped):
            self.call(lambda engine: self._end_all(Piece(finish="shutdown")))

    def stop(self) -> None:
        """End all sequences and the thread, and wait for it."""
        self.end_all()
        with self._lock:
            self._stopping = True
            self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.warm_up()
        except Exception:  # what fails here fails, or does not, when a sequence needs it
            _log.exception("CUDA graphs could not be captured before the first request")
            if not self._recover():
                return
        while True:
            if not self._obey(wait=self._engine.is_idle):
                return
            if self._engine.is_idle:
                continue
            try:
                pieces = self._engine.step()
            except Exception as error:
                # One failing step, as for lack of memory, must not leave clients waiting for ever.
                _log.exception("a step of the engine failed")
                line = " ".join(str(error).split())[:200]
                piece = Piece(finish="error", error=f"the engine failed: {type(error).__name__}: {line}")
                self._deliver([(sequence, piece) for sequence, _, _ in list(self._sinks.values())])
                if not self._recover():
                    return
                continue
            self._deliver(pieces)

    def _recover(self) -> bool:
        """Let the engine start again without sequences; False: it cannot, as after an error of the device that stays,
        and the thread ends."""
        try:
            self._engine.drop_all()
        except Exception:
            _log.exception("the engine cannot go on, and takes no more requests")
            with self._lock:
                self._stopping = True
            while not self._commands.empty():
                found = self._commands.get()
                if found is not None and found[1].set_running_or_notify_cancel():
                    found[1].set_exception(Stopped())
            return False
        return True

    def _obey(self, wait: bool) -> bool:
        """Run the commands that there are, or wait for one; False: stop."""
        while wait or not self._commands.empty():
            found = self._commands.get()
            if found is None:
                return False
            command, future = found
            wait = False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command(self._engine))
            except BaseException as error:
                future.set_exception(error)
        return True

    def _end_all(self, piece: Piece) -> None:
        for sequence in self._engine.sequences():
            self._engine.cancel(sequence)
        self._deliver([(sequence, piece) for sequence, _, _ in list(self._sinks.values())])

    def _deliver(self, pieces: list[tuple[Sequence, Piece]]) -> None:
        """One call into each event loop for all pieces of a step."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for sequence, piece in pieces:
            entry = self._sinks.get(sequence.number)
            if piece.finish:
                self._sinks.pop(sequence.number, None)
            if entry is not None:
                _, loop, sink = entry
                by_loop.setdefault(loop, []).append((sink, sequence, piece))
        for loop, entries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_hand_out, entries)
            except RuntimeError:  # the loop is closed, and nobody waits there
                for _, sequence, _ in entries:
                    self._sinks.pop(sequence.number, None)
                    self._engine.cancel(sequence)


def _hand_out(entries: list[tuple[Sink, Sequence, Piece]]) -> None:
    for sink, sequence, piece in entries:
        sink(sequence, piece)
