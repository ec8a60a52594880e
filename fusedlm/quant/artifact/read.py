"""From an artifact to its recipe, its tokenizer and its tensors. Nothing in the file is executed, and nothing that it
says of itself is believed before it is checked."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fusedlm.config import Recipe, parse_recipe
from fusedlm.data.tokenizer import Tokenizer, tokenizer_of_files
from fusedlm.quant.artifact.code_model import Layout
from fusedlm.quant.artifact.coders import decompress, from_planes
from fusedlm.quant.artifact.codes import CodesReader
from fusedlm.quant.artifact.container import Container, ContentDigest
from fusedlm.quant.artifact.table import DTYPES, RANS, SCALES, STATES, TENSORS, TOKENIZER, Matrix, Part
from fusedlm.quant.integer import IntegerMatrix


@dataclass(frozen=True)
class Artifact:
    """tensors: by name, as `pack` got them, on the CPU. step, weights, text: of the checkpoint that it is from."""

    recipe: Recipe
    tokenizer: Tokenizer
    tensors: dict[str, IntegerMatrix | torch.Tensor]
    step: int
    weights: str
    text: str


def read_artifact(path: str | Path) -> Artifact:
    """Read an artifact.

    Raises:
        DamagedArtifact: it is none, or not what was written: one line with the part and the check that failed. Or a
            part needs a coder that is not installed here.
        OSError: the system cannot read it.
    """
    return read_container(Container(path))


def read_container(container: Container) -> Artifact:
    """As `read_artifact`."""
    container.verify()
    header = container.header
    recipe, tokenizer = _recipe(container), _tokenizer(container)
    raw = {(part.kind, part.dtype): _part(container, part) for part in header.parts}
    scales = {dtype: _Pool(raw[SCALES, dtype], dtype) for kind, dtype in raw if kind == SCALES}
    plain = {dtype: _Pool(raw[TENSORS, dtype], dtype) for kind, dtype in raw if kind == TENSORS}
    reader = None
    if (STATES, None) in raw:
        try:
            reader = CodesReader(raw[STATES, None], header.lanes)
        except ValueError as error:
            raise container.damage(STATES, str(error)) from None
    tensors: dict[str, IntegerMatrix | torch.Tensor] = {}
    for matrix in header.matrices:
        codes = torch.from_numpy(_codes(container, matrix, reader))
        of_rows = scales[matrix.scales].take([matrix.shape[0], matrix.n_groups])
        tensors[matrix.name] = IntegerMatrix(codes, of_rows, matrix.bits, matrix.group)
    if reader is not None:
        try:
            reader.finish()
        except ValueError as error:
            raise container.damage("codes", str(error)) from None
    for tensor in header.tensors:
        tensors[tensor.name] = plain[tensor.dtype].take(tensor.shape)
    digest = ContentDigest()
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    if digest.hexdigest() != header.content:
        raise container.damage("tensors", "decoded, they have another checksum than those that were packed")
    return Artifact(recipe, tokenizer, tensors, header.step, header.weights, header.text)


class _Pool:
    """The elements of several tensors of one dtype, one after the other."""

    def __init__(self, raw: bytes, dtype: str):
        self._dtype, self._next = DTYPES[dtype], 0
        data = bytearray(from_planes(raw, self._dtype.itemsize))
        self._elements = torch.frombuffer(data, dtype=self._dtype) if data else torch.empty(0, dtype=self._dtype)

    def take(self, shape: list[int]) -> torch.Tensor:
        n = int(np.prod(shape, dtype=object))
        self._next += n
        return self._elements[self._next - n : self._next].reshape(shape)


def _recipe(container: Container) -> Recipe:
    try:
        return parse_recipe(container.header.recipe)
    except ValueError as error:
        raise container.damage("recipe", str(error)) from None


def _tokenizer(container: Container) -> Tokenizer:
    part = container.header.parts[0]
    raw = _part(container, part)
    try:
        files = json.loads(raw)
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise ValueError("not texts by the names of their files")
        return tokenizer_of_files(files)
    except (ValueError, RecursionError) as error:
        raise container.damage(TOKENIZER, f"{' '.join(str(error).split())}") from None


def _part(container: Container, part: Part) -> bytes:
    coded = container.section(part.name)
    try:
        return decompress(coded, part.coder, part.size)
    except ValueError as error:
        raise container.damage(part.name, str(error)) from None


def _codes(container: Container, matrix: Matrix, reader: CodesReader | None) -> np.ndarray:
    name = f"codes of {matrix.name}"
    coded = container.section(name)
    try:
        if matrix.coder == RANS:
            layout = Layout(matrix.transposed, matrix.rank, matrix.level)
            return reader.read(coded, matrix.bits, matrix.shape, layout)
        raw = np.frombuffer(decompress(coded, matrix.coder, matrix.n_elements), np.int8)
        largest = 2 ** (matrix.bits - 1) - 1
        if raw.size and (raw.min() < -largest or raw.max() > largest):
            raise ValueError(f"codes from {raw.min()} to {raw.max()} are not of {matrix.bits} bits")
        if matrix.transposed:
            return np.ascontiguousarray(raw.reshape(matrix.shape[::-1]).T)
        return raw.reshape(matrix.shape).copy()
    except ValueError as error:
        raise container.damage(name, str(error)) from None
