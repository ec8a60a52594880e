"""Inputs measured in models of every part, quantisation in order, and going on after a kill."""

import copy

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.nn.ffn.experts import Experts
from fusedlm.nn.linear import Linear
from fusedlm.nn.lm_head import LMHead
from fusedlm.nn.module import parameters_by_kind
from fusedlm.ops.experts.reference import activate
from fusedlm.quant.calibration import Calibration, CalibrationBatch, unfused
from fusedlm.quant.entropy import entropy_bytes
from fusedlm.quant.formats import Integers, packed
from fusedlm.quant.matrix import Inputs, Method, quantize_matrix
from fusedlm.quant.plan import correct_best, estimate, fit_budget
from fusedlm.quant.request import Request, other_bytes
from fusedlm.quant.sequence import Choice, quantize_in_order
from fusedlm.quant.targets import named, stages
from fusedlm.quant.unfinished import UnfinishedFolder
from fusedlm.runs.state import model_tensors
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, part_model, randomise_, wired_config

CPU = torch.device("cpu")
ATTENTION, MOE = MIXER_CASES["attention"][0], FFN_CASES["moe"][0]
CASES = [(cases[0], "{type: swiglu, hidden: 40}") for cases in MIXER_CASES.values()]
CASES += [(ATTENTION, cases[0]) for cases in FFN_CASES.values()]
GPTQ = Method("gptq", "search")


def _batches(n=3, rows=2, length=12, vocab=61):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (n, rows, length), generator=generator)
    return [CalibrationBatch(batch, None) for batch in tokens]


def _model(mixer=ATTENTION, ffn=MOE, extra=""):
    return randomise_(part_model(mixer, ffn, extra=extra)).eval()


def _calibration(model, **options):
    return Calibration(model, _batches(**options), CPU, torch.float32)


def _choices(model, format=None, method=GPTQ):
    return {name: Choice(format or Integers(4), method) for name in named(model)}


@pytest.mark.parametrize(("mixer", "ffn"), CASES, ids=lambda case: case[7:].partition(",")[0].rstrip("}"))
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_a_target_and_has_the_hessian_of_its_inputs(mixer, ffn, tied, monkeypatch):
    """Against what `forward` of each layer is given."""
    model = _model(mixer, ffn, f"tie_embeddings: {str(tied).lower()}")
    expected = {n for n, kind, p in parameters_by_kind(model) if kind in ("matrix", "embedding", "head")}
    assert set(named(model)) == expected
    calibration = _calibration(model)
    found = {}
    for stage in stages(model):
        found |= calibration.inputs(stage)
    assert set(found) == expected
    given: dict[str, list] = {}
    names = {id(target.module): name for name, target in named(model).items() if target.stack == 1}
    original = Linear.forward
    head = LMHead.forward

    def linear(self, x, **options):
        if id(self) in names and not options.get("transposed"):
            given.setdefault(names[id(self)], []).append(x.detach().flatten(0, -2))
        return original(self, x, **options)

    def project(self, hidden, *arguments):
        given.setdefault("embedding.weight" if tied else "head.weight", []).append(
            self.norm(hidden).detach().flatten(0, -2)
        )
        return head(self, hidden, *arguments)

    monkeypatch.setattr(Linear, "forward", linear)
    monkeypatch.setattr(LMHead, "forward", project)
    batches = _batches()
    with torch.no_grad(), unfused(model):
        for batch in batches:
            model(batch.tokens)
    for name, xs in given.items():
        x = torch.cat(xs).double()
        [inputs] = found[name]
        assert inputs.tokens == len(x)
        assert_close(inputs.hessian_KK, x.T @ x / len(x), 1e-6)
    if not tied:
        [looked] = found["embedding.weight"]
        counts = torch.bincount(torch.cat([b.tokens.flatten() for b in batches]), minlength=64)
        assert looked.hessian_KK is None and torch.equal(looked.row_weight_N, counts.double() / counts.sum())
    assert len(given) >= len([n for n, t in named(model).items() if t.stack == 1]) - (not tied)


