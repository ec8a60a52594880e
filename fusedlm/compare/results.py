"""From records and metrics of runs to results: a row per run, a summary and a verdict per variant."""

import csv
import io
import math
from dataclasses import asdict, dataclass, field

import numpy as np

from fusedlm.compare.folder import ExperimentFolder
from fusedlm.compare.matching import Variant
from fusedlm.compare.statistics import Verdict, judge, summarise
from fusedlm.compare.time_to_loss import (
    SECONDS,
    STEPS,
    TimeToLoss,
    add_time_to_loss,
    is_comparable,
    summarise_time,
    time_sentence,
)
from fusedlm.compare.tuning import Tuning, read_tunings, tuned_variants
from fusedlm.config.experiment import Experiment, run_name
from fusedlm.report.history import History, median, read_history, total, without_times

# Values of a run, which are the columns of results.csv.
ROW = (
    "variant",
    "seed",
    "lr_factor",  # of the best trial of the learning rates; none without tuning
    "outcome",  # finished, diverged, failed or not run
    "steps",
    "tokens",
    "val_loss",  # nats per token on all validation text, at the end
    "val_bpb",
    "best_val_loss",  # lowest validation during training
    "best_val_bpb",
    "best_val_step",
    STEPS,  # to the mean final loss of the baseline in validations during training; of the baseline, its totals
    SECONDS,  # without validations and compilation
    "train_loss",  # of the last step
    "train_loss_last_10",  # mean of the last ten steps, without skipped ones
    "tokens_per_second",  # median without warm-up
    "step_seconds",
    "training_seconds",  # of all steps, with warm-up, without validations
    "peak_memory_bytes",
    "skipped_steps",
    "ffn_flops_share",  # FLOPs of routed feed-forwards over those of the full width, in the last validation
    "message",
)
_LAST = 10
_WARM_UP = 10  # one tenth of the steps

LOSS, BPB = ("val_loss", "validation loss", "nats per token"), ("val_bpb", "validation bits per byte", "bits per byte")


