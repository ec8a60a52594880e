"""The commands that records give."""

import re

_JSON = re.compile(r" --json[ =]\S+")


def without_json(command: str) -> str:
    """Without --json and its file, which is where the record was, not what it is of."""
    return _JSON.sub("", command)
