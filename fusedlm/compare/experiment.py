"""The grid of an experiment: one run per variant and seed."""

import contextlib
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fusedlm.compare.folder import FILES, IDENTITY, ExperimentFolder, identify
from fusedlm.compare.matching import Variant, match_variants
from fusedlm.compare.process import Stopped, run_in_process
from fusedlm.compare.progress import GridDisplay
from fusedlm.compare.report import write_report
from fusedlm.compare.results import Results, collect
from fusedlm.compare.work import calibrate, measure, train_run
from fusedlm.config import Recipe
from fusedlm.config.experiment import Experiment, run_name
from fusedlm.data import prepare
from fusedlm.data.vocabulary import planned_vocab_size
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.hardware import device_name
from fusedlm.runs.signals import StopSignal
from fusedlm.train.display import Display
from fusedlm.train.loggers import check_loggers
from fusedlm.train.start import Start


@dataclass(frozen=True)
class Outcome:
    results: Results | None  # None: stopped before the sizes were known
    signal: signal.Signals | None  # that stopped it; running the experiment again resumes it
    report: Path | None  # None: no run is finished yet

    @property
    def stopped(self) -> bool:
        return self.signal is not None


def plan_experiment(
    experiment: Experiment, recipes: dict[str, Recipe], vocab_size: int | None = None
) -> dict[str, Variant]:
    """The variants as they would be trained, without preparing or training; `match: time` keeps the recipes' steps.

    Args:
        vocab_size: None: that of each recipe's tokenizer.

    Raises:
        ValueError: a tokenizer file cannot be read, or a match is impossible.
    """
    _check_same_text(recipes)
    sizes = {name: vocab_size or planned_vocab_size(recipe.data.tokenizer) for name, recipe in recipes.items()}
    return match_variants(experiment, recipes, sizes)


def run_experiment(
    experiment: Experiment, recipes: dict[str, Recipe], out: Path, *, console: Console | None = None, train: bool = True
) -> Outcome:
    """Start or resume an experiment, and write OUT/report.html, results.csv and results.json.

    Each run has its own process. On the first SIGINT, SIGTERM or SIGHUP the current run saves and stops; the next call
    resumes it and does not repeat finished runs. A run that diverges is recorded as diverged.

    Args:
        experiment, recipes: from `load_experiment`.
        out: folder of the experiment.
        console: for progress; None: none is shown.
        train: False: only report finished runs.

    Raises:
        ValueError: the folder holds another experiment or is in use, a match is impossible, variants have different
            validation text, or a run fails.
        OSError: a folder cannot be written.
    """
    for recipe in recipes.values():
        check_loggers(recipe.train.loggers)
    _check_same_text(recipes)
    start = Start(Path(out))
    try:
        with ExperimentFolder(Path(out)) as folder, contextlib.ExitStack() as stack:
            if not (folder.path / IDENTITY).exists():
                stack.enter_context(start.taken_back(FILES, folder.holds_work))
            return _run(experiment, recipes, folder, console, train)
    finally:
        start.remove_empty_folders()


def _run(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None, train: bool
) -> Outcome:
    vocab_sizes = (_open if train else _reopen)(experiment, recipes, folder, console)
    with StopSignal() as stop:
        grid = _Grid(experiment, folder, GridDisplay(console), stop)
        try:
            variants = grid.run(recipes, vocab_sizes) if train else grid.match(recipes, vocab_sizes, timing=False)
        finally:
            grid.display.close()
    if variants is None:
        return Outcome(None, stop.received or signal.SIGTERM, None)
    results = collect(experiment, variants, folder)
    report = write_report(results, folder.path) if results.histories else None
    return Outcome(results, (stop.received or signal.SIGTERM) if grid.stopped else None, report)


def _check_same_text(recipes: dict[str, Recipe]) -> None:
    (baseline, first), *others = recipes.items()
    for name, recipe in others:
        for key in ("source", "validation", "split"):
            if getattr(recipe.data, key) != getattr(first.data, key):
                raise ValueError(
                    f"variants {baseline} and {name} differ in data.{key}; their losses are not comparable"
                )


def _open(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """Prepare the text, once per data section, and check the experiment against its folder. Gives vocabulary sizes."""
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
    runtime = next(iter(recipes.values())).runtime
    device = resolve_device(runtime.device)
    dtype = str(resolve_dtype(runtime.dtype, device)).removeprefix("torch.")
    identity = identify(experiment, recipes, found, device_name(device), dtype)
    folder.check(identity)
    folder.write_header(experiment, identity)
    return {name: entry["vocab_size"] for name, entry in found.items()}


def _reopen(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """The same from the folder alone, on any machine and without the text."""
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
        """None: stopped while timing steps."""
        try:
            variants = self.match(recipes, vocab_sizes)
        except Stopped:
            return None
        # Seeds outside, variants inside: an interrupted grid has the same seeds of all variants.
        runs = [(variant, seed) for seed in self.experiment.seeds for variant in variants.values()]
        left = [run for run in runs if self.folder.record(run[0].name, run[1]) is None]
        all_steps = [variant.recipe.train.steps for variant, _ in runs]
        done = sum(all_steps) - sum(variant.recipe.train.steps for variant, _ in left)
        self.display.open(all_steps, done, len(runs) - len(left))
        if 0 < len(left) < len(runs):
            self.display.note(f"{len(runs) - len(left)} of {len(runs)} runs are already finished")
        try:
            for variant, seed in left:
                self._train(variant, seed)
            for variant in variants.values():
                self._measure(variant)
        except Stopped:
            self.stopped = True
        return variants

    def match(self, recipes: dict[str, Recipe], vocab_sizes: dict[str, int], timing: bool = True) -> dict[str, Variant]:
        """Raises Stopped on a signal."""
        if self.experiment.match != "time":
            return match_variants(self.experiment, recipes, vocab_sizes)
        step_seconds = self.folder.calibration()
        for name, recipe in recipes.items():
            if name not in step_seconds:
                if not timing:
                    raise ValueError(
                        f"experiment folder {self.folder.path}: steps of variant {name} are not timed yet; "
                        "run it without --report-only"
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
        seconds = self._run_in_process(f"timing of {name}", calibrate, short, target)
        if seconds is None:
            raise Stopped
        shutil.rmtree(target)
        self.display.note(f"{name}: {1000 * seconds:.4g} ms per step")
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
        record = self._run_in_process(name, train_run, recipe, self.folder.run(variant.name, seed))
        if record["outcome"] == "stopped":
            raise Stopped
        self.folder.write_record(variant.name, seed, record)
        final = record["final"]
        self.display.end(
            f"validation {final['val_nll_per_token']:.4f} nats per token, {final['val_bpb']:.4f} bits per byte "
            f"(window {recipe.train.seq_len}, stride {recipe.train.seq_len})"
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
        self.display.note(
            f"{variant.name}: measuring decoding after {', '.join(f'{length:,}' for length in left)} tokens"
        )
        found = self._run_in_process(
            f"decoding of {variant.name}", measure, variant.recipe, run, variant.vocab_size, left
        )
        self.folder.write_decoding(variant.name, known | {str(length): value for length, value in found.items()})

    def _run_in_process(self, name: str, work, *arguments):
        if self.stop.received is not None:
            raise Stopped
        try:
            return run_in_process(work, *arguments, report=self.display.report, stop=self.stop)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; finished runs are kept") from None
