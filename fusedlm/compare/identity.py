"""What the results of an experiment depend on, and whether two experiments are the same."""

import hashlib
import json
from collections.abc import Iterator
from typing import get_args, get_origin

from fusedlm.config import Recipe
from fusedlm.config.experiment import DECIDED, Experiment
from fusedlm.config.keys import ABSENT, is_neutral, members


def identify(
    experiment: Experiment, recipes: dict[str, Recipe], data: dict[str, dict], device: str, dtype: str
) -> dict:
    """Everything that the results and the cost of the runs depend on.

    Args:
        recipes: of the variants, before matching.
        data: by variant, the fingerprint of its prepared text and its vocabulary size.
        device: name of the processor.
    """
    matching = experiment.model_dump(include={"match", "match_by", "tolerance"})
    if experiment.match == "time":
        matching["calibration_steps"] = experiment.calibration_steps
    if experiment.weights != "raw":  # the only weights that folders of earlier versions can be trusted to have scored
        matching["weights"] = experiment.weights
    tune = experiment.tune
    if tune is not None:
        matching |= {"tune.seed": tune.seed, "tune.steps": tune.steps}
    return {
        "experiment": {"name": experiment.name, "baseline": next(iter(recipes))} | matching,
        "device": device,
        "dtype": dtype,
        "seeds": experiment.seeds,
        "lr_factors": [] if tune is None else tune.lr_factors,
        "variants": {name: _leaves(recipe.model_dump(mode="json")) | data[name] for name, recipe in recipes.items()},
    }


def variant_digest(identity: dict, variant: str) -> str:
    """What the results of one variant depend on, as a sha256; adding seeds, factors and variants does not change it."""
    parts = [identity[key] for key in ("experiment", "device", "dtype")] + [identity["variants"][variant]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def merged(saved: dict, now: dict) -> dict:
    """A saved identity with the seeds, factors and variants that are new. What was saved keeps its digests."""
    return saved | {
        "seeds": _union(saved["seeds"], now["seeds"]),
        "lr_factors": _union(saved.get("lr_factors", []), now["lr_factors"]),
        "variants": now["variants"] | saved["variants"],
    }


def _union(saved: list, now: list) -> list:
    return [*saved, *(one for one in now if one not in saved)]


def difference(saved: dict, now: dict) -> tuple[str, object, object] | None:
    """The first key that differs and must not, with both values. Seeds, factors and variants may be added; a key that
    recipes did not have yet may be there now with its default."""
    for section in ("experiment", "device", "dtype"):
        before, after = saved[section], now[section]
        pairs = [(section, before, after)]
        if isinstance(before, dict):
            pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after]
        for key, b, a in pairs:
            if b != a:
                return key, b, a
    if gone := [seed for seed in saved["seeds"] if seed not in now["seeds"]]:
        return f"seed {gone[0]}", "run", ABSENT
    if gone := [factor for factor in saved.get("lr_factors", []) if factor not in now["lr_factors"]]:
        return f"tune.lr_factors {gone[0]:g}", "tried", ABSENT
    for name, before in saved["variants"].items():
        after = now["variants"].get(name)
        if after is None:
            return f"variant {name}", "run", ABSENT
        for key in [*before, *(key for key in after if key not in before)]:
            b, a = before.get(key, ABSENT), after.get(key, ABSENT)
            if b != a and not (b is ABSENT and _is_default(key, after)):
                return f"{key} of variant {name}", b, a
    return None


def _leaves(tree: dict, prefix: str = "") -> dict:
    """Values by dotted key, without neutral keys and those that the experiment sets."""
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in DECIDED or is_neutral(name, Recipe):
            continue
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def _is_default(key: str, leaves: dict) -> bool:
    return any(leaves[key] == value for value in _defaults(key.split("."), [Recipe], "", leaves))


def _defaults(parts: list[str], classes: list, prefix: str, leaves: dict) -> Iterator[object]:
    """Defaults of a dotted key in those of the classes that fit the `type` beside it."""
    for cls in classes:
        kind = cls.model_fields.get("type")
        if kind is not None and leaves.get(f"{prefix}type", kind.default) not in get_args(kind.annotation):
            continue
        field = cls.model_fields.get(parts[0])
        if field is None:
            continue
        if len(parts) == 1:
            yield field.get_default(call_default_factory=True)
            continue
        named = 2 if get_origin(field.annotation) is dict else 1  # a dict has names of its own: blocks.NAME
        inner = f"{prefix}{'.'.join(parts[:named])}."
        yield from _defaults(parts[named:], members(field.annotation), inner, leaves)
