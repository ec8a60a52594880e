"""Exclusive self-attention and value residual."""

import pytest
import torch

from fusedlm.config import parse_recipe
from fusedlm.model import build_model
from fusedlm.nn.context import Context
from fusedlm.ops import exclude_own_value
from fusedlm.testing import assert_close, part_model, randomise_


def test_nothing_is_left_along_the_own_value():
    y, v = torch.randn(2, 7, 6, 5, dtype=torch.float64), torch.randn(2, 7, 3, 5, dtype=torch.float64)
    z = exclude_own_value(y, v)
    own = v.repeat_interleave(2, dim=2)
    assert (z * own).sum(-1).abs().max() < 1e-12
    # What is taken out is along the own value, and all of it.
    unit = own / own.norm(dim=-1, keepdim=True)
    assert_close(z + (y * unit).sum(-1, keepdim=True) * unit, y, 1e-12)


def test_a_zero_value_takes_nothing_out():
    y = torch.randn(1, 2, 1, 4)
    assert torch.equal(exclude_own_value(y, torch.zeros(1, 2, 1, 4)), y)


MIXERS = [
    "type: attention, n_heads: 4, n_kv_heads: 2",
    "type: mla, n_heads: 4, kv_rank: 12, rope_dim: 4",
    "type: diff_mla, n_heads: 4, kv_rank: 12, rope_dim: 4",
    "type: cmd_mla, n_heads: 4, kv_rank: 12, rope_dim: 4",
]


@pytest.mark.parametrize("option", ["xsa", "value_residual"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_option_changes_the_output(mixer, option):
    tokens = torch.arange(12)[None]
    outputs = []
    for on in ("true", "false"):
        torch.manual_seed(0)
        model = part_model(f"{{{mixer}, {option}: {on}}}").double()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        outputs.append(model(tokens).logits)
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_later_layers_mix_in_the_first_layers_values(mixer):
    """With a gate wide open the later layer has the first layer's values and none of its own."""
    model = randomise_(part_model(f"{{{mixer}, value_residual: true}}")).double()
    first, second = (block.mixer.value_residual for block in model.blocks)
    assert first.gate is None
    assert second.gate is not None
    v0, v1 = torch.randn(2, 1, 3, 24, dtype=torch.float64)
    context = Context(torch.arange(3)[None])
    assert torch.equal(first(v0, context), v0)
    gate = second.gate.sigmoid()
    assert_close(second(v1, context), (1 - gate) * v1 + gate * v0, 1e-12)


def test_the_mix_starts_with_less_than_a_fifth_of_the_first_values():
    gate = part_model(f"{{{MIXERS[0]}, value_residual: true}}").blocks[1].mixer.value_residual.gate
    assert gate.sigmoid().item() == pytest.approx(0.182, abs=1e-3)


def test_layers_of_other_types_or_widths_do_not_mix():
    recipe = parse_recipe(
        """
name: values
model:
  dim: 32
  n_layers: 5
  pattern: gamba
  blocks:
    g: {mixer: {type: gdn, n_heads: 2}, ffn: {type: swiglu}}
    a: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2, value_residual: true}, ffn: {type: swiglu}}
    m: {mixer: {type: mla, n_heads: 4, kv_rank: 16, value_residual: true}, ffn: {type: swiglu}}
    b: {mixer: {type: attention, n_heads: 4, value_residual: true}, ffn: {type: swiglu}}
train: {steps: 1, seq_len: 8, batch_size: 1}
"""
    )
    model = build_model(recipe.model, vocab_size=61)
    gates = [getattr(block.mixer, "value_residual", None) for block in model.blocks]
    assert [None if gate is None else gate.gate is not None for gate in gates] == [None, False, False, False, True]
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
