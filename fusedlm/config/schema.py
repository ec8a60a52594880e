"""The base class of all configuration, and shared types.

Every number has an upper bound: far above what is trained anywhere, and low enough that neither a size nor a product of
two sizes overflows 64 bits. Every text, list and mapping has one too, so that the recipe of a run is never larger than
what is read back.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class TypeText:
    """How the reference of keys describes a type, where its constraints do not say it."""

    text: str


class _Neutral:
    """Marks a key that does not change the results of a run beyond rounding, so that a run can be resumed, and an
    experiment continued, with another value."""


NEUTRAL = _Neutral()


def _check_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value):
        raise ValueError(f"got {value!r}, must be letters, digits, '.', '_' and '-', and not begin with '.'")
    return value


def _check_path(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"got {value!r}, a path has no NUL character")
    return value


# Names of folders: of a run, and of an experiment or a variant, several of which make the name of a run.
_NAME = (AfterValidator(_check_name), TypeText("text of letters, digits, '.', '_' and '-', not beginning with '.'"))
Name = Annotated[str, Field(min_length=1, max_length=200), *_NAME]
ShortName = Annotated[str, Field(min_length=1, max_length=60), *_NAME]
Text = Annotated[str, Field(max_length=10_000)]
ShortText = Annotated[str, Field(max_length=100)]
PathText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_path), TypeText("path")]

Dim = Annotated[int, Field(gt=0, le=2**20)]  # of a hidden state or a latent
HeadCount = Annotated[int, Field(gt=0, le=2**14)]
HeadDim = Annotated[int, Field(gt=0, le=2**16)]
RopeDim = Annotated[int, Field(ge=0, le=2**16)]
Length = Annotated[int, Field(gt=0, le=2**24)]  # of a sequence, in tokens
Count = Annotated[int, Field(gt=0, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Tokens = Annotated[int, Field(gt=0, le=10**15)]  # of a corpus
Seed = Annotated[int, Field(ge=0, lt=2**63)]

PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]  # of activations: neither it nor its inverse overflows float32
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]  # greater than 0 in float32 too
Fraction = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Immutable and strict: unknown keys and values of the wrong type are errors.

    The docstring below a key is its meaning, in the reference of keys and in `fusedlm help`.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
