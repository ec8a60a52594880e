"""Tokenizers: bytes, byte-level BPE trained on the corpus, or a `tokenizer.json`; one interface, exact byte counts.

Text never encodes to the end-of-text token: special tokens are not parsed in text, so "<|endoftext|>" in a corpus is
ordinary characters.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fusedlm.data.byte_level import byte_table, keeps_text
from fusedlm.data.lossless import change
from fusedlm.data.notes import warn_once
from fusedlm.data.pretokens import SPLIT, cuts_at_line_ends, pieces
from fusedlm.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
_META_FILE = "tokenizer.meta.json"
_MODEL_FILE = "tokenizer.json"

_GROUP_CHARACTERS = 1 << 22
_LARGEST_ID = 2**24 - 1


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        eot_id: the end-of-text id, to which no text encodes.
        fingerprint: sha256 (hex) of everything that the encoding of text depends on.
        keeps_text: whether it is certain that every text decodes to itself, byte for byte.
    """

    vocab_size: int
    eot_id: int
    fingerprint: str
    keeps_text: bool

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array of ids per text, without end-of-text; uses all cores and releases the GIL."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. End-of-text has none; the first and last character may be incomplete."""

    @abstractmethod
    def unused_ids(self, limit: int) -> np.ndarray:
        """Ids in [0, limit) that no token has, int64: gaps in the vocabulary, and ids after it."""

    @abstractmethod
    def files(self) -> dict[str, str]:
        """Content of the files that `load_tokenizer` needs, by name."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def change(self, ids: Iterable[int], text: str) -> str | None:
        """What tokenization changed: `byte 4: 'the Union' becomes 'the union'`; None: the ids decode to the text."""
        return change(text.encode(), self.decode_bytes(ids))

    def save(self, directory: str | Path) -> list[str]:
        """Write the tokenizer into an existing directory; returns the names of the files written."""
        files = self.files()
        for name, content in files.items():
            write_atomic(Path(directory, name), content)
        return list(files)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes of UTF-8; 256 is end-of-text."""

    vocab_size = 257
    eot_id = 256
    fingerprint = hashlib.sha256(b"bytes 257").hexdigest()
    keeps_text = True

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode_bytes(self, ids):
        return bytes([i for i in _integers(ids) if 0 <= i < 256])

    def unused_ids(self, limit):
        return np.arange(self.vocab_size, limit)

    def files(self):
        return {_META_FILE: _meta("bytes", self.fingerprint)}


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, given as the text of its tokenizer.json.

    Args:
        content: the JSON; fingerprint and saved file are of exactly these characters.
        end_of_text: a token of its vocabulary, also an attribute.

    Raises:
        ValueError: the JSON is not a tokenizer, lacks the token, or has ids that are too large or given twice.
    """

    def __init__(self, content: str, end_of_text: str):
        try:
            model = tokenizers.Tokenizer.from_str(content)
            spec = json.loads(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"not a tokenizer.json of the tokenizers library ({' '.join(str(error).split())[:200]})"
            ) from None
        eot_id = model.token_to_id(end_of_text)
        if eot_id is None:
            raise ValueError(f"end-of-text token {end_of_text!r} is not in its vocabulary; set tokenizer.end_of_text")
        # Padding and truncation would change the text. A special token, when special tokens are encoded as text, is
        # never found in text.
        model.no_padding()
        model.no_truncation()
        model.add_special_tokens([end_of_text])
        model.encode_special_tokens = True
        if dropout := (spec.get("model") or {}).get("dropout"):
            model.model.dropout = None
            warn_once(f"the tokenizer's dropout of {dropout:g} is switched off: a text always gets the same tokens")
        self._model, self._content, self.end_of_text = model, content, end_of_text
        vocabulary = model.get_vocab(with_added_tokens=True)
        self._ids = _checked_ids(vocabulary)
        self.vocab_size = int(self._ids[-1]) + 1  # ids can have gaps
        for token in spec.get("added_tokens", ()):
            if (used := vocabulary.get(token["content"])) not in (None, token["id"]):
                warn_once(f"the tokenizer's file gives {token['content']!r} the id {token['id']}; it is read as {used}")
        self.eot_id = eot_id
        self.fingerprint = hashlib.sha256(json.dumps([content, end_of_text]).encode()).hexdigest()
        self.keeps_text = keeps_text(spec, vocabulary)
        self._token_bytes = byte_table(spec, vocabulary)
        self._can_cut = cuts_at_line_ends(spec)

    def encode_batch(self, texts):
        cuts = [list(pieces(text)) if self._can_cut else [text] for text in texts]
        parts = iter(self._encode_pieces([piece for cut in cuts for piece in cut]))
        return [np.concatenate([next(parts) for _ in cut]) for cut in cuts]

    def _encode_pieces(self, cut: list[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each piece, a few megabytes at a time: the library's results take 100 bytes per token."""
        start = size = 0
        for end, piece in enumerate(cut, 1):
            size += len(piece)
            if size >= _GROUP_CHARACTERS or end == len(cut):
                for encoding in self._model.encode_batch_fast(cut[start:end], add_special_tokens=False):
                    yield np.asarray(encoding.ids, dtype=np.int64)
                start, size = end, 0

    def decode_bytes(self, ids):
        ids = [i for i in _integers(ids) if i != self.eot_id]
        if self._token_bytes is None:
            return self._model.decode(ids, skip_special_tokens=False).encode()
        return b"".join(map(self._token_bytes.get, ids, repeat(b"")))

    def unused_ids(self, limit):
        return np.setdiff1d(np.arange(limit), self._ids)

    def spec(self) -> dict:
        """The content of its tokenizer.json as the library writes it, the same for files that differ in form."""
        return json.loads(self._model.to_str())

    def files(self):
        return {_MODEL_FILE: self._content, _META_FILE: _meta("subword", self.fingerprint, self.end_of_text)}


