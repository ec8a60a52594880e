"""Quantisation-aware training: which weights the passes see, which ones are updated, and what is scored."""

import json
import shutil

import pytest
import torch

from fusedlm import load
from fusedlm.cli import main
from fusedlm.nn.fake_quantized import FakeQuantization
from fusedlm.nn.linear import Linear
from fusedlm.nn.lm_head import LMHead
from fusedlm.ops.quantized.integer import fake_quantize
from fusedlm.quant.targets import named
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.testing import FFN_CASES, MIXER_CASES, part_model, randomise_
from fusedlm.train import train
from tests.train.runs import assert_same_run, records, tiny_recipe

QAT = "train.qat={bits: 3, start: 0.5, embedding_bits: 4}"
KEEP = "train.keep_checkpoints=3"


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory):
    """(recipe, run folder) of the tiny recipe of 12 steps, with rounded matrices from the seventh on."""
    folder = tmp_path_factory.mktemp("qat")
    recipe = tiny_recipe(folder, QAT, KEEP)
    train(recipe, folder / "run")
    return recipe, folder / "run"


def _grid_error(weight, bits):
    return float((fake_quantize(weight, bits) - weight).abs().max())


def test_the_passes_see_the_grid_and_the_optimizer_does_not(tmp_path, monkeypatch):
    """What `forward` of layers finds in their weights, step by step, and what the optimizer finds."""
    seen, updated = [], []

    def linear(self, x, **options):
        role = self.__dict__["_declared"]["weight"][0].kind
        if torch.is_grad_enabled() and role == "matrix":
            seen[-1].append(_grid_error(self.weight_of().detach(), 3))
        return original_linear(self, x, **options)

    def head(self, x, *arguments):
        if torch.is_grad_enabled():
            seen[-1].append(_grid_error(self.weight.detach(), 4))
        return original_head(self, x, *arguments)

    def step_if(optimizer, condition):
        matrices = (p for group in optimizer.param_groups for p in group["params"] if p.dim() == 2)
        updated.append(max(_grid_error(p.detach(), 3) for p in matrices))
        return original_step(optimizer, condition)

    from fusedlm.train import step

    original_linear, original_head, original_step = Linear.forward, LMHead.forward, step.step_if
    monkeypatch.setattr(Linear, "forward", linear)
    monkeypatch.setattr(LMHead, "forward", head)
    monkeypatch.setattr(step, "step_if", step_if)
    original_backward = step.backward

    def backward(*arguments, **options):
        seen.append([])
        return original_backward(*arguments, **options)

    monkeypatch.setattr(step, "backward", backward)
    train(tiny_recipe(tmp_path, QAT), tmp_path / "run")
    assert len(seen) == len(updated) == 12 and all(len(errors) > 8 for errors in seen)
    assert all(max(errors) > 1e-3 for errors in seen[:6]) and min(updated) > 1e-3
    assert all(max(errors) == 0 for errors in seen[6:])


def test_losses_differ_from_the_first_such_step_on(quantized_run, trained):
    found, plain = ([record for record in records(run) if "loss" in record] for run in (quantized_run[1], trained[1]))
    assert [record["loss"] for record in found[:6]] == [record["loss"] for record in plain[:6]]
    assert all(a["loss"] != b["loss"] for a, b in zip(found[6:], plain[6:], strict=True))
    assert [record.get("qat", False) for record in found] == [False] * 6 + [True] * 6
    assert not any("qat" in record for record in plain)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_is_an_uninterrupted_one(quantized_run, tmp_path, step):
    """From before the rounding begins, and within it."""
    recipe, straight = quantized_run
    run = shutil.copytree(straight, tmp_path / "run")
    for later in Checkpoints(run / "checkpoints").steps():
        if later > step:
            shutil.rmtree(run / f"checkpoints/step-{later:08d}")
    train(recipe, run, resume=True)
    assert_same_run(run, straight)


def test_checkpoints_hold_the_weights_as_they_are(quantized_run):
    model, _, _ = load(quantized_run[1], device="cpu")
    assert all(_grid_error(target.parameter.detach(), 3) > 1e-3 for target in named(model).values())


