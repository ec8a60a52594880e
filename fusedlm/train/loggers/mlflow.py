"""MLflow: a run in RUN/mlflow.db, or on the server that MLFLOW_TRACKING_URI names."""

import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fusedlm.config import Recipe
from fusedlm.files import write_atomic
from fusedlm.train.loggers.tags import tagged

_EXPERIMENT = "fusedlm"
_ID = "mlflow-id.txt"
_LONGEST_PARAM = 500  # characters, of all servers the lowest limit


class MLflowLogger:
    """Its id is in RUN/mlflow-id.txt, so that resuming continues the same run. The keys of the recipe are its params.

    Points that a resumed run repeats are not sent again.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start_step: int):
        self._client = _client(run_dir)
        self._logged: dict[str, set[int]] | None = None  # steps by tag; None: a new run, none is logged yet
        id_file = run_dir / _ID
        if id_file.exists():
            self._id = id_file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
            self._logged = {}
        else:
            self._id = self._client.create_run(self._experiment(run_dir), run_name=recipe.name).info.run_id
            self._log_params(recipe)
            write_atomic(id_file, self._id)

    def log(self, record: dict) -> None:
        from mlflow.entities import Metric

        step, now = record["step"], time.time_ns() // 1_000_000
        points = [Metric(name, float(value), now, step) for name, value in tagged(record).items()]
        if self._logged is not None:
            points = [point for point in points if step not in self._steps(point.key)]
        self._client.log_batch(self._id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    @staticmethod
    def add_export(run_dir: Path, name: str, figures: dict[str, float | int | str], card: str | None) -> None:
        """See `track_export`. Numbers become metrics export/NAME/KEY, text tags of that name; the card, and all figures
        as JSON, artifacts in exports/NAME."""
        client, run_id = _client(run_dir), (run_dir / _ID).read_text(encoding="utf-8").strip()
        step = figures.get("step", 0)
        for key, value in figures.items():
            if isinstance(value, str):
                client.set_tag(run_id, f"export/{name}/{key}", value)
            else:
                client.log_metric(run_id, f"export/{name}/{key}", float(value), step=step)
        client.log_dict(run_id, figures, f"exports/{name}/figures.json")
        if card is not None:
            client.log_text(run_id, card, f"exports/{name}/README.md")

    def _steps(self, key: str) -> set[int]:
        """Steps at which a tag was logged before this start."""
        if key not in self._logged:
            self._logged[key] = {point.step for point in self._client.get_metric_history(self._id, key)}
        return self._logged[key]

    def _experiment(self, run_dir: Path) -> str:
        found = self._client.get_experiment_by_name(_EXPERIMENT)
        if found is not None:
            return found.experiment_id
        here = (run_dir.absolute() / "mlflow-artifacts").as_uri()
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else here  # a server decides itself
        return self._client.create_experiment(_EXPERIMENT, artifact_location=artifacts)

    def _log_params(self, recipe: Recipe) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in _leaves(recipe.model_dump(mode="json"))]
        for start in range(0, len(params), 100):  # the most of one call
            self._client.log_batch(self._id, params=params[start : start + 100])


def _client(run_dir: Path):
    """Of the server that the environment names, or of the file in the folder of the run."""
    from mlflow.tracking import MlflowClient

    # Setting up the store is no news, and of a failure `Loggers` says one line.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server and importlib.util.find_spec("sqlalchemy") is None:
        raise ValueError("mlflow-skinny needs sqlalchemy and alembic; pip install sqlalchemy alembic")
    return MlflowClient(server or f"sqlite:///{run_dir.absolute()}/mlflow.db")


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