def train_bpe(texts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909): lossless for any text; the same texts in the same order give
    the same tokenizer.

    Args:
        texts: read once; a long text is passed on in pieces.
        vocab_size: 256 bytes, merges, and end-of-text as the last id. The tokenizer has fewer ids if no more pairs
            occur twice.
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    model.add_special_tokens([END_OF_TEXT])
    return SubwordTokenizer(model.to_str(), END_OF_TEXT)


def read_tokenizer_file(path: str | Path, end_of_text: str = END_OF_TEXT) -> SubwordTokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        ValueError: it cannot be read, is not a tokenizer, or lacks the end-of-text token.
    """
    try:
        with open(Path(path).expanduser(), encoding="utf-8", newline="") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer {path}: byte {error.start} is not UTF-8") from None
    try:
        return SubwordTokenizer(content, end_of_text)
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from None


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a tokenizer that `save` wrote.

    Raises:
        ValueError: a file is missing, or the tokenizer is not the saved one.
    """
    path = Path(directory, _META_FILE)
    try:
        kind, fingerprint, end_of_text = _read_meta(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: damaged ({error})") from None
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        path = Path(directory, _MODEL_FILE)
        tokenizer = read_tokenizer_file(path, end_of_text)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"tokenizer {path}: changed since it was saved (its fingerprint differs)")
    return tokenizer


def tokenizer_of_files(files: Mapping[str, str]) -> Tokenizer:
    """The tokenizer whose `files` these are.

    Raises:
        ValueError: they are not, or the library does not read them.
    """
    if _META_FILE not in files:
        raise ValueError(f"{_META_FILE} is missing")
    kind, _, end_of_text = _read_meta(files[_META_FILE])
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    elif _MODEL_FILE in files:
        tokenizer = SubwordTokenizer(files[_MODEL_FILE], end_of_text)
    else:
        raise ValueError(f"{_MODEL_FILE} is missing")
    if tokenizer.files() != dict(files):
        raise ValueError("changed since it was saved (its fingerprint differs)")
    return tokenizer


def _read_meta(text: str) -> tuple[str, str, str | None]:
    """(type, fingerprint, end of text, None of bytes). Raises ValueError if the text is not of `_meta`."""
    try:
        meta = json.loads(text)
        kind, fingerprint = meta["type"], meta["fingerprint"]
        if kind not in ("bytes", "subword"):
            raise ValueError(f"type {kind!r} is unknown")
        end_of_text = None if kind == "bytes" else meta["end_of_text"]
        if not isinstance(end_of_text, str | None):
            raise ValueError(f"end_of_text {end_of_text!r} is not text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return kind, fingerprint, end_of_text


def _meta(kind: str, fingerprint: str, end_of_text: str | None = None) -> str:
    meta = {"type": kind, "fingerprint": fingerprint} | ({} if end_of_text is None else {"end_of_text": end_of_text})
    return json.dumps(meta, indent=1, ensure_ascii=False) + "\n"


def _integers(ids: Iterable[int]) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]


def _checked_ids(vocabulary: dict[str, int]) -> np.ndarray:
    """The ids in order.

    Raises:
        ValueError: an id is too large for a row of an embedding, or two tokens have one. The library gives an added
            token the number of entries as its id, which another token can have if ids have gaps.
    """
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    ids.sort()
    if ids[-1] > _LARGEST_ID:
        raise ValueError(f"id {ids[-1]} is too large: ids are rows of the embedding; number the tokens from 0")
    shared = ids[1:][ids[1:] == ids[:-1]]
    if len(shared):
        names = [token for token, i in vocabulary.items() if i == shared[0]]
        raise ValueError(
            f"the tokens {names[0]!r} and {names[1]!r} get the same id {shared[0]}; number the vocabulary without gaps"
        )
    return ids