def test_scores_of_rounded_weights_are_explicit(quantized_run, capsys):
    recipe, run = quantized_run
    scored = [record for record in records(run) if "val_bpb" in record]
    assert [("val_bpb_qat" in record) for record in scored] == [False, True, True]
    assert scored[-1]["val_bpb_qat"] != scored[-1]["val_bpb"]

    def bpb(*options):
        assert main(["eval", str(run), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["bpb"]

    plain, rounded = bpb(), bpb("--qat")
    model, _, _ = load(run, device="cpu")
    targets = named(model)
    for target in targets.values():
        weight = target.parameter.detach()
        target.write(fake_quantize(weight, 3 if target.kind == "matrix" else 4).flatten(0, -2))
    from fusedlm.evaluate import score_documents
    from fusedlm.runs.text import open_text

    text = open_text(recipe, load_text(run), run, remedy="")
    options = {"device": "cpu", "dtype": torch.float32, "longest": text.validation.longest}
    expected = score_documents(model, text.validation.documents(), window=16, stride=8, **options).bpb
    assert rounded == expected != plain


def load_text(run):
    return Checkpoints(run / "checkpoints").read_json(12, "state.json")["data"]


def test_refusals_of_qat(quantized_run, trained, tmp_path, capsys):
    def error(*arguments):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert f"--qat: {trained[1]} was trained without train.qat" in error("eval", trained[1], "--qat")
    out = tmp_path / "small"
    assert main(["quantize", str(quantized_run[1]), "--format", "int3", "--out", str(out), "--no-score"]) == 0
    assert "is quantised already; score it without" in error("eval", out, "--qat")
    assert "--qat is not an option of --probe mqar" in error("eval", quantized_run[1], "--qat", "--probe", "mqar")
    with pytest.raises(ValueError, match=r"train: qat.start=0.99: begins after the last of 12 steps"):
        tiny_recipe(tmp_path, "train.qat={bits: 3, start: 0.99}")


def test_rounding_after_such_training_has_the_same_grid(quantized_run, tmp_path):
    """Plain rounding of the run gives the values that its last passes saw."""
    out = tmp_path / "small"
    options = ["--storage", "integers", "--format", "int3", "--embedding", "int4", "--no-score"]
    assert main(["quantize", str(quantized_run[1]), *options, "--out", str(out)]) == 0
    model, _, recipe = load(quantized_run[1], device="cpu")
    FakeQuantization(model, **recipe.train.qat.model_dump(exclude={"start"})).write()
    rounded = load(out, device="cpu")[0].state_dict()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in model.state_dict().items())


CASES = [(cases[0], "{type: swiglu, hidden: 40}") for cases in MIXER_CASES.values()]
CASES += [(MIXER_CASES["attention"][1], cases[0]) for cases in FFN_CASES.values()]


@pytest.mark.parametrize(("mixer", "ffn"), CASES, ids=lambda case: case[7:].partition(",")[0].rstrip("}"))
def test_gradients_go_straight_through(mixer, ffn):
    """In every mixer and feed-forward, compiled too: those at the rounded weights, which are restored bit for bit."""
    model = randomise_(part_model(mixer, ffn, extra="tie_embeddings: false")).double()
    rounded = randomise_(part_model(mixer, ffn, extra="tie_embeddings: false")).double()
    rounded.load_state_dict(model.state_dict())
    qat = FakeQuantization(model, bits=3, embedding_bits=5)
    FakeQuantization(rounded, bits=3, embedding_bits=5).write()
    assert set(qat.names()) == set(named(model))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    model.eval(), rounded.eval()
    plain = model(tokens, targets=tokens).total()
    expected = rounded(tokens, targets=tokens).total()
    expected.backward()
    with qat.applied():
        loss = model(tokens, targets=tokens).total()
        loss.backward()
    assert torch.equal(loss, expected) and not torch.equal(loss, plain)
    for (name, parameter), other in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(parameter, own[name])
        assert torch.equal(parameter.grad, other.grad) if parameter.grad is not None else other.grad is None
    assert all(not torch.equal(own[name], rounded.get_parameter(name)) for name in qat.names())


def test_compiled_blocks_see_the_grid_when_it_begins():
    """A graph that was compiled before the rounding began, and must not hold the weights of then."""
    model = randomise_(part_model(MIXER_CASES["attention"][0]))
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    qat = FakeQuantization(model, bits=2, clip=2.0)
    losses = {}
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(backend="aot_eager")
        plain = model(tokens, targets=tokens).total()
        with qat.applied():
            rounded = model(tokens, targets=tokens).total()
        losses[compiled] = torch.stack([plain, rounded, model(tokens, targets=tokens).total()])
    assert losses[True][0] != losses[True][1] and losses[True][0] == losses[True][2]
    torch.testing.assert_close(losses[True], losses[False])


def test_every_option_is_that_of_rounding():
    model = randomise_(part_model(MIXER_CASES["attention"][0], extra="tie_embeddings: false"))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    FakeQuantization(model, bits=3, embedding_bits=5, group=8, clip=1.5, embedding_clip=20.0).write()
    for name, parameter in model.named_parameters():
        options = {"embedding.weight": (5, 8, 20.0), "head.weight": (5, 8, 20.0)}.get(name, (3, 8, 1.5))
        is_matrix = name in named(model)
        assert torch.equal(parameter, fake_quantize(own[name], *options) if is_matrix else own[name])


def test_weights_are_restored_after_an_error():
    model = part_model(MIXER_CASES["attention"][0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), FakeQuantization(model, bits=2).applied():
        raise RuntimeError("stop")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="the model has no matrix to quantise"):
        FakeQuantization(torch.nn.Sequential(), bits=4)
