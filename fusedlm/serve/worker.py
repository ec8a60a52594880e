"""The thread that steps an engine, and the way to it from an event loop."""

import asyncio
import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from fusedlm.serve.engine import Engine
from fusedlm.serve.requests import Piece, Sequence

T = TypeVar("T")
Sink = Callable[[Sequence, Piece], None]
Pieces = list[tuple[Sequence, Piece]]

_log = logging.getLogger("fusedlm.serve")


class Stopped(Exception):
    """The engine's thread or process has ended, or ends."""


class EngineThread:
    """Runs an engine in a thread of its own. The thread alone touches it: what others want is a command that runs
    between two steps.

    Args:
        deliver: called in the thread with the pieces of each step; those of sequences that were cancelled are left out.
    """

    def __init__(self, engine: Engine, deliver: Callable[[Pieces], None]):
        self._engine, self._deliver = engine, deliver
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], object], Future] | None] = queue.SimpleQueue()
        self._waited: dict[int, Sequence] = {}  # all that somebody waits for, by number
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

    def submit(self, sequences: list[Sequence]) -> "Future[None]":
        """Queue sequences: an error of the future is one of `Engine.submit`. Raises Stopped as `call`."""

        def command(engine: Engine) -> None:
            engine.submit(sequences)
            self._waited.update({sequence.number: sequence for sequence in sequences})

        return self.call(command)

    def cancel(self, numbers: list[int]) -> None:
        """Forget sequences, soon; those that have ended are left alone."""

        def command(engine: Engine) -> None:
            for number in numbers:
                sequence = self._waited.pop(number, None)
                if sequence is not None:
                    engine.cancel(sequence)

        with contextlib.suppress(Stopped):
            self.call(command)

    def end_all(self) -> None:
        """End all sequences, with the finish "shutdown"."""

        def command(engine: Engine) -> None:
            for sequence in engine.sequences():
                engine.cancel(sequence)
            self._end_waited(Piece(finish="shutdown"))

        with contextlib.suppress(Stopped):
            self.call(command)

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
                self._end_waited(Piece(finish="error", error=f"the engine failed: {type(error).__name__}: {line}"))
                if not self._recover():
                    return
                continue
            pieces = [(sequence, piece) for sequence, piece in pieces if sequence.number in self._waited]
            for sequence, piece in pieces:
                if piece.finish:
                    del self._waited[sequence.number]
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

    def _end_waited(self, piece: Piece) -> None:
        pieces = [(sequence, piece) for sequence in self._waited.values()]
        self._waited.clear()
        self._deliver(pieces)


@dataclass(frozen=True)
class EngineFacts:
    """What requests are checked by. vocab_size: of the model. context: most tokens of a prompt with its continuation.
    """

    tokenizer: object
    vocab_size: int
    context: int

    @staticmethod
    def of(engine: Engine) -> "EngineFacts":
        return EngineFacts(engine.tokenizer, engine.model.vocab_size, engine.limits.context)


class Worker(ABC):
    """Runs an engine for an event loop, which gets the pieces of each sequence.

    facts: of the engine.
    """

    facts: EngineFacts

    def __init__(self):
        # By the number of the sequence. Any thread may change them.
        self._sinks: dict[int, tuple[Sequence, asyncio.AbstractEventLoop, Sink]] = {}

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it takes sequences."""

    @abstractmethod
    def start(self) -> None:
        """Before the first sequence."""

    @abstractmethod
    def stop(self) -> None:
        """End all sequences and the engine, and wait for it."""

    @abstractmethod
    def call(self, command: Callable[[Engine], T]) -> "Future[T]":
        """Run a command between two steps.

        Raises:
            Stopped: the engine has been stopped.
        """

    @abstractmethod
    def end_all(self) -> None:
        """End all sequences, with the finish "shutdown"."""

    @abstractmethod
    def _submit(self, sequences: list[Sequence]) -> "Future[None]":
        """As `EngineThread.submit`."""

    @abstractmethod
    def _cancel(self, numbers: list[int]) -> None:
        """As `EngineThread.cancel`."""

    async def submit(self, sequences: list[Sequence], sink: Sink) -> None:
        """Queue sequences; sink(sequence, piece) is then called in this event loop, and for the last time with a piece
        that has a finish.

        Raises:
            QueueFull, ValueError: as `Engine.submit`.
            Stopped: the engine has been stopped.
        """
        loop = asyncio.get_running_loop()
        # Before: the first piece may come at once.
        self._sinks.update({sequence.number: (sequence, loop, sink) for sequence in sequences})
        try:
            await asyncio.wrap_future(self._submit(sequences))
        except BaseException:
            self.cancel(sequences)
            raise

    def cancel(self, sequences: list[Sequence]) -> None:
        """Forget sequences, soon; those that have ended are left alone."""
        numbers = [sequence.number for sequence in sequences]
        # One that has no sink any more has ended.
        left = [number for number in numbers if self._sinks.pop(number, None) is not None]
        if left:
            self._cancel(left)

    def _deliver(self, pieces: Pieces) -> None:
        """One call into each event loop for all pieces of a step."""
        by_loop: dict[asyncio.AbstractEventLoop, list] = {}
        for sequence, piece in pieces:
            take = self._sinks.pop if piece.finish else self._sinks.get
            entry = take(sequence.number, None)
            if entry is not None:
                _, loop, sink = entry
                by_loop.setdefault(loop, []).append((sink, sequence, piece))
        for loop, entries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_hand_out, entries)
            except RuntimeError:  # the loop is closed, and nobody waits there
                self.cancel([sequence for _, sequence, _ in entries])


class ThreadWorker(Worker):
    """Runs an engine in a thread of this process, whose interpreter it shares with the event loop."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.facts = EngineFacts.of(engine)
        self._thread = EngineThread(engine, self._deliver)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def call(self, command: Callable[[Engine], T]) -> "Future[T]":
        return self._thread.call(command)

    def end_all(self) -> None:
        self._thread.end_all()

    def _submit(self, sequences: list[Sequence]) -> "Future[None]":
        return self._thread.submit(sequences)

    def _cancel(self, numbers: list[int]) -> None:
        self._thread.cancel(numbers)


def _hand_out(entries: list[tuple[Sink, Sequence, Piece]]) -> None:
    for sink, sequence, piece in entries:
        sink(sequence, piece)
