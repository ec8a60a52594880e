"""Answers to requests that cannot be served, as OpenAI's clients read them."""

from starlette.responses import JSONResponse


class RequestError(Exception):
    """A request that is refused with a status of 4xx or 5xx and one line.

    param: the key of the body. code: a name for programs.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = one_line(message), status, param, code

    def body(self) -> dict:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_LONGEST = 400  # characters of a message


def one_line(text: str) -> str:
    """Without line ends, control characters and lone surrogates, and not longer than fits a log."""
    line = " ".join(text.split()).encode("utf-8", errors="replace").decode()
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def shown(value) -> str:
    """A value in an error, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
