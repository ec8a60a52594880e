"""A small recipe, its text and a finished run of it, and a fixture that runs a command line in this process."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusedlm.cli import main

RECIPE = """
name: small
model:
  dim: 16
  n_layers: 2
  pattern: gm
  blocks:
    g: {mixer: {type: gdn, n_heads: 2, chunk_size: 8}, ffn: {type: relu2}}
    m: {mixer: {type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}, ffn: {type: swiglu}}
data:
  source: {type: text, path: text.txt, separator: "---"}
  split: {type: hash, fraction: 0.3}
train: {steps: 2, seq_len: 16, batch_size: 2, eval_every: 0, checkpoint_every: 1}
runtime: {device: cpu}
"""
TEXT = "\n---\n".join(f"Document {i} says that {i} times {i} makes {i * i}, naïvely." for i in range(20)) + "\n"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def fusedlm(capsys):
    """fusedlm("eval", run, ...) -> Outcome."""

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with small.yaml, text.txt, prepared/ and the run runs/small; read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "small.yaml"]) == 0
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the finished folder, as the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
