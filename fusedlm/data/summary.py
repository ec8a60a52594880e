"""What a person should know about the text before a training starts."""

from dataclasses import dataclass, field

from fusedlm.config import Recipe
from fusedlm.config.data import DataConfig
from fusedlm.data.mixture import stage_lines, total_samples
from fusedlm.data.shards import PreparedData, TokenShards
from fusedlm.data.training_text import TrainingText, open_training_text

# Up to about four epochs, repeated text is nearly as good as new (Muennighoff et al., arXiv 2305.16264).
_FEW_EPOCHS = 4


@dataclass(frozen=True)
class TextSummary:
    """Counts of prepared text, and how it fits a recipe.

    Attributes:
        held_out: bytes held out as a fraction of all bytes.
        wanted: `data.split.fraction`; None: held-out text is a source of its own.
        epochs: times that training reads the training text.
        by_source: tokens read, and epochs, of each of several sources.
        packing: what packing costs; None: documents are not packed.
    """

    train: TokenShards
    validation: TokenShards
    held_out: float
    wanted: float | None
    epochs: float
    by_source: dict[str, tuple[int, float]] = field(default_factory=dict)
    packing: str | None = None

    def one_line(self) -> str:
        """Both splits together, the share that is held out, and the epochs, for a run's header."""
        train, held_out = self.train, self.validation
        return (
            f"{train.n_documents + held_out.n_documents:,} documents, {train.n_bytes + held_out.n_bytes:,} bytes, "
            f"{train.n_tokens + held_out.n_tokens:,} tokens; {_percent(self.held_out)} of the bytes held out; "
            + (self.sources_line() or f"{self.epochs:.3g} epochs")
            + (f"; packed: {self.packing}" if self.packing else "")
        )

    def sources_line(self) -> str:
        """Share of the tokens read, and epochs, of each of several sources; "" if there is one."""
        total = sum(tokens for tokens, _ in self.by_source.values())
        return ", ".join(
            f"{name} {_percent(tokens / total)} ({epochs:.3g} epochs)"
            for name, (tokens, epochs) in self.by_source.items()
        )

    def warnings(self) -> list[str]:
        """Sentences about a split or a number of epochs that few would want."""
        return [warning for warning in (self.split_warning(), self.epochs_warning()) if warning is not None]

    def split_warning(self) -> str | None:
        """A sentence if one side of the split has less than half or more than twice its share."""
        if self.wanted is None:
            return None
        factors = [self.held_out / self.wanted, (1 - self.held_out) / (1 - self.wanted)]
        if all(0.5 <= factor <= 2 for factor in factors):
            return None
        return (
            f"{_percent(self.held_out)} of the text is held out, where data.split.fraction asks for "
            f"{_percent(self.wanted)}: too few or too unequal documents for this split; "
            "use data.split.type=tail or name data.validation"
        )

    def epochs_warning(self) -> str | None:
        """A sentence if the text, or a source, is read many times."""
        if self.by_source:
            epochs = {name: epochs for name, (_, epochs) in self.by_source.items()}
            often = [f"{name} {times:.3g} times" for name, times in epochs.items() if times > _FEW_EPOCHS]
            if not often:
                return None
            return f"training reads {', '.join(often)}; past {_FEW_EPOCHS}, new text helps more than more steps"
        if self.epochs <= _FEW_EPOCHS:
            return None
        return f"every token is read {self.epochs:.3g} times; past {_FEW_EPOCHS}, new text helps more than more steps"


def summarise(prepared: PreparedData, recipe: Recipe, text: TrainingText | None = None) -> TextSummary:
    """Count prepared text for a recipe.

    Args:
        text: what a run of the recipe reads, if it is open.

    Raises:
        ValueError: as `open_training_text`, of several sources or packed documents.
    """
    train, validation, settings = prepared.train, prepared.validation, recipe.train
    n_bytes = train.n_bytes + validation.n_bytes
    if text is None and (recipe.data.sources is not None or recipe.data.packing != "stream"):
        text = open_training_text(train, recipe)
    by_source = {}
    if text is not None and text.schedule is not None:
        tokens, epochs = (count(total_samples(recipe)) for count in (text.tokens, text.epochs))
        by_source = {name: (tokens[name], epochs[name]) for name in tokens}
    return TextSummary(
        train=train,
        validation=validation,
        held_out=validation.n_bytes / n_bytes if n_bytes else 0.0,
        wanted=_wanted(recipe.data),
        epochs=settings.total_tokens() / max(1, train.n_tokens),
        by_source=by_source,
        packing=None if text is None else text.packing(),
    )


def text_facts(prepared: PreparedData, recipe: Recipe) -> dict[str, str]:
    """The summary as lines: name -> text, with warnings after the figures that they are about."""
    summary = summarise(prepared, recipe)
    facts = {
        "training text": count_text(summary.train),
        "held-out text": f"{count_text(summary.validation)}, {_percent(summary.held_out)} of the bytes",
        "epochs": summary.sources_line() or f"{summary.epochs:.3g}",
    }
    if stages := stage_lines(recipe):
        facts["stages"] = "; then ".join(stages)
    if summary.packing is not None:
        facts["packing"] = summary.packing
    for name, warning in (("held-out text", summary.split_warning()), ("epochs", summary.epochs_warning())):
        if warning is not None:
            facts[name] += f" (warning: {warning})"
    return facts


def count_text(shards: TokenShards) -> str:
    """Documents, bytes and tokens of a split."""
    documents = f"{shards.n_documents:,} document{'' if shards.n_documents == 1 else 's'}"
    return f"{documents}, {shards.n_bytes:,} bytes, {shards.n_tokens:,} tokens"


def _wanted(config: DataConfig) -> float | None:
    return None if config.validation is not None else config.split.fraction


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}%"
