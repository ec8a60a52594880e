"""The grid of an experiment: one run per variant and seed, after the trials of learning rates if there are any."""

import contextlib
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from fusedlm.compare.folder import FILES, IDENTITY, ExperimentFolder
from fusedlm.compare.gpus import choose_gpus
from fusedlm.compare.identity import identify
from fusedlm.compare.matching import Variant, match_variants
from fusedlm.compare.process import Child, Stopped, Task, run_in_process, run_tasks
from fusedlm.compare.progress import GridDisplay
from fusedlm.compare.report import write_report
from fusedlm.compare.results import Results, collect
from fusedlm.compare.tuning import read_tunings, trial_recipe, tuned_variants
from fusedlm.compare.work import calibrate, measure, train_run
from fusedlm.config import Recipe
from fusedlm.config.experiment import Experiment, run_name
from fusedlm.data import prepare
from fusedlm.data.vocabulary import planned_vocab_size
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.runs.hardware import device_name
from fusedlm.runs.signals import StopSignal
from fusedlm.runs.text import open_text
from fusedlm.train.display import Display
from fusedlm.train.loggers import check_loggers
from fusedlm.train.undo import StartUndo


@dataclass(frozen=True)
class Outcome:
    results: Results | None  # None: stopped before the sizes were known
    signal: signal.Signals | None  # that stopped it; running the experiment again resumes it
    report: Path | None  # None: no run has ended yet
    failed: tuple[str, ...] = ()  # "NAME: reason" of each run that failed in this call

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
    experiment: Experiment,
    recipes: dict[str, Recipe],
    out: Path,
    *,
    console: Console | None = None,
    train: bool = True,
    gpus: int = 1,
    runs_per_gpu: int = 1,
) -> Outcome:
    """Start or resume an experiment, and write OUT/report.html, results.csv and results.json.

    Each run has its own process. On the first SIGINT, SIGTERM or SIGHUP the current runs save and stop; the next call
    resumes them and does not repeat finished runs. How one run ends does not stop the others: one that diverges is
    recorded as diverged, which is a result; one that fails (its process is killed, memory is too small, the recipe does
    not fit) is recorded as failed, and tried again by the next call.

    Args:
        experiment, recipes: from `load_experiment`.
        out: folder of the experiment.
        console: for progress; None: none is shown.
        train: False: only report finished runs.
        gpus: how many runs, or timings of steps, are made at once, each on a GPU of its own. Decoding is measured on
            the first GPU alone. Reporting uses none.
        runs_per_gpu: how many runs are made at once on each GPU, or, with one of `gpus`, on the device. Losses are the
            same; speeds of runs that were made with more than one are not reported. Steps are timed alone.

    Raises:
        ValueError: this machine or a recipe does not allow `gpus` or `runs_per_gpu`, the folder holds another
            experiment, is damaged or in use, a match is impossible, variants have different validation text, or the
            steps of the baseline cannot be timed.
        OSError: a folder cannot be written, in a run too; finished runs are kept.
    """
    for recipe in recipes.values():
        check_loggers(recipe.train.loggers)
    _check_same_text(recipes)
    if runs_per_gpu < 1:
        raise ValueError(f"--runs-per-gpu {runs_per_gpu}: must be at least 1")
    chosen = choose_gpus(gpus if train else min(gpus, 1), recipes)  # any machine can report
    undo = StartUndo(Path(out))
    try:
        with ExperimentFolder(Path(out)) as folder, contextlib.ExitStack() as stack:
            if not (folder.path / IDENTITY).exists():
                stack.enter_context(undo.taken_back(FILES, folder.holds_work))
            return _run(experiment, recipes, folder, console, train, chosen, runs_per_gpu)
    finally:
        undo.remove_empty_folders()


def _run(
    experiment: Experiment,
    recipes: dict[str, Recipe],
    folder: ExperimentFolder,
    console: Console | None,
    train: bool,
    gpus: Sequence[str | None],
    runs_per_gpu: int,
) -> Outcome:
    vocab_sizes = (_open if train else _reopen)(experiment, recipes, folder, console)
    with StopSignal() as stop:
        grid = _Grid(experiment, folder, GridDisplay(console), stop, gpus, runs_per_gpu)
        try:
            variants = grid.run(recipes, vocab_sizes) if train else grid.match(recipes, vocab_sizes, timing=False)
        finally:
            grid.display.close()
    if variants is None:
        return Outcome(None, stop.received or signal.SIGTERM, None)
    results = collect(experiment, variants, folder)
    report = write_report(results, folder.path) if results.has_ended else None
    stopped_by = (stop.received or signal.SIGTERM) if grid.stopped else None
    failed = tuple(f"{name}: {message}" for name, message in grid.failed.items())
    return Outcome(results, stopped_by, report, failed)


