"""Rules that turn the tensors of our decoder into those of another class, and back. They only cut, join and reorder
rows, so that both directions are exact."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, and the tensors of the other class that hold its elements.

    write: from ours to theirs, in the order of the names. read: its inverse.
    """

    ours: str
    theirs: tuple[str, ...]
    write: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    read: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda tensor: [tensor], lambda tensors: tensors[0])


def rows(ours: str, parts: Mapping[str, int]) -> Rule:
    """A packed projection, whose parts are tensors of their own: their names and numbers of rows, in order."""
    return Rule(ours, tuple(parts), lambda tensor: tensor.split(list(parts.values())), torch.cat)


def reordered(ours: str, theirs: str, order: torch.Tensor) -> Rule:
    """The same rows in another order: row i of theirs is row order[i] of ours."""
    inverse = order.argsort()
    return Rule(ours, (theirs,), lambda tensor: [tensor[order]], lambda tensors: tensors[0][inverse])


def written(rules: Sequence[Rule], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the other class, contiguous.

    Args:
        tensors: all of ours. One that no rule names is a defect, and raises a KeyError.
    """
    if missing := tensors.keys() - {rule.ours for rule in rules}:
        raise KeyError(f"no rule for {sorted(missing)}")
    found = {}
    for rule in rules:
        parts = rule.write(tensors[rule.ours])
        found |= {name: part.contiguous() for name, part in zip(rule.theirs, parts, strict=True)}
    return found


def read(rules: Sequence[Rule], tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple]) -> dict:
    """The tensors of ours.

    Args:
        tensors: all of theirs.
        shapes: of ours, by name.

    Raises:
        ValueError: a tensor is missing, is not known, or has a shape that does not go with the configuration.
    """
    named = {name for rule in rules for name in rule.theirs}
    for name in sorted(named ^ tensors.keys()):
        problem = "is missing" if name in named else "is no part of this class"
        raise ValueError(f"tensor {name!r} {problem}")
    found = {}
    for rule in rules:
        parts = [tensors[name] for name in rule.theirs]
        wanted = [tuple(part.shape) for part in rule.write(torch.empty(shapes[rule.ours], device="meta"))]
        for name, part, shape in zip(rule.theirs, parts, wanted, strict=True):
            if tuple(part.shape) != shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(part.shape)}, by config.json {shape}")
        found[rule.ours] = rule.read(parts).contiguous()
    return found
