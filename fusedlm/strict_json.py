"""JSON without the numbers that it does not have."""

import json
import math


def finite_or_none(value):
    """A tree of dicts, lists and scalars with None in place of every float that is not finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value, **options) -> str:
    """As `json.dumps`, with null in place of NaN and infinities, which other readers of JSON refuse."""
    return json.dumps(finite_or_none(value), allow_nan=False, **options)
