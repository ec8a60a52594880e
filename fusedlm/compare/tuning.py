"""Equal tuning: trials of the learning rate of each variant, and the rate that its runs use."""

import csv
import io
from dataclasses import asdict, dataclass, replace

from fusedlm.compare.folder import RECORDS, RUNS, ExperimentFolder
from fusedlm.compare.matching import Variant
from fusedlm.config import Recipe, load_recipe
from fusedlm.config.experiment import Experiment, run_name, scale_rates
from fusedlm.runs.folder import RECIPE

_COLUMNS = ("variant", "lr_factor", "rates", "outcome", "val_loss", "val_bpb", "chosen", "message")


@dataclass(frozen=True)
class Trial:
    """A training with the learning rates of a variant times a factor."""

    factor: float
    rates: dict[str, float]  # peak learning rates by key
    outcome: str  # finished, diverged, failed or not run
    val_loss: float | None = None  # nats per token on all validation text, of a finished trial
    val_bpb: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Tuning:
    """The trials of one variant, by increasing factor."""

    variant: str
    trials: tuple[Trial, ...]

    @property
    def is_complete(self) -> bool:
        return all(trial.outcome != "not run" for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The finished trial with the lowest loss, of equal ones that of the lowest rate. None: no trial has finished,
        or one is still to be made."""
        finished = [trial for trial in self.trials if trial.outcome == "finished"]
        return min(finished, key=lambda trial: trial.val_loss) if finished and self.is_complete else None

    @property
    def edge(self) -> str | None:
        """ "smallest" or "largest" where that factor is the best of several."""
        if self.best is None or len(self.trials) == 1:
            return None
        ends = {self.trials[0].factor: "smallest", self.trials[-1].factor: "largest"}
        return ends.get(self.best.factor)

    @property
    def lost(self) -> dict | None:
        """How the runs end, as a record, if every trial ended without a loss."""
        if self.best is not None or not self.is_complete:
            return None
        n = len(self.trials)
        failed = [trial for trial in self.trials if trial.outcome == "failed"]
        if failed:
            message = f"since none of {n} trials of its learning rate finished: {failed[0].message}"
            return {"outcome": "failed", "final": None, "message": message}
        return {"outcome": "diverged", "final": None, "message": f"in all trials of its learning rate ({n})"}

    def remarks(self) -> list[str]:
        """Sentences about a choice that more trials could change."""
        best, found = self.best, []
        if best is None:
            return []
        for trial in self.trials:
            if trial.outcome == "failed":
                found.append(
                    f"{self.variant}: the trial of lr factor {trial.factor:g} failed and counts as the worst: "
                    f"{trial.message}"
                )
        if self.edge is not None:
            beyond = "smaller" if self.edge == "smallest" else "larger"
            found.append(
                f"{self.variant}: the best lr factor, {best.factor:g}, is the {self.edge} that was tried; a {beyond} "
                "one might be better"
            )
        return found

    def as_json(self) -> dict:
        best = self.best
        return {
            "factor": None if best is None else best.factor,
            "rates": None if best is None else best.rates,
            "edge": self.edge,
            "trials": [asdict(trial) for trial in self.trials],
        }


def rates_text(rates: dict[str, float]) -> str:
    """ "matrix.lr 0.02, rest.lr 0.001"."""
    return ", ".join(f"{key} {rate:.4g}" for key, rate in rates.items())


def trial_recipe(experiment: Experiment, variant: Variant, baseline: Variant, factor: float) -> Recipe:
    """The recipe of a trial of a matched variant; without validations before its end."""
    train, tune = variant.recipe.train, experiment.tune
    steps = train.steps
    if tune.steps is not None:
        steps = max(1, round(tune.steps * train.steps / baseline.recipe.train.steps))
    scaled = scale_rates(variant.recipe, factor).train.model_copy(
        update={"seed": tune.seed, "steps": steps, "eval_every": 0}
    )
    name = f"{experiment.name}-{run_name(variant.name, tune.seed, factor)}"
    return variant.recipe.model_copy(update={"name": name, "train": scaled})


def read_tunings(experiment: Experiment, variants: dict[str, Variant], folder: ExperimentFolder) -> dict[str, Tuning]:
    """The trials of each matched variant so far; empty if the experiment has none.

    Raises:
        ValueError: a record is damaged.
    """
    tune = experiment.tune
    if tune is None:
        return {}
    found = {}
    for name, variant in variants.items():
        trials = []
        for factor in sorted(tune.lr_factors):
            rates = scale_rates(variant.recipe, factor).train.optimizer.rates()
            record = folder.record(name, tune.seed, factor)
            if record is None:
                trials.append(Trial(factor, rates, "not run"))
                continue
            final = record["final"] or {}
            losses = (final.get("val_nll_per_token"), final.get("val_bpb"))
            trials.append(Trial(factor, rates, record["outcome"], *losses, record["message"]))
        found[name] = Tuning(name, tuple(trials))
    return found


def tuned_variants(
    experiment: Experiment, variants: dict[str, Variant], tunings: dict[str, Tuning], folder: ExperimentFolder
) -> dict[str, Variant]:
    """The variants with the best of their learning rates, where that is known.

    Raises:
        ValueError: a run of the folder was trained with other rates, which were the best before a factor was added.
    """
    tuned = {}
    for name, variant in variants.items():
        best = tunings[name].best if name in tunings else None
        if best is not None:
            variant = replace(variant, recipe=scale_rates(variant.recipe, best.factor))
            _check_rates(variant, best, experiment.seeds, folder)
        tuned[name] = variant
    return tuned


def _check_rates(variant: Variant, best: Trial, seeds: list[int], folder: ExperimentFolder) -> None:
    stale = []
    for seed in seeds:
        path = folder.run(variant.name, seed) / RECIPE
        if path.exists() and load_recipe(path).train.optimizer != variant.recipe.train.optimizer:
            stale.append(run_name(variant.name, seed))
    if stale:
        raise ValueError(
            f"experiment folder {folder.path}: {', '.join(stale)}: trained with another learning rate than the best of "
            f"{variant.name} now, lr factor {best.factor:g} ({rates_text(best.rates)}); remove these folders of "
            f"{RUNS}/ and files of {RECORDS}/ to train them again, or name another folder with --out"
        )


def trials_csv(tunings: dict[str, Tuning]) -> str:
    """One row per trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, tuning in tunings.items():
        for trial in tuning.trials:
            scores = (trial.val_loss, trial.val_bpb)
            chosen = trial == tuning.best
            row = (name, trial.factor, rates_text(trial.rates), trial.outcome, *scores, chosen, trial.message)
            writer.writerow(row)
    return text.getvalue()
