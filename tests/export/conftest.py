"""Short runs of each family, exported."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fusedlm.cli import main
from fusedlm.export import export_run
from tests.export.cases import model_config
from tests.parity.conftest import in_float64, transformers_is_quiet  # noqa: F401

TEXT = "\n---\n".join(f"Document {i} says that {i} times {i} makes {i * i}, naïvely." for i in range(20)) + "\n"
RECIPE = """
name: small
data:
  source: {type: text, path: text.txt, separator: "---"}
  split: {type: hash, fraction: 0.3}
  tokenizer: {type: bpe, vocab_size: 300}
train:
  steps: 6
  seq_len: 64
  batch_size: 2
  eval_every: 0
  optimizer: {type: adamw, lr: 0.02}
runtime: {device: cpu}
"""
# The cases that are trained: each family, tied and untied, with the byte tokenizer once.
TRAINED = [
    "llama",
    "llama-tied",
    "mistral-tied",
    "qwen3-window",
    "granite",
    "arcee",
    "phi3-window",
    "nanochat",
    "deepseek_v3-q_rank",
    "deepseek_v3-moe",
    "qwen3_5-gate",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "nemotron_h-moe",
    "mamba2",
]
BYTES = "arcee"


@dataclass(frozen=True)
class Case:
    """A run and what was exported of it."""

    name: str
    run: Path
    folder: Path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A folder with text.txt, in which runs are trained; prepared text is shared."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cases(workplace) -> dict[str, Case]:
    """Made when they are first asked for."""

    class Cases(dict):
        def __missing__(self, name: str) -> Case:
            self[name] = _train(workplace, name)
            return self[name]

    return Cases()


def _train(folder: Path, name: str) -> Case:
    tree = yaml.safe_load(RECIPE) | {"model": model_config(name).model_dump(mode="json")}
    if name == BYTES:
        tree["data"]["tokenizer"] = {"type": "bytes"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", f"{name}.yaml", "--out", f"runs/{name}"]) == 0
        export_run(Path(f"runs/{name}"), Path(f"hf/{name}"))
    return Case(name, folder / "runs" / name, folder / "hf" / name)
