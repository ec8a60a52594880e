"""Work that is killed and started again: preparing, training, comparing."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedlm.compare import run_experiment
from fusedlm.config import dump_recipe
from fusedlm.config.experiment import load_experiment
from fusedlm.data import prepare
from fusedlm.files import sha256_file
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.train import train
from tests.train.runs import records, tiny_recipe

_EXPERIMENT = """
name: tiny
base: base.yaml
match: params
variants:
  latent: [model.pattern=m]
  softmax: {model.pattern: a}
seeds: 2
decode_lengths: [20]
"""


@dataclass(frozen=True)
class Work:
    """Something that can be killed and started again.

    Attributes:
        begin: writes the inputs into a folder.
        run: does the work in the folder, or what is left of it.
        result: everything that must not depend on kills.
    """

    begin: Callable[[Path], None]
    run: Callable[[Path], None]
    result: Callable[[Path], object]


def _begin_text(folder: Path) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    text = "\n---\n".join(" ".join(draw.choices(words, k=300)) for _ in range(700))
    (folder / "text.txt").write_text(text, encoding="utf-8")


def _begin_files(folder: Path) -> None:
    """The text of several tasks, some of it twice."""
    _begin_text(folder)
    documents = (folder / "text.txt").read_text(encoding="utf-8").split("\n---\n")
    (folder / "text.txt").unlink()
    (folder / "text").mkdir()
    for i in range(5):
        own = documents[i * 140 : (i + 1) * 140] + documents[:20]
        (folder / "text" / f"{i}.txt").write_text("\n---\n".join(own), encoding="utf-8")


def _prepare(folder: Path) -> None:
    overrides = ("data.tokenizer={type: bpe, vocab_size: 2000}", "data.shard_tokens=50000")
    prepare(tiny_recipe(folder, *overrides).data)


def _prepare_at_scale(folder: Path) -> None:
    pipeline = "data.pipeline={executor: {type: local, workers: 2}}"
    overrides = ("data.tokenizer={type: bpe, vocab_size: 2000}", "data.shard_tokens=50000", pipeline)
    overrides += (f"data.source.path={folder / 'text'}", "data.pipeline.tasks=5")
    prepare(tiny_recipe(folder, *overrides).data)


def _prepared(folder: Path):
    files = [path for path in (folder / "prepared").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def _train(folder: Path) -> None:
    recipe = tiny_recipe(folder, "train.steps=40", "train.checkpoint_every=2", "train.keep_checkpoints=2")
    train(recipe, folder / "run", resume=True)


def _trained(folder: Path):
    """Metrics, tensors and states, without the id that each run draws."""
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    names = ("model", "optimizer", "ema", "rng")
    states = [checkpoints.read_json(step, "state.json") | {"run": None} for step in checkpoints.steps()]
    tensors = [
        sha256_file(checkpoints.path(step) / f"{name}.safetensors") for step in checkpoints.steps() for name in names
    ]
    return records(folder / "run"), [state | {"metrics": None} for state in states], tensors


def _begin_experiment(folder: Path) -> None:
    recipe = tiny_recipe(folder, "train.steps=16", "train.eval_every=4", "train.checkpoint_every=2")
    (folder / "base.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "experiment.yaml").write_text(_EXPERIMENT, encoding="utf-8")


def _compare(folder: Path) -> None:
    run_experiment(*load_experiment(folder / "experiment.yaml"), folder / "out")


def _compared(folder: Path):
    rows = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["runs"]
    losses = [{key: row[key] for key in ("variant", "seed", "val_loss", "val_bpb", "train_loss")} for row in rows]
    runs = sorted((folder / "out" / "runs").iterdir())
    return losses, {run.name: records(run) for run in runs}


WORKS = {
    "prepare": Work(_begin_text, _prepare, _prepared),
    "prepare_at_scale": Work(_begin_files, _prepare_at_scale, _prepared),
    "train": Work(lambda folder: None, _train, _trained),
    "compare": Work(_begin_experiment, _compare, _compared),
}


def run(name: str, folder: Path) -> None:
    """Do the work of this name; in a process of its own."""
    torch.set_num_threads(1)
    WORKS[name].run(folder)
