"""Warnings that are given once per process: sources and tokenizers are opened several times."""

import logging
from functools import cache

_log = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before."""
    _log.warning("%s", message)
