"""Tokenizers: bytes, byte-level BPE trained on the corpus, or a `tokenizer.json`; one interface, exact byte counts.

Text never encodes to the end-of-text token: special tokens are not parsed in text, so "<|endoftext|>" in a corpus is
ordinary characters.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fusedlm.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
_META_FILE = "tokenizer.meta.json"
_MODEL_FILE = "tokenizer.json"

# The split of cl100k_base (tiktoken): contractions, a word with the character before it, up to three digits,
# punctuation with the line ends after it, white space. On English a token holds about 1% more text than with GPT-2's
# split, at the same speed.
_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# This split and GPT-2's both always cut between a single line end and a letter.
_PIECE_END = re.compile(r"(?<=[!-~])\n(?=[A-Za-z])")
_PIECE_CHARACTERS = 1 << 17
_GROUP_CHARACTERS = 1 << 22


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        eot_id: the end-of-text id, to which no text encodes.
        fingerprint: sha256 (hex) of everything that the encoding of text depends on.
    """

    vocab_size: int
    eot_id: int
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array of ids per text, without end-of-text; uses all cores and releases the GIL."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids. End-of-text has none; the first and last character may be incomplete."""

    @abstractmethod
    def _files(self) -> dict[str, str]:
        """Content of the files that `load_tokenizer` needs, by name."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without end-of-text."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> list[str]:
        """Write the tokenizer into an existing directory; returns the names of the files written."""
        files = self._files()
        for name, content in files.items():
            write_atomic(Path(directory, name), content)
        return list(files)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes of UTF-8; 256 is end-of-text."""

    vocab_size = 257
    eot_id = 256
    fingerprint = hashlib.sha256(b"bytes 257").hexdigest()

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode_bytes(self, ids):
        return bytes(i for i in map(int, ids) if i < 256)

    def _files(self):
        return {_META_FILE: _meta("bytes", self.fingerprint)}


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, given as the text of its tokenizer.json.

    Args:
        content: the JSON; fingerprint and saved file are of exactly these characters.
        end_of_text: a token of its vocabulary.

    Raises:
        ValueError: the JSON is not a tokenizer, or lacks the token.
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
        self._model, self._content, self._end_of_text = model, content, end_of_text
        vocabulary = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot_id = eot_id
        self.fingerprint = hashlib.sha256(json.dumps([content, end_of_text]).encode()).hexdigest()
        self._token_bytes = (
            _byte_table(spec, vocabulary) if (spec.get("decoder") or {}).get("type") == "ByteLevel" else None
        )
        self._can_cut = _cuts_at_line_ends(spec)

    def encode_batch(self, texts):
        pieces, counts = [], []
        for text in texts:
            cut = list(_pieces(text)) if self._can_cut else [text]
            pieces += cut
            counts.append(len(cut))
        parts = iter(self._encode_pieces(pieces))
        return [np.concatenate([next(parts) for _ in range(count)]) for count in counts]

    def _encode_pieces(self, pieces: list[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each piece, a few megabytes at a time: the library's results take 100 bytes per token."""
        start = size = 0
        for end, piece in enumerate(pieces, 1):
            size += len(piece)
            if size >= _GROUP_CHARACTERS or end == len(pieces):
                for encoding in self._model.encode_batch_fast(pieces[start:end], add_special_tokens=False):
                    yield np.asarray(encoding.ids, dtype=np.int64)
                start, size = end, 0

    def decode_bytes(self, ids):
        ids = [i for i in map(int, ids) if i != self.eot_id]
        if self._token_bytes is None:
            return self._model.decode(ids, skip_special_tokens=False).encode()
        return b"".join(self._token_bytes.get(i, b"") for i in ids)

    def _files(self):
        return {_MODEL_FILE: self._content, _META_FILE: _meta("subword", self.fingerprint, self._end_of_text)}


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
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
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
    model.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
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
        meta = json.loads(path.read_text(encoding="utf-8"))
        kind, fingerprint = meta["type"], meta["fingerprint"]
        if kind not in ("bytes", "subword"):
            raise ValueError(f"type {kind!r} is unknown")
        end_of_text = None if kind == "bytes" else meta["end_of_text"]
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer {path}: damaged ({' '.join(str(error).split())})") from None
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        path = Path(directory, _MODEL_FILE)
        tokenizer = read_tokenizer_file(path, end_of_text)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"tokenizer {path}: changed since it was saved (its fingerprint differs)")
    return tokenizer


def _meta(kind: str, fingerprint: str, end_of_text: str | None = None) -> str:
    meta = {"type": kind, "fingerprint": fingerprint} | ({} if end_of_text is None else {"end_of_text": end_of_text})
    return json.dumps(meta, indent=1, ensure_ascii=False) + "\n"


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text where the pre-tokenizer also cuts: bounds memory, and one document can use every core."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        match = _PIECE_END.search(text, start + _PIECE_CHARACTERS)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:] if start else text


def _cuts_at_line_ends(spec: dict) -> bool:
    """Whether pieces encode to the tokens of the full text: true for the splits of GPT-2 and of `train_bpe`."""
    if spec.get("normalizer") is not None or (spec.get("model") or {}).get("type") != "BPE":
        return False
    if any("\n" in t["content"] or t.get("lstrip") or t.get("rstrip") for t in spec.get("added_tokens", ())):
        return False
    stage = spec.get("pre_tokenizer") or {}
    if stage.get("type") == "ByteLevel":
        return bool(stage.get("use_regex", True)) and not stage.get("add_prefix_space")
    stages = stage.get("pretokenizers", [])
    return (
        len(stages) == 2
        and stages[0].get("pattern") == {"Regex": _SPLIT}
        and stages[0].get("behavior") == "Isolated"
        and not stages[0].get("invert")
        and stages[1].get("type") == "ByteLevel"
        and not stages[1].get("add_prefix_space")
    )


def _byte_table(spec: dict, vocabulary: dict[str, int]) -> dict[int, bytes]:
    """The bytes of each id of a byte-level vocabulary, which has printable characters for bytes (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    added = {token["content"] for token in spec.get("added_tokens", ())}
    table = {}
    for token, i in vocabulary.items():
        known = token not in added and all(character in byte_of for character in token)
        table[i] = bytes(byte_of[character] for character in token) if known else token.encode()
    return table
