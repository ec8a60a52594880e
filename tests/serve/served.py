"""A server on a free port of this machine, in a thread of the test."""

import json
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

from fusedlm.serve.app import AppOptions, make_app
from fusedlm.serve.server import Server, bind
from fusedlm.serve.worker import ThreadWorker, Worker

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Served:
    """engine: as `serving` got it; must only be looked at while the server is idle."""

    def __init__(self, engine, server, port):
        self.engine, self.server, self.port = engine, server, port
        self.url = f"http://127.0.0.1:{port}"

    def send(self, method: str, path: str, body=None, **headers):
        """(status, headers, text) of one request; body: bytes, or anything as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def post(self, path: str, body) -> dict:
        status, _, text = self.send("POST", path, body)
        assert status == 200, text
        return json.loads(text)

    def events(self, path: str, body) -> list[dict]:
        status, headers, text = self.send("POST", path, body)
        assert status == 200 and headers["content-type"].startswith("text/event-stream")
        *lines, last, end = text.split("\n\n")
        assert last == "data: [DONE]" and end == ""
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def wait_idle(self) -> None:
        """Until all that was cancelled is gone."""
        deadline = time.monotonic() + 30
        while not self.server._service.worker.call(_is_idle).result():
            assert time.monotonic() < deadline, "the engine still runs"
            time.sleep(0.01)


def _is_idle(engine) -> bool:
    return engine.is_idle


@contextmanager
def serving(engine, *, template=None, grace: float = 5, **options):
    """engine: or a worker."""
    worker = engine if isinstance(engine, Worker) else ThreadWorker(engine)
    options = AppOptions(name="small", template=template, **options)
    with bind("127.0.0.1", 0) as listening:
        server = Server(make_app(worker, options), grace=grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Served(engine, server, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
