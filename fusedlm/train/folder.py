"""The run folder: what lies where, who may write to it, and whether a recipe may go on in it."""

import fcntl
import json
from pathlib import Path

from fusedlm.config import Recipe, dump_recipe, load_recipe
from fusedlm.files import write_atomic
from fusedlm.train.checkpoint import Checkpoints

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
CHECKPOINTS, LOCK = "checkpoints", ".lock"

# Keys that cannot change what the steps compute. Any other difference would make the resumed run a mixture of two.
_FREE_KEYS = frozenset(
    {
        "description",
        "sample_prompt",
        "data.dir",
        "train.device",
        "train.loggers",
        "train.eval_every",
        "train.eval_tokens",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.compile",
        "train.max_bad_steps",
    }
)


class RunFolder:
    """A folder locked for one training process, as a context.

    Raises:
        ValueError: on entering, another process trains into the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = Checkpoints(path / CHECKPOINTS)
        self.metrics = path / METRICS
        self._lock = None

    def __enter__(self) -> "RunFolder":
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
        return self

    def __exit__(self, *exception) -> None:
        # The file stays: removing it would let two processes hold locks on two files of one name.
        self._lock.close()

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return any((self.path / name).exists() for name in (RECIPE, METRICS, CHECKPOINTS))

    def admit(self, recipe: Recipe, resume: bool) -> int | None:
        """Decide whether this recipe may train here.

        Returns:
            The steps of the run as it was begun, when they differ from the recipe's; else None.

        Raises:
            ValueError: the folder holds a run and `resume` is not set, or the recipe is not that run's.
        """
        if not self.holds_run():
            return None
        if not resume:
            raise ValueError(
                f"run folder {self.path} already holds a run; go on with it by --resume or name another with --out"
            )
        if not (self.path / RECIPE).exists():
            raise ValueError(f"run folder {self.path} holds a run without {RECIPE}; name another folder with --out")
        saved = load_recipe(self.path / RECIPE)
        check_resumable(saved, recipe)
        return saved.train.steps if saved.train.steps != recipe.train.steps else None

    def write_header(self, recipe: Recipe, environment: dict, tokenizer) -> None:
        """Everything that `load` needs besides a checkpoint. The recipe comes last: with it, the folder is a run."""
        tokenizer.save(self.path)
        write_atomic(self.path / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
        write_atomic(self.path / RECIPE, dump_recipe(recipe))


def check_resumable(saved: Recipe, given: Recipe) -> None:
    """Whether a run of recipe `saved` may go on with `given`: equal but for what the steps do not depend on, and for
    `train.steps`, which may grow.

    Raises:
        ValueError: naming the first key that differs, with both values.
    """
    for key, before, now in _differences(saved.model_dump(mode="json"), given.model_dump(mode="json")):
        if key in _FREE_KEYS or any(key.startswith(free + ".") for free in _FREE_KEYS):
            continue
        if key == "train.steps":
            if now > before:
                continue
            raise ValueError(f"train.steps={now} is below the {before} of the run to resume; give at least those")
        raise ValueError(
            f"{key} is {_shown(before)} in the run to resume and {_shown(now)} now; "
            "give the same value or start anew with --out"
        )


_ABSENT = object()


def _differences(before, now, key: str = ""):
    """(dotted key, value before, value now) for each leaf that differs, in the order of the recipe."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(n for n in now if n not in before)]:
            inner = f"{key}.{name}" if key else name
            yield from _differences(before.get(name, _ABSENT), now.get(name, _ABSENT), inner)
    elif before != now:
        yield key, before, now


def _shown(value) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
