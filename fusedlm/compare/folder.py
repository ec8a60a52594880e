"""The folder of an experiment: what lies where, and whether an experiment may go on in it."""

import fcntl
import json
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.config.experiment import Experiment, dump_experiment, run_name
from fusedlm.files import write_atomic
from fusedlm.train.folder import ENVIRONMENT
from fusedlm.train.folder import RECIPE as RUN_RECIPE

EXPERIMENT, IDENTITY, CALIBRATION = "experiment.yaml", "identity.json", "calibration.json"
RUNS, RECORDS, DECODING = "runs", "records", "decoding"

# Of a recipe, these keys do not change what a run computes or costs.
_FREE = ("name", "description", "sample_prompt", "train.seed", "train.loggers")


class ExperimentFolder:
    """OUT/, locked for one process, as a context.

    runs/VARIANT-seedN: folders as `fusedlm train` writes them. records/: a file a finished run, decoding/: a file a
    variant; what has one is not done again.

    Raises:
        ValueError: on entering, another process works in the folder, or it is a file.
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

    def check(self, identity: dict) -> None:
        """Whether an experiment may begin here or go on: seeds and variants may be added, nothing may change.

        Args:
            identity: as `identify` gives it.

        Raises:
            ValueError: the folder holds another experiment; names what differs.
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
        """Take the experiment as it is from now on."""
        write_atomic(self.path / EXPERIMENT, dump_experiment(experiment))
        write_atomic(self.path / IDENTITY, json.dumps(identity, indent=1) + "\n")

    def saved_identity(self) -> dict:
        """As `write_header` left it. Raises ValueError when no experiment was begun here."""
        saved = _read(self.path / IDENTITY)
        if saved is None:
            raise ValueError(f"experiment folder {self.path} holds no experiment yet; run it without --report-only")
        return saved

    def record(self, variant: str, seed: int) -> dict | None:
        """Of a run that came to its end; None when it has not."""
        return _read(self._record_path(variant, seed))

    def write_record(self, variant: str, seed: int, record: dict) -> None:
        self._write(self._record_path(variant, seed), record)

    def environment(self, variant: str, seed: int) -> dict:
        """That of a run, as its folder has it."""
        return _read(self.run(variant, seed) / ENVIRONMENT) or {}

    def decoding(self, variant: str) -> dict | None:
        return _read(self.path / DECODING / f"{variant}.json")

    def write_decoding(self, variant: str, measured: dict) -> None:
        self._write(self.path / DECODING / f"{variant}.json", measured)

    def calibration(self) -> dict[str, float]:
        """Seconds of a step by variant, as far as they were measured."""
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
    """All that decides what the runs compute and cost.

    Args:
        recipes: of the variants, before anything is matched.
        data: of each variant, the fingerprint of its prepared text and the size of its vocabulary.
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
    """Values by dotted key, without those that make no difference."""
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


_ABSENT = object()


def _difference(saved: dict, now: dict) -> tuple[str, object, object] | None:
    """The first key that may not differ and does, with both values."""
    for section in ("experiment", "device", "dtype"):
        before, after = saved.get(section, _ABSENT), now[section]
        pairs = [(section, before, after)]
        if isinstance(before, dict):
            pairs = [(key, before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in before | after]
        for key, b, a in pairs:
            if b != a:
                return key, b, a
    if gone := [seed for seed in saved["seeds"] if seed not in now["seeds"]]:
        return f"seed {gone[0]}", "run", _ABSENT
    for name, before in saved["variants"].items():
        after = now["variants"].get(name)
        if after is None:
            return f"variant {name}", "run", _ABSENT
        for key in [*before, *(key for key in after if key not in before)]:
            b, a = before.get(key, _ABSENT), after.get(key, _ABSENT)
            if b != a:
                return f"{key} of variant {name}", b, a
    return None


def _shown(value) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged, not JSON; remove it, and what it records is done again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, not a JSON object; remove it, and what it records is done again")
    return found
