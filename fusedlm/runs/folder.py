"""The run folder: file names, the lock of the training process, and whether a recipe may resume there."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fusedlm.config import Recipe, dump_recipe, load_recipe
from fusedlm.config.keys import ABSENT, differences, is_neutral
from fusedlm.distributed import World
from fusedlm.files import write_atomic
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.identity import Identity, identity_of, write_identity

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
CHECKPOINTS, LOCK = "checkpoints", ".lock"


def require_run(run_dir: Path) -> None:
    """Raises ValueError if the folder holds no run."""
    if not (run_dir / RECIPE).is_file():
        if run_dir.is_file():
            raise ValueError(f"{run_dir} holds no run: it is a file, which eval, generate and serve may read")
        if (run_dir / "config.json").is_file():
            raise ValueError(
                f"{run_dir} holds a model of Transformers and no run; make one with: fusedlm import {run_dir} RUN"
            )
        raise ValueError(f"{run_dir} holds no run; train one with: fusedlm train RECIPE --out {run_dir}")


class RunFolder:
    """A folder that is locked for one training run while the context is open.

    Args:
        world: the processes of the run; the main one holds the lock. None: this process alone.

    Raises:
        ValueError: on entering, the path is a file, or another process is training into the folder.
    """

    def __init__(self, path: Path, world: World | None = None):
        self.path = path
        self._world = world or World()
        self.checkpoints = Checkpoints(path / CHECKPOINTS)
        self.metrics = path / METRICS
        self._lock = None

    def __enter__(self) -> "RunFolder":
        self._world.together(self._take_lock, only_main=True)
        return self

    def _take_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"run folder {self.path} is a file; name a folder with --out") from None
        self._lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"run folder {self.path} is in use by another training process; wait for it or name another with --out"
            ) from None
        if not self._lock_is_in_place():  # a start that failed has taken its folder back
            self._lock.close()
            self._take_lock()

    def _lock_is_in_place(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK))
        return False

    def __exit__(self, *exception) -> None:
        # Not removed: two processes could then hold locks on two files of the same name.
        if self._lock is not None:
            self._lock.close()

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any((self.path / name).exists() for name in (RECIPE, METRICS, CHECKPOINTS))

    def check_resume(self, resume: bool) -> None:
        """Check that a run may train here.

        Raises:
            ValueError: the folder holds a run and `resume` is not set, or a run without its recipe.
        """
        if not self.holds_run():
            return
        if not resume:
            raise ValueError(
                f"run folder {self.path} already holds a run; resume it with --resume or name another with --out"
            )
        if not (self.path / RECIPE).exists():
            raise ValueError(f"run folder {self.path} holds a run without {RECIPE}; name another folder with --out")

    def check_recipe(self, recipe: Recipe, device: str, saved: Recipe | None, identity: Identity | None) -> list[str]:
        """Check that the run of this folder, if it holds one, may resume with this recipe.

        Args:
            device: the type of the device, "cpu" or "cuda".
            saved: the recipe of the checkpoint to resume from; None: there is none, and that of the folder counts.
            identity: of the run, if known.

        Returns:
            A sentence for each change to the run that the user should see.

        Raises:
            ValueError: the run has another recipe.
        """
        if not self.holds_run():
            return []
        previous = self._previous_device(identity) or device  # if unknown, the stricter rule applies
        notes = check_resumable(saved or load_recipe(self.path / RECIPE), recipe, same_device=previous == device)
        if previous != device:
            notes.insert(0, f"the run was on {previous} and is now on {device}; losses may differ by rounding")
        return notes

    def _previous_device(self, identity: Identity | None) -> str | None:
        path = self.path / ENVIRONMENT
        if identity is not None and not identity.wrote(path):
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8")).get("device")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None

    def write_header(
        self, recipe: Recipe, tokenizer, environment: dict, run: str, identity: Identity | None = None
    ) -> None:
        """Write what `load` needs besides a checkpoint, and record the machine and software that compute the following
        steps. The recipe comes last: with it, the folder holds a run.

        Args:
            run: id of the run.
            identity: of the files that are replaced; None: there is none, and they count as they are.
        """
        contents = {ENVIRONMENT: json.dumps(environment, indent=2) + "\n", **tokenizer.files()}
        contents = {name: text.encode() for name, text in contents.items()} | {RECIPE: dump_recipe(recipe).encode()}
        # Several files are not replaced at once: until the last one is, run.json accepts the old content of each, so
        # that a kill in between does not look like a change by somebody else.
        before = identity or identity_of(run, self._contents(contents))
        write_identity(self.path, identity_of(run, contents, before))
        for name, content in contents.items():
            write_atomic(self.path / name, content)
        write_identity(self.path, identity_of(run, contents))

    def complete_header(self, tokenizer, identity: Identity | None, run: str) -> None:
        """Restore the tokenizer of a finished run, and write run.json if it is missing or damaged."""
        names = tokenizer.save(self.path)
        if identity is None:
            write_identity(self.path, identity_of(run, self._contents((ENVIRONMENT, RECIPE, *names))))

    def _contents(self, names: Iterable[str]) -> dict[str, bytes]:
        """Those of these files that there are."""
        return {name: (self.path / name).read_bytes() for name in names if (self.path / name).is_file()}


# What the files hold is compared when the text is opened, not where they are.
_PATHS = re.compile(r"data\.(source|sources\..+\.source|validation|tokenizer)\.path")
# Neutral keys that change the order of sums. They may change on resume: the out-of-memory error advises it.
_ROUNDING = ("train.micro_batch_size", "runtime.recompute", "runtime.parallel")


def check_resumable(saved: Recipe, given: Recipe, same_device: bool = True) -> list[str]:
    """Check that a run of recipe `saved` may resume with `given`.

    Keys must be equal, except those marked neutral, `train.steps`, which may increase, the paths of the text, and on
    another kind of device the section `runtime`, since rounding differs there anyway.

    Returns:
        A sentence for each difference that changes the schedule or the rounding.

    Raises:
        ValueError: names the first key that must not differ, with both values.
    """
    notes = []
    for key, before, now in differences(saved.model_dump(mode="json"), given.model_dump(mode="json")):
        change = f"{key} was {shown(before)} and is now {shown(now)}"
        if key == "train.steps":
            if now < before:
                raise ValueError(f"train.steps={now}: the run to resume has {before} steps; give at least {before}")
            notes.append(f"{change}; the schedule is recomputed for {now} steps")
            if any(stage.until is not None and stage.until <= 1 for stage in given.data.stages):
                notes.append("data.stages with a fraction as until end later too: text can be read again or left out")
        elif key.startswith(_ROUNDING) or (key.startswith("runtime.") and not same_device):
            notes.append(f"{change}; losses may differ by rounding")
        elif _PATHS.fullmatch(key):
            notes.append(f"{change}; the content is compared")
        elif not is_neutral(key, Recipe):
            raise ValueError(
                f"{key} is {shown(before)} in the run to resume and {shown(now)} now; "
                "give the same value or start a new run with --out"
            )
    return notes


def shown(value) -> str:
    """A value of a JSON tree, for messages; at most 80 characters."""
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)[:80]
