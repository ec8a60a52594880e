"""Distillation: the loss of a step against its definition, and runs with a teacher."""

import json
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fusedlm.config import load_recipe
from fusedlm.config.train import DistillConfig
from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.export import export_run, load_folder
from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.nn.quantized import quantized_layers
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.testing import assert_close, randomise_
from fusedlm.testing.models import FFN_CASES, part_config, wired_config
from fusedlm.train import train
from fusedlm.train.display import Display
from fusedlm.train.step import backward
from fusedlm.train.teacher import Teacher, open_teacher, weights_checksum
from tests.train.runs import records, tiny_recipe

VOCAB = 61
CPU = torch.device("cpu")
SETTINGS = DistillConfig(teacher="teacher", weight=0.7, temperature=2.0)


def model_of(config, seed):
    return randomise_(build_model(config, vocab_size=VOCAB, seed=seed), seed=seed).double()


@pytest.fixture(scope="module")
def teacher_model():
    """Wider than the student, with logits rescaled by a sigmoid and dropout that must not act."""
    return model_of(wired_config("ag", dropout=0.3), seed=1)


@pytest.fixture(scope="module", params=["softcap", "mup"])
def student(request):
    mixer = "{type: attention, n_heads: 2}"
    mup = ", mup: {base_width: 16}" if request.param == "mup" else ""
    return model_of(part_config(mixer, extra=f"logit_softcap: 9.0{mup}"), seed=2).train()


