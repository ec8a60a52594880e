"""What a person should know about the text before a training starts."""

from dataclasses import dataclass

from fusedlm.config import Recipe
from fusedlm.config.data import DataConfig
from fusedlm.data.shards import PreparedData, TokenShards

# Up to about four epochs, repeated text is nearly as good as new (Muennighoff et al., arXiv 2305.16264).
_FEW_EPOCHS = 4


@dataclass(frozen=True)
class TextSummary:
    """Counts of prepared text, and how it fits a recipe.

    Attributes:
        held_out: bytes held out as a fraction of all bytes.
        wanted: `data.split.fraction`; None: held-out text is a source of its own.
        epochs: times that training reads the training text.
    """

    train: TokenShards
    validation: TokenShards
    held_out: float
    wanted: float | None
    epochs: float

    def one_line(self) -> str:
        """Both splits together, the share that is held out, and the epochs, for a run's header."""
        train, held_out = self.train, self.validation
        return (
            f"{train.n_documents + held_out.n_documents:,} documents, {train.n_bytes + held_out.n_bytes:,} bytes, "
            f"{train.n_tokens + held_out.n_tokens:,} tokens; {_percent(self.held_out)} of the bytes held out; "
            f"{self.epochs:.3g} epochs"
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
        """A sentence if the text is read many times."""
        if self.epochs <= _FEW_EPOCHS:
            return None
        return f"every token is read {self.epochs:.3g} times; past {_FEW_EPOCHS}, new text helps more than more steps"


def summarise(prepared: PreparedData, recipe: Recipe) -> TextSummary:
    """Count prepared text for a recipe."""
    train, validation, settings = prepared.train, prepared.validation, recipe.train
    n_bytes = train.n_bytes + validation.n_bytes
    return TextSummary(
        train=train,
        validation=validation,
        held_out=validation.n_bytes / n_bytes if n_bytes else 0.0,
        wanted=_wanted(recipe.data),
        epochs=settings.total_tokens() / max(1, train.n_tokens),
    )


def text_facts(prepared: PreparedData, recipe: Recipe) -> dict[str, str]:
    """The summary as lines: name -> text, with warnings after the figures that they are about."""
    summary = summarise(prepared, recipe)
    facts = {
        "training text": count_text(summary.train),
        "held-out text": f"{count_text(summary.validation)}, {_percent(summary.held_out)} of the bytes",
        "epochs": f"{summary.epochs:.3g}",
    }
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
