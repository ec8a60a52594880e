"""Pages of web archives."""

import io
from collections.abc import Iterator
from pathlib import Path

from fusedlm.data.compression import chunks
from fusedlm.data.remote import RemoteFile


def read_pages(path: Path | RemoteFile, html: str) -> Iterator[tuple[str, str]]:
    """Yields (text, place) of each page. Records that are no page, or whose text has no known encoding, are passed
    over, as datatrove does; pages with NUL too.

    Args:
        html: "extract" or "skip".

    Raises:
        ValueError: the file is damaged, or a package is missing.
    """
    extract = _extractor() if html == "extract" else None
    for number, is_plain, text in _records(path):
        if not is_plain:
            text = extract(text) if extract else ""
        if text and "\0" not in text:
            yield text, f"{path}, record {number}"


def _records(path: Path | RemoteFile) -> Iterator[tuple[int, bool, str]]:
    """Number, whether it is plain text, and text of each page."""
    try:
        from datatrove.pipeline.readers.warc import process_record
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed

        with io.BufferedReader(_Stream(chunks(path))) as stream:
            try:
                for number, record in enumerate(ArchiveIterator(stream)):
                    found = process_record(record)
                    if found is not None:
                        yield number, record.rec_type == "conversion", found["text"]
            except ArchiveLoadFailed as error:
                what = " ".join(str(error).split())[:200]
                raise ValueError(f"{path}: truncated or damaged WARC file ({what})") from None
    except ImportError as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path}: {what}; pip install 'fusedlm[prepare]', and the library libmagic") from None


class _Stream(io.RawIOBase):
    """Bytes of an iterator as a file."""

    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._rest = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._rest = memoryview(part)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n


def _extractor():
    """The extractor of datatrove, called directly: it would stop after a second, and trafilatura would leave out lines
    that earlier pages have, so that what a page gives would depend on the machine and on the pages before it."""
    try:
        from datatrove.pipeline.extractors import Trafilatura

        extractor = Trafilatura(deduplicate=False)
    except ImportError:
        raise ValueError(
            "html=extract: trafilatura is not installed; pip install 'trafilatura>=1.8,<1.12', or set html=skip"
        ) from None

    def extract(page: str) -> str:
        try:
            return extractor.extract(page) or ""
        except Exception:  # what parsers raise for the HTML of the web cannot be foreseen; datatrove drops these too
            return ""

    return extract
