"""JSON records with a checksum of their content and of the name that they were written under."""

import hashlib
import json

_CHECKSUM = "sha256"


def seal(record: dict, name: str) -> dict:
    """The record as JSON gives it back (tuples are lists, keys are strings), with its checksum under "sha256".

    Args:
        name: what the record belongs to, such as "record of wide-seed0"; `unseal` needs the same one.

    Raises:
        ValueError: the record has a key "sha256".
    """
    if _CHECKSUM in record:
        raise ValueError(f"{name}: key {_CHECKSUM!r} is reserved for the checksum")
    record = json.loads(json.dumps(record))
    return record | {_CHECKSUM: _checksum(record, name)}


def unseal(record: dict, name: str, *, required: bool = True) -> dict:
    """The record without its checksum.

    Args:
        required: False: a record without a checksum, of an earlier version, is returned as it is.

    Raises:
        ValueError: the record is not the one that was sealed under this name.
    """
    content = {key: value for key, value in record.items() if key != _CHECKSUM}
    if _CHECKSUM not in record and not required:
        return content
    if record.get(_CHECKSUM) != _checksum(content, name):
        raise ValueError(f"{name}: its content is not what was written (the checksum differs)")
    return content


def _checksum(content: dict, name: str) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()
