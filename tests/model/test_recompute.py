"""Mixers and blocks recomputed in the backward pass: the same gradients from fewer saved bytes."""

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm import build_model
from fusedlm.config.model import ModelConfig
from fusedlm.testing import MIXER_CASES, assert_close, part_model, randomise_

CASES = [case for cases in MIXER_CASES.values() for case in cases if "value_residual" not in case]


def _run(model, tokens, documents=None):
    """Gradients, and the bytes that the forward pass saved for them besides the parameters."""
    model.zero_grad()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, documents=documents, targets=tokens.roll(-1, 1)).losses["nll"]
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}, sum(kept.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["mixer", "block"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_gradients(case, what, packed):
    model = randomise_(part_model(case)).double()
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(40) // 17).expand(2, -1) if packed else None
    plain, plain_bytes = _run(model, tokens, documents)
    model.recompute(what)
    again, again_bytes = _run(model, tokens, documents)
    for name, expected in plain.items():
        assert_close(again[name], expected, 1e-12, name)
    assert again_bytes < plain_bytes


MOE = "{type: moe, n_experts: 4, top_k: 2, hidden: 16, sequence_loss: 0.1, z_loss: 0.01}"


def _whole(n_layers=3, **options):
    """With what a block has beside its mixer: experts with losses and loads, dropout, skips, the first input."""
    block = {"mixer": yaml.safe_load("{type: gdn, n_heads: 2}"), "ffn": yaml.safe_load(MOE)}
    config = {"dim": 16, "n_layers": n_layers, "pattern": "a", "blocks": {"a": block}} | options
    return randomise_(build_model(ModelConfig.model_validate(config), vocab_size=61)).double().train()


WIRED = {"dropout": 0.2, "unet_skips": True, "x0_mixing": True, "mtp": {"depth": 1}}


def _outcome(model, seed=0):
    """All losses, metrics and gradients of a pass with the dropout of a seed."""
    model.zero_grad()
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    output = model(tokens, targets=tokens.roll(-1, 1))
    output.total().backward()
    found = dict(output.losses) | dict(output.metrics)
    return {name: value.detach() for name, value in found.items()} | {
        name: p.grad.clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_whole_blocks(compiled):
    """Their losses, loads that are counted once, and dropout that is drawn once."""
    torch._dynamo.reset()
    model = _whole(**WIRED)
    plain = _outcome(model)
    assert any(not torch.equal(plain[name], other) for name, other in _outcome(model, seed=1).items())
    model.recompute("block")
    if compiled:
        model.dropout.p = 0.0
        for block in model.all_blocks():
            block.dropout.p = 0.0
        model.recompute("none")
        plain = _outcome(model)
        model.recompute("block")
        for block in model.all_blocks():
            block.compile(fullgraph=True, backend="aot_eager")
    again = _outcome(model)
    assert again.keys() == plain.keys() and {"moe", "moe_sequence", "moe_z"} <= plain.keys()
    for name, expected in plain.items():
        assert_close(again[name].double(), expected.double(), 1e-10, name)


def test_a_recomputed_block_saves_its_input_alone():
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    saved = []
    for n_layers in (2, 4):
        model = _whole(n_layers)
        model.recompute("block")
        saved.append(_run(model, tokens)[1])
    assert saved[1] - saved[0] == 2 * tokens.numel() * 16 * 8


@pytest.mark.parametrize("case", [MIXER_CASES["diff_mla"][0], MIXER_CASES["cmd_mla"][0], MIXER_CASES["cmd_mla"][2]])
def test_the_output_of_differential_mixers_is_recomputed(case):
    model = randomise_(part_model(case)).double()
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    again, again_bytes = _run(model, tokens)
    for block in model.blocks:
        assert block.mixer.recomputes_output
        block.mixer.recomputes_output = False
    kept, kept_bytes = _run(model, tokens)
    for name, expected in kept.items():
        assert_close(again[name], expected, 1e-12, name)
    assert again_bytes < kept_bytes


def test_compiled():
    torch._dynamo.reset()
    model = randomise_(part_model("{type: cmd_mla, n_heads: 4, kv_rank: 12, rope_dim: 4}")).double()
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
    plain, _ = _run(model, tokens)
    model.recompute("mixer")
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    again, _ = _run(model, tokens)
    for name, expected in plain.items():
        assert_close(again[name], expected, 1e-10, name)


def test_attention_itself_is_not_recomputed():
    model = randomise_(part_model("{type: diff_mla, n_heads: 4, kv_rank: 12, rope_dim: 4}"))
    tokens = torch.randint(0, 61, (1, 512), generator=torch.Generator().manual_seed(0))

    class Count(TorchDispatchMode):
        """What is computed: an output that was saved does not come this far."""

        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names.append(op.name())
            return op(*args, **(kwargs or {}))

    def attention_calls():
        with Count() as count:
            model(tokens, targets=tokens).total().backward()
        return count.names.count("aten::_scaled_dot_product_flash_attention_for_cpu"), count.names.count("aten::mm")

    attentions, products = attention_calls()
    model.recompute("mixer")
    attentions_again, products_again = attention_calls()
    assert attentions_again == attentions == 4
    assert products_again > products


def test_value_residual_is_refused():
    model = part_model("{type: attention, n_heads: 2, value_residual: true}")
    for what in ("mixer", "block"):
        with pytest.raises(ValueError, match=f"runtime.recompute={what} does not go with value_residual"):
            model.recompute(what)
