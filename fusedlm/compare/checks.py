"""Checks of what is read back from an experiment's folder: JSON objects of the expected form."""

import json
import math
from pathlib import Path

from fusedlm.config.keys import ABSENT
from fusedlm.runs.folder import shown

OUTCOMES = ("finished", "diverged", "failed")
_SCORE = ("val_bpb", "val_nll_per_token", "val_tokens", "val_bytes")


def check_record(record: dict) -> None:
    if record.get("outcome") not in OUTCOMES:
        raise ValueError(f"outcome={shown(record.get('outcome'))}: must be one of {', '.join(OUTCOMES)}")
    if not isinstance(record.get("message"), str):
        raise ValueError(f"message={shown(record.get('message'))}: must be text")
    final = record.get("final")
    if (record["outcome"] == "finished") != isinstance(final, dict):
        raise ValueError(f"final={shown(final)}: does not fit the outcome {record['outcome']}")
    for key in _SCORE if final else ():
        if not is_number(final.get(key)):
            raise ValueError(f"final.{key}={shown(final.get(key))}: must be a finite number")
    if not is_number(record.get("step", 0)) or not isinstance(record.get("files", {}), dict):
        raise ValueError("step must be a number and files an object")


def check_decoding(measured: dict) -> None:
    for length, pair in measured.items():
        fits = isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) and pair[1] > 0
        if not length.isdecimal() or not (pair is None or fits):
            raise ValueError(f"{length}={shown(pair)}: must be a length with bytes and tokens per second")


def check_calibration(found: dict) -> None:
    for name, entry in found.items():
        seconds = entry.get("seconds") if isinstance(entry, dict) else entry
        if not is_number(seconds) or seconds <= 0 or (isinstance(entry, dict) and "of" not in entry):
            raise ValueError(f"{name}={shown(entry)}: must be seconds per step")


def check_identity(saved: dict) -> None:
    kinds = {"experiment": dict, "device": str, "dtype": str, "seeds": list, "variants": dict}
    for key, kind in kinds.items():
        if not isinstance(saved.get(key), kind):
            raise ValueError(f"{key}={shown(saved.get(key, ABSENT))}")
    for name, entry in saved["variants"].items():
        if not isinstance(entry, dict) or not {"text", "vocab_size"} <= entry.keys():
            raise ValueError(f"variant {name} has no text or vocab_size")
    factors = saved.get("lr_factors", [])
    if not isinstance(factors, list) or not all(map(is_number, factors)):
        raise ValueError(f"lr_factors={shown(saved['lr_factors'])}")
    if not isinstance(saved.get("unsealed", {}), dict):
        raise ValueError(f"unsealed={shown(saved['unsealed'])}")


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_json(path: Path, fix: str) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged, not JSON; {fix}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, not a JSON object; {fix}")
    return found
