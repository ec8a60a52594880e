"""The header of an artifact: its tables of tensors and parts, and the rules that they keep."""

import json
from collections.abc import Iterator
from math import prod
from typing import Annotated, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field

from fusedlm.quant.artifact.code_model import LARGEST_RANK, LEVELS
from fusedlm.quant.artifact.coders import OPTIONAL, REQUIRED, fits

DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
SCALE_DTYPES = ("float32", "float16", "bfloat16")
RANS = "rans"
TOKENIZER, STATES, SCALES, TENSORS = "tokenizer", "states", "scales", "tensors"
MOST_LANES = 4096

_LARGEST = 1 << 40  # elements of a tensor: products of sizes stay integers that other programs can hold
Size = Annotated[int, Field(ge=0, le=_LARGEST)]
Check = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Coder = Literal[(*REQUIRED, *OPTIONAL)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tensor(_Entry):
    """A tensor as it is. Those of one dtype are one part, in the order of the table."""

    name: str
    shape: Annotated[list[Size], Field(max_length=16)]
    dtype: Literal[tuple(DTYPES)]

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


class Matrix(_Entry):
    """An `IntegerMatrix`. Its codes are a part; scales of one dtype are one part, in the order of the table.

    transposed: the codes are stored column by column. rank, level: as `code_model.Layout`, of the coder rans alone.
    """

    name: str
    shape: tuple[Size, Size]
    bits: Annotated[int, Field(ge=2, le=8)]
    group: Annotated[int, Field(ge=1, le=_LARGEST)] | None
    scales: Literal[SCALE_DTYPES]
    coder: Literal[(RANS, *REQUIRED, *OPTIONAL)]
    transposed: bool
    rank: Annotated[int, Field(ge=0, le=LARGEST_RANK)]
    level: Annotated[int, Field(ge=0, lt=LEVELS)]
    bytes: Size
    check: Check

    @property
    def n_elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def n_groups(self) -> int:
        return 1 if self.group is None else -(-self.shape[1] // self.group)

    @property
    def n_scales(self) -> int:
        return self.shape[0] * self.n_groups


class Part(_Entry):
    """Bytes of the file that are no codes. dtype: of the elements of scales and tensors. size: before compression."""

    kind: Literal[TOKENIZER, STATES, SCALES, TENSORS]
    dtype: Literal[tuple(DTYPES)] | None
    coder: Coder
    size: Size
    bytes: Size
    check: Check

    @property
    def name(self) -> str:
        return self.kind if self.dtype is None else f"{self.kind} of {self.dtype}"


class Header(_Entry):
    """All that an artifact says of itself.

    recipe: its YAML. step, weights, text: of the checkpoint that it is from, as `fusedlm.load` names them. lanes: of
    the entropy coder. content: digest of all decoded tensors. parts: first in the file, then the codes of the matrices.
    """

    recipe: str
    step: Size
    weights: Literal["raw", "ema", "swa"]
    text: str
    lanes: Annotated[int, Field(ge=1, le=MOST_LANES)]
    content: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    parts: list[Part]
    matrices: list[Matrix]
    tensors: list[Tensor]

    def sections(self) -> Iterator[tuple[str, Part | Matrix]]:
        """(name, entry) of all that follows the header, in the order of the file."""
        yield from ((part.name, part) for part in self.parts)
        yield from ((f"codes of {matrix.name}", matrix) for matrix in self.matrices)

    def dump(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":")).encode()


def parse(content: bytes) -> Header:
    """Read a header and check its rules.

    Raises:
        ValueError: names the key.
    """
    try:
        header = Header.model_validate_json(content)
    except (pydantic.ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ValueError("not JSON") from None
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "JSON"
        raise ValueError(f"{key}={repr(first['input'])[:60]}: {' '.join(first['msg'].split())}") from None
    _check(header)
    return header


def expected_parts(header: Header) -> dict[tuple[str, str | None], int | None]:
    """(kind, dtype) of the parts that the tables need, in order, and their sizes; None: free."""
    sizes: dict[tuple[str, str | None], int | None] = {(TOKENIZER, None): None}
    if any(matrix.coder == RANS for matrix in header.matrices):
        from fusedlm.quant.artifact.rans import STATE_BYTES

        sizes[STATES, None] = STATE_BYTES * header.lanes
    for matrix in header.matrices:
        key = (SCALES, matrix.scales)
        sizes[key] = sizes.get(key, 0) + matrix.n_scales * DTYPES[matrix.scales].itemsize
    for tensor in header.tensors:
        key = (TENSORS, tensor.dtype)
        sizes[key] = sizes.get(key, 0) + tensor.n_elements * DTYPES[tensor.dtype].itemsize
    return sizes


def _check(header: Header) -> None:
    names = [entry.name for entry in (*header.matrices, *header.tensors)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"tensor {twice!r} is there twice")
    expected = expected_parts(header)
    if [(part.kind, part.dtype) for part in header.parts] != list(expected):
        found = ", ".join(part.name for part in header.parts)
        raise ValueError(f"its parts ({found}) are not those of its tensors")
    for part, size in zip(header.parts, expected.values(), strict=True):
        if size is not None and part.size != size:
            raise ValueError(f"{part.name}: {part.size} bytes, its tensors have {size}")
    for name, entry in header.sections():
        size = entry.n_elements if isinstance(entry, Matrix) else entry.size
        if not fits(size, entry.bytes):
            raise ValueError(f"{name}: {entry.bytes} bytes cannot hold {size}")
    for matrix in header.matrices:
        if matrix.coder == RANS and not matrix.n_elements:
            raise ValueError(f"codes of {matrix.name}: an empty matrix has no codes")
