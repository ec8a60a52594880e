"""An engine in a process of its own, so that its steps and HTTP do not wait for each other's interpreter."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import TypeVar

from fusedlm.serve.engine import Engine
from fusedlm.serve.requests import Group, Piece, ScoredToken, Sequence
from fusedlm.serve.worker import EngineFacts, EngineThread, Pieces, Stopped, Worker

T = TypeVar("T")

_PATIENCE = 10  # seconds for which the process may take to end
_ENDED = "the engine's process has ended"


class ProcessWorker(Worker):
    """Runs an engine in a process of its own.

    The process ends with this one, however this one ends. Signals of a terminal do not reach it.

    Args:
        build: makes the engine there; it is pickled, and so are commands.

    Raises:
        Exception: what `build` raised.
        ValueError: the process ended before it had an engine.
    """

    def __init__(self, build: Callable[[], Engine]):
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(build, theirs), name="fusedlm-engine", daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()  # of the connection, and of what follows
        self._tickets = itertools.count()
        self._answers: dict[int, Future] = {}
        self._is_open = True
        try:
            found = self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            raise ValueError(f"{_ENDED} with status {status} before it had a model; is there enough memory?") from None
        except BaseException:
            self._process.terminate()
            raise
        if isinstance(found, BaseException):
            self._process.join()
            raise found
        self.facts = found
        self._reader = threading.Thread(target=self._read, name="fusedlm-pieces", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._is_open

    def start(self) -> None:
        self._reader.start()

    def stop(self) -> None:
        with contextlib.suppress(Stopped):
            self._send("stop", None)
        if self._reader.ident is not None:
            self._reader.join(_PATIENCE)  # until the process has closed its end
        self._process.join(_PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._connection.close()

    def call(self, command: Callable[[Engine], T]) -> "Future[T]":
        return self._ask("call", command)

    def end_all(self) -> None:
        with contextlib.suppress(Stopped):
            self._send("end_all", None)

    def _submit(self, sequences: list[Sequence]) -> "Future[None]":
        return self._ask("submit", _packed(sequences))

    def _cancel(self, numbers: list[int]) -> None:
        with contextlib.suppress(Stopped):
            self._send("cancel", numbers)

    def _ask(self, kind: str, value) -> Future:
        """The future of an answer."""
        future: Future = Future()
        ticket = next(self._tickets)
        self._answers[ticket] = future
        try:
            self._send(kind, (ticket, value))
        except BaseException:
            self._answers.pop(ticket, None)
            raise
        return future

    def _send(self, kind: str, value) -> None:
        with self._lock:
            if not self._is_open:
                raise Stopped
            try:
                self._connection.send((kind, value))
            except OSError:  # the process has ended; the reader finds out too
                raise Stopped from None

    def _read(self) -> None:
        while True:
            try:
                kind, found = self._connection.recv()
            except (EOFError, OSError):
                break
            if kind == "pieces":
                self._deliver(self._unpacked(found))
            else:
                ticket, error, value = found
                future = self._answers.pop(ticket)
                if future.set_running_or_notify_cancel():
                    future.set_exception(error) if error is not None else future.set_result(value)
        with self._lock:
            self._is_open = False
        # Nobody may wait for what does not come any more.
        while self._answers:
            _, future = self._answers.popitem()
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopped())
        ended = Piece(finish="error", error=_ENDED)
        self._deliver([(sequence, ended) for sequence, _, _ in list(self._sinks.values())])

    def _unpacked(self, found: list[tuple]) -> Pieces:
        pieces = []
        for number, text, tokens, finish, error, counts, scores in found:
            entry = self._sinks.get(number)
            if entry is None:  # it was cancelled meanwhile
                continue
            sequence = entry[0]
            sequence.n_generated, sequence.cached_tokens = counts
            if scores is not None:
                sequence.prompt_scores = scores
            pieces.append((sequence, Piece(text, tuple(ScoredToken(*token) for token in tokens), finish, error)))
        return pieces


def _packed(sequences: list[Sequence]) -> list[tuple]:
    """What sequences are made of there; groups by their identity."""
    return [
        (
            (sequence.ids, sequence.choosing),
            {name: getattr(sequence, name) for name in _OPTIONS},
            None if sequence.group is None else (id(sequence.group), sequence.group.n_waiting),
        )
        for sequence in sequences
    ]


_OPTIONS = ("max_tokens", "stop", "seed", "score_prompt", "ignore_eot", "number")


def _sequences(packed: list[tuple], tokenizer) -> list[Sequence]:
    groups: dict[int, Group] = {}
    found = []
    for arguments, options, group in packed:
        own = None if group is None else groups.setdefault(group[0], Group(group[1]))
        found.append(Sequence(tokenizer, *arguments, **options, group=own))
    return found


def _packed_pieces(pieces: Pieces) -> list[tuple]:
    """As plain tuples, which are pickled and read in less time."""
    found = []
    for sequence, piece in pieces:
        tokens = [(token.id, token.start, token.logprob, token.top) for token in piece.tokens]
        counts, scores = (sequence.n_generated, sequence.cached_tokens), None
        if sequence.prompt_scores:
            scores, sequence.prompt_scores = sequence.prompt_scores, []  # once
        found.append((sequence.number, piece.text, tokens, piece.finish, piece.error, counts, scores))
    return found


def _run(build: Callable[[], Engine], connection: Connection) -> None:
    """The process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the process with the terminal, which then ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sending = threading.Lock()

    def send(message) -> None:
        # A closed connection: the other process has ended, and the loop below finds out.
        with sending, contextlib.suppress(OSError):
            connection.send(message)

    try:
        engine = build()
    except Exception as error:
        send(error)
        if isinstance(error, ValueError | OSError):  # for people; of a defect the traceback is here alone
            return
        raise
    send(EngineFacts.of(engine))
    thread = EngineThread(engine, lambda pieces: send(("pieces", _packed_pieces(pieces))))
    thread.start()

    def answer(ticket: int, future: Future) -> None:
        error = future.exception()
        try:
            send(("answer", (ticket, error, None if error is not None else future.result())))
        except Exception as unsent:  # what cannot be pickled
            send(("answer", (ticket, RuntimeError(f"{error or unsent!r}"), None)))

    def ask(ticket: int, ask_thread: Callable[[], Future]) -> None:
        try:
            ask_thread().add_done_callback(lambda future: answer(ticket, future))
        except Stopped as stopped:
            send(("answer", (ticket, stopped, None)))

    while True:
        try:
            kind, value = connection.recv()
        except EOFError:
            break
        if kind == "stop":
            break
        if kind == "submit":
            ticket, packed = value
            sequences = _sequences(packed, engine.tokenizer)
            ask(ticket, lambda sequences=sequences: thread.submit(sequences))
        elif kind == "call":
            ticket, command = value
            ask(ticket, lambda command=command: thread.call(command))
        elif kind == "cancel":
            thread.cancel(value)
        else:
            thread.end_all()
    thread.stop()
    connection.close()
