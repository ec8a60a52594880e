"""fusedlm serve: what it refuses, and a server from its start to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("uvicorn")


def test_a_server_answers_until_it_is_told_to_end(finished, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    command = [sys.executable, "-m", "fusedlm", "serve", finished / "runs/small", "--port", "0", "--api-key-file", key]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert line.startswith("serving small at http://127.0.0.1:") and line.endswith(", context 16\n"), line
        url = line.split()[3].removesuffix(",")
        body = json.dumps({"prompt": "It is", "max_tokens": 4, "ignore_eos": True}).encode()
        request = Request(f"{url}/v1/completions", body, {"Authorization": "Bearer secret"})
        assert json.load(urlopen(request, timeout=60))["usage"]["completion_tokens"] == 4
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
        assert server.returncode == 128 + signal.SIGTERM and err == ""
    finally:
        server.kill()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the processes of Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(finished, number):
    """After Ctrl-C, which all processes of a terminal get, and after the death of the server."""
    command = [sys.executable, "-m", "fusedlm", "serve", finished / "runs/small", "--port", "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    server = subprocess.Popen(list(map(str, command)), **options)
    try:
        url = server.stdout.readline().split()[3].removesuffix(",")
        assert urlopen(f"{url}/health", timeout=60).status == 200
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert children
        os.killpg(server.pid, number)
        err = server.communicate(timeout=60)[1]
        assert server.returncode == (-number if number == signal.SIGKILL else 128 + number) and err == ""
        deadline = time.monotonic() + 30
        while any(_runs(child) for child in children):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.05)
    finally:
        server.kill()


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_is_refused(finished, tmp_path, fusedlm):
    run = finished / "runs/small"
    (tmp_path / "key").write_text("\n")
    (tmp_path / "template").write_text("{% for %}")
    for arguments, said in (
        ([tmp_path], "holds no run"),
        ([run, "--port", 70000], "--port"),
        ([run, "--host", "203.0.113.1", "--port", 0], "cannot listen on 203.0.113.1"),
        ([run, "--sequences", 0, "--port", 0], "sequences=0 must be at least 1"),
        ([run, "--context", 1, "--port", 0], "context=1 must be at least 2"),
        ([run, "--grace", -1, "--port", 0], "--grace -1 must be at least 0"),
        ([run, "--grace", "nan", "--port", 0], "--grace nan"),
        ([run, "--api-key-file", tmp_path / "key", "--port", 0], "must hold one line of printable ASCII"),
        ([run, "--api-key-file", tmp_path / "none", "--port", 0], "No such file or directory"),
        ([run, "--chat-template", tmp_path / "template", "--port", 0], "template: line 1:"),
        ([run, "--cuda-graph", "--port", 0], "cuda_graph=True: needs a CUDA device"),
    ):
        found = fusedlm("serve", *arguments)
        assert found.code == 2 and said in found.err and found.err.count("\n") == 1, (arguments, found)