def test_experts_are_measured_one_by_one_and_few_tokens_are_mixed(monkeypatch):
    model = _model()
    found = _calibration(model).inputs(next(s for s in stages(model) if s.name == "block 1"))
    routed = []
    original = Experts.forward
    monkeypatch.setattr(
        Experts, "forward", lambda self, *a: routed.append((self, *(t.detach() for t in a[:2]))) or original(self, *a)
    )
    with torch.no_grad(), unfused(model):
        for batch in _batches():
            model(batch.tokens)
    experts = model.blocks[1].ffn.experts
    own = [(x, indices) for module, x, indices in routed if module is experts]
    x, indices = torch.cat([x for x, _ in own]), torch.cat([i for _, i in own])
    for attribute, width in (("up", 32), ("down", 16)):
        parts = found[f"blocks.1.ffn.experts.{attribute}"]
        inputs = []
        for expert in range(8):
            rows = x[(indices == expert).any(-1)]
            if attribute == "down":
                rows = activate(rows @ experts.up[expert].T, "swiglu", 0.0).detach()
            inputs.append(rows.double())
        mean = sum(rows.T @ rows for rows in inputs) / sum(map(len, inputs))
        few = sum(len(rows) < width for rows in inputs)
        for rows, part in zip(inputs, parts, strict=True):
            share = min(1, len(rows) / width)
            expected = share * rows.T @ rows / max(len(rows), 1) + (1 - share) * mean
            assert_close(part.hessian_KK, expected, 1e-6)
            assert part.tokens == len(rows) and float(part.row_weight_N) == len(rows) / len(x)
            note = f"{few} of 8 experts with fewer than {width} tokens: mixed with the mean"
            assert part.note == (note if share < 1 else None)
    assert any(len(rows) < 32 for rows in inputs)  # the case is there


def test_stages_see_the_quantised_weights_of_those_before():
    """Against a loop that quantises stage by stage by hand."""
    config = wired_config("avg")
    model = randomise_(build_model(config, vocab_size=61, seed=0)).eval()
    by_hand, choices = copy.deepcopy(model), _choices(model)
    float_inputs = {s.name: _calibration(model).inputs(s) for s in stages(model)}
    outcomes = quantize_in_order(model, choices, _calibration(model))
    assert list(outcomes) == [t.name for s in stages(model) for t in s.targets] and set(outcomes) == set(choices)
    differs = []
    for stage in stages(by_hand):
        inputs = _calibration(by_hand).inputs(stage)
        for target in stage.targets:
            choice = choices[target.name]
            own = quantize_matrix(target.parameter.detach().flatten(0, -2), inputs[target.name], choice.format, GPTQ)
            assert torch.equal(own.matrix.codes, outcomes[target.name].matrix.codes), target.name
            assert torch.equal(own.matrix.scales, outcomes[target.name].matrix.scales)
            target.parameter.data.copy_(own.values().view_as(target.parameter))
            first = float_inputs[stage.name][target.name][0].hessian_KK
            if first is not None and stage.name != "embeddings":
                differs.append(not torch.equal(first, inputs[target.name][0].hessian_KK))
    assert all(differs) and len(differs) > 8
    tensors = model_tensors(by_hand)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model_tensors(model).items())


def test_a_killed_quantisation_goes_on_bit_for_bit(tmp_path):
    model = _model()
    choices = _choices(model)
    whole = copy.deepcopy(model)
    expected = quantize_in_order(whole, choices, _calibration(whole))

    class Killed(Exception):
        pass

    for last in (0, 5, len(choices) - 1):
        folder, copied = tmp_path / str(last), copy.deepcopy(model)
        unfinished = UnfinishedFolder(folder, {"bits": 4})
        saved, save = [], unfinished.save

        def killing(name, outcome, saved=saved, save=save, last=last):
            save(name, outcome)
            saved.append(name)
            if len(saved) > last:
                raise Killed

        unfinished.save = killing
        with pytest.raises(Killed):
            quantize_in_order(copied, choices, _calibration(copied), unfinished=unfinished)
        again, computed = copy.deepcopy(model), []
        unfinished = UnfinishedFolder(folder, {"bits": 4})
        save_again = unfinished.save
        unfinished.save = lambda name, outcome, s=save_again, c=computed: (c.append(name), s(name, outcome))
        found = quantize_in_order(again, choices, _calibration(again), unfinished=unfinished)
        assert len(computed) == len(choices) - last - 1 and not set(computed) & set(saved)
        for name, outcome in found.items():
            for key in ("codes", "scales"):
                assert torch.equal(getattr(outcome.matrix, key), getattr(expected[name].matrix, key))
            figures = [
                (o.error, o.power, o.weight_error, o.damping, o.dead, o.tokens, o.notes)
                for o in (outcome, expected[name])
            ]
            assert figures[0] == figures[1]
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in again.state_dict().items())


