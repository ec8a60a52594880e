"""Loggers get every record once under its tag, are closed, and cannot end a run."""

import collections
import csv
import errno
import importlib.util
import json
import shutil
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fusedlm.config import load_recipe
from fusedlm.train import train
from fusedlm.train.display import Display
from fusedlm.train.loggers import Loggers, check_loggers
from fusedlm.train.loggers.tags import tag, tagged
from tests.train.runs import losses, records, tiny_recipe


class Recorder:
    """In place of the module wandb and of its run, whose rows survive from one start to the next."""

    def __init__(self, offline: bool = False):
        self.inits, self.rows, self.finished, self.offline = [], [], 0, offline
        self.failing = {}  # method -> error
        # importlib.util.find_spec asks a module in sys.modules for this.
        self.__spec__ = types.SimpleNamespace(name="wandb")

    Settings = staticmethod(dict)

    @property
    def starting_step(self) -> int:
        return 0 if self.offline else max((step for step, _ in self.rows), default=-1) + 1

    def _fail(self, method: str) -> None:
        if method in self.failing:
            raise self.failing[method]

    def init(self, **options):
        self._fail("init")
        self.inits.append(options)
        return self

    def log(self, numbers, step):
        self._fail("log")
        self.rows.append((step, numbers))

    def finish(self):
        self.finished += 1
        self._fail("finish")

    def steps(self, name: str) -> list[int]:
        return [step for step, numbers in self.rows if name in numbers]


@pytest.fixture
def wandb(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


class Crash(Display):
    """Ends the run while it shows a step."""

    def __init__(self, at: int):
        super().__init__(None)
        self.at = at

    def step(self, record: dict) -> None:
        if record["step"] == self.at:
            raise KeyError("crash")


def crash_and_resume(recipe, run, at: int) -> None:
    with pytest.raises(KeyError, match="crash"):
        train(recipe, run, display=Crash(at))
    train(recipe, run, resume=True)


def short(folder, *overrides):
    """Five steps, a checkpoint and a validation at every second one."""
    keys = ("train.steps=5", "train.eval_every=2", "train.checkpoint_every=2", "train.eval_tokens=20", "train.ema=null")
    return tiny_recipe(folder, *keys, *overrides)


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_gets_every_record_once_under_one_id(tmp_path, wandb, offline):
    wandb.offline = offline
    run = tmp_path / "run"
    crash_and_resume(short(tmp_path, "train.loggers=[wandb]"), run, at=3)
    assert wandb.steps("train/loss") == [1, 2, 3, 4, 5]
    assert wandb.steps("val/bpb") == [2, 4, 5]
    assert [numbers["train/loss"] for _, numbers in wandb.rows if "train/loss" in numbers] == losses(run)
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["config"]["name"] == "tiny"
    assert wandb.finished == 2


def test_a_late_validation_reaches_wandb(tmp_path, wandb):
    """Its row is taken: the run was stopped between the step and its validation."""
    recipe = short(tmp_path, "train.loggers=[wandb]")
    (tmp_path / "run").mkdir()
    logger = Loggers(recipe, tmp_path / "run", 0)
    logger.log({"step": 1, "loss": 2.0})
    logger.log({"step": 2, "loss": 1.0})
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    logger = Loggers(recipe, tmp_path / "run", 2)
    logger.log({"step": 2, "val_bpb": 1.5})
    logger.log({"step": 3, "loss": 0.5})
    assert wandb.steps("val/bpb") == [3] and wandb.steps("train/loss") == [1, 2, 3]


def test_wandb_without_a_login_is_one_line_and_blocks_nothing(tmp_path, wandb):
    recipe = short(tmp_path, "train.loggers=[csv,wandb]", "train.steps=1")
    wandb.failing["init"] = RuntimeError("No API key configured.\n  Use `wandb login` to log in.\x1b[0m")
    with pytest.raises(ValueError) as caught:
        train(recipe, tmp_path / "run")
    assert str(caught.value) == (
        "train.loggers=['csv', 'wandb']: wandb cannot start: No API key configured. Use `wandb login` to log in."
        r"\x1b[0m To train without a login, set WANDB_MODE=offline or remove wandb from train.loggers."
    )
    assert not (tmp_path / "run").exists()
    wandb.failing.clear()
    train(recipe, tmp_path / "run")


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_logger_that_fails_does_not_end_the_run(tmp_path, wandb, caplog, method):
    recipe = short(tmp_path, "train.loggers=[wandb,csv]")
    wandb.failing[method] = OSError(28, "No space left\non device")
    result = train(recipe, tmp_path / "run")
    assert result.step == 5 and wandb.finished == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "logger wandb failed at step 1 ([Errno 28] No space left on device); the run continues without it"
        if method == "log"
        else "logger wandb could not be closed ([Errno 28] No space left on device); its last points may be missing"
    )
    assert len(table(tmp_path / "run")) == len(records(tmp_path / "run"))


