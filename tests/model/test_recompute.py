"""Mixers recomputed in the backward pass: the same gradients from fewer saved bytes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
@pytest.mark.parametrize("case", CASES)
def test_the_same_gradients(case, packed):
    model = randomise_(part_model(case)).double()
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(40) // 17).expand(2, -1) if packed else None
    plain, plain_bytes = _run(model, tokens, documents)
    model.recompute_mixers()
    again, again_bytes = _run(model, tokens, documents)
    for name, expected in plain.items():
        assert_close(again[name], expected, 1e-12, name)
    assert again_bytes < plain_bytes


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
    model.recompute_mixers()
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
    model.recompute_mixers()
    attentions_again, products_again = attention_calls()
    assert attentions_again == attentions == 4
    assert products_again > products


def test_value_residual_is_refused():
    model = part_model("{type: attention, n_heads: 2, value_residual: true}")
    with pytest.raises(ValueError, match="runtime.recompute=mixer does not go with value_residual"):
        model.recompute_mixers()