def test_unfinished_folders_refuse_other_settings_and_damage(tmp_path):
    folder = UnfinishedFolder(tmp_path, {"bits": 4})
    weight = torch.randn(6, 40)
    for name, format in (("a.weight", Integers(4, 16)), ("b.weight", packed("mxfp4"))):
        outcome = quantize_matrix(weight, [Inputs(note="odd")], format, Method(), rank=2)
        folder.save(name, outcome)
        loaded = folder.load(name, CPU)
        assert torch.equal(loaded.values(), outcome.values()) and loaded.notes == ("odd",)
        assert type(loaded.matrix) is type(outcome.matrix) and loaded.shape == (6, 40)
    assert folder.load("c.weight", CPU) is None
    with pytest.raises(ValueError, match="holds an unfinished quantisation with other settings; remove it"):
        UnfinishedFolder(tmp_path, {"bits": 3})
    file = folder.path / "a.weight.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="a.weight.safetensors is damaged; remove it"):
        folder.load("a.weight", CPU)


def test_without_calibration_nothing_runs():
    model = _model()
    before = copy.deepcopy(model)
    outcomes = quantize_in_order(model, _choices(model, method=Method()))
    for name, target in named(before).items():
        expected = quantize_matrix(target.parameter.detach().flatten(0, -2), [Inputs()], Integers(4), Method())
        assert torch.equal(outcomes[name].matrix.codes, expected.matrix.codes) and outcomes[name].tokens == 0


def test_modules_of_multi_token_prediction_have_no_inputs():
    model = randomise_(part_model(ATTENTION, extra="mtp: {depth: 1}")).eval()
    outcomes = quantize_in_order(model, _choices(model), _calibration(model))
    notes = {name: outcome.notes for name, outcome in outcomes.items()}
    assert all(("no calibration inputs" in note) == name.startswith("mtp.") for name, note in notes.items())
    assert any(name.startswith("mtp.") for name in notes)


def test_documents_reach_the_model():
    """With and without boundaries the inputs of the second block differ."""
    model = _model(ffn="{type: swiglu, hidden: 40}")
    batch = _batches(n=1)[0]
    documents = (torch.arange(12) >= 6).long().expand(2, -1)
    stage = next(s for s in stages(model) if s.name == "block 1")
    found = [
        Calibration(model, [CalibrationBatch(batch.tokens, d)], CPU, torch.float32).inputs(stage)
        for d in (None, documents)
    ]
    name = "blocks.1.mixer.qkv.weight"
    assert not torch.equal(found[0][name][0].hessian_KK, found[1][name][0].hessian_KK)