@pytest.fixture
def batch():
    """Packed documents, and targets of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (4, 12), generator=generator)
    targets = torch.randint(0, VOCAB, (4, 12), generator=generator)
    targets[1, 3:9] = -100
    documents = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] * 1 + [1] * 11, [0] * 4 + [1] * 4 + [2] * 4])
    n_valid = int((targets != -100).sum())
    return SimpleNamespace(tokens=tokens, targets=targets, documents=documents, n_valid=n_valid)


def definition(student, teacher, batch, settings):
    """The two losses per valid target, from all logits."""
    z, valid = student(batch.tokens, documents=batch.documents).logits, batch.targets != -100
    with torch.no_grad():
        q = (teacher(batch.tokens, documents=batch.documents).logits / settings.temperature).softmax(-1)
    nll = torch.nn.functional.cross_entropy(z[valid], batch.targets[valid])
    log_p = (z / settings.temperature).log_softmax(-1)
    kl = (q * (q.log() - log_p)).sum(-1)[valid].mean()
    return nll, kl


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("weight", [0.7, 1.0])
def test_a_step_is_the_definition(student, teacher_model, batch, rows, weight):
    settings = SETTINGS.model_copy(update={"weight": weight})
    teacher = Teacher(teacher_model, ByteTokenizer(), settings)
    losses, metrics = backward(student, batch, rows, partial(autocast, CPU, torch.float32), teacher=teacher)
    found = gradients(student)
    nll, kl = definition(student, teacher_model, batch, settings)
    soft = weight * settings.temperature**2 * kl
    ((1 - weight) * nll + soft).backward()
    assert_close(losses["nll"], (1 - weight) * nll, 1e-10) if weight < 1 else None
    assert_close(losses["distill"], soft, 1e-10)
    for name, expected in gradients(student).items():
        assert_close(found[name], expected, 1e-8, name)
    figures = student.summarise(metrics)
    assert figures == pytest.approx({"nll": nll.item(), "distill_kl": kl.item()}, rel=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in teacher_model.parameters())


def test_a_compiled_head_computes_the_same(teacher_model, batch):
    """One full graph; blocks know nothing of a teacher."""
    torch._dynamo.reset()
    mixer = "{type: attention, n_heads: 2}"
    results = []
    for compiled in (False, True):
        model = model_of(part_config(mixer, extra="logit_softcap: 9.0"), seed=2).train()
        if compiled:
            model.head.compile(fullgraph=True, backend="aot_eager")
        teacher = Teacher(teacher_model, ByteTokenizer(), SETTINGS)
        losses, _ = backward(model, batch, 2, partial(autocast, CPU, torch.float32), teacher=teacher)
        results.append(losses | gradients(model))
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-10, name)


def test_the_reference_backend_computes_the_same(student, teacher_model, batch):
    teacher, results = Teacher(teacher_model, ByteTokenizer(), SETTINGS), []
    for backend in ("chunked", "reference"):
        student.use_backends({"linear_distillation": backend})
        losses, _ = backward(student, batch, 2, partial(autocast, CPU, torch.float32), teacher=teacher)
        results.append(losses | gradients(student))
    student.use_backends({})
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-8, name)


@pytest.mark.parametrize("ffn", [FFN_CASES["moe"][1], FFN_CASES["routed"][0]])
def test_a_teacher_whose_layers_report_metrics(student, batch, ffn):
    """Those of its layers are no part of the step."""
    model = model_of(part_config("{type: attention, n_heads: 2}", ffn), seed=3)
    teacher = Teacher(model, ByteTokenizer(), SETTINGS)
    losses, metrics = backward(student, batch, 2, partial(autocast, CPU, torch.float32), teacher=teacher)
    student.zero_grad(set_to_none=True)
    _, kl = definition(student, model, batch, SETTINGS)
    assert_close(losses["distill"], 0.7 * 4 * kl, 1e-10)
    assert losses.keys() == {"nll", "distill"} and metrics.keys() == {"distill"}


def test_without_soft_targets_nothing_changes(student, batch):
    losses, metrics = backward(student, batch, 4, partial(autocast, CPU, torch.float32))
    assert losses.keys() == {"nll"} and not metrics
    student.zero_grad(set_to_none=True)


def test_the_teacher_is_frozen_and_without_dropout(teacher_model, batch):
    teacher = Teacher(teacher_model.train(), ByteTokenizer(), SETTINGS)
    first, second = (teacher(batch.tokens, batch.documents) for _ in range(2))
    assert (first.logits.x_ND == second.logits.x_ND).all() and not first.logits.x_ND.requires_grad
    assert first.logits.n_classes == VOCAB and (first.temperature, first.weight) == (2.0, 0.7)


@pytest.fixture(scope="module")
def teacher_run(trained, tmp_path_factory):
    """A run folder that may be copied and not changed, and the folder with its text."""
    recipe, run = trained
    return run, run.parent


def distilled(folder, run, *overrides):
    return tiny_recipe(folder, f"train.distill.teacher={run}", "model.pattern=a", "train.steps=6", *overrides)


def test_a_run_with_a_teacher(teacher_run, tmp_path):
    run, folder = teacher_run
    recipe = distilled(folder, run, "train.distill.weight=0.25", "train.distill.temperature=2")
    train(recipe, tmp_path / "student")
    steps = [record for record in records(tmp_path / "student") if "loss" in record]
    assert len(steps) == 6
    for step in steps:
        assert step["loss_distill"] == pytest.approx(0.25 * 4 * step["distill_kl"], rel=1e-5) and "nll" not in step
        assert step["loss"] > 2 and step["distill_kl"] > 0
    saved = load_recipe(tmp_path / "student/recipe.yaml")
    teacher, _, _ = load(run)
    assert saved.train.distill.sha256 == weights_checksum(teacher) and saved.train.distill.teacher == str(run)
    model, _, _ = load(tmp_path / "student")  # needs no teacher
    assert len(model.blocks) == 3 and {len(layer.mixer.rope_specs()) for layer in model.blocks} == {1}
    plain = tiny_recipe(folder, "model.pattern=a", "train.steps=6")
    train(plain, tmp_path / "plain")
    others = [record for record in records(tmp_path / "plain") if "loss" in record]
    assert others[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-6), "another start"
    assert others[-1]["loss"] != pytest.approx(steps[-1]["loss"], rel=1e-4)


def test_resuming_gives_the_same_losses(teacher_run, tmp_path, monkeypatch):
    run, folder = teacher_run
    recipe = distilled(folder, run)
    train(recipe, tmp_path / "straight")
    step = Display.step

    def signalled(self, record):
        step(self, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", signalled)
        assert train(recipe, tmp_path / "stopped").step == 3
    moved = shutil.copytree(run, tmp_path / "moved")
    train(distilled(folder, moved), tmp_path / "stopped", resume=True)
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"train\.distill\.weight is 0\.5 in the run to resume and 0\.6 now"):
        train(distilled(folder, run, "train.distill.weight=0.6"), tmp_path / "stopped", resume=True)


def test_another_teacher_is_refused(teacher_run, tmp_path):
    run, folder = teacher_run
    train(distilled(folder, run, "train.steps=1"), tmp_path / "student")
    other = shutil.copytree(run, tmp_path / "other")
    last = Checkpoints(other / "checkpoints").steps()[-1]
    shutil.rmtree(Checkpoints(other / "checkpoints").path(last))
    with pytest.raises(ValueError, match=r"teacher=.*other: its weights \(sha256 \w{12}\) are not those") as caught:
        train(distilled(folder, other, "train.steps=1"), tmp_path / "student", resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="its weights"):
        train(distilled(folder, run, f"train.distill.sha256={'0' * 64}"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_tokenizer_is_refused(teacher_run, tmp_path):
    run, folder = teacher_run
    recipe = distilled(folder, run, "data.tokenizer={type: bpe, vocab_size: 300}")
    with pytest.raises(ValueError, match=r"tokenizer is not that of the run \(257 tokens, not \d+\)") as caught:
        train(recipe, tmp_path / "student")
    assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()


@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "mxfp4"])
def test_a_quantised_teacher(teacher_run, format):
    run, folder = teacher_run
    recipe = distilled(folder, run, f"train.distill.format={format}")
    exact, rounded = (
        open_teacher(r, None, CPU, torch.float32) for r in (distilled(folder, run), recipe)
    )
    assert exact[0].train.distill.sha256 == rounded[0].train.distill.sha256, "of the weights before rounding"
    assert not quantized_layers(exact[1]._model) and len(quantized_layers(rounded[1]._model)) > 5
    tokens = torch.arange(24).view(2, 12)
    one, other = (teacher(tokens, None).logits.x_ND for _, teacher in (exact, rounded))
    assert 0 < ((one - other).norm() / one.norm()).item() < 0.5


def test_a_quantised_teacher_trains(teacher_run, tmp_path):
    run, folder = teacher_run
    train(distilled(folder, run, "train.distill.format=int8", "train.steps=1"), tmp_path / "student")
    assert records(tmp_path / "student")[0]["distill_kl"] > 0


def test_a_teacher_in_the_format_of_transformers(tmp_path):
    folder = tmp_path
    plain = "model.blocks={a: {mixer: {type: attention, n_heads: 2, qk_norm: false}, ffn: {type: swiglu, hidden: 32}}}"
    recipe = tiny_recipe(folder, "model.pattern=a", plain, "train.steps=2", "model.dropout=0")
    train(recipe, folder / "run")
    export_run(folder / "run", folder / "hf")
    from_run, from_folder = load(folder / "run"), load_folder(folder / "hf")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert_close(from_folder[0](tokens).logits, from_run[0](tokens).logits, 1e-5)
    for name in ("run", "hf"):
        student = distilled(folder, folder / name, "train.steps=2")
        train(student, folder / f"student-{name}")
    for one, other in zip(records(folder / "student-run"), records(folder / "student-hf"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    "overrides,word",
    [
        (("model.mtp={depth: 1}",), "train.distill: has no soft targets for the modules of model.mtp.depth=1"),
        (("runtime.cuda_graph=true",), "runtime.cuda_graph=true: train.distill"),
        (("train.distill.weight=0",), "train.distill.weight"),
        (("train.distill.weight=1.5",), "train.distill.weight"),
        (("train.distill.temperature=0",), "train.distill.temperature"),
        (("train.distill.format=int3",), "train.distill.format"),
        (("train.distill.sha256=abc",), "train.distill.sha256"),
    ],
)
def test_recipes_that_are_refused(tmp_path, overrides, word):
    with pytest.raises(ValueError, match=word.replace(".", r"\.")) as caught:
        tiny_recipe(tmp_path, "train.distill.teacher=run", *overrides)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_teacher(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "resnet"}))
    for name, word in (("absent", "absent"), ("hf", "model_type")):
        recipe = tiny_recipe(tmp_path, f"train.distill.teacher={tmp_path / name}")
        with pytest.raises(ValueError, match=rf"train\.distill\.teacher=.*{name}: .*{word}") as caught:
            train(recipe, tmp_path / "student")
        assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()
