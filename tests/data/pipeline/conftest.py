"""The log of a task, which loguru opens, looks up the folders of Python each time: most of the time of a small task."""

import functools
import sysconfig

import pytest


@pytest.fixture(autouse=True)
def _known_folders(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", _get_path)


_get_path = functools.cache(sysconfig.get_path)
