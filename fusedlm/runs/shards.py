"""Tables of tensors in files: one file of full tensors, or a file of each process with its parts of them.

`model.safetensors` holds full tensors. `model.shard-00002-of-00004.safetensors` holds what the second of four processes
wrote. The key `pieces` of its metadata says of each tensor that is only a part: the shape of the full one, and
where the part begins along each dimension.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from fusedlm.distributed import World, local, position

_PIECES = "pieces"
_SHARD = re.compile(r"(.+)\.shard-([0-9]{5})-of-([0-9]{5})\.safetensors")


def file_name(stem: str) -> str:
    """Of a table of full tensors."""
    return f"{stem}.safetensors"


def shard_name(stem: str, rank: int, size: int) -> str:
    """Of what the process with this rank wrote of a table."""
    return f"{stem}.shard-{rank + 1:05d}-of-{size:05d}.safetensors"


def table_of(name: str) -> str | None:
    """The stem of the table that a file holds, in full or a shard; None: it holds no tensors."""
    if match := _SHARD.fullmatch(name):
        return match[1]
    return name.removesuffix(".safetensors") if name.endswith(".safetensors") else None


def table_files(stem: str, names: Iterable[str]) -> list[str]:
    """The files of a table, in order, by the names of all files of a folder, of which some may be missing."""
    whole, sizes = file_name(stem), set()
    for name in names:
        match = _SHARD.fullmatch(name)
        if name == whole:
            return [whole]
        if match and match[1] == stem and name == shard_name(stem, int(match[2]) - 1, int(match[3])):
            sizes.add(int(match[3]))
    # With several numbers of files, one of them is wrong, and its files are not all there.
    return [shard_name(stem, rank, max(sizes)) for rank in range(max(sizes))] if sizes else [whole]


@dataclass(frozen=True)
class TensorFile:
    """What one process writes into one file: tensors by name, its own parts of the sharded ones."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def own_files(tables: Mapping[str, Mapping[str, torch.Tensor]], world: World) -> list[TensorFile]:
    """The files that this process writes of tables by file stem. All processes pass the same names and shapes.

    A table without sharded tensors is written by the main process, in one file. Of the others every process writes a
    file. Tensors that are the same in all processes are in that of the main one, and copies of a shard take turns, so
    that they write about the same number of bytes.
    """
    files = []
    for stem, table in tables.items():
        if not any(isinstance(tensor, DTensor) for tensor in table.values()):
            if world.is_main:
                files.append(TensorFile(file_name(stem), dict(table), {}))
            continue
        tensors, pieces, written = {}, {}, {}
        for name, tensor in table.items():
            if not isinstance(tensor, DTensor):
                if world.is_main:
                    tensors[name] = tensor
                continue
            where = position(tensor)
            copy = min(range(where.copies), key=lambda index: written.get(index, 0))
            written[copy] = written.get(copy, 0) + tensor.numel() * tensor.dtype.itemsize
            part = local(tensor)
            # The first part is written even if it is empty: of a tensor without elements, it is the only one.
            if copy == where.copy and (part.numel() or where.is_first):
                tensors[name] = part
                if part.shape != tensor.shape:
                    pieces[name] = [list(tensor.shape), list(where.starts)]
        metadata = {_PIECES: json.dumps(pieces)} if pieces else {}
        files.append(TensorFile(shard_name(stem, world.rank, world.size), tensors, metadata))
    return files


class DamagedTable(ValueError):
    """Files that are no table; the message names the file."""


@dataclass(frozen=True)
class _Part:
    file: object  # an open safetensors file
    path: Path
    starts: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The view of the full tensor that it is."""
        for dim, (start, size) in enumerate(zip(self.starts, self.shape, strict=True)):
            full = full.narrow(dim, start, size)
        return full


class StoredTensors(Mapping):
    """The full tensors of a table by name, on the CPU, each in memory only while it is used: `add` every file, then
    `check`."""

    def __init__(self):
        self._parts: dict[str, list[_Part]] = {}
        self._layouts: dict[str, tuple] = {}  # full shape, dtype

    def add(self, path: Path) -> None:
        """Open a file.

        Raises:
            DamagedTable: it is no safetensors file, or its parts do not fit those of the files before it.
            OSError: it cannot be read.
        """
        try:
            file = safe_open(path, "pt")
            pieces = json.loads((file.metadata() or {}).get(_PIECES, "{}"))
            for name in sorted(file.keys()):  # the error that is found first is always the same
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                full, starts = (tuple(map(int, numbers)) for numbers in pieces.get(name, [shape, [0] * len(shape)]))
                layout = (full, part.get_dtype())
                if self._layouts.setdefault(name, layout) != layout:
                    raise DamagedTable(f"{path}: tensor {name!r} is another one than in the files before it")
                self._parts.setdefault(name, []).append(_Part(file, path, starts, shape))
        except SafetensorError as error:
            raise DamagedTable(f"{path}: {' '.join(str(error).split())}") from None
        except DamagedTable:
            raise
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise DamagedTable(f"{path}: its parts are not described as they were written") from None

    def check(self) -> None:
        """Raises DamagedTable if a part of a tensor is missing, or in two files."""
        for name, parts in self._parts.items():
            full, _ = self._layouts[name]
            if not _is_complete(full, parts):
                raise DamagedTable(f"{parts[-1].path}: tensor {name!r} of shape {full} is not complete")

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0].file.get_tensor(name)
        out = None
        for part in parts:
            values = part.file.get_tensor(name)
            if out is None:
                out = torch.empty(self._layouts[name][0], dtype=values.dtype)
            part.of(out).copy_(values)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        return len(self._parts)


def _is_complete(full: tuple[int, ...], parts: list[_Part]) -> bool:
    """Whether parts are the full tensor, each element once."""
    for part in parts:
        if not len(part.shape) == len(part.starts) == len(full):
            return False
        if any(a < 0 or a + n > size for a, n, size in zip(part.starts, part.shape, full, strict=True)):
            return False
    n_elements = sum(math.prod(part.shape) for part in parts)
    return n_elements == math.prod(full) and not any(_overlap(*pair) for pair in itertools.combinations(parts, 2))


def _overlap(a: _Part, b: _Part) -> bool:
    ends = zip(a.starts, a.shape, b.starts, b.shape, strict=True)
    return all(max(i, j) < min(i + m, j + n) for i, m, j, n in ends)