def _check_same_text(recipes: dict[str, Recipe]) -> None:
    (baseline, first), *others = recipes.items()
    for name, recipe in others:
        texts = [
            {"source": data.named_sources(), "validation": data.validation, "split": data.split}
            for data in (recipe.data, first.data)
        ]
        for key in texts[0]:
            if texts[0][key] != texts[1][key]:
                raise ValueError(
                    f"variants {baseline} and {name} differ in data.{key}; their losses are not comparable"
                )


def _open(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """Prepare the text, once per data section, and check the experiment against its folder. Gives vocabulary sizes."""
    display = Display(console)
    prepared, found = {}, {}
    saved = folder.saved_identity()["variants"] if folder.holds_experiment() else {}
    try:
        for name, recipe in recipes.items():
            key = recipe.data.model_dump_json()
            if key not in prepared:
                if name in saved:
                    remedy = "restore the text or name another folder with --out"
                    text, where = saved[name]["text"], folder.path
                    data = open_text(recipe, text, where, remedy=remedy, progress=display.preparing)
                else:
                    data = prepare(recipe.data, display.preparing)
                prepared[key] = {"text": data.manifest["fingerprint"], "vocab_size": data.tokenizer.vocab_size}
            found[name] = prepared[key]
    finally:
        display.close()
    runtime = next(iter(recipes.values())).runtime
    device = resolve_device(runtime.device)
    dtype = str(resolve_dtype(runtime.dtype, device)).removeprefix("torch.")
    identity = identify(experiment, recipes, found, device_name(device), dtype)
    vocab_sizes = {name: entry["vocab_size"] for name, entry in found.items()}
    match_variants(experiment, recipes, vocab_sizes)  # an impossible match leaves nothing that another would not fit
    folder.check(identity)
    _show_notes(folder, console)
    folder.write_header(experiment)
    return vocab_sizes


def _show_notes(folder: ExperimentFolder, console: Console | None) -> None:
    for note in folder.notes:
        GridDisplay(console).note(note)


def _reopen(
    experiment: Experiment, recipes: dict[str, Recipe], folder: ExperimentFolder, console: Console | None
) -> dict[str, int]:
    """The same from the folder alone, on any machine and without the text."""
    saved = folder.saved_identity()
    known = {name: {key: entry[key] for key in ("text", "vocab_size")} for name, entry in saved["variants"].items()}
    if new := [name for name in recipes if name not in known]:
        raise ValueError(f"experiment folder {folder.path} has no variant {new[0]} yet; run it without --report-only")
    folder.check(identify(experiment, recipes, known, saved["device"], saved["dtype"]))
    _show_notes(folder, console)
    return {name: known[name]["vocab_size"] for name in recipes}


@dataclass(frozen=True)
class _Training:
    """A run, or a trial of learning rates."""

    variant: Variant
    recipe: Recipe  # with its seed, learning rates and steps
    factor: float | None = None  # of the learning rates, of a trial

    @property
    def place(self) -> tuple[str, int, float | None]:
        """In the folder."""
        return self.variant.name, self.recipe.train.seed, self.factor

    @property
    def name(self) -> str:
        return run_name(*self.place)


class _Grid:
    def __init__(
        self,
        experiment: Experiment,
        folder: ExperimentFolder,
        display: GridDisplay,
        stop: StopSignal,
        gpus: Sequence[str | None],
        runs_per_gpu: int,
    ):
        self.experiment, self.folder, self.display, self.stop, self.gpus = experiment, folder, display, stop, gpus
        self.runs_per_gpu = runs_per_gpu
        self.stopped = False
        self.failed: dict[str, str] = {}  # runs that failed, and why
        self._n_left = 0  # runs that have not ended
        self._fault: OSError | None = None  # that the other runs would meet too
        self._untimed: dict[str, str] = {}  # variants whose steps could not be timed, and why
        self._lost: dict[str, dict] = {}  # variants without a learning rate, and the record of their runs

    def run(self, recipes: dict[str, Recipe], vocab_sizes: dict[str, int]) -> dict[str, Variant] | None:
        """None: stopped while timing steps."""
        try:
            variants = self.match(recipes, vocab_sizes)
        except Stopped:
            return None
        trials = self._trials(variants)
        trainings = [*trials, *self._runs(variants)]
        left = [training.name for training in trainings if self._is_left(training)]
        all_steps = [training.recipe.train.steps for training in trainings]
        done = sum(training.recipe.train.steps for training in trainings if training.name not in left)
        self.display.open(all_steps, done, len(trainings) - len(left))
        if 0 < len(left) < len(trainings):
            self.display.note(f"{len(trainings) - len(left)} of {len(trainings)} runs are already finished")
        try:
            self._train([trial for trial in trials if trial.name in left])
            tunings = read_tunings(self.experiment, variants, self.folder)
            self._lost = {name: lost for name, tuning in tunings.items() if (lost := tuning.lost) is not None}
            runs = self._runs(tuned_variants(self.experiment, variants, tunings, self.folder))
            self._train([run for run in runs if run.name in left])
            for variant in variants.values():
                self._measure(variant)
        except Stopped:
            self.stopped = True
        return variants

    def _runs(self, variants: dict[str, Variant]) -> list[_Training]:
        """Seeds outside, variants inside: an interrupted grid has the same seeds of all variants."""
        found = []
        for seed in self.experiment.seeds:
            for variant in variants.values():
                recipe, name = variant.recipe, run_name(variant.name, seed)
                changes = {
                    "name": f"{self.experiment.name}-{name}",
                    "train": recipe.train.model_copy(update={"seed": seed}),
                }
                found.append(_Training(variant, recipe.model_copy(update=changes)))
        return found

    def _trials(self, variants: dict[str, Variant]) -> list[_Training]:
        """Factors outside, variants inside."""
        tune, (baseline, *_) = self.experiment.tune, variants.values()
        return [
            _Training(variant, trial_recipe(self.experiment, variant, baseline, factor), factor)
            for factor in (tune.lr_factors if tune else ())
            for variant in variants.values()
        ]

    def _is_left(self, training: _Training) -> bool:
        record = self.folder.record(*training.place)
        if record is None or record["outcome"] != "failed":
            return record is None
        # Once runs have the rate that was found without it, a failed trial stays the worst.
        is_trial, name = training.factor is not None, training.variant.name
        return not (is_trial and any(self.folder.run(name, seed).exists() for seed in self.experiment.seeds))

    def match(self, recipes: dict[str, Recipe], vocab_sizes: dict[str, int], timing: bool = True) -> dict[str, Variant]:
        """Raises Stopped on a signal."""
        if self.experiment.match != "time":
            return match_variants(self.experiment, recipes, vocab_sizes)
        step_seconds = self.folder.calibration()
        left = {name: recipe for name, recipe in recipes.items() if name not in step_seconds}
        baseline = next(iter(recipes))
        if not timing and baseline in left:
            raise ValueError(
                f"experiment folder {self.folder.path}: steps of {baseline}, the baseline, are not timed yet; "
                "run it without --report-only"
            )
        if timing:
            self._calibrate(left, baseline, step_seconds)
        return match_variants(self.experiment, recipes, vocab_sizes, step_seconds)

    def _calibrate(self, recipes: dict[str, Recipe], baseline: str, step_seconds: dict[str, float]) -> None:
        """Time the steps of each recipe, and add them to `step_seconds`. Raises Stopped on a signal."""
        tasks = (self._timing(name, recipe) for name, recipe in recipes.items())
        with contextlib.closing(run_tasks(tasks, self.gpus, self._must_stop)) as ended:
            for child in ended:
                name = child.task.about
                try:
                    seconds = child.result()
                except Stopped:
                    seconds = None
                except (ValueError, RuntimeError) as error:
                    if name == baseline:
                        raise ValueError(f"timing of {name}, the baseline: {_reason(error)}") from None
                    self._untimed[name] = f"its steps could not be timed: {_reason(error)}"
                    continue
                if seconds is None:
                    self.stopped = True
                    continue
                shutil.rmtree(self._timing_folder(name))
                self.display.note(f"{name}: {1000 * seconds:.4g} ms per step")
                step_seconds[name] = seconds
                self.folder.write_calibration(step_seconds)
        if any(name not in step_seconds and name not in self._untimed for name in recipes):
            raise Stopped

    def _timing(self, name: str, recipe: Recipe) -> Task:
        steps = self.experiment.calibration_steps
        changes = {"steps": steps, "eval_every": 0, "eval_tokens": 64, "checkpoint_every": 0, "loggers": []}
        changes["max_bad_steps"] = steps + 1  # a step takes as long when its loss is not finite
        short = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        target = self._timing_folder(name)
        shutil.rmtree(target, ignore_errors=True)
        self.display.note(f"timing {steps} steps of {name}")
        return Task(calibrate, (short, target), partial(self.display.report, name), about=name)

    def _timing_folder(self, name: str) -> Path:
        return self.folder.path / "calibration" / name

    def _train(self, trainings: list[_Training]) -> None:
        """Raises Stopped on a signal, and OSError for a fault that other runs would meet too, after those that run have
        saved and stopped."""
        self._n_left, self.failed = len(trainings), {}
        places = list(self.gpus) * self.runs_per_gpu
        with contextlib.closing(run_tasks(self._tasks(trainings), places, self._must_stop)) as ended:
            for child in ended:
                self._end(child.task.about, _record(child))
        names = [training.name for training in trainings]
        self.failed = {name: self.failed[name] for name in names if name in self.failed}
        if self._fault is not None:
            raise self._fault
        if self._n_left:
            raise Stopped

    def _tasks(self, trainings: list[_Training]) -> Iterator[Task]:
        """Each training is shown as begun when it is taken."""
        for training in trainings:
            name, variant = training.name, training.variant.name
            self.display.begin(name, training.recipe.train.steps)
            if variant in self._lost:
                self._close(training, self._lost[variant])
                continue
            if variant in self._untimed:
                self._end(training, _failed(self._untimed[variant]))
                continue
            self.folder.mark_sharing(*training.place, shared=self.runs_per_gpu > 1)
            text = self.folder.identity["variants"][variant]["text"]
            arguments = (training.recipe, self.folder.run(*training.place), text, self.experiment.weights)
            yield Task(train_run, arguments, partial(self.display.report, name), about=training)

    def _end(self, training: _Training, record: dict) -> None:
        """Keep the record of a run that has ended, or stop the others if it was stopped or met a fault."""
        if record["outcome"] == "stopped":
            self.stopped = True
            return
        try:
            if record["outcome"] == "system":
                raise OSError(f"{training.name}: {record['message']}; finished runs are kept")
            variant, seed, factor = training.place
            self.folder.write_record(variant, seed, record, factor)
        except OSError as error:
            self._fault = self._fault or error
            return
        self._close(training, record)

    def _close(self, training: _Training, record: dict) -> None:
        """Count and show a run that has ended."""
        self._n_left -= 1
        name, final, window = training.name, record["final"], training.recipe.train.seq_len
        if record["outcome"] == "failed":
            self.failed[name] = record["message"]
        at = f" at step {record['step']}" if "step" in record else ""
        self.display.end(
            name,
            f"validation {final['val_nll_per_token']:.4f} nats per token, {final['val_bpb']:.4f} bits per byte "
            f"(window {window}, stride {window})"
            if final
            else f"{record['outcome']}{at}: {record['message']}",
        )

    def _measure(self, variant: Variant) -> None:
        lengths = self.experiment.decode_lengths
        known = self.folder.decoding(variant.name) or {}
        left = [length for length in lengths if str(length) not in known]
        if not left:
            return
        records = {seed: self.folder.record(variant.name, seed) for seed in self.experiment.seeds}
        seed = next((seed for seed, record in records.items() if record and record["outcome"] == "finished"), None)
        run = None if seed is None else self.folder.run(variant.name, seed)
        self.display.note(f"{variant.name}: measuring decoding after {_lengths(left)} tokens")
        found = {}

        def keep(kind: str, content) -> None:
            if kind == "decoded":
                length, pair = content
                found[str(length)] = pair
            else:
                self.display.report(variant.name, kind, content)

        arguments = (variant.recipe, run, variant.vocab_size, left)
        try:
            run_in_process(measure, *arguments, report=keep, stop=self.stop, gpu=self.gpus[0])
        except (ValueError, RuntimeError) as error:
            missing = _lengths(length for length in left if str(length) not in found)
            self.display.note(f"{variant.name}: decoding after {missing} tokens is not measured: {_reason(error)}")
        finally:
            if found:
                self.folder.write_decoding(variant.name, known | found)

    def _must_stop(self) -> bool:
        return self.stopped or self._fault is not None or self.stop.received is not None


def _record(child: Child) -> dict:
    """The record of a run, however its process ended."""
    try:
        return child.result()
    except Stopped:
        return {"outcome": "stopped"}
    except ValueError as error:
        return _failed(_reason(error))
    except RuntimeError as error:  # a defect, or an error of a library such as CUDA
        return _failed(_reason(error)) | {"traceback": str(error)}


def _failed(message: str) -> dict:
    return {"outcome": "failed", "final": None, "message": message}


def _reason(error: Exception) -> str:
    """The last line of an error, which for a traceback is the exception itself."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _lengths(lengths) -> str:
    return ", ".join(f"{length:,}" for length in lengths)
