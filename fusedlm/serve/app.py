"""The HTTP application: OpenAI's endpoints, health, metrics and a page to try them."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fusedlm.serve.errors import RequestError
from fusedlm.serve.fields import ChatBody, CompletionBody, parse_body
from fusedlm.serve.jobs import Job, JobMaker
from fusedlm.serve.metrics import engine_lines
from fusedlm.serve.requests import Piece, QueueFull, Sequence
from fusedlm.serve.responses import Choice, Writer
from fusedlm.serve.sse import EventStream, unless_disconnected
from fusedlm.serve.worker import Stopped, Worker

_PAGE = Path(__file__).with_name("page.html")
_CLIENT_CLOSED = 499  # nobody reads it
_SHORT_BODY = 2**12  # bytes: tokenizing more takes long enough to hold up the streams of others, and is for a thread


@dataclass(frozen=True)
class AppOptions:
    """name: of the model. template: of chats; None: there is none. api_key: that clients must send; None: none.
    max_body: bytes of a request."""

    name: str
    template: object = None
    api_key: str | None = None
    max_body: int = 2**22


class Service:
    """What the endpoints share. draining: no new requests are taken."""

    def __init__(self, worker: Worker, options: AppOptions):
        self.worker = worker
        self.options = options
        self.draining = False
        facts = worker.facts
        self._tokenizer = facts.tokenizer
        self._jobs = JobMaker(facts.tokenizer, facts.vocab_size, facts.context, options.name, options.template)
        self._context, self._started = facts.context, int(time.time())
        self._answers: dict[tuple[str, int], int] = {}

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive and not self.draining
        return JSONResponse({"status": "ok" if alive else "shutting down"}, 200 if alive else 503)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        model = self._model()
        if name := request.path_params.get("name"):
            if name != self.options.name:
                raise RequestError(f"model {name!r} is not served", status=404, code="model_not_found")
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    def _model(self) -> dict:
        return {
            "id": self.options.name,
            "object": "model",
            "created": self._started,
            "owned_by": "fusedlm",
            "max_model_len": self._context,
            "chat": self.options.template is not None,
        }

    async def metrics(self, request: Request) -> Response:
        self._check_key(request)
        lines = await asyncio.wrap_future(self.worker.call(engine_lines))
        lines += ["# HELP fusedlm_requests_total Answers, by path and status.", "# TYPE fusedlm_requests_total counter"]
        for (path, status), n in sorted(self._answers.items()):
            lines.append(f'fusedlm_requests_total{{path="{path}",status="{status}"}} {n}')
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Response:
        return await self._serve(request, CompletionBody, self._jobs.completion)

    async def chat(self, request: Request) -> Response:
        return await self._serve(request, ChatBody, self._jobs.chat)

    def count(self, path: str, status: int) -> None:
        self._answers[path, status] = self._answers.get((path, status), 0) + 1

    async def _serve(self, request: Request, kind, make) -> Response:
        self._check_key(request)
        if self.draining:
            raise RequestError("the server is shutting down", status=503)
        raw = await self._body(request)
        if len(raw) > _SHORT_BODY:
            job = await run_in_threadpool(lambda: make(parse_body(raw, kind)))
        else:
            job = make(parse_body(raw, kind))
        pieces: asyncio.Queue[tuple[Sequence, Piece]] = asyncio.Queue()
        try:
            await self.worker.submit(job.sequences, lambda sequence, piece: pieces.put_nowait((sequence, piece)))
        except QueueFull as full:
            raise RequestError(str(full), status=429, code="queue_full") from None
        except Stopped:
            raise RequestError("the server is shutting down", status=503) from None
        if job.stream:
            return EventStream(self._events(job, pieces), lambda: self.worker.cancel(job.sequences))
        answer = await unless_disconnected(request.receive, self._whole(job, pieces))
        return Response(status_code=_CLIENT_CLOSED) if answer is None else JSONResponse(answer)

    async def _whole(self, job: Job, pieces: asyncio.Queue) -> dict:
        index = {sequence.number: i for i, sequence in enumerate(job.sequences)}
        choices = [Choice() for _ in job.sequences]
        try:
            async for sequence, piece in _until_all_end(job, pieces):
                choice = choices[index[sequence.number]]
                choice.text += piece.text
                choice.tokens += piece.tokens
                choice.finish = piece.finish
        finally:
            self.worker.cancel(job.sequences)
        return Writer(job, self._tokenizer, self.options.name).whole(choices)

    async def _events(self, job: Job, pieces: asyncio.Queue) -> AsyncIterator[dict]:
        index = {sequence.number: i for i, sequence in enumerate(job.sequences)}
        writer, begun = Writer(job, self._tokenizer, self.options.name), set()
        try:
            for chunk in writer.first_chunks():
                yield chunk
            async for sequence, piece in _until_all_end(job, pieces):
                i = index[sequence.number]
                if chunk := writer.chunk(i, piece, is_first=i not in begun):
                    yield chunk
                begun.add(i)
            if job.include_usage:
                yield writer.usage_chunk()
        except RequestError as error:
            yield error.body()

    async def _body(self, request: Request) -> bytes:
        most, found = self.options.max_body, bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > most:
                raise RequestError(f"the body has more than {most} bytes", status=413, code="body_too_large")
        return bytes(found)

    def _check_key(self, request: Request) -> None:
        if self.options.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.options.api_key.encode()):
            raise RequestError("the API key is missing or wrong; send Authorization: Bearer KEY", status=401)


async def _until_all_end(job: Job, pieces: asyncio.Queue) -> AsyncIterator[tuple[Sequence, Piece]]:
    """The pieces of a job, until every choice has ended. Those that came while the last one was sent are one: the
    engine does not wait for the loop, and a loop that is behind has fewer events to send.

    Raises:
        RequestError: a choice ended for a reason that is not its own.
    """
    left = len(job.sequences)
    while left:
        for sequence, piece in _joined([await pieces.get(), *_waiting(pieces)]):
            if piece.finish == "error":
                raise RequestError(piece.error, status=500, code="engine_error")
            if piece.finish == "shutdown":
                raise RequestError("the server shut down before the end", status=503, code="shutdown")
            yield sequence, piece
            left -= piece.finish is not None


def _waiting(pieces: asyncio.Queue) -> list[tuple[Sequence, Piece]]:
    return [pieces.get_nowait() for _ in range(pieces.qsize())]


def _joined(found: list[tuple[Sequence, Piece]]) -> list[tuple[Sequence, Piece]]:
    """One piece per sequence, but for an end that is not its own, which has no text to add."""
    joined: dict[int, tuple[Sequence, Piece]] = {}
    ends = []
    for sequence, piece in found:
        if piece.finish in ("error", "shutdown"):
            ends.append((sequence, piece))
            continue
        before = joined[sequence.number][1] if sequence.number in joined else Piece()
        piece = Piece(before.text + piece.text, before.tokens + piece.tokens, piece.finish)
        joined[sequence.number] = sequence, piece
    return [*joined.values(), *ends]


class _Counted:
    """Counts the answers of known paths by their status."""

    def __init__(self, app, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in _COUNTED else "other"
                self._service.count(path, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


_COUNTED = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def make_app(worker: Worker, options: AppOptions) -> Starlette:
    """The application; its lifespan is that of the worker. `app.state.service` is the `Service`."""
    service = Service(worker, options)

    @asynccontextmanager
    async def lifespan(app):
        service.worker.start()
        try:
            yield
        finally:
            service.draining = True
            await run_in_threadpool(service.worker.stop)

    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handlers = {RequestError: _refused, HTTPException: _http_error, ClientDisconnect: _gone, Stopped: _stopped}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(_Counted, service=service)
    app.state.service = service
    return app


async def _refused(request: Request, error: RequestError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    answer = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code).response()
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


async def _stopped(request: Request, error: Stopped) -> Response:
    return RequestError("the server is shutting down", status=503).response()
