"""The grid: variants × seeds, each a run of its own, once."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fusedlm.compare.folder import ExperimentFolder, identify
from fusedlm.compare.matching import Variant, match_variants
from fusedlm.compare.process import Stopped, apart
from fusedlm.compare.progress import GridDisplay
from fusedlm.compare.report import write_report
from fusedlm.compare.results import Results, collect
from fusedlm.compare.work import calibrate, measure, train_run
from fusedlm.config import Recipe
from fusedlm.config.experiment import Experiment, run_name
from fusedlm.data import prepare
from fusedlm.data.vocabulary import planned_vocab_size
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.train.hardware import device_name
from fusedlm.train.loggers import check_loggers
from fusedlm.train.progress import Display
from fusedlm.train.signals import StopSignal


@dataclass(frozen=True)
class Outcome:
    results: Results | None  # None: stopped before the sizes were known
    stopped: bool  # by a signal; running the experiment again goes on
    report: Path | None  # None: nothing is finished yet


def plan_experiment(
    experiment: Experiment, recipes: dict[str, Recipe], vocab_size: int | None = None
) -> dict[str, Variant]:
    """The variants as they would be trained; prepares and trains nothing, so that `match: time` leaves the steps.

    Args:
        vocab_size: None: that which each recipe's tokenizer asks for.

    Raises:
        ValueError: a tokenizer file cannot be read, or a match is impossible.
    """
    _check_same_text(recipes)
    sizes = {name: vocab_size or planned_vocab_size(recipe.data.tokenizer) for name, recipe in recipes.items()}
    return match_variants(experiment, recipes, sizes)


def run_experiment(
    experiment: Experiment, recipes: dict[str, Recipe], out: Path, *, console: Console | None = None, train: bool = True
) -> Outcome:
    """Do what is left of an experiment, and write OUT/report.html, results.csv and results.json.

    Each run is a process of its own. On the first SIGINT or SIGTERM the run that is on saves and stops; calling again
    goes on from there, and repeats no finished run. A run that diverges is recorded as such.

    Args:
        experiment, recipes: as `load_experiment` gives them.
        out: the experiment's folder.
        console: where progress is shown; None: nowhere.
        train: False: report what is there.

    Raises:
        ValueError: the folder holds another experiment or is in use, a match is impossible, variants are not held
            against the same text, or a run cannot be made.
        OSError: a folder cannot be written.
    """
    for recipe in recipes.values():
        check_loggers(recipe.train.loggers)
    _check_same_text(recipes)
    with ExperimentFolder(Path(out)) as folder:
        vocab_sizes = (_begin if train else _begun)(experiment, recipes, folder, console)
        with StopSignal() as stop:
            grid = _Grid(experiment, folder, GridDisplay(console), stop)
            try:
                variants = grid.run(recipes, vocab_sizes) if train else grid.match(recipes, vocab_sizes, timing=False)
            finally:
                grid.display.close()
        if variants is None:
            return Outcome(None, True, None)
        results = collect(experiment, variants, folder)
        report = write_report(results, folder.path) if results.histories else None
        return Outcome(results, grid.stopped, report)


def _check_same_text(recipes: dict[str, Recipe]) -> None:
    (baseline, first), *others = recipes.items()
    for name, recipe in others:
        for key in ("source", "validation", "split"):
            if getattr(recipe.data, key) != getattr(first.data, key):
                raise ValueError(f"variants {baseline} and {name} differ in data.{key}; their losses would not compare")


def _begin(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """Prepare the text, once for each way of preparing it, and admit the experiment. Gives vocabulary sizes."""
    display = Display(console)
    prepared, found = {}, {}
    try:
        for name, recipe in recipes.items():
            key = recipe.data.model_dump_json()
            if key not in prepared:
                data = prepare(recipe.data, display.preparing)
                prepared[key] = {"text": data.manifest["fingerprint"], "vocab_size": data.tokenizer.vocab_size}
            found[name] = prepared[key]
    finally:
        display.close()
    settings = next(iter(recipes.values())).train
    device = resolve_device(settings.device)
    dtype = str(resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    identity = identify(experiment, recipes, found, device_name(device), dtype)
    folder.check(identity)
    folder.write_header(experiment, identity)
    return {name: entry["vocab_size"] for name, entry in found.items()}


def _begun(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """The same from what the folder says of itself, on any machine and without the text."""
    saved = folder.saved_identity()
    known = {name: {key: entry[key] for key in ("text", "vocab_size")} for name, entry in saved["variants"].items()}
    if new := [name for name in recipes if name not in known]:
        raise ValueError(f"experiment folder {folder.path} has no variant {new[0]} yet; run it without --report-only")
    folder.check(identify(experiment, recipes, known, saved["device"], saved["dtype"]))
    return {name: known[name]["vocab_size"] for name in recipes}


class _Grid:
    def __init__(self, experiment: Experiment, folder: ExperimentFolder, display: GridDisplay, stop: StopSignal):
        self.experiment, self.folder, self.display, self.stop = experiment, folder, display, stop
        self.stopped = False

    def run(self, recipes: dict[str, Recipe], vocab_sizes: dict[str, int]) -> dict[str, Variant] | None:
        """None: stopped while steps were being timed."""
        try:
            variants = self.match(recipes, vocab_sizes)
        except Stopped:
            return None
        # Seed by seed: what an interrupted grid has, it has of all variants.
        wanted = [(variant, seed) for seed in self.experiment.seeds for variant in variants.values()]
        left = [run for run in wanted if self.folder.record(run[0].name, run[1]) is None]
        all_steps = [variant.recipe.train.steps for variant, _ in wanted]
        done = sum(all_steps) - sum(variant.recipe.train.steps for variant, _ in left)
        self.display.open(all_steps, done, len(wanted) - len(left))
        if 0 < len(left) < len(wanted):
            self.display.note(f"{len(wanted) - len(left)} of {len(wanted)} runs were finished before")
        try:
            for variant, seed in left:
                self._train(variant, seed)
            for variant in variants.values():
                self._measure(variant)
        except Stopped:
            self.stopped = True
        return variants

    def match(self, recipes: dict[str, Recipe], vocab_sizes: dict[str, int], timing: bool = True) -> dict[str, Variant]:
        """Raises Stopped by a signal."""
        if self.experiment.match != "time":
            return match_variants(self.experiment, recipes, vocab_sizes)
        step_seconds = self.folder.calibration()
        for name, recipe in recipes.items():
            if name not in step_seconds:
                if not timing:
                    raise ValueError(
                        f"experiment folder {self.folder.path}: the steps of variant {name} are not timed yet"
                    )
                step_seconds[name] = self._calibrate(name, recipe)
                self.folder.write_calibration(step_seconds)
        return match_variants(self.experiment, recipes, vocab_sizes, step_seconds)

    def _calibrate(self, name: str, recipe: Recipe) -> float:
        steps = self.experiment.calibration_steps
        changes = {"steps": steps, "eval_every": 0, "eval_tokens": 1, "checkpoint_every": 0, "loggers": []}
        short = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        target = self.folder.path / "calibration" / name
        shutil.rmtree(target, ignore_errors=True)
        self.display.note(f"timing {steps} steps of {name}")
        seconds = self._apart(f"timing of {name}", calibrate, short, target)
        if seconds is None:
            raise Stopped
        shutil.rmtree(target)
        self.display.note(f"{name}: {1000 * seconds:.4g} ms a step")
        return seconds

    def _train(self, variant: Variant, seed: int) -> None:
        name = run_name(variant.name, seed)
        recipe = variant.recipe
        recipe = recipe.model_copy(
            update={
                "name": f"{self.experiment.name}-{name}",
                "train": recipe.train.model_copy(update={"seed": seed}),
            }
        )
        self.display.begin(name, recipe.train.steps)
        record = self._apart(name, train_run, recipe, self.folder.run(variant.name, seed))
        if record["outcome"] == "stopped":
            raise Stopped
        self.folder.write_record(variant.name, seed, record)
        final = record["final"]
        self.display.end(
            f"validation {final['val_nll_per_token']:.4f} nats a token, {final['val_bpb']:.4f} bits per byte"
            if final
            else f"diverged: {record['message']}"
        )

    def _measure(self, variant: Variant) -> None:
        lengths = self.experiment.decode_lengths
        known = self.folder.decoding(variant.name) or {}
        left = [length for length in lengths if str(length) not in known]
        if not left:
            return
        records = {seed: self.folder.record(variant.name, seed) for seed in self.experiment.seeds}
        seed = next((seed for seed, record in records.items() if record["outcome"] == "finished"), None)
        run = None if seed is None else self.folder.run(variant.name, seed)
        self.display.note(f"{variant.name}: decoding after {', '.join(f'{length:,}' for length in left)} tokens")
        found = self._apart(f"decoding of {variant.name}", measure, variant.recipe, run, variant.vocab_size, left)
        self.folder.write_decoding(variant.name, known | {str(length): value for length, value in found.items()})

    def _apart(self, what: str, work, *arguments):
        if self.stop.received is not None:
            raise Stopped
        try:
            return apart(work, *arguments, report=self.display.report, stop=self.stop)
        except ValueError as error:
            raise ValueError(f"{what}: {error}; what is finished is kept") from None
