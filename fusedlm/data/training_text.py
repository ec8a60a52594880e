"""What a run reads: the samples of its sources, how often each source is read, and the limits of that."""

from dataclasses import dataclass

from fusedlm.config import Recipe
from fusedlm.data.mixture import SourceSchedule, source_schedule, total_samples
from fusedlm.data.packing import PackedRows
from fusedlm.data.samples import MixedSamples, Windows
from fusedlm.data.shards import TokenShards


@dataclass(frozen=True)
class TrainingText:
    """The samples of a run.

    Attributes:
        samples: for the loader.
        parts: samples by source; a single one has the name None.
        schedule: of several sources; None: there is one.
        seq_len: tokens per sample.
    """

    samples: Windows | PackedRows | MixedSamples
    parts: dict[str | None, Windows | PackedRows]
    schedule: SourceSchedule | None
    seq_len: int

    def tokens(self, n_samples: int) -> dict[str | None, int]:
        """Tokens of each source among the first n_samples samples."""
        counts = {None: n_samples} if self.schedule is None else self.schedule.counts(n_samples)
        return {name: count * self.seq_len for name, count in counts.items()}

    def epochs(self, n_samples: int) -> dict[str | None, float]:
        """Times that each source is read in the first n_samples samples."""
        tokens = self.tokens(n_samples)
        return {name: tokens[name] / (part.per_epoch * self.seq_len) for name, part in self.parts.items()}

    def packing(self) -> str | None:
        """What packing costs, for people; None: the stream of tokens is cut."""
        packed = {name: part for name, part in self.parts.items() if isinstance(part, PackedRows)}
        if not packed:
            return None
        return "; ".join(f"{name + ': ' if name else ''}{part.facts()}" for name, part in packed.items())


def open_training_text(shards: TokenShards, recipe: Recipe) -> TrainingText:
    """The samples of a recipe.

    Args:
        shards: the training split of its text.

    Raises:
        ValueError: the text or a source is too short, or a source would be read more often than its `max_epochs`.
    """
    seq_len, seed = recipe.train.seq_len, recipe.train.seed
    kind = PackedRows if recipe.data.packing == "best_fit" else Windows
    schedule = source_schedule(recipe)
    if schedule is None:
        samples = kind(shards, seq_len, seed)
        return TrainingText(samples, {None: samples}, None, seq_len)
    parts = {}
    for name in schedule.names:
        try:
            parts[name] = kind(shards.sources[name], seq_len, f"{seed} {name}")
        except ValueError as error:
            raise ValueError(f"data.sources.{name}: {error}") from None
    text = TrainingText(MixedSamples(parts, schedule), parts, schedule, seq_len)
    _check_epochs(text, recipe)
    return text


def _check_epochs(text: TrainingText, recipe: Recipe) -> None:
    excess = []
    for name, epochs in text.epochs(total_samples(recipe)).items():
        limit = recipe.data.sources[name].max_epochs
        if limit is not None and epochs > limit:
            excess.append(f"{name} {epochs:.3g} times (max_epochs={limit:g})")
    if excess:
        raise ValueError(
            f"data.sources: the run would read {', '.join(excess)}; lower their weights, train on fewer tokens, or "
            "raise max_epochs"
        )