def test_loggers_are_closed_when_training_fails(tmp_path, wandb):
    with pytest.raises(KeyError):
        train(short(tmp_path, "train.loggers=[wandb]"), tmp_path / "run", display=Crash(1))
    assert wandb.finished == 1


def test_loggers_that_had_started_are_closed_when_another_cannot(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match="csv cannot start"):
        train(short(tmp_path, "train.loggers=[wandb,csv]"), tmp_path / "run")
    assert (len(wandb.inits), wandb.finished) == (1, 1)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    check_loggers(["csv"])
    with pytest.raises(ValueError, match=f"package {name} is not installed; pip install {name}"):
        train(short(tmp_path, f"train.loggers=[csv,{name}]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def table(run) -> list[dict]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_the_numbers_of_the_metrics(tmp_path):
    run = tmp_path / "run"
    crash_and_resume(short(tmp_path, "train.loggers=[csv]"), run, at=3)
    rows = table(run)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [{key: float(value) for key, value in row.items() if value} for row in rows] == [
        {key: value for key, value in record.items() if isinstance(value, int | float)} for record in found
    ]
    assert "val_bpb" in rows[0] and rows[0]["val_bpb"] == ""  # a column that came later


def test_csv_can_be_read_while_the_run_goes_on(tmp_path):
    logger = Loggers(short(tmp_path, "train.loggers=[csv]"), tmp_path, 0)
    for record, rows in (
        ({"step": 1, "loss": 2.5, "skipped": True, "note": "text"}, ["step,loss,skipped", "1,2.5,1"]),
        ({"step": 2, "loss": float("nan")}, ["step,loss,skipped", "1,2.5,1", "2,,"]),
        ({"step": 2, "val_bpb": 1.5}, ["step,loss,skipped,val_bpb", "1,2.5,1,", "2,,,", "2,,,1.5"]),
        ({"step": 3, "loss": 0.5}, ["step,loss,skipped,val_bpb", "1,2.5,1,", "2,,,", "2,,,1.5", "3,0.5,,"]),
    ):
        logger.log(record)
        assert (tmp_path / "metrics.csv").read_text().splitlines() == rows


def test_csv_is_complete_when_it_comes_later_and_leaves_files_of_others(trained, tmp_path):
    _, straight = trained
    run = shutil.copytree(straight, tmp_path / "run")
    recipe = load_recipe(run / "recipe.yaml", overrides=["train.loggers=[csv]", "train.steps=13"])
    train(recipe, run, resume=True)
    assert [row["step"] for row in table(run) if row["loss"]] == [str(step) for step in range(1, 14)]

    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"metrics.csv exists and is not of this run; move it away"):
        train(short(tmp_path, "train.loggers=[csv]"), other)
    assert [path.name for path in other.iterdir()] == ["metrics.csv"] and (other / "metrics.csv").read_text() == "mine"


def test_tags():
    assert [tag(key) for key in ("loss", "loss_routed_budget", "routed_full", "mfu", "val_bpb", "val_routed_full")] == [
        "train/loss",
        "train/loss_routed_budget",
        "train/routed_full",
        "system/mfu",
        "val/bpb",
        "val/routed_full",
    ]
    step = {"step": 3, "loss": float("nan"), "mfu": None, "tokens": 5, "skipped": True, "routed_layers": [[1.0]]}
    assert tagged(step) == {"train/tokens": 5, "train/skipped": True}
    assert tagged({"step": 3, "tokens": 5, "val_bpb": 1.0, "val_window": 16}) == {"val/bpb": 1.0, "val/window": 16}


@pytest.fixture
def tensorboard():
    """Reads the event files of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(run: Path):
        return accumulator.EventAccumulator(str(run / "tensorboard")).Reload()

    return read


def test_tensorboard_has_each_point_once(tmp_path, tensorboard):
    run = tmp_path / "run"
    crash_and_resume(short(tmp_path, "train.loggers=[tensorboard]"), run, at=3)
    events = tensorboard(run)
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx(losses(run))
    assert [point.step for point in events.Scalars("val/bpb")] == [2, 4, 5]
    assert "system/step_seconds" in events.Tags()["scalars"]


def test_tensorboard_shows_points_while_the_run_goes_on_and_after_those_of_earlier_versions(tmp_path, tensorboard):
    """Earlier versions named files by seconds: 1700000000.HOST.PID.0."""
    recipe = short(tmp_path, "train.loggers=[tensorboard]")
    first = Loggers(recipe, tmp_path, 0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 1.0})
    assert [point.step for point in tensorboard(tmp_path).Scalars("train/loss")] == [1, 2, 3]
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.rename(file.with_name(f"events.out.tfevents.{int(time.time())}.host.7.0"))
    Loggers(recipe, tmp_path, 1).log({"step": 2, "loss": 5.0})
    assert [(point.step, point.value) for point in tensorboard(tmp_path).Scalars("train/loss")] == [(1, 1.0), (2, 5.0)]


@pytest.mark.filterwarnings("error")  # an exception of a thread is a warning here, and a traceback elsewhere
def test_a_full_disk_ends_tensorboard_with_one_line(tmp_path, monkeypatch, tensorboard, caplog, capfd):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    write, calls = record_writer.RecordWriter.write, []

    def fill_up(self, data):
        calls.append(data)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", fill_up)
    result = train(short(tmp_path, "train.loggers=[tensorboard]"), tmp_path / "run")
    assert result.step == 5 and len(losses(tmp_path / "run")) == 5
    (warning,) = [record.getMessage() for record in caplog.records]
    problem = "([Errno 28] No space left on device); the run continues without it"
    assert warning == f"logger tensorboard failed at step 2 {problem}"
    assert capfd.readouterr() == ("", "") and len(calls) == 5
    assert [point.step for point in tensorboard(tmp_path / "run").Scalars("train/loss")] == [1, 2]


@dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


@dataclass
class Tracked:
    """A run in a store of MLflow."""

    name: str
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[Metric]] = field(default_factory=lambda: collections.defaultdict(list))

    @property
    def info(self):
        return types.SimpleNamespace(status=self.status)

    @property
    def data(self):
        return self


class Store:
    """In place of MlflowClient. Runs survive from one start to the next, by the address of their store."""

    stores = collections.defaultdict(dict)

    def __init__(self, uri: str):
        self.runs = self.stores[uri]

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location):
        return name

    def create_run(self, experiment, run_name):
        assert experiment == "fusedlm"
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = Tracked(run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def get_run(self, run_id):
        return self.runs[run_id]

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def set_terminated(self, run_id):
        self.update_run(run_id, "FINISHED")

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(params) <= 100 and self.runs[run_id].status == "RUNNING"
        self.runs[run_id].params |= dict(params)
        for point in metrics:
            self.runs[run_id].metrics[point.key].append(point)

    def get_metric_history(self, run_id, key):
        return self.runs[run_id].metrics[key]


@pytest.fixture(params=["stand-in", "installed"])
def mlflow(request, monkeypatch):
    """The class MlflowClient."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "installed":
        pytest.importorskip("sqlalchemy")
        return pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setattr(Store, "stores", collections.defaultdict(dict))
    entities = {"Metric": Metric, "Param": lambda key, value: (key, value)}
    contents = {"mlflow": {}, "mlflow.tracking": {"MlflowClient": Store}, "mlflow.entities": entities, "sqlalchemy": {}}
    for name, content in contents.items():
        module = types.SimpleNamespace(__spec__=types.SimpleNamespace(name=name), **content)
        monkeypatch.setitem(sys.modules, name, module)
    return Store


def test_mlflow_has_each_point_once(tmp_path, mlflow):
    run = tmp_path / "run"
    crash_and_resume(short(tmp_path, "train.loggers=[mlflow]"), run, at=3)
    client = mlflow(f"sqlite:///{run}/mlflow.db")
    run_id = (run / "mlflow-id.txt").read_text()
    points = client.get_metric_history(run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == list(enumerate(losses(run), start=1))
    assert [point.step for point in client.get_metric_history(run_id, "val/bpb")] == [2, 4, 5]
    entry = client.get_run(run_id)
    assert entry.info.status == "FINISHED" and entry.data.params["model.dim"] == "16"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("mlflow", ["stand-in"], indirect=True)
def test_mlflow_uses_the_server_that_the_environment_names(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    block = "{mixer: {type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}, ffn: {type: swiglu}}"
    more = [*(f"model.blocks.{name}={block}" for name in "xy"), "model.pattern=gamxy", "model.n_layers=5"]
    train(short(tmp_path, "train.loggers=[mlflow]", "train.steps=1", *more), tmp_path / "run")
    assert list(Store.stores) == ["http://server"]
    tracked = Store.stores["http://server"]["run-0"]
    assert tracked.name == "tiny" and len(tracked.params) > 100  # which servers take in one call