def test_estimates_and_budgets():
    model = randomise_(build_model(wired_config("avg"), vocab_size=61, seed=0)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = _calibration(model)
    candidates = {name: [Choice(Integers(bits), GPTQ) for bits in (2, 4, 6)] for name in named(model)}
    found = estimate(model, calibration, candidates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for own in found.values():
        errors, sizes = [e.nll for e in own], [e.n_bytes for e in own]
        assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes) and errors[0] > 0
    others = other_bytes(model, candidates)
    uniform = {name: own[1] for name, own in found.items()}
    budget = others + sum(e.n_bytes for e in uniform.values())
    chosen = fit_budget(found, budget, others)
    by_choice = {name: next(e for e in own if e.choice == chosen[name]) for name, own in found.items()}
    assert others + sum(e.n_bytes for e in by_choice.values()) <= budget
    assert sum(e.nll for e in by_choice.values()) < sum(e.nll for e in uniform.values())
    with pytest.raises(ValueError, match=f"budget=10: the tensors that are not quantised take {others:,} bytes alone"):
        fit_budget(found, 10, others)
    with pytest.raises(ValueError, match="the smallest widths take .* bytes of other tensors leave"):
        fit_budget(found, others + 10, others)


def test_the_estimated_loss_is_of_the_size_of_the_real_one():
    """Of one matrix rounded alone, on the calibration text, within a factor of three."""
    model = randomise_(build_model(wired_config("ag"), vocab_size=61, seed=0), scale=0.5).eval()
    batches = _batches(n=8, rows=8)
    calibration = Calibration(model, batches, CPU, torch.float32)

    with torch.no_grad():
        own_p = [model(batch.tokens).logits.log_softmax(-1) for batch in batches]

    def loss():
        """KL divergence from the model as it was: its own next tokens are the targets."""
        with torch.no_grad():
            found = [model(batch.tokens).logits.log_softmax(-1) for batch in batches]
        pairs = zip(own_p, found, strict=True)
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(batches)

    ratios = []
    names = [name for name in named(model) if name.endswith(("ffn.up.weight", "mixer.out.weight", "ffn.down.weight"))]
    found = estimate(model, calibration, {name: [Choice(Integers(4), Method())] for name in names})
    for name in names:
        target = named(model)[name]
        own = target.parameter.detach().clone()
        outcome = quantize_matrix(own, [Inputs()], Integers(4), Method())
        target.write(outcome.values())
        ratios.append(loss() / found[name][0].nll)
        target.write(own)
    assert len(ratios) == 6 and all(1 / 3 < ratio < 3 for ratio in ratios), ratios


def test_corrections_go_where_they_pay():
    model = randomise_(build_model(wired_config("ag"), vocab_size=61, seed=0)).eval()
    request = Request("int3", calibrate="gptq", rank=2, corrected=2)
    calibration = _calibration(model)
    choices = request.choices(model, calibration)
    corrected = {name for name, choice in choices.items() if choice.rank}
    assert len(corrected) == 2 and {choice.rank for choice in choices.values()} == {0, 2}
    pairs = {n: [Choice(c.format, c.method), Choice(c.format, c.method, 2)] for n, c in choices.items()}
    found = estimate(model, calibration, pairs)
    gains = {n: (a.nll - b.nll) / (b.n_bytes - a.n_bytes) for n, (a, b) in found.items()}
    assert corrected == set(sorted(gains, key=lambda n: -gains[n])[:2])
    assert {n for n, c in correct_best(found, 1).items() if c.rank} < corrected
    outcomes = quantize_in_order(model, choices, calibration)
    assert {n for n, o in outcomes.items() if o.low_rank is not None} == corrected


def test_a_pass_ends_after_the_stage_and_fuses_nothing():
    model, entered = _model(ffn="{type: swiglu, hidden: 40}"), []
    model.use_backends({"swiglu_mlp": "auto"})
    for name, module in (("block 0", model.blocks[0]), ("block 1", model.blocks[1]), ("head", model.head)):
        module.register_forward_pre_hook(
            lambda module, _, name=name: entered.append((name, module.backend("swiglu_mlp")))
        )
    found = {stage.name: stage for stage in stages(model)}
    for name, expected in (("block 0", ["block 0"]), ("block 1", ["block 0", "block 1"])):
        entered.clear()
        _calibration(model, n=1).inputs(found[name])
        assert entered == [(part, "reference") for part in expected]
    assert model.backends == {"swiglu_mlp": "auto"} and not model.blocks[1]._forward_hooks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("max", "max")),
        ({"clip": 2.0}, (2.0, "max")),
        ({"calibrate": "gptq", "clip": 2.0}, (2.0, "search")),
        ({"calibrate": "gptq", "clip": "max"}, ("max", "max")),
        ({"calibrate": "gptq", "embedding_clip": 20.0}, ("search", 20.0)),
        ({"clip": 2.0, "embedding_clip": 20.0}, (2.0, 20.0)),
    ],
)
def test_clips_of_matrices_and_embeddings(options, expected):
    request = Request("int3", **options)
    assert (request.method(False).clip, request.method(True).clip) == expected


def test_coded_estimates_are_of_the_codes_that_come_of_them():
    """Bytes and errors of 256 rows stand for all 1024; clips between two that are estimated are as if estimated."""
    model = randomise_(build_model(wired_config("aa"), vocab_size=1021, seed=0)).eval()
    calibration = _calibration(model)
    request = Request("coded", calibrate="gptq", budget=10**6)
    found = request.coded_estimates(model, calibration)
    assert found.keys() == named(model).keys()
    sampled = 0
    for name, own in found.items():
        clips, sizes, errors = ([getattr(e, key) for e in own] for key in ("choice", "n_bytes", "nll"))
        clips = [choice.method.clip for choice in clips]
        assert clips == sorted(clips) and len(own) == 37 and clips[0] == 127 / 16
        assert sizes == sorted(sizes, reverse=True) and errors[-1] > errors[0] > 0
        target = named(model)[name]
        sampled += target.shape[0] > 256
        inputs = calibration.inputs(next(s for s in stages(model) if target in s.targets))[name]
        for guess in (own[8], own[10]):
            outcome = quantize_matrix(target.parameter.detach(), inputs, guess.choice.format, guess.choice.method)
            real = entropy_bytes(outcome.matrix.codes) + 2 * target.shape[0]
            assert guess.n_bytes == pytest.approx(real, rel=0.03)
            assert guess.error == pytest.approx(outcome.error, rel=0.3)
    assert sampled


def test_the_entropy_is_that_of_the_codes():
    assert entropy_bytes(torch.tensor([[1, -1], [1, -1]], dtype=torch.int8)) == 0.5
    assert entropy_bytes(torch.arange(-127, 129).to(torch.int8)) == 256
    assert entropy_bytes(torch.zeros(3, 5, dtype=torch.int8)) == 0
