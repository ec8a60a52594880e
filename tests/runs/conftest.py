from tests.train.conftest import trained  # noqa: F401
