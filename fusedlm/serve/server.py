"""The server process: a socket, uvicorn, and an orderly end."""

import asyncio
import socket
import sys

import uvicorn

_LAST_WORDS = 5  # seconds for streams to end after their sequences have
# Seconds for which the loop may keep the interpreter from the thread that brings it pieces; Python: 5e-3.
_SWITCH_INTERVAL = 5e-4


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: a free one.

    Raises:
        ValueError: the address is not one of this machine, or the port is taken.
    """
    if not 0 <= port < 2**16:  # the system would take the rest of the division
        raise ValueError(f"--port {port}: must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(2048)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot listen on {host} port {port}: {reason}; choose others by --host and --port") from None
    return found


class Server(uvicorn.Server):
    """Ends in order at SIGTERM or SIGINT: no new requests; those that run have `grace` seconds to finish; what still
    runs then is ended, streams with an error event and [DONE]."""

    def __init__(self, app, *, grace: float, log_level: str = "warning"):
        config = uvicorn.Config(
            app,
            log_level=log_level,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=int(grace) + _LAST_WORDS,
            server_header=False,
        )
        super().__init__(config)
        self._service, self._grace = app.state.service, grace

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        try:
            super().run(sockets)
        finally:
            sys.setswitchinterval(before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        ending = asyncio.get_running_loop().call_later(self._grace, self._service.worker.end_all)
        await super().shutdown(sockets)
        ending.cancel()
