from importlib.util import find_spec

import pytest

from tests.serve.engines import make_model

# Without the server's packages the engine is tested alone.
collect_ignore = []
if not all(map(find_spec, ("starlette", "uvicorn", "jinja2"))):
    collect_ignore += ["test_http.py", "test_malformed.py", "test_clients.py", "test_process.py"]
elif not find_spec("openai"):
    collect_ignore.append("test_clients.py")


@pytest.fixture
def hybrid():
    return make_model()
