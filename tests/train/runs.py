"""A run that trains in a second: its recipe, its text, the records of its metrics, and what two runs have in common."""

import io
import random
from pathlib import Path

from rich.console import Console

from fusedlm.config import Recipe, parse_recipe
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.metrics import read_metrics
from fusedlm.train import train

# Keys of metrics.jsonl that differ between two runs of the same recipe.
TIMINGS = {"tokens_per_second", "mfu", "peak_memory_bytes", "loader_wait_seconds", "step_seconds", "checkpoint_seconds"}

_RECIPE = """
name: tiny
model:
  dim: 16
  n_layers: 3
  pattern: gam
  blocks:
    g: {mixer: {type: gdn, n_heads: 2, chunk_size: 8}, ffn: {type: relu2, hidden: 32}}
    a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 32}}
    m: {mixer: {type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}, ffn: {type: swiglu, hidden: 32}}
  dropout: 0.1
train:
  steps: 12
  seq_len: 16
  batch_size: 4
  micro_batch_size: 2
  ema: 0.9
  optimizer: {type: adamw, lr: 0.01}
  eval_every: 4
  eval_tokens: 100
  checkpoint_every: 4
runtime: {device: cpu}
"""


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    """A hybrid with dropout, averaged weights and two micro-batches, on generated text in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        rng = random.Random(0)
        words = ["tea", "water", "stone", "a", "river", "old", "bridge", "and"]
        text.write_text("\n---\n".join(" ".join(rng.choices(words, k=12)) for _ in range(60)), encoding="utf-8")
    source = f"data.source={{type: text, path: {text}, separator: '---'}}"
    return parse_recipe(
        _RECIPE, [source, f"data.dir={folder / 'prepared'}", "data.split={type: hash, fraction: 0.2}", *overrides]
    )


def records(run: Path) -> list[dict]:
    """The run's metrics without timings."""
    found, damaged = read_metrics(run / "metrics.jsonl")
    assert damaged == []
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in found]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def checkpoint_names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


# A run of three steps without checkpoints, for tests of how a key of the recipe changes losses.
SHORT = ["train.steps=3", "train.eval_every=0", "train.checkpoint_every=0", "train.ema=null"]


def short_losses(folder: Path, *overrides: str) -> list[float]:
    train(tiny_recipe(folder, *SHORT, *overrides), folder / "run")
    found = losses(folder / "run")
    assert len(found) == 3
    return found


def assert_same_run(run, other):
    """Metrics, final weights, optimizer, averages and random numbers agree to the last bit."""
    assert records(run) == records(other)
    one, two = Checkpoints(run / "checkpoints"), Checkpoints(other / "checkpoints")
    last = one.steps()[-1]
    assert two.steps()[-1] == last
    for name in ("model", "optimizer", "ema", "rng"):
        assert one.files(last)[f"{name}.safetensors"] == two.files(last)[f"{name}.safetensors"], name
    states = [checkpoints.read_json(last, "state.json") for checkpoints in (one, two)]
    for state in states:
        assert len(state.pop("run")) == 32 and len(state.pop("metrics")) == 16  # of timings too
    assert states[0] == states[1]


def snapshot(run):
    """Content, inode and time of every file: a file that is written again with the same content differs."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def resume(recipe, run):
    """Resume; the output."""
    output = io.StringIO()
    train(recipe, run, resume=True, console=Console(file=output, width=200))
    return output.getvalue()
