"""Short runs, exported, and lm-eval's own back end on what was exported."""

from importlib.util import find_spec

import pytest

from tests.export.conftest import cases, workplace  # noqa: F401

collect_ignore = [] if find_spec("lm_eval") else ["test_model.py", "test_tasks.py"]
if not find_spec("accelerate"):
    collect_ignore.append("test_parity.py")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """Data sets are made from files, in a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
