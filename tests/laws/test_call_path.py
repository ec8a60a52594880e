"""Everything that a model computes goes through the `__call__` of the module that owns the weights."""

import pytest
import torch

from fusedlm import build_model, load_recipe
from fusedlm.evaluate import score_documents
from fusedlm.generation import generate
from fusedlm.ops.common import OPS
from fusedlm.ops.common.dispatch import recorded
from fusedlm.testing import MIXER_CASES, assert_close, backend_of, part_model, randomise_
from tests.generation.conftest import Bytes
from tests.laws.models import ALL_MODELS, RECIPES, one_period, some_tokens


def _train(model, tokens=None):
    tokens = some_tokens(2, 12) if tokens is None else tokens
    model.train()(tokens, targets=tokens.roll(-1, 1)).total().backward()


@torch.no_grad()
def _decode_static(model):
    state = model.init_state(2)
    model(some_tokens(2, 4), state=state)
    state.make_static(5)
    model(some_tokens(2, 1), state=state)


def _evaluate(model):
    document = some_tokens(1, 12)[0].numpy()
    score_documents(model, [(document, 11)], window=8, device="cpu", dtype=torch.float32)


def _score_through_the_state(model):
    document = some_tokens(1, 12)[0].numpy()
    score_documents(model, [(document, 11)], window=None, device="cpu", dtype=torch.float32)


def _decode(model):
    state = model.eval().init_state(1)
    with torch.no_grad():
        model(some_tokens(1, 5), state=state)
        for _ in range(2):
            model(some_tokens(1, 1), state=state)


PASSES = {"training": _train, "evaluation": _evaluate, "full documents": _score_through_the_state, "decoding": _decode}


def _owners(model, what="training"):
    """Modules with parameters of their own or below that run, by name; lists compute nothing."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters())
        and not isinstance(module, torch.nn.ModuleList)
        and _runs(name, what)
    }


def _runs(name, what):
    """Modules of multi-token prediction run in training alone."""
    return what == "training" or not name.startswith("mtp.")


@ALL_MODELS
@pytest.mark.parametrize("what", PASSES)
def test_hooks_fire_on_every_module_with_parameters(make, what):
    model = randomise_(make())
    fired, owners = set(), _owners(model, what)
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    PASSES[what](model)
    assert fired == set(owners)


class Refuses(torch.nn.Module):
    """Stands where a layer was."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, *arguments, **options):
        raise NotImplementedError("called")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("what", PASSES)
def test_a_linear_layer_that_raises_raises(recipe, what):
    model = randomise_(build_model(one_period(load_recipe(recipe)), vocab_size=61))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and _runs(n, what)}
    assert layers
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Refuses(layer))
        with pytest.raises(NotImplementedError, match="called"):
            PASSES[what](model)
        setattr(model.get_submodule(parent), child, layer)
    PASSES[what](model)  # and does not once all of them are back


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_linear_layer_of_torch_can_take_the_place_of_ours(recipe):
    """In training and evaluation; decoding multiplies by parts of the up-projection of latents."""
    config, tokens = one_period(load_recipe(recipe)), some_tokens(2, 12)
    model = randomise_(build_model(config, vocab_size=61)).eval()
    expected = model(tokens).logits
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not name.endswith(("kv_up", "router", "router.project")):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = layer.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    assert_close(model(tokens).logits, expected, 1e-6)


@pytest.mark.parametrize("op", ["relu2_mlp", "swiglu_mlp"])
def test_hooks_fire_when_two_layers_are_one_op(op):
    """With a fused backend, which is what runs on a GPU."""
    ffn = {"relu2_mlp": "{type: relu2, slope: 0.5}", "swiglu_mlp": "{type: swiglu}"}[op]
    model = randomise_(part_model(MIXER_CASES["attention"][0], ffn))
    expected = model(some_tokens(2, 12)).logits
    fired, owners, calls = set(), _owners(model), []
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))

    def fused(*arguments):
        calls.append(op)
        return OPS[op].backends["reference"].run(*arguments)

    OPS[op].backends["reference"].load()
    model.use_backends({op: "auto"})
    with backend_of(op, fused):
        assert_close(model(some_tokens(2, 12)).logits, expected, 1e-6)
    assert fired == set(owners) and calls == [op, op]


def test_hooks_fire_when_norm_and_projection_are_one_op():
    for mixer in (MIXER_CASES["attention"][1], MIXER_CASES["mla"][1], MIXER_CASES["sdla"][0], MIXER_CASES["mamba2"][0]):
        model = randomise_(part_model(mixer))
        expected = model(some_tokens(2, 12)).logits
        fired, owners, calls = set(), _owners(model), []
        for name, module in owners.items():
            module.register_forward_hook(lambda *_, name=name, fired=fired: fired.add(name))

        def fused(x, gamma, weight, eps, dtype, calls=calls):
            calls.append(tuple(weight.shape))
            return OPS["rmsnorm_linear"].backends["reference"].run(x, gamma, weight, eps, dtype)

        OPS["rmsnorm_linear"].backends["reference"].load()
        model.use_backends({"rmsnorm_linear": "auto"})
        with backend_of("rmsnorm_linear", fused):
            assert_close(model(some_tokens(2, 12)).logits, expected, 1e-6)
        assert fired == set(owners)
        assert len(calls) == (4 if "q_rank" in mixer else 2), "once per block, and for the latent of queries"


def test_a_layer_that_fuses_nothing_gets_no_pending_input():
    """As a quantised one may: both layers then compute their own step."""
    model = randomise_(part_model(MIXER_CASES["attention"][0], "{type: relu2}"))
    expected = model(some_tokens(2, 12)).logits
    model.use_backends({"relu2_mlp": "auto", "rmsnorm_linear": "auto"})
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.fuses = False

    def refuse(*_):
        raise AssertionError("a pending input was given")

    with backend_of("relu2_mlp", refuse), backend_of("rmsnorm_linear", refuse):
        assert_close(model(some_tokens(2, 12)).logits, expected, 1e-6)


@ALL_MODELS
def test_the_ops_that_run_are_those_that_are_declared(make):
    """`explain`, the header of a run and `doctor` speak of these."""
    model = randomise_(make())
    device = torch.device("cpu")
    declared = {
        (use.op, tuple(sorted(use.sizes.items()))) for part in (*model.blocks, model.head) for use in part.ops(device)
    }
    with recorded() as found:
        documents = (torch.arange(12) // 5).expand(2, -1)
        tokens = some_tokens(2, 12)
        for n in (2, 12):  # shorter and longer than any window
            model.train()(tokens[:, :n], targets=tokens[:, :n]).total().backward()
        model(tokens, targets=tokens, documents=documents).total().backward()
        _decode(model)
        _decode_static(model)
        _evaluate(model)
    assert {(op, tuple(sorted(sizes.items()))) for op, _, sizes in found} == declared
    explained = {(choice.op, choice.backend) for choice in model.explain(device, torch.float32).values()}
    assert {(op, backend) for op, backend, _ in found} == explained


def test_generation_calls_the_model():
    model = randomise_(part_model(MIXER_CASES["gdn"][0], vocab_size=257))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, Bytes(), "ab", max_tokens=4, device="cpu", dtype=torch.float32)
    assert len(calls) == 4
