"""Server-sent events that end when their client goes away."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy must not collect them
]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventStream:
    """An ASGI application that sends each item of an iterator as an event, then [DONE].

    When the client disconnects, the iterator is closed at once, wherever it waits. close is called at the end, however
    it comes.
    """

    def __init__(self, events: AsyncIterator[dict], close: Callable[[], None]):
        self._events, self._close = events, close

    async def __call__(self, scope, receive, send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watching, sending):
                task.cancel()
            await asyncio.gather(watching, sending, return_exceptions=True)
            await self._events.aclose()
            self._close()
        if not sending.cancelled() and (error := sending.exception()) is not None and not isinstance(error, OSError):
            raise error

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        async for event in self._events:
            await send({"type": "http.response.body", "body": _line(event), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _line(event: dict) -> bytes:
    return b"data: " + _encode(event).encode() + b"\n\n"


async def disconnected(receive: Callable[[], Awaitable[dict]]) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive, wanted: Awaitable):
    """The result of `wanted`; None if the client went away first, which cancels it."""
    working = asyncio.ensure_future(wanted)
    watching = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (watching, working):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working
        await asyncio.gather(watching, return_exceptions=True)
