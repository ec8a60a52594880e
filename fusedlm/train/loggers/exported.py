"""The card and the figures of an exported model, sent to the trackers that its run was logged to."""

import importlib
import importlib.util
from pathlib import Path

from fusedlm.terminal import one_line

# Module and class in this package.
_TRACKERS = {"mlflow": ("mlflow", "MLflowLogger"), "wandb": ("wandb", "WandbLogger")}


def trackers_of(run_dir: str | Path) -> list[str]:
    """Names of the trackers that know a run.

    Raises:
        ValueError: there are none, or the package of one is not installed.
    """
    found = [name for name in _TRACKERS if (Path(run_dir) / f"{name}-id.txt").exists()]
    if not found:
        raise ValueError(f"--track: no tracker knows {run_dir}; train with train.loggers=[mlflow] or [wandb]")
    for name in found:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--track: package {name} is not installed; pip install {name}")
    return found


def track_export(run_dir: str | Path, name: str, figures: dict[str, float | int | str], card: str | None) -> list[str]:
    """Add an exported model to what the trackers of its run have.

    Args:
        name: of the export, such as that of its folder; one of the same name is replaced. Trackers get it in ASCII.
        figures: what is known of it, by name.
        card: the text of its card; None: it has none.

    Returns:
        The names of the trackers.

    Raises:
        ValueError: as `trackers_of`, or one does not take it.
    """
    found = trackers_of(run_dir)
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)[:100]
    for tracker in found:
        module, cls = _TRACKERS[tracker]
        try:
            logger = getattr(importlib.import_module(f"{__package__}.{module}"), cls)
            logger.add_export(Path(run_dir), kept, figures, card)
        except Exception as error:
            reason = one_line(str(error)) or type(error).__name__
            raise ValueError(f"--track: {tracker} did not take {name}, which is written: {reason}") from error
    return found
