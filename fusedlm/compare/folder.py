"""The folder of an experiment: its files, each bound to what it belongs to, and whether it can be resumed."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fusedlm.compare.checks import (
    check_calibration,
    check_decoding,
    check_identity,
    check_record,
    read_json,
)
from fusedlm.compare.identity import difference, merged, variant_digest
from fusedlm.config.experiment import Experiment, dump_experiment, run_name
from fusedlm.files import sha256_file, write_atomic
from fusedlm.runs.folder import ENVIRONMENT, METRICS, shown
from fusedlm.runs.folder import RECIPE as RUN_RECIPE
from fusedlm.runs.seal import seal, unseal

EXPERIMENT, IDENTITY, CALIBRATION = "experiment.yaml", "identity.json", "calibration.json"
RUNS, RECORDS, DECODING = "runs", "records", "decoding"
SHARED = "shared"  # an empty file for each run that shared its GPU
FILES = (EXPERIMENT, IDENTITY, RUNS, SHARED, ".lock")  # what a start writes before there is anything to keep
_CHECKSUM = "sha256"
_AGAIN = "remove it to compute its content again"


class ExperimentFolder:
    """OUT/, locked for one process, as a context.

    runs/VARIANT-seedN are run folders, as `fusedlm train` writes them, and runs/VARIANT-lrxFACTOR those of trials of
    learning rates; records/ has one file per run or trial that has ended, and decoding/ one per variant. Recorded
    results are not recomputed; failed runs are retried.
    Every file that is read back is {"about", "content", "sha256"}: it must be what was written, and about the variant,
    seed and experiment that it is read for. Files of versions without checksums are accepted once: `notes` says so,
    and from then on identity.json has the sha256 of each.

    Attributes:
        identity: in force, after `check`.
        notes: sentences for the user, after `check`.

    Raises:
        ValueError: on entering, another process has locked the folder, or it is a file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.identity: dict = {}
        self.notes: list[str] = []
        self._lock = None
        self._legacy: dict[str, str] = {}  # accepted files without a checksum, and the sha256 of each

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

    def run(self, variant: str, seed: int, factor: float | None = None) -> Path:
        """The folder of a run; with a factor that of the trial of these learning rates, here and below."""
        return self.path / RUNS / run_name(variant, seed, factor)

    def record_path(self, variant: str, seed: int, factor: float | None = None) -> Path:
        return self.path / RECORDS / f"{run_name(variant, seed, factor)}.json"

    def mark_sharing(self, variant: str, seed: int, factor: float | None, *, shared: bool) -> None:
        """Note, before a run starts or resumes, whether others share its GPU. Once it was shared for a part of a run,
        times of the steps of that run mean nothing."""
        mark = self.path / SHARED / run_name(variant, seed, factor)
        if shared:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
        elif not self.run(variant, seed, factor).exists():
            mark.unlink(missing_ok=True)

    def is_shared(self, variant: str, seed: int) -> bool:
        return (self.path / SHARED / run_name(variant, seed)).exists()

    def holds_work(self) -> bool:
        """Whether there is anything that a new start would have to repeat."""
        runs = self.path / RUNS
        started = runs.is_dir() and any(runs.iterdir())
        return started or any((self.path / name).exists() for name in (RECORDS, CALIBRATION, DECODING))

    def check(self, identity: dict) -> None:
        """Check that an experiment can start or resume here: seeds, factors of learning rates and variants may be
        added, nothing else may differ once a run has started.

        Args:
            identity: from `identify`.

        Raises:
            ValueError: the folder holds another experiment; names the first key that differs. Or its identity is
                damaged or missing.
        """
        saved = self._read_identity()
        if saved is None:
            self.identity = identity
            return
        saved = self._started(saved, identity)
        different = difference(saved, identity)
        if different is None:
            self.identity = merged(saved, identity)
            return
        if self._has_runs():
            key, before, now = different
            raise ValueError(
                f"experiment folder {self.path} holds another experiment: {key} is {shown(before)} there and "
                f"{shown(now)} now; name another folder with --out"
            )
        (self.path / CALIBRATION).unlink(missing_ok=True)
        shutil.rmtree(self.path / DECODING, ignore_errors=True)
        self.identity = identity

    def write_header(self, experiment: Experiment) -> None:
        """Save the experiment and its identity."""
        content = self.identity | ({"unsealed": self._legacy} if self._legacy else {})
        write_atomic(self.path / EXPERIMENT, dump_experiment(experiment))
        write_atomic(self.path / IDENTITY, json.dumps(seal(content, "identity of an experiment"), indent=1) + "\n")

    def holds_experiment(self) -> bool:
        """Whether an experiment was started here."""
        return (self.path / IDENTITY).exists()

    def saved_identity(self) -> dict:
        """The identity that `write_header` saved. Raises ValueError if there is none, or it is damaged."""
        saved = self._read_identity()
        if saved is None:
            raise ValueError(f"experiment folder {self.path} holds no experiment yet; run it without --report-only")
        return saved

    def record(self, variant: str, seed: int, factor: float | None = None) -> dict | None:
        """The record of a run that has ended; None: it has not.

        Raises:
            ValueError: the record is damaged or of another run, or the files of the run have changed since it ended.
        """
        path = self.record_path(variant, seed, factor)
        record = self._read(path, self._about_run(variant, seed, factor), check_record)
        if record is None:
            return None
        for name, digest in record.get("files", {}).items():
            file = self.run(variant, seed, factor) / name
            if not file.is_file():
                raise ValueError(
                    f"{file}: missing, although {path.name} says that the run has ended; restore it, or remove {path} "
                    f"and {file.parent} to train the run again"
                )
            if sha256_file(file) != digest:
                raise ValueError(
                    f"{file}: changed since the run ended (the checksum in {path.name} differs); restore it, or remove "
                    f"{path} and {file.parent} to train the run again"
                )
        return record

    def write_record(self, variant: str, seed: int, record: dict, factor: float | None = None) -> None:
        """Save how a run ended. Unless it failed, with checksums of the run's metrics and environment."""
        files = {}
        if record["outcome"] != "failed":
            paths = [self.run(variant, seed, factor) / name for name in (METRICS, ENVIRONMENT)]
            files = {path.name: sha256_file(path) for path in paths if path.is_file()}
        path = self.record_path(variant, seed, factor)
        self._write(path, self._about_run(variant, seed, factor), record | {"files": files})

    def environment(self, variant: str, seed: int) -> dict:
        """The environment of a run."""
        return read_json(self.run(variant, seed) / ENVIRONMENT, "remove it") or {}

    def decoding(self, variant: str) -> dict | None:
        """length (text) -> (bytes, tokens per second), or None if the device has too little memory."""
        return self._read(self._decoding_path(variant), self._about("decoding", variant), check_decoding)

    def write_decoding(self, variant: str, measured: dict) -> None:
        self._write(self._decoding_path(variant), self._about("decoding", variant), measured)

    def calibration(self) -> dict[str, float]:
        """Measured seconds per step, by variant."""
        path = self.path / CALIBRATION
        found = self._read(path, {"kind": "calibration"}, check_calibration) or {}
        for name, entry in found.items():
            known = name in self.identity["variants"]
            if isinstance(entry, dict) and known and entry["of"] != variant_digest(self.identity, name):
                raise ValueError(f"{path}: {name} was timed for another experiment; {_AGAIN}")
        return {name: entry["seconds"] if isinstance(entry, dict) else entry for name, entry in found.items()}

    def write_calibration(self, step_seconds: dict[str, float]) -> None:
        entries = {
            name: {"seconds": seconds, "of": variant_digest(self.identity, name)}
            for name, seconds in step_seconds.items()
            if name in self.identity["variants"]
        }
        self._write(self.path / CALIBRATION, {"kind": "calibration"}, entries)

    def _about(self, kind: str, variant: str) -> dict:
        return {"kind": kind, "variant": variant, "experiment": variant_digest(self.identity, variant)}

    def _about_run(self, variant: str, seed: int, factor: float | None) -> dict:
        if factor is None:
            return self._about("record", variant) | {"seed": seed}
        return self._about("trial", variant) | {"seed": seed, "factor": factor}

    def _decoding_path(self, variant: str) -> Path:
        return self.path / DECODING / f"{variant}.json"

    def _started(self, saved: dict, now: dict) -> dict:
        """A saved identity without the variants, seeds and factors that have no run and are not in the experiment any
        more."""
        seeds, factors, names = saved["seeds"], saved.get("lr_factors", []), list(saved["variants"])

        def kept(variant: str, seed: int, factor: float | None = None) -> bool:
            return self.run(variant, seed, factor).exists() or self.record_path(variant, seed, factor).exists()

        def has_work(variant: str) -> bool:
            return any(kept(variant, seed) for seed in seeds) or any(kept(variant, 0, factor) for factor in factors)

        return saved | {
            "seeds": [seed for seed in seeds if seed in now["seeds"] or any(kept(name, seed) for name in names)],
            "lr_factors": [x for x in factors if x in now["lr_factors"] or any(kept(name, 0, x) for name in names)],
            "variants": {
                name: leaves for name, leaves in saved["variants"].items() if name in now["variants"] or has_work(name)
            },
        }

    def _has_runs(self) -> bool:
        return any(any((self.path / name).glob("*")) for name in (RUNS, RECORDS))

    def _read_identity(self) -> dict | None:
        path = self.path / IDENTITY
        fix = "restore it, or name another folder with --out"
        saved = read_json(path, fix)
        if saved is None:
            if self._has_runs():
                raise ValueError(f"experiment folder {self.path} holds runs but no {IDENTITY}; {fix}")
            return None
        if _CHECKSUM not in saved:
            self._legacy = self._unsealed_files()
            if self._legacy:
                self.notes = [
                    f"experiment folder {self.path} is of a version without checksums: {len(self._legacy)} files are "
                    "accepted as they are"
                ]
        try:
            saved = unseal(saved, "identity of an experiment", required=False)
            check_identity(saved)
        except ValueError as error:
            raise ValueError(f"{path}: damaged: {error}; {fix}") from None
        self._legacy = saved.pop("unsealed", self._legacy)
        return saved

    def _unsealed_files(self) -> dict[str, str]:
        paths = [self.path / CALIBRATION, *(self.path / RECORDS).glob("*"), *(self.path / DECODING).glob("*")]
        return {
            str(path.relative_to(self.path)): sha256_file(path)
            for path in paths
            if path.suffix == ".json" and _CHECKSUM not in (read_json(path, _AGAIN) or {_CHECKSUM: ""})
        }

    def _read(self, path: Path, about: dict, check: Callable[[dict], None]) -> dict | None:
        tree = read_json(path, _AGAIN)
        if tree is None:
            return None
        try:
            if _CHECKSUM in tree:
                tree = unseal(tree, "content")
                if different := _other(tree.get("about"), about):
                    raise ValueError(different)
                content = tree.get("content")
            elif self._legacy.get(str(path.relative_to(self.path))) == sha256_file(path):
                content = tree
            else:
                raise ValueError("it has no checksum, and is not as it was accepted from a version without")
            if not isinstance(content, dict):
                raise ValueError("its content is not a JSON object")
            check(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {_AGAIN}") from None
        return content

    def _write(self, path: Path, about: dict, content: dict) -> None:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(seal({"about": about, "content": content}, "content"), indent=1) + "\n")


def _other(found, about: dict) -> str | None:
    """What a file belongs to instead of what it is read for; None: to that."""
    if not isinstance(found, dict):
        return "it does not say what it belongs to"
    for key, value in about.items():
        if found.get(key) != value:
            what = f"{key} {found.get(key)}, not {value}" if key != "experiment" else "another experiment"
            return f"it belongs to {what}"
    return None