@dataclass(frozen=True)
class Results:
    experiment: Experiment
    variants: dict[str, Variant]  # with their tuned learning rates
    rows: list[dict]  # one per run, keys as in ROW
    histories: dict[tuple[str, int], History]  # of runs that have finished or diverged
    decoding: dict[str, dict | None]  # variant -> length (text) -> (bytes, tokens per second), or None
    environments: list[dict]  # distinct environments of runs, each with its number of "runs"
    dates: tuple[str, ...]  # distinct days on which runs ended
    backends: dict[str, dict]  # variant -> op -> backend that ran
    data: dict = field(default_factory=dict)  # counts of the text of the baseline, as its environment records them
    tunings: dict[str, Tuning] = field(default_factory=dict)  # by variant; empty: nothing was tuned
    baseline_bpb: float | None = None  # mean final loss of the baseline in validations during training, bits per byte
    shared: tuple[str, ...] = ()  # runs that shared a GPU, whose times are left out

    @property
    def baseline(self) -> str:
        return next(iter(self.variants))

    @property
    def metric(self) -> tuple[str, str, str]:
        """(column, name, unit) of the verdicts: nats per token only if all variants have the same tokenizer."""
        tokenizers = {variant.recipe.data.tokenizer.model_dump_json() for variant in self.variants.values()}
        return LOSS if len(tokenizers) == 1 else BPB

    def of(self, variant: str, outcome: str | None = "finished") -> list[dict]:
        """Rows of a variant with that outcome; None: any."""
        return [row for row in self.rows if row["variant"] == variant and outcome in (None, row["outcome"])]

    def values(self, variant: str, column: str) -> dict[int, float]:
        """seed -> value of the finished runs."""
        return {row["seed"]: row[column] for row in self.of(variant) if row[column] is not None}

    def summary(self, variant: str, column: str):
        return summarise(list(self.values(variant, column).values()))

    @property
    def has_ended(self) -> bool:
        """Whether any run has, in any way."""
        return any(row["outcome"] != "not run" for row in self.rows)

    def label(self, variant: str) -> str:
        """The name of a variant; if its means are not over all seeds, with the number of seeds that they are over."""
        n, n_all = len(self.of(variant)), len(self.of(variant, None))
        return variant if n == n_all else f"{variant} ({n} of {n_all} seeds)"

    def lost(self, variant: str) -> str:
        """How runs of a variant ended without a loss: "wide diverged on seeds 0 (step 40) and 1 (step 60)"."""
        diverged, failed = self.of(variant, "diverged"), self.of(variant, "failed")
        parts = []
        if variant in self.tunings and (lost := self.tunings[variant].lost) is not None:
            diverged = failed = []
            parts.append(f"{lost['outcome']} {lost['message']}")
        if diverged:
            where = _listed([f"{row['seed']} (step {row['steps']:,})" for row in diverged])
            parts.append(f"diverged on seed{'s' * (len(diverged) > 1)} {where}")
        if failed:
            parts.append(f"failed on seed{'s' * (len(failed) > 1)} {_listed([str(row['seed']) for row in failed])}")
        return f"{variant} {' and '.join(parts)}" if parts else ""

    def left_out(self) -> str:
        """The runs that are in no mean and no curve, as a sentence; empty if there are none."""
        lost = "; ".join(filter(None, map(self.lost, self.variants)))
        return f"Left out: {lost}." if lost else ""

    def verdict(self, variant: str, metric: tuple[str, str, str] | None = None) -> Verdict:
        column, what, unit = metric or self.metric
        own, other = self.values(variant, column), self.values(self.baseline, column)
        lost = ", ".join(filter(None, (self.lost(variant), self.lost(self.baseline))))
        return judge(variant, self.baseline, own, other, what, unit, lost)

    def time_to_loss(self, variant: str) -> TimeToLoss | None:
        """Steps and seconds of a variant to the baseline's final loss. None: validations during training are not
        comparable, or the baseline has none."""
        if self.baseline_bpb is None:
            return None
        outcome = "finished" if variant == self.baseline else None
        return summarise_time(self.of(variant, outcome), self.of(self.baseline))

    def time_sentences(self) -> list[str]:
        """A sentence for each variant but the first that has ended runs."""
        found = {name: self.time_to_loss(name) for name in self.variants if name != self.baseline}
        return [time_sentence(name, self.baseline, time) for name, time in found.items() if time and time.n_runs]

    def verdicts(self) -> list[str]:
        """A sentence for each variant but the first, and some for diverged, failed and unfinished runs."""
        sentences = [self.verdict(name).sentence for name in self.variants if name != self.baseline]
        for name in self.variants:
            if self.of(name, "diverged"):
                sentences.append(f"{self.lost(name)}; diverged runs are in no mean")
            for row in self.of(name, "failed"):
                sentences.append(f"{name} failed on seed {row['seed']}: {row['message']}")
        if any(row["outcome"] == "failed" for row in self.rows):
            sentences.append("failed runs are in no mean; running the experiment again tries them again")
        for tuning in self.tunings.values():
            sentences += tuning.remarks()
        missing = sum(row["outcome"] == "not run" for row in self.rows)
        if missing:
            sentences.append(f"{missing} of {len(self.rows)} runs are not finished yet")
        return sentences

    def as_json(self) -> dict:
        """Everything as plain values."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "baseline": self.baseline,
            "metric": dict(zip(("column", "name", "unit"), self.metric, strict=True)),
            "variants": {name: self._variant_json(name) for name in self.variants},
            "verdicts": self.verdicts(),
            "baseline_loss_in_training": self.baseline_bpb,
            "runs": self.rows,
            "environments": self.environments,
            "dates": list(self.dates),
            "shared_gpu": list(self.shared),
        }

    def _variant_json(self, name: str) -> dict:
        variant = self.variants[name]
        summarised = ("val_loss", "val_bpb", "best_val_loss", "best_val_bpb", "train_loss", "train_loss_last_10")
        measured = (
            "tokens_per_second",
            "step_seconds",
            "training_seconds",
            "peak_memory_bytes",
            "ffn_flops_share",
        )
        tree = {
            **asdict(variant.account),
            "vocab_size": variant.vocab_size,
            "steps": variant.recipe.train.steps,
            "tokens": variant.tokens,
            "training_flops": variant.account.flops_per_token * variant.tokens,
            "changed_to_match": [asdict(change) for change in variant.changes],
            "deviation": variant.deviation,
            **{column: asdict(self.summary(name, column)) for column in (*summarised, *measured)},
            "decoding": {
                length: None if found is None else {"state_bytes": found[0], "tokens_per_second": found[1]}
                for length, found in (self.decoding[name] or {}).items()
            },
            "backends": self.backends.get(name, {}),
            "recipe": variant.recipe.model_dump(mode="json"),
        }
        if (time := self.time_to_loss(name)) is not None:
            tree["to_baseline_loss"] = asdict(time)
        if name in self.tunings:
            tree["tuning"] = self.tunings[name].as_json()
        if name != self.baseline:
            tree["against_baseline"] = {metric[0]: asdict(self.verdict(name, metric)) for metric in (LOSS, BPB)}
        return tree

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, ROW, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()


def collect(experiment: Experiment, variants: dict[str, Variant], folder: ExperimentFolder) -> Results:
    """The results in an experiment's folder so far.

    Args:
        variants: matched; not tuned.

    Raises:
        ValueError: a record or the metrics of a run are damaged; names file and line. Or a run has another learning
            rate than the best trial.
    """
    tunings = read_tunings(experiment, variants, folder)
    variants = tuned_variants(experiment, variants, tunings, folder)
    rows, histories, environments, dates, backends, data, shared = [], {}, [], set(), {}, {}, []
    for name, variant in variants.items():
        tuning = tunings.get(name)
        factor = tuning.best.factor if tuning and tuning.best else None
        is_trained = tuning is None or factor is not None
        for seed in experiment.seeds:
            record = folder.record(name, seed) if is_trained else tuning.lost
            history = None
            if record is not None and record["outcome"] != "failed" and is_trained:
                history = read_history(folder.run(name, seed))
                if folder.is_shared(name, seed):
                    history = without_times(history)
                    shared.append(run_name(name, seed))
                histories[name, seed] = history
                environment = folder.environment(name, seed)
                for of_the_model in ("parameters", "optimizer"):
                    environment.pop(of_the_model, None)
                counts = environment.pop("data", {})
                data = data or counts
                dates.add(str(environment.pop("date", ""))[:10])
                backends[name] = environment.pop("backends", {})
                _count_environment(environments, environment)
            rows.append(_row(variant, seed, record, history) | {"lr_factor": factor})
    decoding = {name: folder.decoding(name) for name in variants}
    days = tuple(sorted(dates - {""}))
    target = None
    if is_comparable(variants):
        target = add_time_to_loss(rows, histories, next(iter(variants)), experiment.weights)
    facts = (environments, days, backends, data)
    return Results(experiment, variants, rows, histories, decoding, *facts, tunings, target, tuple(shared))


def _count_environment(environments: list[dict], found: dict) -> None:
    for known in environments:
        if {key: value for key, value in known.items() if key != "runs"} == found:
            known["runs"] += 1
            return
    environments.append(found | {"runs": 1})


def _row(variant: Variant, seed: int, record: dict | None, history: History | None) -> dict:
    row = dict.fromkeys(ROW) | {"variant": variant.name, "seed": seed, "outcome": "not run"}
    if record is None:
        return row
    row |= {"outcome": record["outcome"], "message": record["message"]}
    if history is None:
        return row
    steps, validation = history.steps, history.validation
    settled = slice(len(steps["step"]) // _WARM_UP, None)
    last = steps["loss"][-_LAST:]
    memory = steps["peak_memory_bytes"]
    row |= {
        "steps": int(steps["step"][-1]),
        "tokens": int(steps["tokens"][-1]),
        "train_loss": _finite(steps["loss"][-1]),
        "train_loss_last_10": _finite(np.mean(last[np.isfinite(last)])) if np.isfinite(last).any() else None,
        "tokens_per_second": median(steps["tokens_per_second"][settled]),
        "step_seconds": median(steps["step_seconds"][settled]),
        "training_seconds": total(steps["step_seconds"]),
        "peak_memory_bytes": int(np.nanmax(memory)) if np.isfinite(memory).any() else None,
        "skipped_steps": len(history.skipped),
    }
    if record["final"] is not None:
        row |= {"val_loss": record["final"]["val_nll_per_token"], "val_bpb": record["final"]["val_bpb"]}
    shares = validation["val_routed_flops_share"]
    if np.isfinite(shares).any():
        row["ffn_flops_share"] = _finite(shares[np.isfinite(shares)][-1])
    if np.isfinite(validation["val_bpb"]).any():
        best = int(np.nanargmin(validation["val_bpb"]))
        row |= {
            "best_val_loss": _finite(validation["val_nll_per_token"][best]),
            "best_val_bpb": _finite(validation["val_bpb"][best]),
            "best_val_step": int(validation["step"][best]),
        }
    return row


def _listed(items: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
