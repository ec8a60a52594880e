"""`fusedlm export --track`: card and figures reach the trackers of a run, the installed ones and stand-ins."""

import contextlib
import io
import json
import shutil
import sys
import types
from pathlib import Path

import pytest

from fusedlm.cli import main


@pytest.fixture
def run(cases, tmp_path, monkeypatch) -> Path:
    """A run that no tracker knows yet."""
    monkeypatch.chdir(cases["llama"].run.parents[1])
    return Path(shutil.copytree(cases["llama"].run, tmp_path / "run"))


class Client:
    """In place of MlflowClient."""

    def __init__(self, uri):
        self.uri = uri
        self.calls.append(("client", uri))

    calls: list = []

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, *arguments, *named.values()))


@pytest.fixture
def client(monkeypatch) -> list:
    """The calls of the client."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Client, "calls", [])
    for name, content in {"mlflow": {}, "mlflow.tracking": {"MlflowClient": Client}, "sqlalchemy": {}}.items():
        module = types.SimpleNamespace(__spec__=types.SimpleNamespace(name=name), **content)
        monkeypatch.setitem(sys.modules, name, module)
    return Client.calls


class WandB:
    """In place of the module wandb, of a run and of an artifact."""

    Settings = staticmethod(dict)

    def __init__(self):
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.inits, self.summary, self.artifacts, self.files, self.finished = [], {}, [], {}, 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def Artifact(self, name, type, metadata):  # noqa: N802, A002
        self.artifacts.append((name, type, metadata))
        return self

    @contextlib.contextmanager
    def new_file(self, name, encoding):
        file = io.StringIO()
        yield file
        self.files[name] = file.getvalue()

    def log_artifact(self, artifact):
        assert artifact is self and "README.md" in self.files

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> WandB:
    found = WandB()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_mlflow_gets_card_and_figures(run, tmp_path, client, capsys):
    (run / "mlflow-id.txt").write_text("abc")
    assert main(["export", str(run), str(tmp_path / "modèl 1"), "--track"]) == 0
    assert capsys.readouterr().out.endswith("\ntracked by mlflow\n")
    card = (tmp_path / "modèl 1" / "README.md").read_text(encoding="utf-8")
    assert client[0] == ("client", f"sqlite:///{run}/mlflow.db")
    assert ("log_text", "abc", card, "exports/mod-l-1/README.md") in client and "LlamaForCausalLM" in card
    assert ("set_tag", "abc", "export/mod-l-1/class", "LlamaForCausalLM") in client
    (figures,) = [call[2] for call in client if call[0] == "log_dict"]
    bpb = f"| held-out bits per byte | {figures['val_bpb']:.4f} |"
    assert bpb in card and f"| parameters | {figures['parameters']:,} |" in card and figures["step"] == 6
    numbers = {call[2]: call[3:] for call in client if call[0] == "log_metric"}
    assert numbers["export/mod-l-1/val_bpb"] == (figures["val_bpb"], 6) and len(numbers) == 3


def test_wandb_gets_card_and_figures(run, tmp_path, wandb, capsys):
    (run / "wandb-id.txt").write_text("xyz")
    assert main(["export", str(run), str(tmp_path / "hf"), "--track", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "llama"
    (options,) = wandb.inits
    assert options["id"] == "xyz" and options["dir"] == str(run) and wandb.finished == 1
    (artifact,) = wandb.artifacts
    assert artifact[:2] == ("export-hf", "exported-model") and artifact[2]["dtype"] == "bfloat16"
    assert wandb.summary == {f"export/hf/{key}": value for key, value in artifact[2].items()}
    assert wandb.files["README.md"] == (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_a_gguf_file_has_figures_and_no_card(run, tmp_path, client):
    pytest.importorskip("gguf")
    (run / "mlflow-id.txt").write_text("abc")
    assert main(["export", str(run), str(tmp_path / "m.gguf"), "--to", "gguf", "--dtype", "q8_0", "--track"]) == 0
    assert "log_text" not in {call[0] for call in client}
    (figures,) = [call[2] for call in client if call[0] == "log_dict"]
    assert figures["class"] == "llama" and figures["dtype"] == "q8_0" and figures["parameters"] > 1000


def test_what_cannot_be_tracked_is_one_line(run, tmp_path, client, wandb, monkeypatch, capsys):
    def error(*options):
        assert main(["export", str(run), *options, "--track"]) == 2
        lines = capsys.readouterr().err
        assert lines.startswith("error: --track: ") and lines.count("\n") == 1
        return lines

    capsys.readouterr()
    assert "no tracker knows" in error(str(tmp_path / "new"))
    assert "--explain writes nothing" in error("--explain")
    (run / "wandb-id.txt").write_text("xyz")
    monkeypatch.setattr(wandb, "init", lambda **options: (_ for _ in ()).throw(OSError("no\nnetwork")))
    assert "wandb did not take other, which is written: no network" in error(str(tmp_path / "other"))
    assert (tmp_path / "other" / "config.json").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "package wandb is not installed; pip install wandb" in error(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def _trained(workplace, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(workplace)
    name = str(tmp_path / "run")
    assert main(["train", "llama.yaml", "train.steps=2", f"train.loggers=[{logger}]", "--out", name]) == 0
    assert main(["export", name, str(tmp_path / "hf"), "--track"]) == 0
    return tmp_path / "run", (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")


def test_the_installed_mlflow(cases, workplace, tmp_path, monkeypatch):
    pytest.importorskip("sqlalchemy")
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cases["llama"].run.exists()  # whose recipe is trained
    run, card = _trained(workplace, tmp_path, monkeypatch, "mlflow")
    client, run_id = tracking.MlflowClient(f"sqlite:///{run}/mlflow.db"), (run / "mlflow-id.txt").read_text()
    entry = client.get_run(run_id)
    assert entry.info.status == "FINISHED" and entry.data.tags["export/hf/class"] == "LlamaForCausalLM"
    assert entry.data.metrics["export/hf/step"] == 2 and "train/loss" in entry.data.metrics
    folder = Path(client.download_artifacts(run_id, "exports/hf"))
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    assert json.loads((folder / "figures.json").read_text())["format"] == "hf"


def test_the_installed_wandb(cases, workplace, tmp_path, monkeypatch):
    """Offline: what `wandb sync` would send lies in the folder of the run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    assert cases["llama"].run.exists()
    run, card = _trained(workplace, tmp_path, monkeypatch, "wandb")
    sent = b"".join(path.read_bytes() for path in sorted((run / "wandb").rglob("*.wandb")))
    assert len(list((run / "wandb").glob("offline-run-*"))) >= 1
    assert b"export/hf/class" in sent and b"export-hf" in sent and b"LlamaForCausalLM" in sent
    staged = [path.read_text(encoding="utf-8") for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert card in staged
