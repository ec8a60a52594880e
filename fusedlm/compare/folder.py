"""The folder of an experiment: its files, and whether an experiment can be resumed in it."""

import fcntl
import json
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.config.experiment import DECIDED, Experiment, dump_experiment, run_name
from fusedlm.config.keys import ABSENT, is_neutral
from fusedlm.files import write_atomic
from fusedlm.runs.folder import ENVIRONMENT
from fusedlm.runs.folder import RECIPE as RUN_RECIPE

EXPERIMENT, IDENTITY, CALIBRATION = "experiment.yaml", "identity.json", "calibration.json"
RUNS, RECORDS, DECODING = "runs", "records", "decoding"
FILES = (EXPERIMENT, IDENTITY, RUNS, ".lock")  # what a start writes before there is anything to keep


class ExperimentFolder:
    """OUT/, locked for one process, as a context.

    runs/VARIANT-seedN are run folders, as `fusedlm train` writes them; records/ has one file per finished run, and
    decoding/ one per variant. What is recorded is not computed again.

    Raises:
        ValueError: on entering, another process has locked the folder, or it is a file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = None

    def __enter__(self) -> "ExperimentFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"experiment folder {self.path} is a file; name a folder with --out") from None
        if (self.path / RUN_RECIPE).exists():
            raise ValueError(f"experiment folder {self.path} holds a run; name another with --out")
        self._lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"experiment folder {self.path} is in use by another process; wait for it or name another with --out"
            ) from None
        return self

    def __exit__(self, *exception) -> None:
        self._lock.close()

    def run(self, variant: str, seed: int) -> Path:
        return self.path / RUNS / run_name(variant, seed)

    def holds_work(self) -> bool:
        """Whether there is anything that a new start would have to repeat."""
        runs = self.path / RUNS
        started = runs.is_dir() and any(runs.iterdir())
        return started or any((self.path / name).exists() for name in (RECORDS, CALIBRATION, DECODING))

    def check(self, identity: dict) -> None:
        """Check that an experiment can start or resume here: seeds and variants may be added, nothing else may differ.

        Args:
            identity: from `identify`.

        Raises:
            ValueError: the folder holds another experiment; names the first key that differs.
        """
        saved = _read(self.path / IDENTITY)
        if saved is not None:
            difference = _difference(saved, identity)
            if difference is not None:
                key, before, now = difference
                raise ValueError(
                    f"experiment folder {self.path} holds another experiment: {key} is {_shown(before)} there and "
                    f"{_shown(now)} now; name another folder with --out"
                )

    def write_header(self, experiment: Experiment, identity: dict) -> None:
        """Save the experiment and its identity."""
        write_atomic(self.path / EXPERIMENT, dump_experiment(experiment))
        write_atomic(self.path / IDENTITY, json.dumps(identity, indent=1) + "\n")

    def saved_identity(self) -> dict:
        """The identity that `write_header` saved. Raises ValueError if there is none."""
        saved = _read(self.path / IDENTITY)
        if saved is None:
            raise ValueError(f"experiment folder {self.path} holds no experiment yet; run it without --report-only")
        return saved

    def record(self, variant: str, seed: int) -> dict | None:
        """The record of a run that has ended; None: it has not."""
        return _read(self._record_path(variant, seed))

    def write_record(self, variant: str, seed: int, record: dict) -> None:
        self._write(self._record_path(variant, seed), record)

    def environment(self, variant: str, seed: int) -> dict:
        """The environment of a run."""
        return _read(self.run(variant, seed) / ENVIRONMENT) or {}

    def decoding(self, variant: str) -> dict | None:
        return _read(self.path / DECODING / f"{variant}.json")

    def write_decoding(self, variant: str, measured: dict) -> None:
        self._write(self.path / DECODING / f"{variant}.json", measured)

    def calibration(self) -> dict[str, float]:
        """Measured seconds per step, by variant."""
        return _read(self.path / CALIBRATION) or {}

    def write_calibration(self, step_seconds: dict[str, float]) -> None:
        self._write(self.path / CALIBRATION, step_seconds)

    def _record_path(self, variant: str, seed: int) -> Path:
        return self.path / RECORDS / f"{run_name(variant, seed)}.json"

    @staticmethod
    def _write(path: Path, content: dict) -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1) + "\n")


def identify(
    experiment: Experiment, recipes: dict[str, Recipe], data: dict[str, dict], device: str, dtype: str
) -> dict:
    """Everything that the results and the cost of the runs depend on.

    Args:
        recipes: of the variants, before matching.
        data: by variant, the fingerprint of its prepared text and its vocabulary size.
        device: name of the processor.
    """
    matching = experiment.model_dump(include={"match", "match_by", "tolerance"})
    if experiment.match == "time":
        matching["calibration_steps"] = experiment.calibration_steps
    return {
        "experiment": {"name": experiment.name, "baseline": next(iter(recipes))} | matching,
        "device": device,
        "dtype": dtype,
        "seeds": experiment.seeds,
        "variants": {name: _leaves(recipe.model_dump(mode="json")) | data[name] for name, recipe in recipes.items()},
    }


def _leaves(tree: dict, prefix: str = "") -> dict:
    """Values by dotted key, without neutral keys and those that the experiment sets."""
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in DECIDED or is_neutral(name, Recipe):
            continue
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def _difference(saved: dict, now: dict) -> tuple[str, object, object] | None:
    """The first key that differs and must not, with both values."""
    for section in ("experiment", "device", "dtype"):
        before, after = saved.get(section, ABSENT), now[section]
        pairs = [(section, before, after)]
        if isinstance(before, dict):
            pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after]
        for key, b, a in pairs:
            if b != a:
                return key, b, a
    if gone := [seed for seed in saved["seeds"] if seed not in now["seeds"]]:
        return f"seed {gone[0]}", "run", ABSENT
    for name, before in saved["variants"].items():
        after = now["variants"].get(name)
        if after is None:
            return f"variant {name}", "run", ABSENT
        for key in [*before, *(key for key in after if key not in before)]:
            b, a = before.get(key, ABSENT), after.get(key, ABSENT)
            if b != a:
                return f"{key} of variant {name}", b, a
    return None


def _shown(value) -> str:
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged, not JSON; remove it to compute its content again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, not a JSON object; remove it to compute its content again")
    return found
