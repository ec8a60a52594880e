"""Training on several sources and on packed rows: what is recorded, and resuming around the boundary of stages."""

import contextlib
import io
import shutil

import pytest
import torch
from rich.console import Console

from fusedlm.config.train import AdamWConfig
from fusedlm.data import Batch, Loader, prepare
from fusedlm.data.mixture import source_schedule
from fusedlm.data.training_text import open_training_text
from fusedlm.model import build_model
from fusedlm.optim import build_optimizer
from fusedlm.report import write_report
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.train import train, trainer
from fusedlm.train.step import train_step
from tests.train.runs import assert_same_run, records, resume, tiny_recipe

# 12 steps of 4 windows of 16 tokens: the stages end at samples 14 and 34, within steps 4 and 9.
STAGES = (
    "[{until: 224, weights: {a: 3, b: 1}}, {until: 0.7083, weights: {a: 3, b: 1}, anneal: true}, {weights: {b: 1}}]"
)


def mixed(folder, *overrides):
    (folder / "b.txt").write_text("\n---\n".join(f"{i} def return lambda {i * i}" * (i % 5 + 1) for i in range(40)))
    sources = ", ".join(
        f"{name}: {{source: {{type: text, path: {folder / file}, separator: '---'}}}}"
        for name, file in (("a", "text.txt"), ("b", "b.txt"))
    )
    keys = ["data.source=null", f"data.sources={{{sources}}}", f"data.stages={STAGES}", "train.checkpoint_every=1"]
    return tiny_recipe(folder, *keys, "train.keep_checkpoints=12", *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, recipe, what was printed)."""
    folder, output = tmp_path_factory.mktemp("mixed"), io.StringIO()
    recipe = mixed(folder)
    train(recipe, folder / "run", console=Console(file=output, width=400))
    return folder, recipe, output.getvalue()


def test_tokens_and_epochs_of_each_source_are_recorded(run):
    folder, recipe, printed = run
    schedule = source_schedule(recipe)
    parts = open_training_text(prepare(recipe.data).train, recipe).parts
    steps = [record for record in records(folder / "run") if "loss" in record]
    assert len(steps) == 12
    for record in steps:
        counts = schedule.counts(4 * record["step"])
        for name in ("a", "b"):
            assert record[f"source_tokens_{name}"] == 16 * counts[name]
            assert record[f"source_epochs_{name}"] == counts[name] / parts[name].per_epoch
        assert record["source_tokens_a"] + record["source_tokens_b"] == record["tokens"]
    assert abs(steps[2]["source_tokens_a"] / steps[2]["tokens"] - 0.75) < 0.1
    assert steps[-1]["source_tokens_a"] == steps[8]["source_tokens_a"]  # the last stage does not read it
    share = f"a {100 * steps[-1]['source_tokens_a'] / 768:.3g}%"
    assert f"{share} ({steps[-1]['source_epochs_a']:.3g} epochs), b " in printed
    page = write_report(folder / "run").read_text()
    assert f"<dt>Source a</dt><dd>{steps[-1]['source_tokens_a']} tokens read" in page


@pytest.mark.parametrize("after", [3, 4, 8, 9])
def test_resuming_around_a_boundary_gives_the_run_that_never_stopped(run, tmp_path, after):
    folder, recipe, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in checkpoints.steps():
        if step > after:
            shutil.rmtree(checkpoints.path(step))
    resume(recipe, tmp_path / "run")
    assert_same_run(folder / "run", tmp_path / "run")


def test_text_may_move_and_weights_may_not(run, tmp_path):
    folder, _, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy(folder / "b.txt", tmp_path / "moved.txt")
    moved = mixed(folder, f"data.sources.b.source.path={tmp_path / 'moved.txt'}")
    assert "data.sources.b.source.path was" in resume(moved, tmp_path / "run")
    other = mixed(folder, f"data.stages={STAGES.replace('a: 3', 'a: 2')}")
    with pytest.raises(ValueError, match="data.stages is .* in the run to resume"):
        resume(other, tmp_path / "run")


def test_longer_runs_say_that_stages_move(run, tmp_path):
    folder, _, _ = run
    shutil.copytree(folder / "run", tmp_path / "run")
    longer = mixed(folder, "train.steps=13")
    assert "data.stages with a fraction as until end later too" in resume(longer, tmp_path / "run")


def test_a_run_beyond_the_epochs_of_a_source_is_refused(run, tmp_path):
    folder, _, _ = run
    with pytest.raises(ValueError, match=r"the run would read a 0\.\d+ times \(max_epochs=0.01\)"):
        train(mixed(folder, "data.sources.a.max_epochs=0.01"), tmp_path / "run")


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_training_takes_the_samples_of_the_recipe(tmp_path, packing, monkeypatch):
    recipe, output, seen = mixed(tmp_path, f"data.packing={packing}"), io.StringIO(), []

    def watched(model, optimizer, batch, **options):
        seen.append(batch)
        return train_step(model, optimizer, batch, **options)

    monkeypatch.setattr(trainer, "train_step", watched)
    train(recipe, tmp_path / "run", console=Console(file=output, width=1000))
    assert ("% of the positions filled up, no token left out" in output.getvalue()) == (packing == "best_fit")
    shards = prepare(recipe.data).train
    with Loader(shards, seq_len=16, batch_size=4, seed=0, samples=open_training_text(shards, recipe).samples) as loader:
        for batch, expected in zip(seen, loader, strict=False):
            assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.targets, expected.targets)
    assert len(seen) == 12


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_the_loss_of_packed_rows_is_the_mean_over_their_tokens(tmp_path, micro_batch_size):
    """What fills up a row changes neither the loss nor a gradient."""
    recipe = tiny_recipe(tmp_path, "data.packing=best_fit", "model.dropout=0")
    prepared = prepare(recipe.data)
    text = open_training_text(prepared.train, recipe)
    assert text.samples.padded > 0
    with Loader(prepared.train, seq_len=16, batch_size=8, seed=0, samples=text.samples) as loader:
        batch = next(one for one in loader if one.n_valid < one.tokens.numel())
    norms = []
    for filled in (prepared.tokenizer.eot_id, 7):
        tokens = torch.where(batch.targets == -100, filled, batch.tokens)
        changed = Batch(tokens, batch.targets, batch.documents, batch.n_valid, batch.next_sample)
        model = build_model(recipe.model, vocab_size=prepared.tokenizer.vocab_size, device=torch.device("cpu"), seed=0)
        with torch.no_grad():
            logits = model(tokens, documents=batch.documents).logits.double()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        optimizer = build_optimizer(model, AdamWConfig(), torch.device("cpu"))
        result = train_step(
            model.train(),
            optimizer,
            changed,
            lr_scale=1.0,
            micro_batch_size=micro_batch_size,
            grad_clip=None,
            autocast=contextlib.nullcontext,
        )
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)
        norms.append(result.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
