"""The section `data.pipeline` of a recipe: preparation at scale."""

from typing import Annotated, Literal

from pydantic import Field

from fusedlm.config.schema import NEUTRAL, Config, Count, CountOrZero, Fraction, PositiveFloat, Seed, ShortText, Text


class GopherQuality(Config):
    """Quality rules of Gopher (Rae et al., arXiv 2112.11446, table A1); a document must meet all of them."""

    type: Literal["gopher_quality"] = "gopher_quality"
    """The filter."""
    min_words: Count = 50
    """Fewest words."""
    max_words: Count = 100_000
    """Most words."""
    min_word_length: PositiveFloat = 3.0
    """Smallest mean length of the words, in characters."""
    max_word_length: PositiveFloat = 10.0
    """Largest mean length of the words, in characters."""
    max_symbols_per_word: PositiveFloat = 0.1
    """Most # signs per word, and most ellipses."""
    max_bullet_lines: Fraction = 0.9
    """Largest fraction of lines that begin with a bullet."""
    max_ellipsis_lines: Fraction = 0.3
    """Largest fraction of lines that end with an ellipsis."""
    min_alphabetic_words: Fraction = 0.8
    """Smallest fraction of words with a letter."""
    min_stop_words: CountOrZero = 2
    """Fewest different ones of the words the, be, to, of, and, that, have, with; 0: any text, as of other languages."""


class GopherRepetition(Config):
    """Repetition rules of Gopher (Rae et al., arXiv 2112.11446, table A1), with their thresholds for repeated n-grams
    of 2 to 10 words."""

    type: Literal["gopher_repetition"] = "gopher_repetition"
    """The filter."""
    max_duplicate_lines: Fraction = 0.3
    """Largest fraction of lines that are repeated."""
    max_duplicate_paragraphs: Fraction = 0.3
    """Largest fraction of paragraphs that are repeated."""
    max_duplicate_line_characters: Fraction = 0.2
    """Largest fraction of characters in repeated lines."""
    max_duplicate_paragraph_characters: Fraction = 0.2
    """Largest fraction of characters in repeated paragraphs."""


class FineWebQuality(Config):
    """Line rules of FineWeb (Penedo et al., arXiv 2406.17557)."""

    type: Literal["fineweb_quality"] = "fineweb_quality"
    """The filter."""
    min_punctuated_lines: Fraction = 0.12
    """Smallest fraction of lines that end with punctuation."""
    max_short_lines: Fraction = 0.67
    """Largest fraction of lines of at most 30 characters."""
    max_duplicate_line_characters: Fraction = 0.01
    """Largest fraction of characters in repeated lines."""
    max_line_breaks_per_word: PositiveFloat = 0.3
    """Most line breaks per word."""


Filter = Annotated[GopherQuality | GopherRepetition | FineWebQuality, Field(discriminator="type")]


class MinHash(Config):
    """Near duplicates: documents that agree in all hashes of a bucket (Broder 1997). With buckets of b hashes in n
    buckets, documents of Jaccard similarity s of their n-grams are found with probability 1 - (1 - s^b)^n."""

    n_grams: int = Field(5, ge=1, le=100)
    """Words per n-gram; a document with fewer words is no near duplicate."""
    buckets: int = Field(14, ge=1, le=1000)
    """Buckets."""
    hashes: int = Field(8, ge=1, le=1000)
    """Hashes of 64 bits per bucket."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of the hash functions."""


class LocalExecutor(Config):
    """Processes of this machine."""

    type: Literal["local"] = "local"
    """What runs the tasks."""
    workers: int | None = Field(None, ge=1, le=4096)
    """Tasks at the same time; null: one per core."""


class SlurmExecutor(Config):
    """Array jobs of a Slurm cluster, one per stage, each after the one before it."""

    type: Literal["slurm"] = "slurm"
    """What runs the tasks."""
    partition: ShortText
    """Partition."""
    time: ShortText = "24:00:00"
    """Time limit of a task."""
    workers: int | None = Field(None, ge=1, le=100_000)
    """Tasks of a stage at the same time; null: no limit."""
    cpus: int = Field(1, ge=1, le=1024)
    """Cores per task."""
    memory_gb: int = Field(4, ge=1, le=100_000)
    """Memory per core, in GB."""
    single_memory_gb: int = Field(32, ge=1, le=100_000)
    """Memory per core of the stages that are one task: clusters, tokenizer, spans, layout."""
    qos: ShortText | None = None
    """Quality of service; null: that of the cluster."""
    setup: Text | None = None
    """Shell command before each task, such as `source /shared/venv/bin/activate`."""
    sbatch: dict[ShortText, ShortText] = Field({}, max_length=50)
    """Further options of sbatch, such as {account: mine}."""
    max_array: int = Field(1001, ge=1, le=10**7)
    """Largest array of the cluster (MaxArraySize)."""


class RayExecutor(Config):
    """Actors of a Ray cluster."""

    type: Literal["ray"] = "ray"
    """What runs the tasks."""
    address: Text | None = None
    """Of the cluster; null: as `ray.init()` finds it."""
    workers: int | None = Field(None, ge=1, le=100_000)
    """Tasks of a stage at the same time; null: no limit."""
    cpus: int = Field(1, ge=1, le=1024)
    """Cores per task."""
    memory_gb: int = Field(4, ge=1, le=100_000)
    """Memory per core, in GB."""
    single_memory_gb: int = Field(32, ge=1, le=100_000)
    """Memory per core of the stages that are one task: clusters, tokenizer, spans, layout."""


Executor = Annotated[LocalExecutor | SlurmExecutor | RayExecutor, Field(discriminator="type")]


class PipelineConfig(Config):
    """Preparation at scale, on datatrove (`pip install fusedlm[prepare]`)."""

    filters: list[Filter] = Field([], max_length=32)
    """Filters by type, in order; a document that fails one is dropped."""
    language: ShortText | None = None
    """Of datatrove's word tokenizer for filters and MinHash, such as en (spaCy); null: words are between white
    space."""
    exact: bool = True
    """Of documents with the same text, only the first is kept."""
    near: MinHash | None = MinHash()
    """Of near duplicates, only the first is kept, and of those of a held-out document none; null: they are not
    searched."""
    held_out_span: CountOrZero | None = None
    """Training text with so many consecutive tokens of held-out text is dropped; null: 50, or 200 with the
    tokenizer bytes; 0: it is not searched."""
    seed: Seed = 0
    """Of the choice of held-out documents by split.type=hash; 0: as without data.pipeline."""
    executor: Annotated[Executor, NEUTRAL] = LocalExecutor()
    """What runs the tasks, by its type; the shards do not depend on it."""
    tasks: Annotated[int | None, NEUTRAL] = Field(None, ge=1, le=100_000)
    """Largest number of tasks of a stage; a file is read by one task. null: by the size of the files. The shards do not
    depend on it."""

    def text_settings(self) -> dict:
        """The keys that the prepared text depends on."""
        return self.model_dump(mode="json", exclude={"executor", "tasks"})
