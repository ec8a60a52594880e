import pytest

from tests.serve.engines import make_model


@pytest.fixture
def hybrid():
    return make_model()
