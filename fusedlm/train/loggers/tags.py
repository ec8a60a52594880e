"""The group of each key of metrics.jsonl: train/, val/ or system/."""

import math

_TIMES = {"tokens_per_second", "step_seconds", "loader_wait_seconds", "checkpoint_seconds"}
_SYSTEM = _TIMES | {"mfu", "peak_memory_bytes"}
_VALIDATION = "val_"


def tag(key: str) -> str:
    """The tag under which TensorBoard, W&B and MLflow show a key: val_bpb is val/bpb, and what is neither of a
    validation nor of the machine is of training, metrics of layers too."""
    if key.startswith(_VALIDATION):
        return f"val/{key.removeprefix(_VALIDATION)}"
    return f"{'system' if key in _SYSTEM else 'train'}/{key}"


def tagged(record: dict) -> dict[str, float]:
    """The finite numbers of a record, by tag. Of a validation only its own: its step has logged the tokens."""
    of_validation = any(key.startswith(_VALIDATION) for key in record)
    return {
        tag(key): value
        for key, value in record.items()
        if key != "step" and is_number(value) and (key.startswith(_VALIDATION) or not of_validation)
    }


def is_number(value) -> bool:
    """Whether a value can be a point: a finite number, or a flag."""
    return isinstance(value, int | float) and math.isfinite(value)
